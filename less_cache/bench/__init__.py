"""Speed and memory of caches on a model, measured."""

from less_cache.bench.options import CACHES, DEFAULTS, BenchOptions

__all__ = ["CACHES", "DEFAULTS", "BenchOptions"]
