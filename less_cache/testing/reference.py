"""The oracle: LESS as one plain O(T²) masked formula, without slots, recurrence or virtual tokens.

Axes: `b` batch, `h` query heads, `g` KV heads, `s` = h / g, `n` queries of one block, `T` all tokens, `d` head dim,
`r` rank, `f` token counts of the policy.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from less_cache.fitting.references import References
from less_cache.memory.base import TrainedMemory
from less_cache.ops.attention import group_heads
from less_cache.policies import EvictionPolicy
from less_cache.slots import asked
from less_cache.slots.formats import QueryCodes
from less_cache.slots.rows import counts_by_head


def reference_attention(
    query_states: torch.Tensor,
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    policy: EvictionPolicy,
    blocks: Sequence[int],
    kernels: TrainedMemory | None = None,
    real: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    shares: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    rotation: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a `LESSLayer` must give for tokens that were fed in `blocks`, in float64.

        w_ij = e^{l_ij} where query i sees token j, Σ_r φ_r(q_i) β_ir ψ_r(k_j) e^{−λ_r (i − j)} where j is evicted, otherwise 0
        out_i = Σ_j w_ij v_j / Σ_j w_ij

    This is the formula of LESS with H and z written out as sums over the evicted tokens, whose means φ may read. β is 1 but
    where a memory bounds the weight of a virtual token, to W_r of Z_r: then it is W_r / Z_r. A query
    sees the tokens that were kept before its block and those of its block up to itself; after every block there is one
    selection, by the policy's own methods over columns for all T tokens (position -1: padding, evicted or not yet there).

    Args:
        query_states: After RoPE, `[b, h, T, d]`.
        key_states: After RoPE, `[b, g, T, d]`.
        value_states: `[b, g, T, d]`.
        policy: Which tokens are kept.
        blocks: How the tokens came, such as `[prompt, 1, 1, 1]`; the sum is T.
        kernels: φ and ψ; None: evicted tokens are lost.
        real: Which tokens are not padding, bool `[b, T]`; None: all. What is returned at padding has no meaning.
        scaling: Factor of q·k; None: 1/√d.
        softcap: Soft cap of the logits; None: none.
        sinks: Learned logits without a value, `[h]`, that share the denominator (gpt-oss).
        shares: How much of the policy's budget each KV head gets, `[g]`; None: the same for all.
        bias: Added to the logit of a token once its block is over, `[b, g, T]`; None: 0.
        rotation: Turns queries to later positions, for a policy that asks for reference queries; None: they stay as they are.

    Returns:
        Outputs `[b, h, T, d]`, and the tokens kept after each block, bool `[len(blocks), b, g, T]`. The evicted ones are
        those before the block's end that are real and not kept.

    >>> from less_cache import SinkRecent
    >>> q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    >>> outputs, kept = reference_attention(q, k, v, SinkRecent(sinks=1, recent=2), blocks=[4, 1, 1])
    >>> outputs.shape
    torch.Size([1, 4, 6, 8])
    >>> kept[:, 0, 0].int()
    tensor([[1, 0, 1, 1, 0, 0],
            [1, 0, 0, 1, 1, 0],
            [1, 0, 0, 0, 1, 1]], dtype=torch.int32)
    """
    b, g, T, d = key_states.shape
    scaling = d**-0.5 if scaling is None else scaling
    real = torch.ones(b, T, dtype=torch.bool) if real is None else real.bool()
    row_positions = (real.cumsum(-1) - 1).masked_fill(~real, -1)  # [b, T]
    positions = row_positions.unsqueeze(1).expand(b, g, T)
    token = torch.arange(T)

    keys, values = key_states.double()[:, :, None], value_states.double()[:, :, None]  # [b, g, 1, T, d]
    sink_mass = 0.0 if sinks is None else sinks.double().exp().view(1, g, -1, 1, 1)
    if kernels is not None:
        key_features = kernels.key_features(key_states).double()  # [b, g, T, r]
        remembered = kernels.remembered(key_states, value_states).double()[:, :, None]  # [b, g, 1, T, *]
        fading = kernels.fading_rates()
        rates = torch.zeros(g, kernels.num_virtual_tokens) if fading is None else fading
    held = torch.zeros(b, g, T, dtype=torch.bool)
    biased = torch.zeros(b, g, T, dtype=torch.bool)  # tokens whose block is over

    def weigh(
        query_states: torch.Tensor, at: torch.Tensor, sees: torch.Tensor, evicted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights `[b, g, s, n, T]` of all tokens, those of the seen alone, and their sum, for the queries `[b, h, n, d]`
        at positions `at` `[b, n]`; `sees`: bool `[b, g, n, T]`, `evicted`: bool `[b, g, T]`.
        """
        logits = group_heads(query_states, g).double() @ keys.transpose(-1, -2) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        weights = sparse = logits.exp() * sees.unsqueeze(2)
        if bias is not None:
            weights = sparse = sparse * (bias.double() * biased).exp()[:, :, None, None]
        if kernels is not None:
            ages = (at.unsqueeze(-1) - row_positions[:, None])[:, None, :, :, None]  # [b, 1, n, T, 1]
            folded = key_features[:, :, None] * torch.exp(-rates[:, None, None].double() * ages)  # [b, g, n, T, r]
            folded = folded * evicted[:, :, None, :, None]
            mass = folded.sum(3).unsqueeze(-1).clamp_min(torch.finfo(torch.float32).tiny)  # [b, g, n, r, 1]
            means = (folded.transpose(-1, -2) @ remembered / mass).float()  # [b, g, n, r, *]
            log_query_features = kernels.log_query_features(query_states, means, scaling, softcap)
            log_mass = mass.squeeze(-1).log().unsqueeze(2)  # [b, g, 1, n, r]
            query_features = (log_query_features.double() + kernels.log_weights(log_mass) - log_mass).exp()
            weights = sparse + torch.einsum("bgsnr,bgntr->bgsnt", query_features, folded)
        return weights, sparse, weights.sum(-1, keepdim=True) + sink_mass

    def asked_before(stop: int, since: int) -> torch.Tensor:
        """The tokens whose queries a layer holds after `stop` tokens, by query head of a KV head and place, -1: none; then the
        last `since`: `[b, s, k]`.
        """
        s = query_states.shape[1] // g
        places = torch.full((b, s, asked.PLACES), -1)
        for row, position in enumerate(row_positions[:, :stop].tolist()):
            for column, turn in itertools.product(range(stop), range(s)):
                if position[column] >= 0 and position[column] % asked.STRIDE == turn * asked.STRIDE // s:
                    places[row, turn, position[column] // asked.STRIDE % asked.PLACES] = column
        return torch.cat([places, torch.arange(stop - since, stop).expand(b, s, since)], dim=-1)

    scores = policy.arrival(positions)
    outputs, kept = [], []
    settled = torch.zeros(b, dtype=torch.bool)
    counts = policy.resolve(torch.zeros(b, dtype=torch.long), shares)  # [b, f] or [b, g, f]
    start = since = 0  # since: tokens since the last choice
    scored = torch.zeros(b, g, T, dtype=torch.bool)  # tokens that it kept
    evicted = torch.zeros(b, g, T, dtype=torch.bool)
    for n in blocks:
        rows = slice(start, start + n)
        stop, since = start + n, since + n
        block = token[rows, None]  # [n, 1]
        new = (token >= start) & (token <= block) & real[:, None, None]  # [b, 1, n, T]
        sees = held.unsqueeze(2) | new | (token == block)  # [b, g, n, T]; even padding sees itself
        weights, sparse, total = weigh(query_states[:, :, rows], row_positions[:, rows], sees, evicted)
        outputs.append(weights @ values / total)

        seen = real[:, :stop].sum(-1)  # [b]
        settled |= (real[:, rows].sum(-1) == 1) & real[:, :start].any(-1)  # a token alone ends the row's prompt
        counts = torch.where(settled.view(b, *[1] * (counts.dim() - 1)), counts, policy.resolve(seen, shares))
        present = held | ((token >= start) & (token < stop) & real.unsqueeze(1))
        every = policy.block_size
        if every is not None and start > 0 and since < every:
            held = present
        else:
            if policy.asks_references:
                if every is None or start == 0 or n > every:
                    asks = References.of_prompt(rotation, query_states[:, :, rows], row_positions[:, rows], seen, g)
                else:
                    chosen = asked_before(stop, since)  # [b, s, k]
                    at = row_positions.unsqueeze(1).expand(-1, chosen.shape[1], -1).gather(-1, chosen.clamp_min(0))
                    at = at.masked_fill(chosen < 0, -1)
                    index = chosen.clamp_min(0).repeat(1, g, 1).unsqueeze(-1).expand(-1, -1, -1, d)  # [b, h, k, d]
                    queries = query_states.gather(2, index)
                    queries = QueryCodes.decode(*QueryCodes.encode(queries), d, queries.dtype)
                    asks = References.turned(rotation, queries, at, seen, torch.full_like(seen, at.shape[-1]), every)
                sees = present.unsqueeze(2).expand(b, g, asks.query_states.shape[2], T)
                _, sparse, _ = weigh(asks.query_states, seen.unsqueeze(-1) + asks.later, sees, evicted)
                judged = sparse / (sparse.sum(-1, keepdim=True) + sink_mass)
                judgement = policy.judge(judged.float(), asks.there)
                blended = policy.remember(scores.half().float(), judgement)
                capacity = policy.capacity(counts_by_head(counts))
                assert capacity is not None, "who asks for references has a budget"
                is_over = (present.sum(-1, keepdim=True) > capacity).any(1, keepdim=True)  # in some head of the row
                scores = blended.where(scored, judgement).where(is_over, torch.zeros(()))
            else:
                observed = sparse / (sparse.sum(-1, keepdim=True) + sink_mass) * real[:, None, None, rows, None]
                scores = policy.observe(scores, observed.float(), row_positions[:, rows])
            columns = positions.masked_fill(~present, -1)
            held = policy.keep(scores, columns, seen.view(b, 1, 1), counts_by_head(counts))
            evicted = (token < stop) & real.unsqueeze(1) & ~held
            since = 0
            scored = held & is_over if policy.asks_references else held
        biased = held.clone()
        kept.append(held)
        start = stop
    assert start == T, f"blocks sum to {start}, there are {T} tokens"
    return torch.cat(outputs, dim=3).flatten(1, 2), torch.stack(kept)
