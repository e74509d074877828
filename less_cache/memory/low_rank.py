"""The learned kernels φ and ψ of the paper.

Axes: `b` batch, `h` query heads, `g` KV heads, `n` tokens, `d` head dim, `m` hidden size, `r` rank.
"""

import torch
from torch import nn
from torch.nn.functional import gelu

from less_cache.memory.base import TrainedMemory, by_head, by_row
from less_cache.ops.attention import group_heads


class LayerKernels(TrainedMemory):
    """φ and ψ of one layer: one φ per query head, one ψ per KV head; float32, no bias, g is GELU.

        φ(q) = | g( g(q W_φ1) W_φ2 ) |
        u(k) = |s1| ⊙ g( g(k W_ψ1) W_ψ2 )
        ψ(k) = | u + s2 ⊙ (u W_ψ3) |

    q and k are the states that attention sees (after RoPE), without the 1/√d of attention.

    Names: W_φ1 `query_in [h, d, m]`, W_φ2 `query_out [h, m, r]`, W_ψ1 `key_in [g, d, m]`, W_ψ2 `key_out [g, m, r]`,
    W_ψ3 `key_mix [g, r, r]`, s1 `key_scale [g, r]`, s2 `mix_scale [g, r]`.

    Source: Dong et al., "Get More with LESS", ICML 2024 (arXiv 2402.09398), section 4.
    """

    words = "R = {}"

    query_in: nn.Parameter
    query_out: nn.Parameter
    key_in: nn.Parameter
    key_out: nn.Parameter
    key_mix: nn.Parameter
    key_scale: nn.Parameter
    mix_scale: nn.Parameter

    @staticmethod
    def shapes(h: int, g: int, d: int, m: int, r: int) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, in the order that they are stored."""
        return {
            "query_in": (h, d, m),
            "query_out": (h, m, r),
            "key_in": (g, d, m),
            "key_out": (g, m, r),
            "key_mix": (g, r, r),
            "key_scale": (g, r),
            "mix_scale": (g, r),
        }

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Matrices from U(±√(6 / (fan_in + fan_out))), scales 1e-4, as in the official code."""
        for name, parameter in self.named_parameters():
            if name.endswith("scale"):
                nn.init.constant_(parameter, 1e-4)
            else:
                bound = (6 / (parameter.shape[-2] + parameter.shape[-1])) ** 0.5
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def query_features(self, query_states: torch.Tensor) -> torch.Tensor:
        """φ(q): `[b, h, n, d]` to `[b, h, n, r]`, float32, not negative."""
        features = gelu(torch.bmm(gelu(torch.bmm(by_head(query_states), self.query_in)), self.query_out)).abs()
        return by_row(features, query_states)

    def key_features(self, key_states: torch.Tensor) -> torch.Tensor:
        """ψ(k): `[b, g, n, d]` to `[b, g, n, r]`, float32, not negative."""
        u = gelu(torch.bmm(gelu(torch.bmm(by_head(key_states), self.key_in)), self.key_out))
        u = self.key_scale.abs().unsqueeze(1) * u
        return by_row((u + self.mix_scale.unsqueeze(1) * torch.bmm(u, self.key_mix)).abs(), key_states)

    def log_query_features(
        self, query_states: torch.Tensor, means: torch.Tensor, scaling: float, softcap: float | None = None
    ) -> torch.Tensor:
        features = self.query_features(query_states).clamp_min(torch.finfo(torch.float32).tiny)
        return group_heads(features.log(), self.sizes[1])
