"""One call of attention, as a layer of the cache takes it in.

Axes: `b` batch, `h` query heads, `g` KV heads, `n` new tokens, `d` head dim.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from less_cache.ops.masks import left_padding


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """The new tokens of one forward, after RoPE, and how attention is to read them.

    Args:
        query_states: `[b, h, n, d]`.
        key_states: `[b, g, n, d]`.
        value_states: `[b, g, n, d]`.
        attention_mask: Of the new tokens alone, `[b, 1, n, n]` or `[b, n]`, bool or additive; None: causal.
        real: Which tokens are not padding, bool `[b, n]`; None: all.
        scaling: Factor of q·k.
        softcap: Soft cap of the logits; None: none.
        sinks: Learned logits without a value, `[h]`; None: none.
    """

    query_states: torch.Tensor
    key_states: torch.Tensor
    value_states: torch.Tensor
    attention_mask: torch.Tensor | None
    real: torch.Tensor | None
    scaling: float
    softcap: float | None
    sinks: torch.Tensor | None

    @classmethod
    def of(
        cls,
        states: Sequence[torch.Tensor],
        attention_mask: torch.Tensor | None,
        real: torch.Tensor | None,
        scaling: float | None,
        kwargs: Mapping[str, Any],
    ) -> "AttentionCall":
        """What an attention function is called with, `states`: queries, keys and values, its keyword arguments in `kwargs`."""
        if real is not None:  # what a model computes at padding may be NaN
            states = [each.masked_fill(~real[:, None, :, None], 0) for each in states]
        query_states, key_states, value_states = (each.detach() for each in states)  # untagged: no cycle with the layer
        scaling = query_states.shape[-1] ** -0.5 if scaling is None else scaling
        softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
        return cls(query_states, key_states, value_states, attention_mask, real, scaling, softcap, sinks)

    @property
    def num_tokens(self) -> int:
        return self.query_states.shape[2]

    @functools.cached_property
    def padding(self) -> list[int] | None:
        """How many tokens of padding each row begins with, where the mask is causal but for these; None: it is another mask, or
        a compiler could not look into it.
        """
        b, _, n, _ = self.key_states.shape
        if self.attention_mask is None and self.real is None:
            return [0] * b
        if torch.compiler.is_compiling():
            return None
        real = self.key_states.new_ones(b, n, dtype=torch.bool) if self.real is None else self.real
        return left_padding(self.attention_mask, real)

    def part(self, start: int, stop: int) -> "AttentionCall":
        """The tokens from `start` to `stop`, as if they had come alone."""
        tokens, mask = slice(start, stop), self.attention_mask
        if mask is not None:
            mask = mask[..., -self.num_tokens :][..., tokens]
            mask = mask if mask.dim() == 2 else mask[:, :, -self.num_tokens :][:, :, tokens]
        return dataclasses.replace(
            self,
            query_states=self.query_states[:, :, tokens],
            key_states=self.key_states[:, :, tokens],
            value_states=self.value_states[:, :, tokens],
            attention_mask=mask,
            real=None if self.real is None else self.real[:, tokens],
        )
