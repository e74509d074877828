"""A KV cache of constant size that still remembers everything, for any Hugging Face language model."""

from less_cache.cache import LESSCache, MemoryFootprint
from less_cache.errors import LESSError
from less_cache.kernels import HeadBudgets, LESSConfig, LESSKernels
from less_cache.policies import CORM, H2O, POLICIES, AttentionMatching, EvictionPolicy, SinkRecent
from less_cache.version import __version__

__all__ = [
    "CORM",
    "H2O",
    "POLICIES",
    "AttentionMatching",
    "EvictionPolicy",
    "HeadBudgets",
    "LESSCache",
    "LESSConfig",
    "LESSError",
    "LESSKernels",
    "MemoryFootprint",
    "SinkRecent",
    "__version__",
]
