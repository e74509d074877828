"""How much of the budget each KV head gets: one threshold on the scores over all heads of all layers.

Axes: `b` rows, `g` KV heads, `c` columns, `L` layers.
"""

from collections.abc import Sequence

import torch

FLOOR = 0.3  # of the mean budget, which every head gets


def allot(scores: Sequence[torch.Tensor], protected: Sequence[torch.Tensor], budgets: torch.Tensor) -> list[torch.Tensor]:
    """Tokens of every head, `[b, g]` int64 a layer, whose mean over heads and layers is the budget of the row.

    Every head gets `FLOOR` of the mean, and the protected columns; the rest goes to the highest scores of all.

    Args:
        scores: Of every layer `[b, g, c]`, comparable over layers; below 0 where there is no token.
        protected: Columns that must stay, bool `[b, g, c]`.
        budgets: Mean tokens of a head, `[b]` int64.
    """
    device = scores[0].device
    longest = max(each.shape[-1] for each in scores)
    ranked = torch.cat([_ranked(*each, longest).to(device) for each in zip(scores, protected, strict=True)], dim=1)
    b, heads, c = ranked.shape
    alive = (ranked >= 0).sum(-1)  # [b, L·g]
    stay = torch.cat([each.sum(-1).to(device) for each in protected], dim=1)  # [b, L·g]
    allotted = torch.empty(b, heads, dtype=torch.long, device=device)
    for row in range(b):
        mean = int(budgets[row])
        least = torch.maximum((stay[row] + 1).clamp_max(mean), stay.new_full((heads,), round(FLOOR * mean)))
        least = torch.minimum(least, alive[row])
        free = ranked[row].masked_fill(torch.arange(c, device=device) < least.unsqueeze(-1), -1.0)
        rest = min(int(mean * heads - least.sum()), int((free >= 0).sum()))
        best = free.flatten().topk(max(rest, 0)).indices // c
        allotted[row] = least + torch.bincount(best, minlength=heads)
    parts = allotted.split([each.shape[1] for each in scores], dim=1)
    return [part.to(each.device) for part, each in zip(parts, scores, strict=True)]


def _ranked(scores: torch.Tensor, protected: torch.Tensor, longest: int) -> torch.Tensor:
    """Scores of each head in descending order, protected ones first, filled up to the `longest`."""
    ranked = scores.masked_fill(protected, torch.inf).sort(dim=-1, descending=True).values
    return torch.nn.functional.pad(ranked, (0, longest - ranked.shape[-1]), value=-1.0)
