"""One call of attention, as a layer of the cache takes it in.

Axes: `b` batch, `h` query heads, `g` KV heads, `n` new tokens, `d` head dim.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from less_cache.ops.masks import additive_to_bool, left_padding


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
    own: Callable[..., Any] | None = None  # the model's attention function, of queries, keys, values and a mask

    @classmethod
    def of(
        cls,
        states: Sequence[torch.Tensor],
        attention_mask: torch.Tensor | None,
        real: torch.Tensor | None,
        own: functools.partial,
    ) -> "AttentionCall":
        """What an attention function `own` is called with, `states`: queries, keys and values."""
        if real is not None:  # what a model computes at padding may be NaN
            states = [each.masked_fill(~real[:, None, :, None], 0) for each in states]
        query_states, key_states, value_states = (each.detach() for each in states)  # untagged: no cycle with the layer
        scaling, softcap, sinks = (own.keywords.get(name) for name in ("scaling", "softcap", "s_aux"))
        scaling = query_states.shape[-1] ** -0.5 if scaling is None else scaling
        return cls(query_states, key_states, value_states, attention_mask, real, scaling, softcap, sinks, own)

    @property
    def num_tokens(self) -> int:
        return self.query_states.shape[2]

    @property
    def real_tokens(self) -> torch.Tensor:
        """Which tokens are not padding, bool `[b, n]`."""
        b, _, n, _ = self.key_states.shape
        return self.key_states.new_ones(b, n, dtype=torch.bool) if self.real is None else self.real

    def alone(self) -> "AttentionCall":
        """The same in memory of its own: a part is a view of all that came with it."""
        copied = ("query_states", "key_states", "value_states", "attention_mask", "real")
        tensors = {name: getattr(self, name) for name in copied}
        return dataclasses.replace(self, **{name: tensor.clone() for name, tensor in tensors.items() if tensor is not None})

    @property
    def is_causal(self) -> bool:
        """Whether each token sees all real ones before it."""
        return self.attention_mask is None or self.attention_mask.dim() == 2 or bool(self._sees_those_before().all())

    def can_part(self, at: int) -> bool:
        """Whether the tokens from `at` on see all real ones before, so that these may be taken in first."""
        if self.attention_mask is None or self.attention_mask.dim() == 2:
            return True
        return bool(self._sees_those_before(at)[..., :at].all())

    def _sees_those_before(self, start: int = 0) -> torch.Tensor:
        """Whether the tokens from `start` on see each token, bool `[b, n - start, n]`; true for later ones and padding."""
        n = self.num_tokens
        assert self.attention_mask is not None, "a mask of 4 dimensions"
        visible = self.attention_mask[:, 0, -n:, -n:][:, start:]
        visible = visible if visible.dtype == torch.bool else additive_to_bool(visible)
        new = torch.arange(n, device=visible.device)
        visible = visible | (new > new[start:, None])
        return visible if self.real is None else visible | ~self.real[:, None, :] | ~self.real[:, start:, None]

    @functools.cached_property
    def padding(self) -> list[int] | None:
        """How many tokens of padding each row begins with, where the mask is causal but for these; None: it is another mask, or
        a compiler could not look into it.
        """
        if self.attention_mask is None and self.real is None:
            return [0] * self.key_states.shape[0]
        if torch.compiler.is_compiling():
            return None
        return left_padding(self.attention_mask, self.real_tokens)

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
