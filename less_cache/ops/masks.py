"""What masks say: which new tokens are padding, and which columns a query sees.

Axes: `b` rows, `g` KV heads, `n` new tokens, `c` columns.
"""

import threading
import weakref

import torch

from less_cache.ops.blocks import blocks

_last = threading.local()  # `answer` of `left_padding`, and what it was asked: the mask, its version, and the shape


def additive_to_bool(mask: torch.Tensor) -> torch.Tensor:
    """True where an additive mask lets a column be seen, or a 0/1 mask says it is real."""
    if not mask.dtype.is_floating_point:
        return mask.bool()
    return mask > torch.finfo(mask.dtype).min / 2


def own_column(attention_mask: torch.Tensor, n: int) -> torch.Tensor:
    """Which of the `n` new tokens are not padding, bool `[b, n]`: those that see themselves.

    `attention_mask`: `[b, 1, n, n]` or `[b, n]`, bool or additive; longer ones end with the new tokens.
    """
    own = attention_mask[:, -n:] if attention_mask.dim() == 2 else attention_mask[:, 0, -n:, -n:].diagonal(dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else additive_to_bool(own)


def visible_new(attention_mask: torch.Tensor | None, real: torch.Tensor, queries: slice) -> torch.Tensor:
    """Which new tokens some of the new queries see, bool `[b, 1, queries, c]`; each sees itself.

    Up to the last of these queries without a 4D mask, `c = queries.stop`; all of them with one, `c = n`. `real`: `[b, n]`.
    """
    n = real.shape[1]
    if attention_mask is None or attention_mask.dim() == 2:
        new = torch.arange(queries.stop, device=real.device)
        visible = (new <= new[queries, None]) & real[:, None, None, : queries.stop]
    else:
        new = torch.arange(n, device=real.device)
        visible = attention_mask[:, :, -n:, -n:][:, :, queries]
        visible = visible if visible.dtype == torch.bool else additive_to_bool(visible)
    return visible | (new == new[queries, None])


def left_padding(attention_mask: torch.Tensor | None, real: torch.Tensor) -> list[int] | None:
    """How many tokens of padding each row begins with, where the mask is causal but for these; None: it is another mask.

    `attention_mask`: of the new tokens, as in `own_column`; `real`: which of them are not padding, bool `[b, n]`. What a mask
    says of padding itself does not matter. All layers of a model get one mask, so that it is read for the first of them.
    """
    if attention_mask is None or attention_mask.is_inference():  # such a tensor does not say whether it was changed
        return _left_padding(attention_mask, real)
    asked, version = getattr(_last, "asked", None), attention_mask._version
    if asked is None or asked[0]() is not attention_mask or asked[1:] != (version, real.shape):
        _last.answer = _left_padding(attention_mask, real)
        _last.asked = weakref.ref(attention_mask), version, real.shape
    return _last.answer


def _left_padding(attention_mask: torch.Tensor | None, real: torch.Tensor) -> list[int] | None:
    b, n = real.shape
    padding, column = n - real.sum(-1), torch.arange(n, device=real.device)
    if not torch.equal(real, column >= padding.unsqueeze(-1)):
        return None
    if attention_mask is not None and attention_mask.dim() == 4:
        for queries in blocks(0, n, b * n):
            visible = attention_mask[:, 0, -n:, -n:][:, queries]
            visible = visible if visible.dtype == torch.bool else additive_to_bool(visible)
            causal = (column <= column[queries, None]) & real.unsqueeze(1)  # [b, queries, n]
            if bool(((visible != causal) & real[:, queries, None]).any()):
                return None
    return padding.tolist()
