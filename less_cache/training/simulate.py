"""Decoding under a policy, all steps of a block at once and differentiable in the kernels.

Axes: `b` batch, `h` query heads, `g` KV heads, `s` = h / g, `p` prompt tokens, `n` decoded tokens, `k` prompt tokens
kept, `c` = k + n columns, `d` head dim, `r` rank.
"""

import dataclasses

import torch

from less_cache.attention import attention_logits, sparse_softmax
from less_cache.kernels import LayerKernels
from less_cache.policies import EvictionPolicy

MAX_EXPONENT = 60.0  # e^60 is far from float32's overflow


@dataclasses.dataclass
class Decode:
    """Teacher-forced decoding of `n` tokens after a prompt of `p`, with every step's kept set.

    Made by `roll`. Which tokens are kept depends on queries and keys alone, never on the kernels, so it is rolled
    once, without gradients; `attend` is the differentiable part.
    """

    keep: torch.Tensor  # [b, g, p] bool, prompt tokens kept by the selection after the prompt
    order: torch.Tensor  # [b, g, k] prompt tokens of the first k columns, kept ones first
    visible: torch.Tensor  # [b, g, n, c] columns kept when a query attends
    evicted: torch.Tensor  # [b, g, n, c] columns already folded in when a query attends

    def split(self, batch_size: int) -> list["Decode"]:
        """The parts of a batch."""
        fields = (getattr(self, field.name).split(batch_size) for field in dataclasses.fields(self))
        return [Decode(*part) for part in zip(*fields, strict=True)]


def roll(
    policy: EvictionPolicy,
    query_states: torch.Tensor,
    key_states: torch.Tensor,
    prompt_scores: torch.Tensor,
    counts: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Decode:
    """Roll `policy` over the last n tokens of a sequence, one step after another, as the cache does.

    Args:
        query_states: `[b, h, n, d]`, the decoded tokens alone.
        key_states: `[b, g, p + n, d]`.
        prompt_scores: The policy's scores after the prompt, `[b, g, p]`.
        counts: The policy's token counts, `[f, b, 1, 1]`; rows may differ.
        sinks: `[h]` or `[b, h]`.
    """
    b, g, p = prompt_scores.shape
    n = query_states.shape[2]
    device = key_states.device
    prompt = torch.arange(p, device=device).expand(b, g, p)
    seen = torch.full((b, 1, 1), p, device=device)
    keep = policy.keep(prompt_scores, prompt, seen, counts)
    k = int(keep.sum(-1).max())
    order = (~keep).int().argsort(dim=-1, stable=True)[..., :k]

    kept_positions = torch.where(keep.gather(-1, order), order, -1)
    positions = torch.cat([kept_positions, kept_positions.new_full((b, g, n), -1)], dim=-1)
    scores = torch.cat([prompt_scores.gather(-1, order), prompt_scores.new_zeros(b, g, n)], dim=-1)
    exists = torch.cat([kept_positions >= 0, positions.new_zeros(b, g, n, dtype=torch.bool)], dim=-1)
    everywhere = torch.ones((), dtype=torch.bool, device=device).expand(b, g, n, k + n)
    logits = attention_logits(query_states, columns(key_states, order, p), everywhere, scaling, softcap)
    capacity = policy.capacity(counts)
    visible_steps, evicted_steps = [], []
    for step in range(n):
        positions[..., k + step] = p + step
        exists[..., k + step] = True
        scores[..., k + step] = policy.arrival(positions[..., k + step])
        visible = positions >= 0
        visible_steps.append(visible)
        evicted_steps.append(exists & ~visible)
        if policy.observed(counts, 1):
            step_logits = logits[..., step : step + 1, :].masked_fill(~visible[:, :, None, None], -torch.inf)
            weights, _ = sparse_softmax(step_logits, sinks)
            scores = policy.observe(scores, weights, seen.view(b, 1))
        seen = seen + 1
        if capacity is None:
            positions = positions.masked_fill(~policy.keep(scores, positions, seen, counts), -1)
        else:
            victim = policy.victim(scores, positions, seen, counts)
            leaves = visible.sum(-1, keepdim=True) > capacity
            positions = positions.scatter(-1, victim, positions.gather(-1, victim).masked_fill(leaves, -1))
    return Decode(keep, order, torch.stack(visible_steps, dim=2), torch.stack(evicted_steps, dim=2))


def columns(states: torch.Tensor, order: torch.Tensor, p: int) -> torch.Tensor:
    """Of `[b, g, p + n, *]` the prompt tokens in `order`, then the decoded ones: `[b, g, c, *]`."""
    kept = states[:, :, :p].gather(2, order.unsqueeze(-1).expand(*order.shape, states.shape[-1]))
    return torch.cat([kept, states[:, :, p:]], dim=2)


def attend(
    decode: Decode,
    query_states: torch.Tensor,
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    kernels: LayerKernels | None,
    logits: torch.Tensor,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention output of the decoded tokens, `[b, h, n, d]` float32, by the plain formula of `LESSCache`.

    `logits`: of the queries and the columns, `[b, g, s, n, c]`, -inf where not visible. `sinks`: `[h]`.
    """
    p = decode.keep.shape[-1]
    b, g, s, n, c = logits.shape
    value_states = value_states.float()
    column_values = columns(value_states, decode.order, p)  # [b, g, c, d]
    largest = logits.amax(dim=-1, keepdim=True).detach()
    weights = (logits - largest).exp()
    denominator = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        denominator = denominator + (sinks.float().view(1, g, s, 1, 1) - largest).exp()
    if kernels is None:
        mixed, numerator = weights, weights.new_zeros(())
    else:
        query_features = kernels.query_features(query_states).view(b, g, s * n, -1)
        key_features = kernels.key_features(key_states)  # [b, g, p + n, r]
        folded = key_features[:, :, :p] * ~decode.keep.unsqueeze(-1)
        values_sum = folded.transpose(-1, -2) @ value_states[:, :, :p]  # [b, g, r, d]
        features_sum = folded.sum(dim=2).unsqueeze(-1)  # [b, g, r, 1]
        scale = (-largest).clamp_max(MAX_EXPONENT).exp()
        query_features = query_features * scale.view(b, g, s * n, 1)
        pairs = query_features @ columns(key_features, decode.order, p).transpose(-1, -2)  # [b, g, s·n, c]
        pairs = pairs.view(b, g, s, n, c) * decode.evicted.unsqueeze(2)
        mixed = weights + pairs  # a column is kept or folded, never both
        numerator = (query_features @ values_sum).view(b, g, s, n, -1)
        denominator = denominator + (query_features @ features_sum).view(b, g, s, n, 1) + pairs.sum(dim=-1, keepdim=True)
    numerator = numerator + (mixed.view(b, g, s * n, c) @ column_values).view(b, g, s, n, -1)
    return (numerator / denominator).flatten(1, 2)
