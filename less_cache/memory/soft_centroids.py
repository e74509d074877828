"""A trained state of centroids: virtual tokens with a mean key as well as a mean value.

Axes: `b` batch, `h` query heads, `g` KV heads, `s` = h / g, `n` tokens, `d` head dim, `m` hidden size, `r` centroids.
"""

import math

import torch
from torch import nn
from torch.nn.functional import gelu, rms_norm, softplus

from less_cache.memory.base import TrainedMemory, by_head, by_row
from less_cache.ops.attention import group_heads

LIGHT = -3.0  # nats on a centroid's logit before training: at first the state hardly matters
MOST_WEIGHT = 20.0  # |log ψ| at most
HEAVIEST = 1024.0  # tokens: a centroid of any number weighs less than so many, before training
SLOWEST, FASTEST = 1 / 512, 1 / 32  # nats a token: how fast the centroids but the first fade before training


class LayerSoftCentroids(TrainedMemory):
    """Every evicted pair joins all R centroids, each with a learned weight; a centroid has a mean key and a mean value.

        ψ_r(k) = exp( a_r(k / |k|) )                           H_r = Σ e^{−λ_r t} ψ_r(k) (v, k) = Z_r (v̄_r, k̄_r)
        logit_r(q) = log W_r + q·k̄_r / √d + c_r(q / |q|)       W_r = 1 / (1 / Z_r + 1 / L_r)       value_r = v̄_r

    t: how many tokens ago a pair came. λ_r = f_r² is learned for each KV head; the first centroid never fades, for f = 0
    has no gradient. L_r is learned for each KV head too: a centroid of few tokens weighs as much as they do, one of any number
    less than L_r, so that a text without end does not drown what is kept. Where φ of the low-rank state is the same function
    for every text, q·k̄_r follows what was evicted, and a centroid that fades follows where the text is. a and c are networks
    of one hidden layer with a linear path beside it,

        a(x) = GELU(x W1 + b1) W2 + x W3 + b2

    with |·| the root mean square. c corrects for what a mean key gets less than its tokens would.

    R = rank / 2 centroids of 2 d + 1 numbers take no more than the R' = rank rows of d + 1 numbers of a low-rank state.
    """

    rank_step = 2
    rank_rule = "an even rank (a centroid takes the bytes of two rows)"
    words = "{} trained centroids"

    query_bias: nn.Parameter
    fading: nn.Parameter  # f
    limit: nn.Parameter  # log L

    @staticmethod
    def shapes(h: int, g: int, d: int, m: int, rank: int) -> dict[str, tuple[int, ...]]:
        r = rank // 2
        shapes: dict[str, tuple[int, ...]] = {"fading": (g, r), "limit": (g, r)}
        for side, heads in (("query", h), ("key", g)):
            shapes |= {
                f"{side}_in": (heads, d, m),  # W1
                f"{side}_in_bias": (heads, m),
                f"{side}_out": (heads, m, r),  # W2
                f"{side}_skip": (heads, d, r),  # W3
                f"{side}_bias": (heads, r),
            }
        return shapes

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Centroids that differ at random, of tokens taken as they are, `LIGHT` nats too light."""
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter)
            if name in ("query_in", "key_in", "key_out"):
                bound = (6 / (parameter.shape[-2] + parameter.shape[-1])) ** 0.5
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        nn.init.constant_(self.query_bias, LIGHT)
        nn.init.constant_(self.limit, math.log(HEAVIEST))
        if self.num_virtual_tokens > 1:
            slowest, fastest, fading = math.log2(SLOWEST), math.log2(FASTEST), self.num_virtual_tokens - 1
            rates = torch.logspace(slowest, fastest, fading, base=2, dtype=torch.float32)
            with torch.no_grad():
                self.fading[:, 1:] = rates.sqrt()

    def fading_rates(self) -> torch.Tensor:
        return self.fading.square()

    def log_weights(self, log_mass: torch.Tensor) -> torch.Tensor:
        return log_mass - softplus(log_mass - self.limit[:, None, None])

    def key_features(self, key_states: torch.Tensor) -> torch.Tensor:
        return self._network("key", key_states).clamp(-MOST_WEIGHT, MOST_WEIGHT).exp()

    def log_query_features(
        self, query_states: torch.Tensor, means: torch.Tensor, scaling: float, softcap: float | None = None
    ) -> torch.Tensor:
        mean_keys = means[..., -self.extra_dims :]  # [b, g, n or 1, r, d]
        queries = group_heads(query_states.float() * scaling, self.sizes[1]).transpose(2, 3)  # [b, g, n, s, d]
        logits = (queries @ mean_keys.transpose(-1, -2)).transpose(2, 3)  # [b, g, s, n, r]
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits + group_heads(self._network("query", query_states), self.sizes[1])

    def remembered(self, key_states: torch.Tensor, value_states: torch.Tensor) -> torch.Tensor:
        return torch.cat([value_states, key_states], dim=-1)

    @property
    def extra_dims(self) -> int:
        return self.sizes[2]

    def _network(self, side: str, states: torch.Tensor) -> torch.Tensor:
        """a(k) or c(q): `[b, heads, n, d]` to `[b, heads, n, r]`."""
        w1, b1, w2, w3, b2 = (getattr(self, f"{side}_{part}") for part in ("in", "in_bias", "out", "skip", "bias"))
        x = rms_norm(by_head(states), states.shape[-1:], eps=1e-6)  # [heads, b·n, d]
        hidden = gelu(torch.baddbmm(b1.unsqueeze(1), x, w1))
        return by_row(torch.baddbmm(torch.baddbmm(b2.unsqueeze(1), x, w3), hidden, w2), states)
