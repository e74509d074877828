"""Reference queries: queries of the text so far, turned to behind it, where they stand for the queries to come.

Axes: `b` rows, `h` query heads, `g` KV heads, `s` = h / g, `n` tokens, `k` reference queries, `c` columns, `d` head dim, `w`
width of values.
"""

import dataclasses
from typing import Any

import torch

from less_cache.ops.attention import add_virtual_tokens, attention_logits, group_heads, sparse_softmax
from less_cache.ops.call import AttentionCall
from less_cache.policies import EvictionPolicy
from less_cache.slots import Columns

MOST = 512  # reference queries from a prompt
HORIZON = 128  # tokens behind the text over which they are spread


@dataclasses.dataclass(frozen=True)
class References:
    """Queries as they would be asked behind the text."""

    query_states: torch.Tensor  # [b, h, k, d]
    there: torch.Tensor  # [b, s, k] bool, which of them there are, for the query heads of every KV head
    later: torch.Tensor  # [b, k] float32, how many tokens behind the end of the text each is asked

    @classmethod
    def turned(
        cls,
        rotation: Any,
        query_states: torch.Tensor,
        positions: torch.Tensor,
        seen: torch.Tensor,
        count: torch.Tensor,
        horizon: int,
    ) -> "References":
        """The queries `[b, h, k, d]` from `positions` `[b, s, k]`, -1: none, turned to behind the `seen` `[b]` tokens of a row,
        where `count` `[b]` of them spread over `horizon` tokens. A rotation that is not known turns nothing.
        """
        places = torch.arange(positions.shape[-1], device=positions.device)  # those that there are come first
        later = places * (horizon / count.clamp_min(1).float()).unsqueeze(-1)  # [b, k]
        if rotation is not None:
            by = seen.view(-1, 1, 1) - positions + later.unsqueeze(1)  # [b, s, k]
            query_states = rotation.turn(query_states, by.repeat(1, query_states.shape[1] // by.shape[1], 1))
        return cls(query_states, positions >= 0, later)

    @classmethod
    def of_prompt(
        cls, rotation: Any, query_states: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor, num_key_value_heads: int
    ) -> "References":
        """Of a prompt's queries `[b, h, n, d]` at `positions` `[b, n]`, -1: padding, at most `MOST` a row, evenly spaced."""
        real = positions >= 0
        length = real.sum(-1)  # [b]
        count = length.clamp_max(MOST)
        places = torch.arange(min(MOST, positions.shape[-1]), device=positions.device)  # [k]
        steps = (length - 1).float() / (count - 1).clamp_min(1)  # from one to the next, [b]
        spaced = (places * steps.unsqueeze(-1)).round().long().clamp_max(positions.shape[-1] - 1)  # [b, k]
        first = (~real).int().argsort(dim=-1, stable=True)  # [b, n], real tokens in their order
        index = first.gather(-1, spaced.clamp_min(0))  # [b, k]
        chosen = query_states.gather(2, index[:, None, :, None].expand(-1, query_states.shape[1], -1, query_states.shape[-1]))
        at = positions.gather(-1, index).masked_fill(places >= count.unsqueeze(-1), -1)
        at = at.unsqueeze(1).expand(-1, query_states.shape[1] // num_key_value_heads, -1)
        return cls.turned(rotation, chosen, at, seen, count, HORIZON)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What reference queries see where every token is there."""

    references: References
    log_sum: torch.Tensor  # [b, g, s, k, 1] float32, log-sum-exp of their logits
    output: torch.Tensor  # [b, g, s, k, w] float32, of their attention


def ask(
    references: References, columns: Columns, policy: EvictionPolicy, call: AttentionCall, virtual: Any = None
) -> tuple[torch.Tensor | None, Seen]:
    """What the references see, and the policy's judgement of it: scores `[b, g, c]` float32.

    `virtual`: logits and values of the state, as in `LayerMemory.virtual_tokens`; None: there is none. One KV head at a time,
    so that memory is O(k · c).
    """
    g = columns.keys.shape[1]
    queries = group_heads(references.query_states, g)  # [b, g, s, k, d]
    visible = (columns.positions >= 0).unsqueeze(2)  # [b, g, 1, c]
    scores, log_sums, outputs = [], [], []
    for head in range(g):
        one = slice(head, head + 1)
        bias = None if columns.bias is None else columns.bias[:, one].float()
        keys, values = columns.keys[:, one], columns.values[:, one].float()
        logits = attention_logits(queries[:, head], keys, visible[:, one], call.scaling, call.softcap, bias)  # [b, 1, s, k, c]
        weights, log_sum = sparse_softmax(logits, None if call.sinks is None else call.sinks.view(g, -1)[head])
        output = weights @ values.unsqueeze(2)
        if policy.asks_references:
            scores.append(policy.judge(weights, references.there))
        if virtual is not None:
            virtual_logits, virtual_values = virtual[0][:, one], virtual[1][:, one]
            output = add_virtual_tokens(output, log_sum, virtual_logits, virtual_values)
            log_sum = torch.logaddexp(log_sum, virtual_logits.logsumexp(dim=-1, keepdim=True))
        outputs.append(output)
        log_sums.append(log_sum)
    judged = torch.cat(scores, dim=1) if scores else columns.scores
    return judged, Seen(references, torch.cat(log_sums, dim=1), torch.cat(outputs, dim=1))
