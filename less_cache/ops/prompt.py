"""Reading a prompt whose padding is on the left: what its queries attend to, for a policy's scores and for the output.

Axes: `b` batch, `h` query heads, `g` KV heads, `s` = h / g, `n` tokens, `d` head dim.
"""

import torch

from less_cache.ops.attention import causal_blocks
from less_cache.ops.call import AttentionCall
from less_cache.policies import EvictionPolicy

SCORE_BLOCK = 32  # queries of a KV head weighed at once: their weights over a long prompt stay in the processor's cache
SCORE_NUMBERS = 2**26  # attention weights held at once on other devices


def read_prompt(
    policy: EvictionPolicy, call: AttentionCall, scores: torch.Tensor, positions: torch.Tensor, start: int, attends: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The policy's scores `[b, g, n]` after the queries from `start` on, and with `attends` their output `[b, h, n, d]`, 0 at
    padding.

    `scores`: before them. `positions`: of the tokens, `[b, n]`. The mask is causal but for `call.padding`.
    """
    b, h, n, _ = call.query_states.shape
    assert call.padding is not None, "another mask is read by `backends.torch`"
    g, device = call.key_states.shape[1], call.query_states.device
    scores = scores.flatten(0, 1)  # [b·g, n]
    positions = positions.repeat_interleave(g, dim=0)  # [b·g, n]
    output = None
    if attends:
        output = call.query_states.new_zeros(b * g, h // g, n, call.value_states.shape[-1])
    heads_at_once, queries_at_once = 1, SCORE_BLOCK
    if device.type != "cpu":
        heads_at_once = g if any(call.padding) else b * g
        queries_at_once = max(1, SCORE_NUMBERS // (heads_at_once // g * h * n))
    blocks = causal_blocks(
        call.query_states,
        call.key_states,
        call.value_states if attends else None,
        call.scaling,
        call.softcap,
        call.sinks,
        start,
        heads_at_once,
        queries_at_once,
        call.padding,
    )
    for heads, rows, columns, weights, attended in blocks:
        seen = scores[heads, None, columns]
        seen.copy_(policy.observe(seen, weights[:, None], positions[heads, rows]))
        if output is not None and attended is not None:
            output[heads, :, rows] = attended
    return scores.view(b, g, n), None if output is None else output.view(b, h, n, -1)
