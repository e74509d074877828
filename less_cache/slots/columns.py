"""Columns: kept tokens, and others behind them, as attention reads them.

Axes: `b` rows, `g` KV heads, `c` columns, `n` other tokens, `d` head dim, `w` width of values.
"""

import dataclasses

import torch


@dataclasses.dataclass
class Columns:
    """Tokens as attention and policies read them, every head padded to the longest."""

    keys: torch.Tensor  # [b, g, c, d]
    values: torch.Tensor  # [b, g, c, w]
    positions: torch.Tensor  # [b, g, c] int32, where in its row a token is; -1: none
    scores: torch.Tensor | None = None  # [b, g, c], the policy's; None: not all of these tokens have one yet
    bias: torch.Tensor | None = None  # [b, g, c], added to a token's logit; None: 0 for all

    def followed_by(self, *later: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> "Columns":
        """These, then other tokens: keys and values, `[b, g, n, *]`, and positions `[b, n]`; without scores and biases."""
        b, g, c = self.positions.shape
        keys, values, positions = zip(*later, strict=True)
        columns = Columns(
            torch.cat([self.keys, *(each.to(self.keys.dtype) for each in keys)], dim=2),
            torch.cat([self.values, *(each.to(self.values.dtype) for each in values)], dim=2),
            torch.cat([self.positions, *(each.unsqueeze(1).expand(b, g, -1) for each in positions)], dim=-1),
        )
        if self.bias is not None:
            columns.bias = torch.nn.functional.pad(self.bias, (0, columns.positions.shape[-1] - c))
        return columns
