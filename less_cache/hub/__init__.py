"""Sets of kernels as files: on disk, on the Hub, and in the catalogue."""

from less_cache.hub.files import CONFIG_NAME, WEIGHTS_NAME

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME"]
