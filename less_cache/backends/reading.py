"""What reading tokens takes in every form: the state as columns, and the queries some at a time.

Axes: `b` rows, `h` query heads, `n` queries.
"""

import torch

from less_cache.ops.blocks import blocks
from less_cache.ops.call import AttentionCall
from less_cache.slots import Held, Setup

QUERY_BLOCK = 256  # most queries attended at once in a block


def virtual_tokens(
    setup: Setup, held: Held, query_states: torch.Tensor, call: AttentionCall, later: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The state as columns for some queries, asked `later` tokens after it, `[b, n]`; None without a memory."""
    if setup.memory is None:
        return None
    return setup.memory.virtual_tokens(setup.unpacked(held.state), query_states, call.scaling, call.softcap, later)


def query_blocks(start: int, call: AttentionCall, columns: int) -> list[slice]:
    """The queries from `start` on, some at a time: their weights over so many columns are bounded in numbers."""
    b, h, n, _ = call.query_states.shape
    return blocks(start, n, b * h * columns, most=QUERY_BLOCK)
