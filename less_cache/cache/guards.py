"""What a call must be: functions that raise `LESSError` for what cannot be taken in, and change nothing.

Axes: `b` rows, `n` new tokens.
"""

import warnings
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from less_cache.errors import LESSError
from less_cache.ops.masks import additive_to_bool, own_column
from less_cache.slots import Rows

READ_AT_ONCE = {"cpu"}  # types of device whose tensors Python reads without waiting

# Arguments of an attention function that do not change its result here. `scaling`, `softcap` and `s_aux` are read.
HARMLESS = {"is_causal", "position_ids", "cache_position", "token_type_ids", "logits_to_keep"}


def check_new(layer_idx: int, num_tokens: int, seen: int) -> None:
    """Raise where a block has no tokens: `generate` slices off what the cache has seen. `seen`: padding included."""
    if num_tokens == 0:
        raise LESSError(
            f"Layer {layer_idx}: expected new tokens, got none: the prompt is shorter than the {seen} tokens that the cache "
            "has seen. Pass the whole conversation, or call cache.reset()."
        )


def check_batch(layer_idx: int, rows: Rows, batch: int) -> None:
    """Raise where the batch is not that of the turns before."""
    if batch != rows.seen.shape[0]:
        raise LESSError(
            f"Layer {layer_idx}: expected a batch of {rows.seen.shape[0]}, as in the turns before, got {batch}. "
            "Call cache.reset() for a new batch, or cache.batch_repeat_interleave()."
        )


def check_dtypes(layer_idx: int, expected: Sequence[torch.dtype], got: Sequence[torch.dtype]) -> None:
    """Raise where keys or values come in another type than in the turns before, as with autocast in some calls alone."""
    for name, before, now in zip(("keys", "values"), expected, got, strict=True):
        if now != before:
            raise LESSError(
                f"Layer {layer_idx}: expected {name} of type {before}, as in the turns before, got {now}. Use the same "
                "model and the same autocast in every call, or call cache.reset()."
            )


def check_attention(layer_idx: int, module: torch.nn.Module, kwargs: dict) -> None:
    """Raise where attention is asked for something that a LESSCache does not do."""
    where = f"Layer {layer_idx} ({type(module).__name__})"
    if module.training:
        raise LESSError(f"{where}: the model is in training mode. A LESSCache is for inference: call model.eval().")
    if kwargs["dropout"]:
        raise LESSError(f"{where}: expected no attention dropout, got {kwargs['dropout']}.")
    if kwargs.get("sliding_window") is not None:
        raise LESSError(f"{where}: expected full attention, got sliding_window {kwargs['sliding_window']}. Use a DynamicCache.")
    for name, argument in kwargs.items():
        if isinstance(argument, torch.Tensor) and name not in HARMLESS and name != "s_aux":
            raise LESSError(f"{where}: attention argument {name!r} is not supported. Use a DynamicCache.")


def check_reader(layer_idx: int, module: torch.nn.Module, owner: torch.nn.Module) -> None:
    """Raise where a layer is read by attention that is not `owner`, or a part of it, nor has the same weights."""
    index, peer = getattr(module, "layer_idx", None), None
    for each in owner.modules():
        if each is module:
            return
        if type(each) is type(module) and getattr(each, "layer_idx", None) == index:
            peer = each
    if peer is None or not _same_weights(module, peer):
        raise LESSError(
            f"Layer {layer_idx} ({type(module).__name__}): this cache belongs to another model, with other weights. "
            "Make a LESSCache for each model."
        )


def warns_of_length(config: PreTrainedConfig, seen: int) -> bool:
    """Warn where a text of `seen` tokens is longer than what the model was trained on: the cache has no end, the model has."""
    trained = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if trained is None or seen <= trained:
        return False
    warnings.warn(
        f"The text is longer than the {trained} tokens that the model was trained for (max_position_embeddings): "
        "the cache goes on at the same size, but what the model writes may get worse.",
        stacklevel=2,
    )
    return True


