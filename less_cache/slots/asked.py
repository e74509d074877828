"""Some queries of the text so far, from which a choice of tokens takes its reference queries.

Axes: `b` rows, `h` query heads, `k` places, `n` new tokens, `d` head dim.
"""

import dataclasses
from collections.abc import Callable, Mapping

import torch

from less_cache.slots.formats import SlotFormat, stored_name

PLACES = 8  # queries that are held: enough where a policy remembers the scores of earlier choices
STRIDE = 64  # tokens from one that is held to the next


@dataclasses.dataclass
class Asked:
    """Every `STRIDE`-th query of the last `PLACES` · `STRIDE` tokens, in the format of the slots."""

    format: SlotFormat
    dtype: torch.dtype  # of queries, as the model gives them
    stored: dict[str, torch.Tensor]  # [b, h, k, *] a tensor, by `queries`, or with its part: `queries_codes`
    positions: torch.Tensor  # [b, k] int32, where in its row a query is; -1: none

    @classmethod
    def empty(cls, query_states: torch.Tensor, format: SlotFormat) -> "Asked":
        """No queries yet, of rows, heads and type as in `query_states` `[b, h, *, d]`."""
        b, h, _, d = query_states.shape
        blank = format.encode(query_states.new_zeros(b, h, PLACES, d))
        positions = torch.full((b, PLACES), -1, dtype=torch.int32, device=query_states.device)
        return cls(format, query_states.dtype, {stored_name("queries", part): each for part, each in blank.items()}, positions)

    def put(self, query_states: torch.Tensor, positions: torch.Tensor) -> None:
        """Take those of the queries `[b, h, n, d]` whose positions `[b, n]` are multiples of `STRIDE`; -1: padding."""
        wanted = (positions >= 0) & (positions % STRIDE == 0)  # [b, n]
        if not bool(wanted.any()):
            return
        latest = positions.amax(dim=-1, keepdim=True)  # [b, 1]
        rows, columns = (wanted & (positions > latest - PLACES * STRIDE)).nonzero(as_tuple=True)  # at most one a place
        places = positions[rows, columns] // STRIDE % PLACES
        for part, each in self.format.encode(query_states[rows, :, columns]).items():
            self.stored[stored_name("queries", part)][rows, :, places] = each
        self.positions[rows, places] = positions[rows, columns]

    def queries(self) -> torch.Tensor:
        """What is held, `[b, h, k, d]`; where there is none it means nothing."""
        parts = {name.removeprefix("queries").removeprefix("_"): each for name, each in self.stored.items()}
        return self.format.decode(parts, self.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        return {**self.stored, "queries_positions": self.positions}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], format: SlotFormat, dtype: torch.dtype) -> "Asked":
        """What `tensors` gave these of."""
        names = [stored_name("queries", part) for part in format.parts]
        return cls(format, dtype, {name: tensors[name] for name in names}, tensors["queries_positions"])

    def map(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> "Asked":
        """The same with every tensor changed, by its name; shapes stay, but for the rows."""
        stored = {name: change(name, tensor) for name, tensor in self.stored.items()}
        return dataclasses.replace(self, stored=stored, positions=change("queries_positions", self.positions))
