"""What is counted for each row of a batch.

Axes: `b` rows, `g` KV heads, `n` new tokens, `f` token counts of the policy.
"""

import dataclasses

import torch

from less_cache.policies import EvictionPolicy


@dataclasses.dataclass(frozen=True)
class Hidden:
    """What a mask leaves of the tokens seen."""

    stays: torch.Tensor  # [b, t] bool, of all t tokens seen, padding included, those that are real and not hidden
    moved: torch.Tensor  # [b, t] int32, for each position of a token seen where it is counted from now on; -1: hidden

    @property
    def seen(self) -> torch.Tensor:
        """Tokens of each row that are left, `[b]`."""
        return self.stays.sum(-1)


@dataclasses.dataclass
class Rows:
    """Counters of each row: tokens seen, and the policy's token counts, which stay once its prompt is over.

    A prompt may come in several blocks. It is over when a token comes alone.
    """

    seen: torch.Tensor  # [b] int64, real tokens
    settled: torch.Tensor  # [b] bool, the prompt is over
    counts: torch.Tensor | None = None  # [b, f] int64, or [b, g, f] where heads differ; None before the first block
    allotted: torch.Tensor | None = None  # [b] bool, heads have got budgets of their own by their scores; None: none have
    real: torch.Tensor | None = None  # [b, t] bool, which of the first t tokens were real, as the ones after; None: all

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> "Rows":
        """Rows that have seen nothing."""
        return cls(
            seen=torch.zeros(batch, dtype=torch.long, device=device),
            settled=torch.zeros(batch, dtype=torch.bool, device=device),
        )

    def read(self, tokens: torch.Tensor, policy: EvictionPolicy, shares: torch.Tensor | None) -> torch.Tensor:
        """Count a block; where its tokens are in their rows, `[b, n]` int32, -1 for padding.

        `tokens`: which are real, bool `[b, n]`; `shares`: of the policy's budget, by KV head, `[g]`; None: the same for all.
        """
        positions = (self.seen.unsqueeze(-1) + tokens.cumsum(-1) - 1).masked_fill(~tokens, -1).int()
        arrived = tokens.sum(-1)
        self.settle(arrived == 1)
        self.seen = self.seen + arrived
        resolved = policy.resolve(self.seen, shares)
        if self.counts is not None:
            if self.counts.dim() > resolved.dim():
                resolved = self._shared_out(policy, resolved, self.seen - arrived)
            settled = self.settled.view(-1, *[1] * (resolved.dim() - 1))
            resolved = torch.where(settled, self.counts, resolved)
        self.counts = resolved
        return positions

    def _shared_out(self, policy: EvictionPolicy, counts: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Counts `[b, f]` by KV head, `[b, g, f]`, in the shares that heads had after `before` tokens, `[b]`."""
        equal = counts.unsqueeze(1).expand_as(self.counts)
        if self.allotted is None:
            return equal
        mean = policy.capacity(counts_by_head(policy.resolve(before)))  # [b, 1, 1]
        shares = (policy.capacity(self.counts_by_head()) / mean.clamp_min(1)).squeeze(-1)  # [b, g]
        return torch.where(self.allotted[:, None, None], policy.by_head(counts, shares), equal)

    def step(self, arrived: torch.Tensor | bool) -> None:
        """Count one token where it `arrived`, bool `[b]` or for all rows, in place."""
        self.settle(arrived)
        self.seen += arrived

    def settle(self, alone: torch.Tensor | bool) -> None:
        """End the prompt of the rows that get one token `alone`, bool `[b]` or for all, after their first block."""
        self.settled |= (self.seen > 0) & alone

    def remember_padding(self, tokens: torch.Tensor, before: int) -> None:
        """Note which tokens of a block are real, bool `[b, n]`, that came after `before` others, padding included."""
        if not bool(tokens.all()):
            self.real = torch.cat([self.real_of(before), tokens], dim=-1)

    def assume_left_padding(self, num_tokens: int) -> None:
        """Of `num_tokens` tokens, padding included, take those that are not real for the first of each row."""
        if self.real is None and bool((self.seen < num_tokens).any()):
            tokens = torch.arange(num_tokens, device=self.seen.device)
            self.real = tokens >= num_tokens - self.seen.unsqueeze(-1)

    def real_of(self, num_tokens: int) -> torch.Tensor:
        """Which of the first `num_tokens` tokens, padding included, are real: bool `[b, num_tokens]`."""
        if self.real is None:
            return self.seen.new_ones(len(self.seen), num_tokens, dtype=torch.bool)
        return torch.nn.functional.pad(self.real, (0, num_tokens - self.real.shape[-1]), value=True)

    def hidden_by(self, visible: torch.Tensor) -> Hidden | None:
        """What a mask hides of the tokens seen, `visible` bool `[b, t]`, of all t; None: nothing but padding."""
        real = self.real_of(visible.shape[-1])
        stays = real & visible
        if torch.equal(stays, real):
            return None
        by_position = (~real).int().argsort(dim=-1, stable=True)  # of the tokens seen, those at positions 0, 1, …
        return Hidden(stays, (stays.cumsum(-1) - 1).masked_fill(~stays, -1).gather(-1, by_position).int())

    def allot(self, policy: EvictionPolicy, budgets: torch.Tensor, means: torch.Tensor, rows: torch.Tensor) -> None:
        """Give the KV heads of some `rows`, bool `[b]`, `budgets` `[b, g]` of their own; `means` `[b]`: over all layers."""
        assert self.counts is not None, "a block was read"
        counts = self.counts if self.counts.dim() == 3 else self.counts.unsqueeze(1).expand(-1, budgets.shape[1], -1)
        shares = budgets.float() / means.unsqueeze(-1)
        of_rows = policy.by_head(policy.resolve(self.seen), shares)
        self.counts = torch.where(rows[:, None, None], of_rows, counts)
        self.allotted = rows.clone() if self.allotted is None else self.allotted | rows  # of this layer alone

    @property
    def reallots(self) -> torch.Tensor:
        """In which rows heads that have budgets of their own get new ones, bool `[b]`: the prompt goes on. Layers agree on
        it, whatever their heads keep.
        """
        return torch.zeros_like(self.settled) if self.allotted is None else self.allotted & ~self.settled

    def counts_by_head(self) -> torch.Tensor:
        """The policy's token counts in the form that its methods take, `[f, b, 1 or g, 1]`."""
        assert self.counts is not None, "a block was read"
        return counts_by_head(self.counts)


def counts_by_head(counts: torch.Tensor) -> torch.Tensor:
    """Counts `[b, f]` or `[b, g, f]` in the form that a policy's methods take: `[f, b, 1 or g, 1]`."""
    return counts.T[:, :, None, None] if counts.dim() == 2 else counts.permute(2, 0, 1).unsqueeze(-1)
