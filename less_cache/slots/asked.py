"""Some queries of the text so far, from which a choice of tokens takes its reference queries.

Axes: `b` rows, `h` query heads, `s` query heads of a KV head, `k` places, `n` new tokens, `d` head dim.
"""

import dataclasses
from collections.abc import Callable, Mapping

import torch

from less_cache.slots.formats import QueryCodes

PLACES = 8  # queries of a head that are held: enough where a policy remembers the scores of earlier choices
STRIDE = 64  # tokens from one that is held to the next
OF_ASKED = ("codes", "scales", "positions")  # its tensors


@dataclasses.dataclass
class Asked:
    """Every `STRIDE`-th query of the last `PLACES` · `STRIDE` tokens, in two bits a number.

    The query heads of a KV head take turns: each holds others than the ones beside it, so that there are s times as many
    positions.
    """

    head_dim: int
    dtype: torch.dtype  # of queries, as the model gives them
    codes: torch.Tensor  # [b, h, k, *] uint8
    scales: torch.Tensor  # [b, h, k, 1] float16
    positions: torch.Tensor  # [b, s, k] int32, where in its row a query is, for the query heads of every KV head; -1: none

    @classmethod
    def empty(cls, query_states: torch.Tensor, num_key_value_heads: int) -> "Asked":
        """No queries yet, of rows, heads and type as in `query_states` `[b, h, *, d]`."""
        b, h, _, d = query_states.shape
        codes, scales = QueryCodes.encode(query_states.new_zeros(b, h, PLACES, d))
        places = (b, h // num_key_value_heads, PLACES)
        positions = torch.full(places, -1, dtype=torch.int32, device=query_states.device)
        return cls(d, query_states.dtype, codes, scales, positions)

    def put(self, query_states: torch.Tensor, positions: torch.Tensor) -> None:
        """Take those of the queries `[b, h, n, d]` that have a place; `positions` `[b, n]`, -1: padding.

        A position has one in the s-th query head of a KV head if it is s · `STRIDE` / (query heads) more than a multiple of
        `STRIDE`.
        """
        s = self.positions.shape[1]
        if positions.is_cpu and positions.shape[-1] == 1 and not torch.compiler.is_compiling():
            turns_of_heads = {turn * STRIDE // s for turn in range(s)}
            if not any(position >= 0 and position % STRIDE in turns_of_heads for position in positions.flatten().tolist()):
                return
        latest = positions.amax(dim=-1, keepdim=True)  # [b, 1]
        near = (positions >= 0) & (positions > latest - PLACES * STRIDE)  # at most one a place
        turns = torch.arange(s, device=positions.device) * STRIDE // s
        wanted = near & (positions % STRIDE == turns.view(-1, 1, 1))  # [s, b, n]
        if not bool(wanted.any()):
            return
        for turn in range(s):
            rows, columns = wanted[turn].nonzero(as_tuple=True)
            places = positions[rows, columns] // STRIDE % PLACES
            codes, scales = QueryCodes.encode(query_states[rows, turn::s, columns])
            self.codes[rows, turn::s, places], self.scales[rows, turn::s, places] = codes, scales
            self.positions[rows, turn, places] = positions[rows, columns]

    def queries(self) -> torch.Tensor:
        """What is held, `[b, h, k, d]`; where there is none it means nothing."""
        return QueryCodes.decode(self.codes, self.scales, self.head_dim, self.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        return {f"queries_{name}": getattr(self, name) for name in OF_ASKED}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], head_dim: int, dtype: torch.dtype) -> "Asked":
        """What `tensors` gave these of."""
        return cls(head_dim, dtype, *[tensors[f"queries_{name}"] for name in OF_ASKED])

    def map(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> "Asked":
        """The same with every tensor changed, by its name; shapes stay, but for the rows."""
        return Asked(self.head_dim, self.dtype, *[change(name, tensor) for name, tensor in self.tensors().items()])
