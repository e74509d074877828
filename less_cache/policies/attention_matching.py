"""Attention matching: keep what later queries will ask for."""

import dataclasses
from typing import ClassVar

import torch

from less_cache.policies.base import EvictionPolicy, check_count

PROTECTED_SHARE = 10  # one in so many kept tokens is one of the last


@dataclasses.dataclass(frozen=True)
class AttentionMatching(EvictionPolicy):
    """Keeps the tokens that reference queries attend to, per KV head; chooses anew after every `every` tokens.

    Reference queries stand for the queries to come: queries of the text so far, turned by RoPE from their own positions to
    those behind the text, where each sees all tokens.

        score_j = sqrt( mean over reference queries i, over the KV head's query group, of a_ij² )
        a_ij    = exp(q_i k_j / sqrt(d)) / sum_l exp(q_i k_l / sqrt(d))

    The first token stays, and of the last ones a tenth of the budget. Between two choices nothing is scored and nothing
    evicted: the newest tokens lie beside those that were chosen, up to `every` of them.

    Args:
        budget: Tokens that a KV head keeps at each choice, or a fraction of the prompt.
        every: Tokens from one choice to the next.

    The idea of matching the full cache's attention: Zweiger et al., "Attention Matching", 2026 (arXiv 2602.16284).

    >>> AttentionMatching(budget=256, every=32)
    AttentionMatching(budget=256, every=32)
    """

    name: ClassVar[str] = "attention_matching"
    asks_references: ClassVar[bool] = True

    budget: int | float
    every: int = dataclasses.field(default=32, metadata={"shared": True, "whole": True})

    @property
    def block_size(self) -> int:
        return self.every

    @classmethod
    def from_budget(cls, budget: int | float) -> "AttentionMatching":
        check_count(cls.__name__, "budget", budget)
        return cls(budget=budget)

    def capacity(self, counts: torch.Tensor) -> torch.Tensor:
        return counts[0]

    def observed(self, counts: torch.Tensor, num_queries: int) -> int:
        return 0

    def protected(self, positions: torch.Tensor, seen: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        recent = counts[0] // PROTECTED_SHARE
        return ((positions == 0) & (counts[0] > 1)) | (positions >= seen - recent)

    def judge(self, weights: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        squares = (weights.square() * queries[:, None, None, :, None]).sum(dim=(2, 3))  # [b, g, c]
        return (squares / (queries.sum(-1).clamp_min(1) * weights.shape[2]).view(-1, 1, 1)).sqrt()
