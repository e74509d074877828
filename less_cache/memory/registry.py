"""Trained memories by the name that a config gives them: a new one is one file here and one line in `MEMORIES`."""

from less_cache.memory.base import TrainedMemory
from less_cache.memory.low_rank import LayerKernels
from less_cache.memory.soft_centroids import LayerSoftCentroids

MEMORIES: dict[str, type[TrainedMemory]] = {"low_rank": LayerKernels, "soft_centroids": LayerSoftCentroids}
