"""Training of kernels."""

from less_cache.training.cost import Cost, estimate
from less_cache.training.data import TokenSampler
from less_cache.training.options import TrainingOptions
from less_cache.training.trainer import train

__all__ = ["Cost", "TokenSampler", "TrainingOptions", "estimate", "train"]
