"""Reading a prompt again, with all of it there: attention of its repetition, and what that attends to.

Axes: `b` rows, `h` query heads, `g` KV heads, `n` new tokens, `m` repeated ones before them, `c` tokens of the prompt, `d` head
dim, `w` width of values.
"""

import torch

from less_cache.backends.reading import query_blocks
from less_cache.ops.attention import less_attention
from less_cache.ops.call import AttentionCall
from less_cache.ops.masks import visible_new
from less_cache.slots import Columns

Repeated = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # keys [b, g, m, d], values [b, g, m, w], which are real [b, m]


def read_again(prompt: Columns, call: AttentionCall, before: Repeated | None) -> tuple[torch.Tensor, torch.Tensor, Repeated]:
    """Attention of the `call`'s tokens to the `prompt`, to what was repeated `before` them, and among themselves.

    Returns:
        Their output, `[b, h, n, w]`; the largest weight of each token of the prompt, `[b, g, c]`, over the tokens and the KV
        head's query group; and what has been repeated now.
    """
    _, g, c = prompt.positions.shape
    alive, real = prompt.positions >= 0, call.real_tokens
    repeated = call.key_states, call.value_states, real
    if before is not None:
        alive = torch.cat([alive, before[2].unsqueeze(1).expand(-1, g, -1)], dim=-1)  # [b, g, c + m]
        states = [torch.cat(pair, dim=2) for pair in zip(before[:2], repeated[:2], strict=True)]
        repeated = states[0], states[1], torch.cat([before[2], real], dim=-1)
    keys, values = torch.cat([prompt.keys, repeated[0]], dim=2), torch.cat([prompt.values, repeated[1]], dim=2)
    scores = torch.zeros_like(prompt.positions, dtype=torch.float32)
    outputs = []
    for queries in query_blocks(0, call, keys.shape[2]):
        new = visible_new(call.attention_mask, real, queries)  # [b, 1, queries, new]
        visible = torch.cat([alive.unsqueeze(2).expand(-1, -1, new.shape[2], -1), new.expand(-1, g, -1, -1)], dim=-1)
        some = slice(visible.shape[-1])
        asking = call.query_states[:, :, queries], keys[:, :, some], values[:, :, some]
        output, weights = less_attention(*asking, visible, call.scaling, call.softcap, call.sinks)
        weights = weights[..., :c].masked_fill(~real[:, None, None, queries, None], 0)
        scores = torch.maximum(scores, weights.amax(dim=(2, 3)))
        outputs.append(output)
    return torch.cat(outputs, dim=2), scores, repeated
