"""The oracle: LESS as one plain O(T²) formula."""

from less_cache.testing.reference import reference_attention

__all__ = ["reference_attention"]
