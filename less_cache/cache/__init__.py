"""The cache that users pass to `generate`, and what it is made of."""

from less_cache.cache.cache import LESSCache
from less_cache.cache.footprint import MemoryFootprint
from less_cache.cache.layer import LESSLayer
from less_cache.cache.static import StaticLESSLayer

__all__ = ["LESSCache", "LESSLayer", "MemoryFootprint", "StaticLESSLayer"]
