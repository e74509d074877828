"""What kept tokens should say, so that attention over the few equals attention over all, for reference queries.

Axes: `b` rows, `g` KV heads, `s` query heads of a KV head, `k` reference queries, `n` = s · k, `t` kept tokens, `r` virtual
tokens, `w` width of values.
"""

import math
from typing import Any

import torch

from less_cache.fitting.references import Seen
from less_cache.ops.attention import attention_logits, sparse_softmax
from less_cache.ops.call import AttentionCall
from less_cache.slots import Columns

MOST_BIAS = 3.0  # nats, up or down
STEPS = 100  # of the search for biases
MASS_RIDGE = 1e-3  # pull of a token's weight to what it was, of a query's error
VALUE_RIDGE = 1e-3  # pull of the values to what they were, of the mean square weight that they would have if all were equal


def fit(
    seen: Seen, kept: Columns, call: AttentionCall, virtual: Any = None, rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Biases and values of the `kept` columns `[b, g, t, *]` that give the references what they saw of all.

    A bias β is added to a token's logit, as if it stood for e^β tokens: the biases are those for which the kept tokens and the
    state have the weight of all tokens, Σ_j e^{β_j} a_ij + state_i = 1 for every reference i, by least squares with a small
    pull to 0. Then the values, and with them those of the virtual tokens, solve X V = Y by ridge regression to what they were:
    X the new weights, Y the attention of all tokens. A head for which this is worse than nothing keeps what it had, and so do
    all but the `rows`, bool `[b]`.

    Source: Zweiger et al., "Attention Matching", 2026 (arXiv 2602.16284); there without a state, and with other solvers.

    Returns:
        Biases `[b, g, t]`, values `[b, g, t, w]`, and what to add to the values of the virtual tokens, `[b, g, r, w]` or None;
        float32. Where a column is empty they mean nothing.
    """
    there = seen.references.there[:, None, :, :, None].float()  # [b, 1, s, k, 1]
    alive = kept.positions >= 0  # [b, g, t]
    logits = attention_logits(
        seen.references.query_states, kept.keys, alive.unsqueeze(2), call.scaling, call.softcap, kept.bias
    )  # [b, g, s, k, t]
    shares = ((logits - seen.log_sum).exp() * there).flatten(2, 3)  # [b, g, n, t]
    rest = torch.ones_like(seen.log_sum)  # of the weight, which the kept tokens should have
    if call.sinks is not None:
        rest = rest - (call.sinks.float().view(1, *logits.shape[1:3], 1, 1) - seen.log_sum).exp()
    if virtual is not None:
        rest = rest - (virtual[0] - seen.log_sum).exp().sum(-1, keepdim=True)
    asked = seen.references.there.sum((1, 2)).clamp_min(1).float().view(-1, 1, 1, 1)  # queries, [b, 1, 1, 1]
    bias = _masses(shares, (rest.clamp_min(0.05) * there).flatten(2, 4), MASS_RIDGE * asked).log()  # [b, g, t]

    values, output = kept.values.float(), (seen.output * there).flatten(2, 3)  # [b, g, n, w]
    if virtual is not None:
        values = torch.cat([values, virtual[1]], dim=2)

    def weights(bias: torch.Tensor | float) -> torch.Tensor:
        biased = logits + bias
        if virtual is not None:
            biased = torch.cat([biased, virtual[0]], dim=-1)
        return (sparse_softmax(biased, call.sinks)[0] * there).flatten(2, 3)  # [b, g, n, t + r]

    fitted = weights(bias[:, :, None, None])
    columns = alive.sum(-1)[..., None, None].clamp_min(1) + (0 if virtual is None else virtual[1].shape[2])  # [b, g, 1, 1]
    change = _ridge(fitted, output - fitted @ values, VALUE_RIDGE * asked / columns)
    before = (output - weights(0.0) @ values).square().sum((2, 3), keepdim=True)  # [b, g, 1, 1]
    after = (output - fitted @ (values + change)).square().sum((2, 3), keepdim=True)
    better = after < before  # never where something is not finite
    if rows is not None:
        better = better & rows.view(-1, 1, 1, 1)
    change = change.where(better, 0)
    bias = bias.where(better.squeeze(-1), 0)
    if kept.bias is not None:
        bias = bias + kept.bias
    t = kept.positions.shape[-1]
    return bias, values[:, :, :t] + change[:, :, :t], None if virtual is None else change[:, :, t:]


def _masses(shares: torch.Tensor, rest: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """Factors `[b, g, t]` of the tokens' shares `[b, g, n, t]` whose sum is `rest` `[b, g, n]`, by accelerated gradient steps
    within the bounds.
    """
    transposed = shares.transpose(-1, -2)
    gram = transposed @ shares  # [b, g, t, t], so that no step reads all references
    target = transposed @ rest.unsqueeze(-1) + ridge  # [b, g, t, 1]
    # The shares are not negative, so that the largest row sum of their square bounds its eigenvalues.
    steepest = gram.sum(-1, keepdim=True).amax(2, keepdim=True) + ridge
    factors = torch.ones_like(target)
    ahead, momentum = factors, 1.0
    for _ in range(STEPS):
        slope = gram @ ahead + ridge * ahead - target
        following = (ahead - slope / steepest).clamp(math.exp(-MOST_BIAS), math.exp(MOST_BIAS))
        next_momentum = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = following + (momentum - 1) / next_momentum * (following - factors)
        factors, momentum = following, next_momentum
    return factors.squeeze(-1)


def _ridge(weights: torch.Tensor, missing: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """The least change of values `[b, g, t, w]` for which `weights` `[b, g, n, t]` give what is `missing` `[b, g, n, w]`."""
    n, t = weights.shape[-2:]
    transposed = weights.transpose(-1, -2)
    if n < t:  # the smaller of two systems with the same solution
        return transposed @ _solve(weights @ transposed, ridge, missing)
    return _solve(transposed @ weights, ridge, transposed @ missing)


def _solve(matrix: torch.Tensor, ridge: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(matrix + ridge)⁻¹ right, by Cholesky in float64; NaN where that fails."""
    size = matrix.shape[-1]
    matrix = matrix.double() + ridge * torch.eye(size, dtype=torch.float64, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    solution = torch.cholesky_solve(right.double(), factor).float()
    return solution.masked_fill((failed > 0)[..., None, None], torch.nan)
