"""What a cache takes in memory."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from less_cache.cache.layer import LESSLayer
from less_cache.cache.own import tensors_of
from less_cache.slots.held import OF_ROWS
from less_cache.slots.slots import OF_SLOTS


@dataclasses.dataclass(frozen=True)
class MemoryFootprint:
    """Bytes that a cache holds.

    Args:
        keys_values: Slots of kept tokens, and what the model's own layers hold.
        low_rank_state: H and z, float32.
        bookkeeping: Positions, scores and counters, and what is recorded for `crop`.
        full_cache: What a full cache would take for the tokens seen.
    """

    keys_values: int
    low_rank_state: int
    bookkeeping: int
    full_cache: int

    @property
    def total(self) -> int:
        """All that the cache holds."""
        return self.keys_values + self.low_rank_state + self.bookkeeping

    @property
    def saved(self) -> float:
        """Share of the full cache's bytes that is not held, at least 0."""
        return max(0.0, 1 - self.total / self.full_cache) if self.full_cache else 0.0


def measure(layers: Sequence[Any]) -> MemoryFootprint:
    """The footprint of a cache with these layers."""
    keys_values = low_rank_state = bookkeeping = full_cache = 0
    for layer in layers:
        if not isinstance(layer, LESSLayer):
            own = sum(tensor.nbytes for tensor in tensors_of(vars(layer)) if tensor.dim() > 0)  # but for a counter
            keys_values += own
            full_cache += own
            continue
        stored = {*layer.setup.format.names(), "newest_keys", "newest_values"}
        for name, tensor in layer.allocated().items():
            if name in stored:
                keys_values += tensor.nbytes
            elif name in OF_SLOTS or name in OF_ROWS or name.startswith(("newest_", "queries")):
                bookkeeping += tensor.nbytes
            else:
                low_rank_state += tensor.nbytes
        bookkeeping += layer.recorded_bytes
        if not layer.is_empty:
            slots = layer.held.slots
            bookkeeping += slots.host_bytes
            first = torch.zeros(*slots.sizes.shape, 1, dtype=torch.long, device=slots.positions.device)  # a token of every row
            full_cache += sum(states.nbytes for states in slots.pairs(first)) * int(layer.cumulative_length)
    return MemoryFootprint(keys_values, low_rank_state, bookkeeping, full_cache)
