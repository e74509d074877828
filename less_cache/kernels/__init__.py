"""Kernels: what is trained for a model, stored in a folder and published."""

from less_cache.kernels.config import LESSConfig
from less_cache.kernels.kernels import LESSKernels

__all__ = ["LESSConfig", "LESSKernels"]
