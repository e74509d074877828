"""Attention over kept tokens and the state of the evicted ones.

Axes: `b` batch, `h` query heads, `g` KV heads, `s` = h / g query heads per KV head, `n` queries, `c` cache columns,
`d` head dim, `r` rank. Query heads g·s … g·s + s − 1 share KV head g.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

LOWEST = torch.finfo(torch.float32).min  # a log of 0 that softmax survives where a whole row has it


def group_heads(by_query_head: torch.Tensor, num_key_value_heads: int) -> torch.Tensor:
    """`[b, h, n, *]` to `[b, g, s, n, *]`."""
    return by_query_head.unflatten(1, (num_key_value_heads, -1))


def attention_logits(
    query_states: torch.Tensor,
    key_states: torch.Tensor,
    visible: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """q k · scaling, soft-capped, plus the column's bias, -inf where not `visible`: `[b, g, s, n, c]` float32.

    `query_states`: `[b, h, n, d]`, `key_states`: `[b, g, c, d]`, `visible`: bool, broadcast to `[b, g, n, c]`; None: all.
    `bias`: `[b, g, c]`; None: 0.
    """
    query_states = group_heads(query_states.float() * scaling, key_states.shape[1])  # [b, g, s, n, d]
    b, g, s, n, d = query_states.shape
    logits = query_states.reshape(b, g, s * n, d) @ key_states.float().transpose(-1, -2)  # [b, g, s·n, c]
    logits = logits.view(b, g, s, n, -1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias[:, :, None, None]
    return logits if visible is None else logits.masked_fill(~visible.unsqueeze(2), -torch.inf)


def sparse_softmax(logits: torch.Tensor, sinks: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the kept tokens alone, what a policy sees: weights `[b, g, s, n, c]` and log-sum-exp `[b, g, s, n, 1]`.

    `sinks`: `[h]`, `[b, h]` or None, learned logits without a value (gpt-oss) that share the denominator.
    """
    if sinks is None:
        return logits.softmax(dim=-1), logits.logsumexp(dim=-1, keepdim=True)
    sinks = sinks.float().view(-1, logits.shape[1], logits.shape[2], 1, 1)
    largest = torch.maximum(logits.amax(dim=-1, keepdim=True), sinks)
    weights = (logits - largest).exp()
    mass = weights.sum(dim=-1, keepdim=True) + (sinks - largest).exp()
    # Divided rather than e^(l - log_sum): at large logits the rounding of log_sum would be in every weight.
    return weights / mass, largest + mass.log()


