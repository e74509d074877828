"""Sets of kernels on the Hub and in the catalogue: all that needs the network."""

from less_cache.hub.client import download, find, search, upload

__all__ = ["download", "find", "search", "upload"]
