"""The layers that a model has beside those under LESS: windows, convolutions and recurrences, held as transformers does."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, StaticCache


def own_layers(config: PreTrainedConfig, static: bool) -> list[Any]:
    """One of transformers' own layers for each that a model has; they hold nothing yet."""
    cache = StaticCache(config=config, max_cache_len=sys.maxsize) if static else DynamicCache(config=config)
    return list(cache.layers)


def holds_other_rows(layer: Any, rows: int) -> bool:
    """Whether a layer has memory for another number of rows, as transformers' `reset` leaves it."""
    held = next((tensor for tensor in tensors_of(vars(layer)) if tensor.dim() > 2), None)
    return held is not None and held.shape[0] != rows


def tensors_of(held: Any) -> Iterator[torch.Tensor]:
    """All tensors in a layer's attributes."""
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict | list | tuple):
        for each in held.values() if isinstance(held, dict) else held:
            yield from tensors_of(each)
