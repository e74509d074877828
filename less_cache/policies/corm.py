"""CORM: keep what recent queries found important, without a budget."""

import dataclasses
from typing import ClassVar

import torch

from less_cache.policies.base import EvictionPolicy, check_count, halve


@dataclasses.dataclass(frozen=True)
class CORM(EvictionPolicy):
    """Evicts a token that was minor for all of the last `window` queries; the last `recent` tokens always stay.

    A token is important to the query at step t (t tokens seen, this one included) if its attention weight is at
    least 1 / t, the mean weight over the tokens seen; with grouped queries, if it is important to any query head of
    its KV head. A token younger than `window` queries stays. There is no budget: heads keep different numbers.

    The score is the position of the last query that found the token important, which says the same as the paper's
    ring of `window` bits in one number. One-shot, chunked and token-by-token feeding differ by definition: the
    weights are over the tokens kept at the time.

    Source: Dai et al., "CORM: Cache Optimization with Recent Message" (arXiv 2404.15949).

    >>> CORM(window=256, recent=256)
    CORM(window=256, recent=256)
    """

    name: ClassVar[str] = "corm"
    compares_heads: ClassVar[bool] = False

    window: int | float = 256
    recent: int | float = 256

    @classmethod
    def from_budget(cls, budget: int | float) -> "CORM":
        check_count(cls.__name__, "budget", budget, least=2)
        window, recent = halve(budget)
        return cls(window=window, recent=recent)

    def capacity(self, counts: torch.Tensor) -> None:
        return None

    def observed(self, counts: torch.Tensor, num_queries: int) -> int:
        window, _ = counts
        return min(num_queries, int(window.max()))

    def protected(self, positions: torch.Tensor, seen: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        _, recent = counts
        return positions >= seen - recent

    def arrival(self, positions: torch.Tensor) -> torch.Tensor:
        # As if important to the query just before its own: `window` queries must pass before it can go.
        return (positions - 1).float()

    def observe(self, scores: torch.Tensor, weights: torch.Tensor, query_positions: torch.Tensor) -> torch.Tensor:
        at = query_positions[:, None, :, None].float()  # [b, 1, n, 1]
        threshold = 1 / (at + 1)  # inf for padding: never reached
        important = weights.amax(dim=2) >= threshold  # [b, g, n, c]
        return torch.maximum(scores, torch.where(important, at, -1.0).amax(dim=2))

    def renumbered(self, scores: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        latest = (moved >= 0).cumsum(-1) - 1  # [b, t], the last query up to a position that is still there
        b, g, c = scores.shape
        at = scores.clamp(0, moved.shape[-1] - 1).long().view(b, g * c)
        return torch.where(scores < 0, scores, latest.gather(-1, at).view(b, g, c).float())

    def keep(self, scores: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        window, _ = counts
        return (positions >= 0) & (self.protected(positions, seen, counts) | (scores >= seen - window))