def causal_blocks(
    query_states: torch.Tensor,
    key_states: torch.Tensor,
    value_states: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    start: int = 0,
    heads_at_once: int = 1,
    queries_at_once: int = 32,
    padding: Sequence[int] | None = None,
) -> Iterator[tuple[slice, slice, slice, torch.Tensor, torch.Tensor | None]]:
    """Causal attention of a text, from query `start` on, in blocks: weights and output of a few queries of a few KV heads at a
    time, so that memory is O(block · n). One head and few queries stay in a processor's cache.

    Shapes as in `less_attention`; without `value_states` there is no output. Heads are numbered through the batch, `a` of
    them at once. `padding`: how many tokens of it each row begins with, which take no part; None: there is none. Rows that
    differ in it are not read at once: `heads_at_once` then divides g.

    Yields:
        The heads out of b·g; the queries; the keys, from the row's first to the last query's own; their weights,
        `[a, s, m, c]` float32, which the next block overwrites; their output, `[a, s, m, d]` float32.
    """
    b, g, n, _ = key_states.shape
    queries = group_heads(query_states.float() * scaling, g).flatten(0, 1)  # [b·g, s, n, d]
    keys = key_states.float().flatten(0, 1).transpose(-1, -2).contiguous()  # [b·g, d, n], which multiplies faster
    values = None if value_states is None else value_states.float().flatten(0, 1)  # [b·g, n, d]
    s, queries_at_once = queries.shape[1], min(queries_at_once, n - start)
    if sinks is not None:
        sinks = sinks.float().view(-1, g, s).expand(b, g, s).flatten(0, 1)  # [b·g, s]
    later = torch.ones(queries_at_once, queries_at_once, dtype=torch.bool, device=queries.device).triu(1)
    buffer = queries.new_empty(heads_at_once, s * queries_at_once, n)
    for head in range(0, b * g, heads_at_once):
        heads = slice(head, min(head + heads_at_once, b * g))
        before = 0 if padding is None else padding[head // g]
        for first in range(max(start, before), n, queries_at_once):
            rows = slice(first, min(first + queries_at_once, n))
            columns = slice(before, rows.stop)
            block = queries[heads, :, rows]  # [a, s, m, d]
            a, _, m, _ = block.shape
            c = rows.stop - before
            weights = buffer.as_strided((a, s * m, c), (s * m * c, c, 1))  # the start of it, dense
            torch.bmm(block.flatten(1, 2), keys[heads, :, columns], out=weights)
            if softcap is not None:
                weights.div_(softcap).tanh_().mul_(softcap)
            weights.view(a, s, m, -1)[..., first - before :].masked_fill_(later[:m, :m], -torch.inf)
            if sinks is None:
                torch.softmax(weights, dim=-1, out=weights)
            else:
                weights.copy_(sparse_softmax(weights.view(1, a, s, m, -1), sinks[heads].flatten())[0].view_as(weights))
            output = None if values is None else (weights @ values[heads, columns]).view(a, s, m, -1)
            yield heads, rows, columns, weights.view(a, s, m, -1), output


def add_virtual_tokens(
    sparse_output: torch.Tensor, log_sum: torch.Tensor, logits: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Merge the state's virtual tokens into attention over the kept tokens, as one softmax over both kinds of column.

    With the low-rank state's logits log φ_r(q) + log z_r and values H_r / z_r this is, exactly,

        out = ( φ(q) H + Σ_{i kept} e^{l_i} v_i ) / ( φ(q) z + Σ_{i kept} e^{l_i} )

    `sparse_output`: `[b, g, s, n, d]`, `log_sum`: log Σ e^{l_i}, `[b, g, s, n, 1]`, `logits`: `[b, g, s, n, r]`,
    `values`: `[b, g, r, d]`.
    """
    virtual_log_sum = logits.logsumexp(dim=-1, keepdim=True)
    virtual_output = (logits.softmax(dim=-1).flatten(2, 3) @ values).unflatten(2, logits.shape[2:4])
    share = torch.sigmoid(virtual_log_sum - log_sum)
    return torch.lerp(sparse_output, virtual_output, share)


def less_attention(
    query_states: torch.Tensor,
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    virtual_tokens: tuple[torch.Tensor, torch.Tensor] | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention output `[b, h, n, d]` in the values' dtype, and the sparse weights `[b, g, s, n, c]` in float32.

    `virtual_tokens`: logits and values of `LayerMemory.virtual_tokens`; without them the output is plain attention over
    the visible columns. At least one column must be visible to every query. Shapes as in `attention_logits`;
    `value_states`: `[b, g, c, d]`.
    """
    logits = attention_logits(query_states, key_states, visible, scaling, softcap, bias)
    weights, log_sum = sparse_softmax(logits, sinks)
    b, g, s, n, c = weights.shape
    output = (weights.view(b, g, s * n, c) @ value_states.float()).view(b, g, s, n, -1)
    if virtual_tokens is not None:
        output = add_virtual_tokens(output, log_sum, *virtual_tokens)
    return output.flatten(1, 2).to(value_states.dtype), weights


def kept_attention(
    query_states: torch.Tensor, key_states: torch.Tensor, value_states: torch.Tensor, visible: torch.Tensor, scaling: float
) -> torch.Tensor:
    """`less_attention`'s output for one query, without virtual tokens, soft cap and sinks: torch's own, which keeps no weights.

    `query_states`: `[b, h, 1, d]`; the others as in `less_attention`.
    """
    queries = group_heads(query_states, key_states.shape[1]).squeeze(3)  # [b, g, s, d]: a group sees the same columns
    keys, values = key_states.to(queries.dtype), value_states.to(queries.dtype)  # under autocast they may differ
    output = scaled_dot_product_attention(queries, keys, values, attn_mask=visible, scale=scaling)
    return output.flatten(1, 2).unsqueeze(2).to(value_states.dtype)
