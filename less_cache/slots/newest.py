"""The newest tokens under a policy that chooses in blocks: they lie beside the slots until the next choice.

Axes: `b` rows, `h` query heads, `g` KV heads, `e` tokens, `n` new tokens, `d` head dim, `w` width of values.
"""

import dataclasses
from collections.abc import Callable, Mapping

import torch

from less_cache.memory.state import in_16_bits
from less_cache.slots.formats import QueryCodes


@dataclasses.dataclass
class Newest:
    """Tokens in the order that they came, the same for every head.

    They are as exact as the model's own, or where slots are quantised in 16 bits at most.
    """

    keys: torch.Tensor  # [b, g, e, d]
    values: torch.Tensor  # [b, g, e, w]
    positions: torch.Tensor  # [b, e] int32, where in its row a token is; -1: padding
    query_codes: torch.Tensor  # [b, h, e, *] uint8, for the next choice
    query_scales: torch.Tensor  # [b, h, e, 1] float16

    @classmethod
    def empty(
        cls, query_states: torch.Tensor, key_states: torch.Tensor, value_states: torch.Tensor, is_exact: bool
    ) -> "Newest":
        """No tokens yet, of rows, heads and types as in these states, `[b, h, *, d]`, `[b, g, *, d]` and `[b, g, *, w]`."""
        b = len(key_states)
        positions = torch.empty(b, 0, dtype=torch.int32, device=key_states.device)
        keys, values = (_stored(states[:, :, :0].clone(), is_exact) for states in (key_states, value_states))
        return cls(keys, values, positions, *QueryCodes.encode(query_states[:, :, :0]))

    @property
    def count(self) -> int:
        return self.positions.shape[-1]

    def put(
        self, query_states: torch.Tensor, key_states: torch.Tensor, value_states: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Take tokens at `positions` `[b, n]`: queries `[b, h, n, d]`, keys and values `[b, g, n, *]`."""
        self.keys = torch.cat([self.keys, _stored(key_states, self.keys.dtype == key_states.dtype)], dim=2)
        self.values = torch.cat([self.values, _stored(value_states, self.values.dtype == value_states.dtype)], dim=2)
        self.positions = torch.cat([self.positions, positions.int()], dim=-1)
        codes, scales = QueryCodes.encode(query_states)
        self.query_codes = torch.cat([self.query_codes, codes], dim=2)
        self.query_scales = torch.cat([self.query_scales, scales], dim=2)

    def longer(self) -> "Newest":
        """Room for these and one token more; nothing is in it yet."""
        (b, g, e, d), h, w = self.keys.shape, self.query_codes.shape[1], self.values.shape[-1]
        return Newest(
            self.keys.new_empty(b, g, e + 1, d),
            self.values.new_empty(b, g, e + 1, w),
            self.positions.new_empty(b, e + 1),
            self.query_codes.new_empty(b, h, e + 1, self.query_codes.shape[-1]),
            self.query_scales.new_empty(b, h, e + 1, 1),
        )

    def queries(self, dtype: torch.dtype) -> torch.Tensor:
        """What the tokens asked, `[b, h, e, d]`, in two bits a number."""
        return QueryCodes.decode(self.query_codes, self.query_scales, self.keys.shape[-1], dtype)

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values and positions."""
        return self.keys, self.values, self.positions

    def clear(self) -> None:
        """Let all tokens go."""
        self.keys, self.values = self.keys[:, :, :0].clone(), self.values[:, :, :0].clone()
        self.positions = self.positions[:, :0].clone()
        self.query_codes, self.query_scales = self.query_codes[:, :, :0].clone(), self.query_scales[:, :, :0].clone()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        return {f"newest_{name}": tensor for name, tensor in vars(self).items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "Newest":
        """What `tensors` gave these of."""
        return cls(*[tensors[f"newest_{field.name}"] for field in dataclasses.fields(cls)])

    def map(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> "Newest":
        """The same with every tensor changed, by its name; shapes stay, but for the rows."""
        return Newest(*[change(name, tensor) for name, tensor in self.tensors().items()])


def _stored(states: torch.Tensor, is_exact: bool) -> torch.Tensor:
    return states if is_exact or states.dtype.itemsize <= 2 else in_16_bits(states)
