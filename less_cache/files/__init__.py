"""Files that survive what happens to the process that writes them."""

from less_cache.files.atomic import replace

__all__ = ["replace"]
