"""Sinks and recent tokens: StreamingLLM, LESS's Λ."""

import dataclasses
from typing import ClassVar

import torch

from less_cache.errors import LESSError
from less_cache.policies.base import EvictionPolicy, check_count


@dataclasses.dataclass(frozen=True)
class SinkRecent(EvictionPolicy):
    """Keeps the first `sinks` tokens and the last `recent` tokens, at their original positions (LESS's Λ).

    Needs no attention weights. What is kept depends on positions alone, so one-shot, chunked and token-by-token
    feeding keep the same tokens and fold the same tokens into the state.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024 (arXiv 2309.17453).

    >>> SinkRecent(sinks=4, recent=124)
    SinkRecent(sinks=4, recent=124)
    >>> SinkRecent.from_budget(128)
    SinkRecent(sinks=4, recent=124)
    """

    name: ClassVar[str] = "sink_recent"
    compares_heads: ClassVar[bool] = False

    sinks: int | float = dataclasses.field(default=4, metadata={"least": 0, "shared": True})
    recent: int | float = 124

    @classmethod
    def from_budget(cls, budget: int | float) -> "SinkRecent":
        check_count(cls.__name__, "budget", budget)
        if isinstance(budget, float):
            return cls(sinks=4, recent=budget)
        if budget <= 4:
            raise LESSError(f"SinkRecent: expected a budget above its 4 sinks, got {budget}. Pass sinks and recent.")
        return cls(sinks=4, recent=budget - 4)

    def capacity(self, counts: torch.Tensor) -> torch.Tensor:
        sinks, recent = counts
        return sinks + recent

    def observed(self, counts: torch.Tensor, num_queries: int) -> int:
        return 0

    def protected(self, positions: torch.Tensor, seen: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        sinks, recent = counts
        return (positions < sinks) | (positions >= seen - recent)
