"""What a layer remembers evicted tokens with: kinds of state, trained and untrained."""

from less_cache.memory.base import LayerMemory, TrainedMemory
from less_cache.memory.centroids import CentroidState, LayerCentroids
from less_cache.memory.low_rank import LayerKernels
from less_cache.memory.registry import MEMORIES
from less_cache.memory.soft_centroids import LayerSoftCentroids
from less_cache.memory.state import LowRankState

__all__ = [
    "MEMORIES",
    "CentroidState",
    "LayerCentroids",
    "LayerKernels",
    "LayerMemory",
    "LayerSoftCentroids",
    "LowRankState",
    "TrainedMemory",
]
