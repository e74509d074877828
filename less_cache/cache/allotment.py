"""Head budgets of one prompt: every layer waits with its choice until the last one has read it."""

from typing import Any

import torch

from less_cache.backends import Draft
from less_cache.fitting import allot


class Allotment:
    """What the layers of a cache have read and not yet chosen from, in order, during one forward."""

    def __init__(self, num_layers: int):
        self.num_layers = num_layers
        self.waiting: list[tuple[Any, Draft]] = []

    def concerns(self, layer: Any, draft: Draft) -> bool:
        """Whether heads get budgets of their own before they choose: in rows that are over theirs for the first time.

        Not after the first block while tokens are recorded: each layer takes those of a block in one by one then, and cannot
        wait for the others between two of them.
        """
        if layer.record_past and not layer.is_empty:
            return False
        rows = _concerned(layer, draft)
        return rows is not None and bool(rows.any())

    def add(self, layer: Any, draft: Draft) -> None:
        """A layer has read a block and has more tokens than its budget; with the last one all choose."""
        if layer.leads:
            self.waiting.clear()  # of a forward that was interrupted
        self.waiting.append((layer, draft))
        if len(self.waiting) < self.num_layers:
            return
        waiting, self.waiting = self.waiting, []
        first, draft = waiting[0]
        policy, rows = first.setup.policy, first.held.rows
        chosen = _concerned(first, draft)  # [b]
        means = policy.capacity(policy.resolve(rows.seen).T[:, :, None, None]).view(-1)  # [b]
        scores, protected = [], []
        for layer, draft in waiting:
            positions, seen = draft.columns.positions, layer.held.rows.seen.view(-1, 1, 1)
            equal = layer.held.rows.counts_by_head()
            alive = positions >= 0
            scores.append(draft.columns.scores.masked_fill(~alive, -1))
            protected.append(alive & policy.protected(positions, seen, equal))
        for (layer, draft), budgets in zip(waiting, allot(scores, protected, means), strict=True):
            layer.held.rows.allot(policy, budgets, means, chosen)
            layer.choose(draft)


def _concerned(layer: Any, draft: Draft) -> torch.Tensor | None:
    """Rows whose heads get budgets now, bool `[b]`, in all layers alike; None: there are no budgets."""
    rows = draft.to_allot(layer.setup, layer.held)
    return None if rows is None else rows | layer.held.rows.reallots
