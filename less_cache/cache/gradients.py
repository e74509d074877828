"""Gradients of attention's output: a first block's are the model's own, later ones raise.

What a layer keeps is cut off from the graph that made it, so the gradient of a later block would leave out all that came
before. A first block has nothing before it: its gradient is right for as long as nothing else of the text counts in the loss.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from less_cache.errors import LESSError


class Text:
    """What the outputs of one text share, in all forks of its cache."""

    def __init__(self):
        self.carries = False  # the first block came with gradients
        self.went_on = False  # a later one came while gradients were on


def wanted(states: Sequence[torch.Tensor], text: Text) -> bool:
    """Whether PyTorch would carry gradients through attention of these queries, keys and values to those or earlier ones."""
    return torch.is_grad_enabled() and (text.carries or any(each.requires_grad for each in states))


def attended(
    attend: Callable,
    own: functools.partial,
    states: Sequence[torch.Tensor],
    attention_mask: torch.Tensor | None,
    is_first: bool,
    text: Text,
) -> torch.Tensor:
    """What `attend` gives for `own`, states and mask, with the gradients that there are.

    Of a block that nothing precedes, `is_first`, the gradient goes to the output of `own`, which is the same but for rounding,
    unless the text goes on with gradients. Of a later one it is an error, and from then on of the first as well.
    """
    output = attend(_carrying(own), states, attention_mask)
    if not is_first:
        text.went_on = True
        return _LaterBlock.apply(output, *states)
    models_own = output
    if not output.requires_grad:  # the weights that the policy asked for gave it
        models_own, _ = own(*states, attention_mask)
    text.carries = True
    return _FirstBlock.apply(output.detach(), models_own, text)


def _carrying(own: functools.partial) -> functools.partial:
    """An attention function with its arguments that carries gradients wherever it is called."""

    def attention(*args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad():
            return own.func(*args, **kwargs)

    return functools.partial(attention, *own.args, **own.keywords)


class _FirstBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, models_own: torch.Tensor, text: Text) -> torch.Tensor:
        ctx.text = text
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        if ctx.text.went_on:
            raise LESSError(
                "A LESSCache carries the gradients of a text's first block alone, and this text went on. Call backward before "
                "it does, let it go on under torch.no_grad(), or use a DynamicCache."
            )
        return None, gradient, None


class _LaterBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *states: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        raise LESSError(
            "A LESSCache carries no gradients through what came before a block: what it keeps is cut off from the graph that "
            "made it. Pass the whole text at once, or use a DynamicCache."
        )
