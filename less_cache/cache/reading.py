"""Reading a prompt twice, so that what nothing in it points at is found later: first as ever, then repeating it.

Axes: `b` rows, `g` KV heads, `c` tokens of the prompt.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from less_cache.backends import Draft
from less_cache.cache.allotment import Allotment
from less_cache.cache.layer import LESSLayer
from less_cache.cache.repeating import RepeatingLayer, forward, repeat
from less_cache.errors import LESSError
from less_cache.ops.precision import no_autocast


class Waiting(Allotment):
    """What the layers of a cache have read, in order; none of them chooses."""

    def concerns(self, layer: Any, draft: Draft) -> bool:
        return True

    def add(self, layer: Any, draft: Draft) -> None:
        self.waiting.append((layer, draft))


@torch.inference_mode(False)  # as in `LESSLayer`
@torch.no_grad()
def read(
    cache: Any, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, chunk_size: int
) -> None:
    """What `LESSCache.read` does. After an exception the cache is empty."""
    layers = [layer for layer in cache.layers if isinstance(layer, LESSLayer)]
    _check(cache, layers, input_ids, attention_mask, chunk_size)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    try:
        drafts = _first_pass(cache, layers, model, input_ids, mask)
        if any(draft.references is not None for draft in drafts):  # somebody has to choose
            again: list[Any] = list(cache.layers)
            for layer, draft in zip(layers, drafts, strict=True):
                again[layer.layer_idx] = RepeatingLayer(layer.layer_idx, draft, input_ids.shape[1])
            repeat(model, again, input_ids, mask, chunk_size)
            for layer, draft in zip(layers, drafts, strict=True):
                draft.columns.scores = cache.policy.recall(draft.columns.scores, again[layer.layer_idx].scores)
        with no_autocast(input_ids.device.type):
            for layer, draft in zip(layers, drafts, strict=True):
                layer.decide(draft)
    except BaseException:
        cache.reset()
        raise


def _first_pass(
    cache: Any, layers: list[LESSLayer], model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor
) -> list[Draft]:
    """Read the prompt; what each layer has to choose from."""
    waiting, allotments = Waiting(len(layers)), [layer.allotment for layer in layers]
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    try:
        for layer in layers:
            layer.allotment = waiting
        forward(model, input_ids, mask, position_ids, cache)
    finally:
        for layer, allotment in zip(layers, allotments, strict=True):
            layer.allotment = allotment
    return [draft for _, draft in waiting.waiting]


def _check(
    cache: Any,
    layers: list[LESSLayer],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    chunk_size: int,
) -> None:
    """Raise for what cannot be read twice."""
    if not cache.policy.asks_references:
        raise LESSError(
            f"LESSCache.read: {cache.policy} scores tokens while they are read, and nothing that is repeated later changes "
            "that. Use AttentionMatching, or pass the prompt to generate."
        )
    if any(not layer.is_empty or layer.record_past for layer in layers):
        raise LESSError("LESSCache.read: expected a cache that has seen nothing. Call cache.reset() first.")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise LESSError(f"LESSCache.read: expected input_ids [b, n], got a tensor of shape {list(input_ids.shape)}.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise LESSError(
            f"LESSCache.read: expected a mask of the shape {list(input_ids.shape)} of input_ids, got "
            f"{list(attention_mask.shape)}."
        )
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise LESSError(f"LESSCache.read: expected chunk_size to be an int >= 1 (tokens), got {chunk_size!r}.")
