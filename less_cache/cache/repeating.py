"""A second pass over a prompt, in which the model repeats it: what each token is attended to for that.

Axes: `b` rows, `h` query heads, `g` KV heads, `n` new tokens, `m` repeated ones before them, `c` tokens of the prompt, `d` head
dim, `w` width of values.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from less_cache.backends import Draft, read_again
from less_cache.cache import guards
from less_cache.errors import LESSError
from less_cache.integration import hook
from less_cache.integration.probing import trained_length
from less_cache.integration.weights import unwrapped
from less_cache.ops.call import AttentionCall
from less_cache.ops.precision import no_autocast

STRETCH = 512  # tokens that are repeated at once, at positions behind the prompt
LEAD = 16  # tokens before a stretch that it begins with, from which the model finds its place


class RepeatingLayer(CacheLayerMixin):
    """A layer of a cache in which the model repeats a prompt that a `LESSLayer` has read and not yet chosen from.

    New tokens attend to the whole prompt and to those of their stretch before them. The layer keeps, of the prompt's tokens,
    the largest weight that one of them gave it, over the KV head's query group:

        score_j = max_i a_ij

    Source: Kim et al., "KVzip", 2025 (arXiv 2505.23416).
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, layer_idx: int, draft: Draft, num_tokens: int):
        # Not the base's, which makes `keys` and `values`.
        self.layer_idx, self.draft, self.num_tokens = layer_idx, draft, num_tokens
        self.scores = torch.zeros_like(draft.columns.positions, dtype=torch.float32)  # [b, g, c]
        self.begin()

    def begin(self) -> None:
        """Begin another stretch: what was repeated so far is forgotten."""
        self.repeated: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # keys, values, [b, m] which are real
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to begin with."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return hook.tag(key_states, self), value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.get_seq_length()

    def get_seq_length(self) -> int:
        return self.num_tokens + (0 if self.repeated is None else self.repeated[2].shape[-1])

    def get_max_length(self) -> int:
        return -1

    def refuse(self, reason: str) -> None:
        """Raise for a call that attention cannot hand over."""
        raise LESSError(f"Layer {self.layer_idx}: {reason}")

    def attend(
        self,
        original: Callable,
        module: torch.nn.Module,
        query_states: torch.Tensor,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """Attention output of the new tokens, `[b, n, h, w]`, and None for the weights; shapes as in `LESSLayer.attend`."""
        states = query_states, key_states, value_states
        real = guards.real_tokens(self.layer_idx, attention_mask, *query_states.shape[::2])
        call = AttentionCall.of(states, attention_mask, real, functools.partial(original, module, scaling=scaling, **kwargs))
        with no_autocast(query_states.device.type):
            output, scores, self.repeated = read_again(self.draft.columns, call, self.repeated)
            self.scores = torch.maximum(self.scores, scores)
        return output.transpose(1, 2).contiguous(), None


def repeat(
    model: PreTrainedModel,
    layers: Sequence[Any],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    chunk_size: int,
) -> None:
    """Let the model repeat a prompt, `chunk_size` tokens of each row at a time.

    Args:
        model: The model.
        layers: One for each of its layers: `RepeatingLayer`s, which have the scores afterwards, and the model's own as they
            are after the prompt, which stay so.
        input_ids: `[b, c]`, padded on the left.
        attention_mask: 1 where a token is real, `[b, c]`.
    """
    lengths = attention_mask.sum(-1, keepdim=True)  # [b, 1]
    first = (attention_mask == 0).int().argsort(dim=-1, stable=True)  # [b, c], real tokens first
    tokens, longest = input_ids.gather(-1, first), int(lengths.max())
    for start in range(0, longest, STRETCH):
        begin, stop = max(0, start - LEAD), min(start + STRETCH, longest)
        places = torch.arange(begin, stop, device=input_ids.device)
        there = (places < lengths).to(attention_mask.dtype)  # [b, stop − begin]
        positions = _behind(lengths, stop - begin, model) + places - begin
        cache = Cache(layers=[_afresh(layer) for layer in layers])
        for chunk in range(0, stop - begin, chunk_size):
            some = slice(chunk, min(chunk + chunk_size, stop - begin))
            mask = torch.cat([attention_mask, there[:, : some.stop]], dim=-1)
            forward(model, tokens[:, begin:stop][:, some], mask, positions[:, some], cache)


def _behind(lengths: torch.Tensor, num_tokens: int, model: PreTrainedModel) -> torch.Tensor:
    """Where `num_tokens` behind texts of these `lengths` begin, `[b, 1]`: not beyond the positions that the model knows, if the
    text itself ends there.
    """
    known = trained_length(unwrapped(model).config.get_text_config(decoder=True))
    last = max(0, known - num_tokens)
    return lengths.clamp_max(last).where(lengths <= known, lengths)


def forward(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, cache: Cache
) -> None:
    """Read tokens into a cache; nobody asks for logits."""
    known = inspect.signature(unwrapped(model).forward).parameters
    wanted = {"position_ids": position_ids, "logits_to_keep": 1}
    arguments = {name: value for name, value in wanted.items() if name in known}
    model(input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **arguments)


def _afresh(layer: Any) -> Any:
    """The layer as it is after the prompt."""
    if not isinstance(layer, RepeatingLayer):
        return copy.deepcopy(layer)
    layer.begin()
    return layer
