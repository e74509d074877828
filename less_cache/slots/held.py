"""All that one layer holds of its sequences."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from less_cache.policies import EvictionPolicy
from less_cache.slots.asked import Asked
from less_cache.slots.columns import Columns
from less_cache.slots.newest import Newest
from less_cache.slots.rows import Hidden, Rows
from less_cache.slots.setup import Setup
from less_cache.slots.slots import Slots

OF_ROWS = ("seen", "settled", "counts", "allotted", "real")


@dataclasses.dataclass
class Held:
    """What a layer holds of its sequences: kept tokens, counters, and the state of all others.

    Backends read it and change it in place; all that happens to a whole batch (beams, forks, offloading, files) goes through
    `map` and `select`.
    """

    rows: Rows
    slots: Slots | None = None  # None before the first block
    state: Any = None  # a dataclass of tensors [b, …], whatever the memory keeps evicted tokens in; None without a memory
    newest: Newest | None = None  # tokens since the last choice, under a policy that chooses in blocks
    asked: Asked | None = None  # queries for its next choice
    is_whole: bool = False  # every token is there as it came, in its order

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name: what takes memory, and what a file of them holds."""
        tensors = {name: getattr(self.rows, name) for name in OF_ROWS if getattr(self.rows, name) is not None}
        for part in (self.slots, self.newest, self.asked):
            if part is not None:
                tensors |= part.tensors()
        return tensors if self.state is None else tensors | vars(self.state)

    def columns(self) -> Columns:
        """What is kept, then the newest tokens, as attention reads them."""
        kept, newest = self.slots.columns(), self.newest
        if newest is None or newest.count == 0:
            return kept
        return kept.followed_by(newest.tokens())

    def make_room(self, policy: EvictionPolicy, tokens: int) -> None:
        """Have a free slot in every head for one more token, after the `tokens` that were seen."""
        if self.slots.room == 0:
            self.slots = self.slots.refit(policy.capacity(self.rows.counts_by_head()), tokens)
        if self.slots.room is not None:
            self.slots.room -= 1

    def forget(self, policy: EvictionPolicy, hidden: Hidden) -> None:
        """Drop the tokens that are hidden, and count the others anew, in place. What was folded in stays there."""
        self.slots.renumber(policy, hidden.moved)
        for part in (self.newest, self.asked):
            if part is not None:
                part.positions.copy_(renumbered(part.positions, hidden.moved))
        self.is_whole = False
        self.rows.seen.copy_(hidden.seen)

    def map(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> "Held":
        """The same with every tensor changed, by its name; shapes stay."""
        rows = {name: getattr(self.rows, name) for name in OF_ROWS}
        return Held(
            Rows(**{name: None if tensor is None else change(name, tensor) for name, tensor in rows.items()}),
            None if self.slots is None else self.slots.map(change),
            _map_state(self.state, change),
            None if self.newest is None else self.newest.map(change),
            None if self.asked is None else self.asked.map(change),
            self.is_whole,
        )

    def select(self, indices: torch.Tensor) -> "Held":
        """The rows at `indices`, which may repeat."""

        def chosen(name: str, rows: torch.Tensor) -> torch.Tensor:
            return rows[indices.to(rows.device)]

        slots = None if self.slots is None else self.slots.select(indices)
        selected = dataclasses.replace(self, slots=None).map(chosen)
        return dataclasses.replace(selected, slots=slots)

    @classmethod
    def empty(cls, setup: Setup, b: int, g: int, width: int, device: torch.device) -> "Held":
        """Nothing yet, of `b` rows and `g` KV heads whose values have this width."""
        state = None if setup.memory is None else setup.memory.empty_state(b, g, width, device)
        return cls(Rows.empty(b, device), state=setup.packed(state))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], setup: Setup, dtype: torch.dtype) -> "Held":
        """What `tensors` gave these of; `dtype`: of the keys and values before they were stored."""
        rows = Rows(**{name: tensors.get(name) for name in OF_ROWS})
        capacity = setup.policy.capacity(rows.counts_by_head())
        slots = Slots.from_tensors(tensors, setup.coding(None).on(rows.seen.device), dtype, len(rows.seen), capacity)
        if slots.room is not None and not setup.grows:
            slots = slots.refit(capacity, None)
        b, g = slots.sizes.shape
        empty = cls.empty(setup, b, g, 1, rows.seen.device)  # of the right type: its tensors come from the file
        held = cls(rows, slots, _map_state(empty.state, lambda name, _: tensors[name]))
        if setup.policy.block_size is not None:
            held.newest = Newest.from_tensors(tensors)
            columns = held.columns()
            held.asked = Asked.from_tensors(tensors, columns.keys.shape[-1], dtype)
            positions = columns.positions
            all_there = bool((positions >= 0).all()) and bool((rows.seen == positions.shape[-1]).all())
            held.is_whole = setup.format.is_exact and all_there
        return held


def renumbered(positions: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """Positions `[b, *]` in their rows, counted anew: the token at position p is at `moved[row, p]` now; -1: it leaves."""
    at = moved.gather(-1, positions.clamp_min(0).long().flatten(1))
    return at.view(positions.shape).masked_fill(positions < 0, -1)


def _map_state(state: Any, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Any:
    if state is None:
        return None
    return dataclasses.replace(state, **{name: change(name, tensor) for name, tensor in vars(state).items()})