def _same_weights(module: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether what both have in common is the same up to rounding: copies of another type and adapted ones belong together."""
    weights, others = dict(module.named_parameters()), dict(other.named_parameters())
    for name in weights.keys() & others.keys():
        weight, same = weights[name], others[name]
        if weight.is_meta or same.is_meta:
            continue  # offloaded: nothing to compare
        if weight.shape != same.shape or not torch.allclose(weight.to(same), same, rtol=2e-2, atol=1e-3):
            return False
    return True


def real_tokens(layer_idx: int, attention_mask: torch.Tensor | None, b: int, n: int) -> torch.Tensor | None:
    """Which new tokens are not padding, `[b, n]`: those that see themselves; None: all, where a look is for free."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() not in (2, 4):
        raise LESSError(
            f"Layer {layer_idx}: expected a mask tensor of 2 or 4 dimensions, got {type(attention_mask).__name__}. "
            'Load the model with attn_implementation="sdpa" or "eager".'
        )
    if attention_mask.dim() == 4 and attention_mask.shape[1] != 1:
        raise LESSError(
            f"Layer {layer_idx}: expected one mask for all heads, got a mask of shape {list(attention_mask.shape)}."
        )
    real = own_column(attention_mask, n)
    if real.device.type in READ_AT_ONCE and not torch.compiler.is_compiling() and real.all():
        return None
    return real.expand(b, n)


def check_seen_columns(layer_idx: int, rows: Rows, attention_mask: torch.Tensor, n: int, seen: int) -> None:
    """Raise where a 4D mask hides seen tokens from new ones. `seen`: padding included."""
    if attention_mask.dim() != 4 or attention_mask.shape[-1] <= n:
        return
    past = attention_mask[:, 0, -n:, :-n]
    visible = past if past.dtype == torch.bool else additive_to_bool(past)  # [b, n, tokens seen]
    real = rows.real_of(seen)[:, None, -visible.shape[-1] :]
    new = own_column(attention_mask, n).unsqueeze(-1)
    if not bool((visible | ~real | ~new).all()):
        raise LESSError(
            f"Layer {layer_idx}: the 4D mask hides tokens that the cache has seen. Those that no later token may see can be "
            "hidden by a 2D mask; masks that differ by query are supported among the new tokens only. Or use a DynamicCache."
        )


def seen_again(
    layer_idx: int,
    tokens: torch.Tensor,
    real: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    n: int,
    seen: int,
) -> int:
    """How many of `n` new tokens are the `seen` of before: assisted decoding starts with the whole conversation, unsliced.

    `tokens`: real ones that each row has seen, `[b]`.
    """
    if position_ids is None or not n > seen > 0:
        return 0
    if bool((_first_positions(position_ids, real, len(tokens)) >= tokens).all()):
        return 0
    if position_ids.shape != (1, n) or not torch.equal(position_ids[0], torch.arange(n, device=position_ids.device)):
        raise LESSError(
            f"Layer {layer_idx}: expected the conversation to start with the {seen} tokens that the cache has seen, without "
            "padding: assisted decoding passes all of it again. Or call cache.reset()."
        )
    return seen


def check_continuation(
    layer_idx: int,
    rows: Rows,
    tokens: torch.Tensor,
    real: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    seen: int,
) -> None:
    """Raise where the new tokens do not come after what was seen, by their positions: `generate` slices a prompt that is
    shorter silently, counts on from padding on the right, and passes the whole text in every forward with `use_cache=False`.

    `tokens`: real ones that each row has seen, `[b]`; `seen`: padding included.
    """
    shorter = (
        f"Layer {layer_idx}: the new tokens lie before the {seen} tokens that the cache has seen: the prompt or its "
        "mask is shorter, or the model counts from 0 where a forward has no position_ids. Pass the whole conversation with its "
        "mask, position_ids in forwards of your own, or call cache.reset()."
    )
    if real is not None and not bool(real.any()) and bool((tokens > 0).any()):  # a prompt may begin with padding
        raise LESSError(shorter)
    if position_ids is None or position_ids.dim() != 2:
        return
    n = position_ids.shape[1]
    ends_before = position_ids[:, -1] < tokens  # [b]
    begins_before = ends_before
    if real is not None:
        ends_before = begins_before = ends_before & real[:, -1]
    if n > 1:
        begins_before = ends_before | (_first_positions(position_ids, real, len(tokens)) < tokens)
    if not bool(begins_before.any()):
        return
    if bool((begins_before & ~rows.real_of(seen)[:, -1]).any()):
        raise LESSError(
            f"Layer {layer_idx}: the new tokens lie before the {seen} tokens that the cache has seen: a row ends with padding, "
            "from which its positions go on. Pad prompts on the left (tokenizer.padding_side = 'left') after cache.reset()."
        )
    if bool(ends_before.any()):
        raise LESSError(shorter)
    raise LESSError(
        f"Layer {layer_idx}: expected the tokens that follow the {seen} that the cache has seen, got {n} that begin before "
        "their end, as where the whole text is passed again: generate does so with use_cache=False. Leave use_cache as it is, "
        "or do without the cache; cache.reset() makes it ready for another text."
    )


def _first_positions(position_ids: torch.Tensor, real: torch.Tensor | None, b: int) -> torch.Tensor:
    """Where each row's first real new token stands, `[b]`; a row without any is at the end of everything."""
    if real is None:
        return position_ids[:, 0]
    first = position_ids.expand(b, -1).gather(1, real.int().argmax(dim=-1, keepdim=True))[:, 0]
    return first.masked_fill(~real.any(dim=-1), torch.iinfo(first.dtype).max)
