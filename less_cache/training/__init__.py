"""Training of kernels."""

from less_cache.training.data import TokenSampler
from less_cache.training.trainer import TrainingOptions, train

__all__ = ["TokenSampler", "TrainingOptions", "train"]
