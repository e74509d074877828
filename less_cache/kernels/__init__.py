"""Kernels: what is trained for a model, stored in a folder and published; and head budgets, which are measured for it."""

from less_cache.kernels.config import LESSConfig
from less_cache.kernels.head_budgets import HeadBudgets
from less_cache.kernels.kernels import LESSKernels

__all__ = ["HeadBudgets", "LESSConfig", "LESSKernels"]
