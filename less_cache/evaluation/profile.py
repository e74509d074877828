"""A profile of head budgets: what adaptive heads get, on average over texts.

Axes: `b` rows, `L` layers under LESS, `g` KV heads, `p` prompt tokens.
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from less_cache.cache.cache import LESSCache
from less_cache.cache.layer import LESSLayer
from less_cache.errors import LESSError


@torch.no_grad()
def shares(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    budget: int | float,
    batch_size: int = 4,
    advance: Callable[[int], object] = lambda rows: None,
) -> torch.Tensor:
    """Shares of the budget that each KV head gets after each text, `[count, L, g]`, 1 on average for each.

    They are what a fitted cache with adaptive heads, `LESSCache(model, budget=budget)`, allots when it has read the text.
    `tokens` `[count, p]`; `advance` is called with the number of rows after each batch.
    """
    measured = []
    for batch in tokens.to(model.device).split(batch_size):
        cache = LESSCache(model, budget=budget, fit=False)  # heads get their budgets before anything is fitted
        model(batch, past_key_values=cache, logits_to_keep=1)
        measured.append(_allotted(cache))
        advance(len(batch))
    return torch.cat(measured)


def mean(measured: torch.Tensor) -> torch.Tensor:
    """Of shares `[count, L, g]` over texts, `[L, g]`; 1 on average, whatever was rounded."""
    shares = measured.double().mean(0)
    return shares / shares.mean()


def explained(measured: torch.Tensor) -> float:
    """How much of the variance of shares `[count, L, g]` over heads and texts lies between heads: 1 where all texts agree."""
    total = (measured - 1).square().mean().item()
    return (mean(measured) - 1).square().mean().item() / total if total else 1.0


def _allotted(cache: LESSCache) -> torch.Tensor:
    """Shares of the heads of a cache that has read a prompt, `[b, L, g]`."""
    layers = [layer for layer in cache.layers if isinstance(layer, LESSLayer)]
    if any(layer.held.rows.allotted is None or not bool(layer.held.rows.allotted.all()) for layer in layers):
        raise LESSError(
            f"Expected a budget below the prompt, got {cache.policy} for {int(cache.get_seq_length())} tokens, which keeps all "
            "of them. Pass a smaller budget or a longer prompt."
        )
    tokens = [cache.policy.capacity(layer.held.rows.counts_by_head()).squeeze(-1) for layer in layers]  # each [b, g]
    budgets = torch.stack(tokens, dim=1).double().cpu()
    return budgets / budgets.mean((1, 2), keepdim=True)
