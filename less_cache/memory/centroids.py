"""A state that needs no training: centroids of the evicted tokens.

Axes: `b` batch, `h` query heads, `g` KV heads, `s` = h / g, `m` tokens folded at once, `n` queries, `d` head dim, `r`
centroids.
"""

import dataclasses

import torch

from less_cache.memory.base import LayerMemory
from less_cache.memory.state import in_16_bits
from less_cache.ops.attention import LOWEST, group_heads
from less_cache.ops.blocks import blocks

ITERATIONS = 6  # of Lloyd's algorithm over a block
SPREAD = 0.25  # share of |q|²σ² that a centroid's logit gains; half is what a normal distribution would give
MOST_SPREAD = 2.0  # most that it gains, in nats


@dataclasses.dataclass
class CentroidState:
    """Sums over the tokens of each centroid, float32."""

    count: torch.Tensor  # [b, g, r]
    keys_sum: torch.Tensor  # [b, g, r, d]
    values_sum: torch.Tensor  # [b, g, r, d]
    squares_sum: torch.Tensor  # [b, g, r] of |k|²


@dataclasses.dataclass
class PackedCentroids:
    """A `CentroidState` at rest, in half the bytes."""

    count: torch.Tensor  # [b, g, r] float32
    mean_keys: torch.Tensor  # [b, g, r, d] float16: means do not grow with the text
    mean_values: torch.Tensor  # [b, g, r, d] float16
    variance: torch.Tensor  # [b, g, r] float32, |k|² less the square of its mean


