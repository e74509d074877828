"""Heads of different sizes, one after the other: where each begins, and where its slots are.

Axes: `b` rows, `g` KV heads, `N` slots of all heads. `sizes`: slots of each head, `[b, g]` on the processor; `starts`: where
each begins and the last one ends, `[b·g + 1]`.
"""

import torch


def starts_of(sizes: torch.Tensor) -> torch.Tensor:
    """Where each head begins, and where the last one ends: `[b·g + 1]`."""
    return torch.nn.functional.pad(sizes.flatten().cumsum(0), (1, 0))


def heads_and_slots(sizes: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every slot of all heads, its head out of b·g and its number in it: `[N]` each."""
    total = int(sizes.sum())
    heads = torch.arange(sizes.numel(), device=starts.device).repeat_interleave(starts.diff(), output_size=total)
    return heads, torch.arange(total, device=starts.device) - starts[heads]


def index_in_padded(sizes: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Where every slot of all heads would be, were all heads as long as the longest: `[N]`."""
    heads, slots = heads_and_slots(sizes, starts)
    return heads * int(sizes.max()) + slots


def padded(tensor: torch.Tensor, sizes: torch.Tensor, starts: torch.Tensor, fill: int) -> torch.Tensor:
    """What lies in slots `[N, *]`, as if all heads were as long as the longest: `[b, g, c, *]`, `fill` beyond a head's last."""
    slot = torch.arange(int(sizes.max()), device=tensor.device)
    there = (slot < starts.diff().unsqueeze(-1)).view(*sizes.shape, -1, *[1] * (tensor.dim() - 1))
    at = (starts[:-1, None] + slot).clamp_max(tensor.shape[0] - 1)
    return tensor[at].unflatten(0, sizes.shape).masked_fill(~there, fill)
