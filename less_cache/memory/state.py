"""The low-rank state that evicted tokens are folded into.

Axes: `b` batch, `g` KV heads, `m` tokens folded at once, `d` head dim, `r` rank.
"""

import dataclasses

import torch

LARGEST = torch.finfo(torch.float16).max


@dataclasses.dataclass
class PackedState:
    """A `LowRankState` at rest, in half the bytes: means do not grow with the text, so that 16 bits hold them."""

    means: torch.Tensor  # [b, g, r, d] float16
    features_sum: torch.Tensor  # [b, g, r] float32


@dataclasses.dataclass
class LowRankState:
    """The recurrent state of LESS, float32: two sums over every evicted pair (k, v).

        H = Σ ψ(k)ᵀ v   `values_sum`    [b, g, r, d]
        z = Σ ψ(k)ᵀ     `features_sum`  [b, g, r]

    Row r of the state acts as one *virtual token* whose value is H_r / z_r (a convex combination of evicted values)
    and whose logit is log φ_r(q) + log z_r. A memory may sum more than values: d is the width of what it folds in.

    Source: Dong et al., "Get More with LESS", ICML 2024 (arXiv 2402.09398), equations 4 to 6.
    """

    values_sum: torch.Tensor
    features_sum: torch.Tensor

    @classmethod
    def empty(cls, batch: int, num_key_value_heads: int, rank: int, head_dim: int, device: torch.device) -> "LowRankState":
        """The state before anything was evicted."""
        return cls(
            values_sum=torch.zeros(batch, num_key_value_heads, rank, head_dim, dtype=torch.float32, device=device),
            features_sum=torch.zeros(batch, num_key_value_heads, rank, dtype=torch.float32, device=device),
        )

    def fold_in(self, key_features: torch.Tensor, values: torch.Tensor) -> None:
        """Add evicted pairs in place: ψ(k) `[b, g, m, r]`, 0 where nothing is evicted, and v `[b, g, m, d]`."""
        self.values_sum += key_features.transpose(-1, -2) @ values.float()
        self.features_sum += key_features.sum(dim=-2)

    def packed(self) -> PackedState:
        """The same at rest."""
        return PackedState(in_16_bits(self.means()), self.features_sum)

    @classmethod
    def unpacked(cls, packed: PackedState) -> "LowRankState":
        """What `packed` gave, as near as 16 bits allow."""
        return cls(packed.means.float() * packed.features_sum.unsqueeze(-1), packed.features_sum.clone())

    def scale(self, factor: torch.Tensor) -> None:
        """Multiply all that was folded in by `factor`, `[b or 1, g, r]`, in place."""
        self.values_sum *= factor.unsqueeze(-1)
        self.features_sum *= factor

    def means(self) -> torch.Tensor:
        """H_r / z_r, `[b, g, r, d]`; 0 where z_r is 0."""
        return self.values_sum / self.features_sum.unsqueeze(-1).clamp_min(torch.finfo(torch.float32).tiny)

    def log_mass(self) -> torch.Tensor:
        """log z_r, `[b, g, 1, 1, r]`."""
        return self.features_sum.log()[:, :, None, None]


def in_16_bits(numbers: torch.Tensor) -> torch.Tensor:
    """As float16, the largest that there is where they are larger."""
    return numbers.clamp(-LARGEST, LARGEST).half()
