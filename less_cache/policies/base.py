"""What every eviction policy has in common: which tokens a KV head keeps.

Axes: `b` batch, `g` KV heads, `s` query heads per KV head, `n` queries, `c` cache columns, `f` token counts
(the policy's dataclass fields).
"""

import abc
import dataclasses
from typing import Any, ClassVar

import torch

from less_cache.errors import LESSError

MOST_TOKENS = 2**31 - 2  # positions are int32


@dataclasses.dataclass(frozen=True)
class EvictionPolicy(abc.ABC):
    """Chooses which tokens each KV head keeps. Stateless: all per-sequence state is passed in and handed back.

    A policy is a frozen dataclass whose fields are token counts. Each is an `int` (tokens) or a `float` in (0, 1)
    (a fraction of the prompt, resolved at prefill, rounded, at least 1 token).

    The cache calls, for every block of new tokens, `arrival` (first scores of the new columns), `observe` (the
    block's attention weights), then `keep` (or `victim`, its fast form for one step). A column that holds nothing
    has position -1 and is never kept; positions count the real tokens of a row from 0, padding left out.
    """

    name: ClassVar[str]
    compares_heads: ClassVar[bool] = True  # whether scores mean the same in every head, so that heads can share a budget
    asks_references: ClassVar[bool] = False  # whether `judge` gives the scores, from reference queries at a choice

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_count(type(self).__name__, field.name, getattr(self, field.name), **_bounds(field))

    @classmethod
    @abc.abstractmethod
    def from_budget(cls, budget: int | float) -> "EvictionPolicy":
        """The policy that spends a total `budget` (tokens, or a fraction of the prompt) in its usual proportions."""

    @abc.abstractmethod
    def capacity(self, counts: torch.Tensor) -> torch.Tensor | None:
        """Most tokens a KV head keeps, `[b, 1, 1]`; `None` for a policy without a budget.

        `counts`: `[f, b, 1, 1]`; where heads have budgets of their own `[f, b, g, 1]`, and so is what comes of it.
        """

    @abc.abstractmethod
    def observed(self, counts: torch.Tensor, num_queries: int) -> int:
        """How many of a block's last queries `observe` must see: 0 for a policy that needs no attention weights."""

    @abc.abstractmethod
    def protected(self, positions: torch.Tensor, seen: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Columns that must stay whatever their score, `[b, g, c]`. `positions`: `[b, g, c]`, `seen`: `[b, 1, 1]`."""

    def arrival(self, positions: torch.Tensor) -> torch.Tensor:
        """Scores of columns that have just come in, float32, same shape as `positions`."""
        return torch.zeros_like(positions, dtype=torch.float32)

    def observe(self, scores: torch.Tensor, weights: torch.Tensor, query_positions: torch.Tensor) -> torch.Tensor:
        """Scores after the queries at `query_positions` `[b, n]` (-1: padding, its weights are 0) have attended.

        `scores`: `[b, g, c]`; `weights`: `[b, g, s, n, c]`, the softmax over the kept tokens alone.
        """
        return scores

    @property
    def block_size(self) -> int | None:
        """Tokens from one choice to the next; None: after the prompt one leaves for each that comes."""
        return None

    def judge(self, weights: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Scores at a choice, `[b, g, c]`, of a policy that asks for reference queries.

        `weights`: `[b, g, s, n, c]`, the softmax over all columns; `queries`: which of the n there are, bool `[b, s, n]`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not ask for reference queries.")

    def recall(self, scores: torch.Tensor, repeated: torch.Tensor) -> torch.Tensor:
        """What counts in the choice of a prompt that was read twice, `[b, g, c]`: of `scores` from its reference queries, and
        of `repeated`, the largest weight that its repetition gave each token.
        """
        raise NotImplementedError(f"{type(self).__name__} does not ask for reference queries.")

    def remember(self, before: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """What counts at a choice, of the `scores` from its reference queries and those of the choice `before`, `[b, g, c]`."""
        return scores

    def renumbered(self, scores: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        """Scores `[b, g, c]` once the token at position p of a row is at `moved[row, p]`, `[b, t]`, -1: it is gone."""
        return scores

    def keep(self, scores: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Columns that stay, `[b, g, c]`: the protected, then the highest scores up to capacity (ties: the newest)."""
        capacity = self.capacity(counts)
        assert capacity is not None, "a policy without a budget overrides keep"
        alive = positions >= 0
        protected = alive & self.protected(positions, seen, counts)
        # Two stable sorts order the columns by (protected or score, position), best first.
        ranked_scores = scores.masked_fill(protected, torch.inf).masked_fill(~alive, -torch.inf)
        newest_first = positions.argsort(dim=-1, descending=True, stable=True)
        best_first = ranked_scores.gather(-1, newest_first).argsort(dim=-1, descending=True, stable=True)
        order = newest_first.gather(-1, best_first)
        rank = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
        return protected | (alive & (rank < capacity))

    def victim(self, scores: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The column that `keep` drops first, `[b, g, 1]`, for a head that is one token over its capacity."""
        stays = (positions < 0) | self.protected(positions, seen, counts)
        scores = scores.masked_fill(stays, torch.inf)
        above = scores > scores.amin(dim=-1, keepdim=True)
        return positions.masked_fill(above, torch.iinfo(positions.dtype).max).argmin(dim=-1, keepdim=True)

    def resolve(self, prompt_length: torch.Tensor, shares: torch.Tensor | None = None) -> torch.Tensor:
        """Token counts of each row, `[b, f]` int64, for prompts of `prompt_length` `[b]` real tokens.

        `shares`: how much of the budget each KV head gets, `[g]`, 1 on average; then the counts are `[b, g, f]`, but for those
        that are the same for every head.
        """
        if shares is not None:
            prompt_length = prompt_length.unsqueeze(-1).expand(-1, len(shares))  # [b, g]
        columns = []
        for field in dataclasses.fields(self):
            count, least = getattr(self, field.name), field.metadata.get("least", 1)
            share = 1 if shares is None or field.metadata.get("shared", False) else shares
            if isinstance(count, float):
                columns.append((prompt_length.float() * (count * share)).round().clamp_min(1).long())
            elif isinstance(share, int):
                columns.append(torch.full_like(prompt_length, count, dtype=torch.long))
            else:
                columns.append((share * count).round().clamp_min(least).long().expand_as(prompt_length))
        return torch.stack(columns, dim=-1)

    def by_head(self, counts: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Token counts `[b, f]` as those of KV heads, `[b, g, f]`, which get `shares` `[b, g]` of the budget."""
        columns = []
        total, spent = torch.zeros_like(shares, dtype=torch.long), torch.zeros_like(shares, dtype=torch.long)
        for field, count in zip(dataclasses.fields(self), counts.unbind(-1), strict=True):
            by_head = count.unsqueeze(-1).expand(shares.shape)
            if not field.metadata.get("shared", False):
                total = total + by_head
                spent_with_it = (total * shares).round().long()  # rounded once, so that the counts of a head add up
                by_head = (spent_with_it - spent).clamp_min(field.metadata.get("least", 1))
                spent = spent_with_it
            columns.append(by_head)
        return torch.stack(columns, dim=-1)

    @property
    def is_fractional(self) -> bool:
        """Whether a count is a fraction of the prompt."""
        return any(isinstance(getattr(self, field.name), float) for field in dataclasses.fields(self))

    def to_dict(self) -> dict[str, str | int | float]:
        """JSON form, read back by `less_cache.policies.policy_from_dict`."""
        return {"name": self.name, **dataclasses.asdict(self)}


def _bounds(field: dataclasses.Field) -> dict[str, Any]:
    """What is said of a count beside its name: at least how many tokens, and whether it is never a fraction."""
    return {name: field.metadata[name] for name in ("least", "whole") if name in field.metadata}


def check_count(owner: str, field: str, count: int | float, least: int = 1, whole: bool = False) -> None:
    """Raise unless `count` is an int of at least `least` tokens or, unless it is to be `whole`, a float in (0, 1)."""
    fraction = "" if whole else " or a float in (0, 1) (fraction of the prompt)"
    expected = f"{owner}: expected {field} to be an int >= {least} (tokens){fraction}"
    if isinstance(count, bool) or not isinstance(count, int if whole else int | float):
        raise LESSError(f"{expected}, got {count!r} of type {type(count).__name__}.")
    if isinstance(count, int) and not least <= count <= MOST_TOKENS:
        raise LESSError(f"{expected}, got {count}." if count < least else f"{expected}, at most {MOST_TOKENS:,}, got {count}.")
    if isinstance(count, float) and not 0 < count < 1:
        raise LESSError(f"{expected}, got {count}. For a token count pass an int.")


def halve(budget: int | float) -> tuple[int | float, int | float]:
    """Two equal parts of a total budget; an odd token goes to the first."""
    if isinstance(budget, int):
        return budget - budget // 2, budget // 2
    return budget / 2, budget / 2