class LayerCentroids(LayerMemory):
    """Every evicted pair joins the nearest of R centroids; a centroid acts as a virtual token with its mean key and value.

        logit_r(q) = q·k̄_r / √d + log n_r + min(|q|² σ_r² / 4d, 2)        value_r = v̄_r

    n_r: tokens of centroid r, k̄_r and v̄_r: their mean key and value, σ_r²: variance of their keys, mean over
    dimensions. The last term makes up for Jensen's inequality: a mean key gets less attention than its tokens do.

    Pairs are compared by |k − k̄|² + ρ |v − v̄|², ρ the ratio of the keys' mean square to the values'. The tokens of one
    block are clustered with Lloyd's algorithm, from evenly spaced seeds for centroids that are still empty; a single
    token joins the nearest centroid, or an empty one. So one-shot, chunked and token-by-token feeding give different
    states.

    R (2 d + 2) numbers a KV head: with R = 4 as many as the low-rank state of rank 8.
    """

    def __init__(self, num_centroids: int):
        super().__init__()
        self.num_centroids = num_centroids

    def empty_state(self, batch: int, num_key_value_heads: int, head_dim: int, device: torch.device) -> CentroidState:
        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(batch, num_key_value_heads, self.num_centroids, *size, dtype=torch.float32, device=device)

        return CentroidState(count=zeros(), keys_sum=zeros(head_dim), values_sum=zeros(head_dim), squares_sum=zeros())

    def fold_in(
        self,
        state: CentroidState,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        leaves: torch.Tensor,
        positions: torch.Tensor,
        seen: torch.Tensor,
    ) -> None:
        b, g, m, d = key_states.shape
        if m == 1:  # of a step, few operations
            self._fold_in(state, key_states, value_states, leaves)
            return
        numbers = m * (4 * d + 2 * value_states.shape[-1])  # of a head; each is clustered by itself
        for rows in blocks(0, b, g * numbers):
            for heads in blocks(0, g, (rows.stop - rows.start) * numbers):
                some = CentroidState(*[each[rows, heads] for each in vars(state).values()])
                self._fold_in(some, key_states[rows, heads], value_states[rows, heads], leaves[rows, heads])

    def _fold_in(
        self, state: CentroidState, key_states: torch.Tensor, value_states: torch.Tensor, leaves: torch.Tensor
    ) -> None:
        share = leaves.unsqueeze(-1).float()  # [b, g, m, 1]
        keys, values = key_states.float() * share, value_states.float() * share
        squares = keys.square().sum(-1)  # [b, g, m]
        joins = self._assign(state, keys, values, squares, leaves)  # [b, g, m, r]
        state.count += joins.sum(dim=2)
        state.keys_sum += joins.transpose(-1, -2) @ keys
        state.values_sum += joins.transpose(-1, -2) @ values
        state.squares_sum += (joins * squares.unsqueeze(-1)).sum(dim=2)

    def _assign(
        self,
        state: CentroidState,
        keys: torch.Tensor,
        values: torch.Tensor,
        squares: torch.Tensor,
        leaves: torch.Tensor,
    ) -> torch.Tensor:
        """Which centroid each token joins, one-hot `[b, g, m, r]`, 0 where nothing leaves."""
        tiny = torch.finfo(torch.float32).tiny
        held = state.count.clamp_min(1).unsqueeze(-1)
        values_squares = (state.values_sum.square() / held).sum(dim=(-1, -2)) + values.square().sum(dim=(-1, -2))  # [b, g]
        keys_squares = state.squares_sum.sum(-1) + squares.sum(-1)
        weight = (keys_squares / values_squares.clamp_min(tiny)).sqrt()[..., None, None]  # √ρ
        pairs = torch.cat([keys, values * weight], dim=-1)  # [b, g, m, 2d]
        sums = torch.cat([state.keys_sum, state.values_sum * weight], dim=-1)  # [b, g, r, 2d]

        first = leaves.int().argsort(dim=-1, descending=True, stable=True)  # those that leave, in order
        spaced = torch.linspace(0, 1, self.num_centroids, dtype=torch.float32, device=keys.device) * (
            leaves.sum(-1, keepdim=True) - 1
        )
        index = first.gather(-1, spaced.clamp_min(0).long())  # [b, g, r]
        seeds = pairs.gather(2, index.unsqueeze(-1).expand(*index.shape, pairs.shape[-1]))
        centers = torch.where(state.count.unsqueeze(-1) > 0, sums / held, seeds)
        joins = _nearest(pairs, centers, leaves)
        for _ in range(ITERATIONS - 1 if pairs.shape[2] > 1 else 0):
            count = (state.count + joins.sum(dim=2)).unsqueeze(-1)
            means = (sums + joins.transpose(-1, -2) @ pairs) / count.clamp_min(1)
            centers = torch.where(count > 0, means, centers)
            joins = _nearest(pairs, centers, leaves)
        return joins

    def virtual_tokens(
        self,
        state: CentroidState,
        query_states: torch.Tensor,
        scaling: float,
        softcap: float | None = None,
        later: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = state.count.clamp_min(1).unsqueeze(-1)  # [b, g, r, 1]
        keys, values = state.keys_sum / count, state.values_sum / count
        variance = _variance(state, keys) / keys.shape[-1]  # [b, g, r]
        queries = group_heads(query_states.float() * scaling, keys.shape[1])  # [b, g, s, n, d]
        logits = queries @ keys.transpose(-1, -2).unsqueeze(2)  # [b, g, s, n, r]
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        spread = SPREAD * queries.square().sum(-1, keepdim=True) * variance[:, :, None, None]
        logits = logits + spread.clamp_max(MOST_SPREAD) + state.count.log()[:, :, None, None]
        return logits.clamp_min(LOWEST), values

    def packed(self, state: CentroidState) -> PackedCentroids:
        count = state.count.clamp_min(1).unsqueeze(-1)
        keys = in_16_bits(state.keys_sum / count)
        values = in_16_bits(state.values_sum / count)
        return PackedCentroids(state.count, keys, values, _variance(state, state.keys_sum / count))

    def unpacked(self, packed: PackedCentroids) -> CentroidState:
        count, keys = packed.count.unsqueeze(-1), packed.mean_keys.float()
        squares = packed.count * (packed.variance + keys.square().sum(-1))
        return CentroidState(packed.count.clone(), keys * count, packed.mean_values.float() * count, squares)

    def change_values(self, state: CentroidState, change: torch.Tensor) -> None:
        state.values_sum += change * state.count.unsqueeze(-1)


def _variance(state: CentroidState, keys: torch.Tensor) -> torch.Tensor:
    """How far the keys of a centroid are from their mean `keys` `[b, g, r, d]`, squared, on average: `[b, g, r]`."""
    return (state.squares_sum / state.count.clamp_min(1) - keys.square().sum(-1)).clamp_min(0)


def _nearest(pairs: torch.Tensor, centers: torch.Tensor, leaves: torch.Tensor) -> torch.Tensor:
    """The center nearest to each pair, one-hot `[b, g, m, r]`, 0 where nothing leaves."""
    # |x − c|² without |x|², which is the same for all centers
    distances = centers.square().sum(-1).unsqueeze(2) - 2 * pairs @ centers.transpose(-1, -2)
    nearest = distances.argmin(dim=-1, keepdim=True)
    return torch.zeros_like(distances).scatter_(-1, nearest, 1) * leaves.unsqueeze(-1)
