"""Files written whole or not at all, JSON that every reader takes, paths as users write them."""

from less_cache.files.atomic import replace

__all__ = ["replace"]
