"""Training of kernels."""

from less_cache.training.cost import Cost, estimate
from less_cache.training.data import TokenSampler, hub_text, own_text, text_files, tokenize
from less_cache.training.options import TrainingOptions
from less_cache.training.trainer import train

__all__ = [
    "Cost",
    "TokenSampler",
    "TrainingOptions",
    "estimate",
    "hub_text",
    "own_text",
    "text_files",
    "tokenize",
    "train",
]
