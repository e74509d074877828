"""Attention matching: keep what later queries will ask for."""

import dataclasses
from typing import ClassVar

import torch

from less_cache.policies.base import EvictionPolicy, check_count

PROTECTED_SHARE = 10  # one in so many kept tokens is one of the last
MEMORY = 0.8  # share of a token's squared score that comes from the choices before
RECALL = 0.1  # of a weight in the repetition of a prompt, beside root mean squares
FEWEST = 8  # tokens that stay whatever is spared


@dataclasses.dataclass(frozen=True)
class AttentionMatching(EvictionPolicy):
    """Keeps the tokens that reference queries attend to, per KV head; chooses anew after every `every` tokens.

    Reference queries stand for the queries to come: queries of the text so far, turned by RoPE from their own positions to
    those behind the text, where each sees all tokens.

        score_j = sqrt( mean over reference queries i, over the KV head's query group, of a_ij² )
        a_ij    = exp(q_i k_j / sqrt(d)) / sum_l exp(q_i k_l / sqrt(d))

    A decoding text has few queries to choose by, the prompt had many: a kept token's squared score is for `MEMORY` what it was
    at the choice before.

    Of a prompt that was read twice, the largest weight r_j that the repetition gave a token counts as well, beside root mean
    squares for a tenth (`RECALL`): sqrt(score_j² + (r_j / 10)²).

    The first token stays, and of the last ones a tenth of the budget. Between two choices nothing is scored and nothing
    evicted: the newest tokens lie beside those that were chosen, up to `every` of them.

    Args:
        budget: Tokens that a KV head keeps at each choice, or a fraction of the prompt.
        every: Tokens from one choice to the next.
        spared: Tokens of the budget that a head does without, since other things take their bytes.

    The idea of matching the full cache's attention: Zweiger et al., "Attention Matching", 2026 (arXiv 2602.16284); of the
    repetition: Kim et al., "KVzip", 2025 (arXiv 2505.23416).

    >>> AttentionMatching(budget=256, every=32)
    AttentionMatching(budget=256, every=32, spared=0)
    """

    name: ClassVar[str] = "attention_matching"
    asks_references: ClassVar[bool] = True

    budget: int | float
    every: int = dataclasses.field(default=32, metadata={"shared": True, "whole": True})
    spared: int = dataclasses.field(default=0, metadata={"least": 0, "whole": True})

    @property
    def block_size(self) -> int:
        return self.every

    @classmethod
    def from_budget(cls, budget: int | float) -> "AttentionMatching":
        check_count(cls.__name__, "budget", budget)
        return cls(budget=budget)

    def capacity(self, counts: torch.Tensor) -> torch.Tensor:
        budget, _, spared = counts
        return (budget - spared).maximum(budget.clamp_max(FEWEST))

    def by_head(self, counts: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        capacity = self.capacity(counts.T).unsqueeze(-1)  # [b, 1]
        budget = (capacity * shares).round().long()
        return torch.stack([budget, torch.full_like(budget, self.every), torch.zeros_like(budget)], dim=-1)

    def observed(self, counts: torch.Tensor, num_queries: int) -> int:
        return 0

    def protected(self, positions: torch.Tensor, seen: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        capacity = self.capacity(counts)
        recent = capacity // PROTECTED_SHARE
        return ((positions == 0) & (capacity > 1)) | (positions >= seen - recent)

    def judge(self, weights: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        squares = (weights.square() * queries[:, None, :, :, None]).sum(dim=(2, 3))  # [b, g, c]
        return (squares / queries.sum((1, 2)).clamp_min(1).view(-1, 1, 1)).sqrt()

    def recall(self, scores: torch.Tensor, repeated: torch.Tensor) -> torch.Tensor:
        return (scores.square() + (RECALL * repeated).square()).sqrt()

    def remember(self, before: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return (MEMORY * before.square() + (1 - MEMORY) * scores.square()).sqrt()
