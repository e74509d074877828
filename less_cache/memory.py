"""What a layer remembers evicted tokens with.

Axes: `b` batch, `h` query heads, `g` KV heads, `s` = h / g, `m` tokens folded at once, `n` queries, `d` head dim, `r`
virtual tokens.
"""

import abc
import copy
from typing import Any, TypeVar

import torch
from torch import nn

Self = TypeVar("Self", bound="LayerMemory")


class LayerMemory(nn.Module, abc.ABC):
    """Folds evicted pairs (k, v) into a state of constant size and reads it back as *virtual tokens*.

    A virtual token has a logit for every query and a value; attention treats it like any other column. Stateless: the
    state, a dataclass of tensors whose first dimension is the batch, is handed in.
    """

    @abc.abstractmethod
    def empty_state(self, batch: int, num_key_value_heads: int, head_dim: int, device: torch.device) -> Any:
        """The state before anything was evicted. `head_dim`: of the values."""

    @abc.abstractmethod
    def fold_in(self, state: Any, key_states: torch.Tensor, value_states: torch.Tensor, leaves: torch.Tensor) -> None:
        """Fold in, in place, the pairs `[b, g, m, d]` that leave, `[b, g, m]` bool."""

    @abc.abstractmethod
    def virtual_tokens(
        self, state: Any, query_states: torch.Tensor, scaling: float, softcap: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[b, g, s, n, r]` for the queries `[b, h, n, d]`, and values `[b, g, r, d]`; float32."""

    def for_heads(self: Self, num_key_value_heads: int) -> Self:
        """The part for the KV heads that this process has: under tensor parallelism a share of them, in order."""
        return self

    def on(self: Self, device: torch.device) -> Self:
        """This, or a copy of it on `device`: the user's kernels stay where they are."""
        if all(parameter.device == device for parameter in self.parameters()):
            return self
        return copy.deepcopy(self).to(device)
