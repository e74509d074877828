"""Decoding under a policy, all steps of a block at once and differentiable in the kernels.

Axes: `b` batch, `h` query heads, `g` KV heads, `s` = h / g, `p` prompt tokens, `n` decoded tokens, `k` prompt tokens
kept, `c` = k + n columns, `d` head dim, `r` rank.
"""

import dataclasses

import torch

from less_cache.memory.base import TrainedMemory
from less_cache.ops.attention import attention_logits, sparse_softmax
from less_cache.policies import EvictionPolicy

LEAST_MASS = 1e-20  # of a virtual token: nothing reads less than that, and gradients, which are over the mass, stay finite


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

    def leaving(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of the columns that leave before the last query, `[b, g, l]`, and which of them have when each query
        attends, `[b, g, n, l]` float32; heads of which fewer leave have some that do not.
        """
        p, n = self.keep.shape[-1], self.visible.shape[2]
        leaves = self.evicted[:, :, -1]  # [b, g, c]; what has left stays away
        found = (~leaves).int().argsort(dim=-1, stable=True)[..., : int(leaves.sum(dim=-1).max())]
        decoded = torch.arange(p, p + n, device=found.device).expand(*self.order.shape[:2], n)
        tokens = torch.cat([self.order, decoded], dim=-1).gather(-1, found)
        return tokens, self.evicted.gather(-1, found.unsqueeze(2).expand(-1, -1, n, -1)).float()

    def split(self, batch_size: int) -> list["Decode"]:
        """The parts of a batch, without columns that only other parts need."""
        fields = (getattr(self, field.name).split(batch_size) for field in dataclasses.fields(self))
        parts = []
        for keep, order, visible, evicted in zip(*fields, strict=True):
            k, most = int(keep.sum(dim=-1).max()), order.shape[-1]
            visible, evicted = (torch.cat([each[..., :k], each[..., most:]], dim=-1) for each in (visible, evicted))
            parts.append(Decode(keep, order[..., :k], visible, evicted))
        return parts


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
    logits = attention_logits(query_states, columns(key_states, order, p), None, scaling, softcap)
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
            weights = step_logits.softmax(dim=-1) if sinks is None else sparse_softmax(step_logits, sinks)[0]
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
    return torch.cat([_tokens(states[:, :, :p], order), states[:, :, p:]], dim=2)


def _tokens(states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Of `[b, g, t, *]` the tokens at `[b, g, l]`: `[b, g, l, *]`."""
    return states.gather(2, indices.unsqueeze(-1).expand(*indices.shape, states.shape[-1]))


def attend(
    decode: Decode,
    query_states: torch.Tensor,
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    memory: TrainedMemory | None,
    logits: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention output of the decoded tokens, `[b, h, n, d]` float32: kept and virtual tokens in one softmax.

    `logits`: of the queries and the columns, `[b, g, s, n, c]`, -inf where not visible. `sinks`: `[h]`.
    """
    p = decode.keep.shape[-1]
    b, g, s, n, c = logits.shape
    column_values = columns(value_states.float(), decode.order, p)  # [b, g, c, d]
    everything = [logits]
    if memory is not None:
        means, log_mass = _states(decode, key_states, value_states, memory)
        log_weights = memory.log_weights(log_mass)  # [b, g, 1, n, r]
        everything.append(memory.log_query_features(query_states, means, scaling, softcap) + log_weights)
    if sinks is not None:
        everything.append(sinks.float().view(1, g, s, 1, 1).expand(b, g, s, n, 1))
    weights = torch.cat(everything, dim=-1).softmax(dim=-1)
    output = (weights[..., :c].reshape(b, g, s * n, c) @ column_values).view(b, g, s, n, -1)
    if memory is not None:
        virtual_weights = weights[..., c : c + memory.num_virtual_tokens].transpose(2, 3)  # [b, g, n, s, r]
        output = output + (virtual_weights @ memory.values_of(means)).transpose(2, 3)
    return output.flatten(1, 2)


def _states(
    decode: Decode, key_states: torch.Tensor, value_states: torch.Tensor, memory: TrainedMemory
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state when each query attends: means `[b, g, n, r, *]` and log-masses `[b, g, 1, n, r]`.

    Pairs weigh what they do at the prompt's end, and fade from there to each query. Of the columns, only those that leave
    within the block change the state from one query to the next. No gradient goes into the prompt's pairs: the dense model
    made them.
    """
    p, n = decode.keep.shape[-1], decode.visible.shape[2]
    features, rates = memory.key_features(key_states), memory.fading_rates()  # [b, g, p + n, r]
    if rates is not None:
        features = features * torch.exp(rates.unsqueeze(1) * torch.arange(-p, n, device=rates.device).unsqueeze(-1))
    remembered = memory.remembered(key_states, value_states).float()  # [b, g, p + n, *]
    folded = features[:, :, :p] * ~decode.keep.unsqueeze(-1)
    leaving, evicted = decode.leaving()  # [b, g, l], [b, g, n, l]
    late_features = _tokens(features, leaving)  # [b, g, l, r]
    late_pairs = late_features.unsqueeze(-1) * _tokens(remembered, leaving).unsqueeze(-2)  # [b, g, l, r, *]
    mass = folded.sum(dim=2, keepdim=True) + evicted @ late_features  # [b, g, n, r]
    sums = (folded.transpose(-1, -2) @ remembered[:, :, :p].detach()).unsqueeze(2)  # [b, g, 1, r, *]
    sums = sums + (evicted @ late_pairs.flatten(-2)).unflatten(-1, sums.shape[-2:])  # [b, g, n, r, *]
    log_mass = mass.clamp_min(LEAST_MASS).log()
    if rates is not None:
        log_mass = log_mass - rates.unsqueeze(1) * torch.arange(n, device=rates.device).unsqueeze(-1)
    return sums / mass.unsqueeze(-1).clamp_min(LEAST_MASS), log_mass.unsqueeze(2)
