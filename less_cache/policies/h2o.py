"""H2O: heavy hitters and recent tokens."""

import dataclasses
from typing import ClassVar

import torch

from less_cache.policies.base import EvictionPolicy, check_count, halve


@dataclasses.dataclass(frozen=True)
class H2O(EvictionPolicy):
    """Keeps the `heavy` tokens of largest accumulated attention and the last `recent` tokens, per KV head.

        score_j = sum over every query i seen, over the KV head's query group, of
                  exp(q_i k_j / sqrt(d)) / sum_{l kept at i} exp(q_i k_l / sqrt(d))

    Heavy tokens are chosen among those older than `recent`. One-shot, chunked and token-by-token feeding keep
    different tokens by definition: a token evicted early can no longer collect attention.

    Source: Zhang et al., "H2O: Heavy-Hitter Oracle", NeurIPS 2023 (arXiv 2306.14048).

    >>> H2O(heavy=64, recent=64)
    H2O(heavy=64, recent=64)
    >>> H2O.from_budget(0.05)
    H2O(heavy=0.025, recent=0.025)
    """

    name: ClassVar[str] = "h2o"

    heavy: int | float
    recent: int | float

    @classmethod
    def from_budget(cls, budget: int | float) -> "H2O":
        check_count(cls.__name__, "budget", budget, least=2)
        recent, heavy = halve(budget)
        return cls(heavy=heavy, recent=recent)

    def capacity(self, counts: torch.Tensor) -> torch.Tensor:
        heavy, recent = counts
        return heavy + recent

    def observed(self, counts: torch.Tensor, num_queries: int) -> int:
        return num_queries

    def protected(self, positions: torch.Tensor, seen: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        _, recent = counts
        return positions >= seen - recent

    def observe(self, scores: torch.Tensor, weights: torch.Tensor, query_positions: torch.Tensor) -> torch.Tensor:
        return scores + weights.sum(dim=(2, 3))
