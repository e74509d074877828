"""A layer's work in PyTorch, on any device: the oracle of every other backend. A step stands on one page.

Axes: `b` rows, `h` query heads, `g` KV heads, `n` new tokens, `c` columns, `m` slots of a head, `d` head dim, `w` width of
values, `f` token counts of the policy.
"""

from collections.abc import Callable

import torch

from less_cache.backends.choice import Draft, judge
from less_cache.backends.reading import query_blocks, virtual_tokens
from less_cache.fitting import References
from less_cache.ops.attention import attention_logits, kept_attention, less_attention, sparse_softmax
from less_cache.ops.call import AttentionCall
from less_cache.ops.masks import visible_new
from less_cache.slots import Columns, Held, Setup


def step(setup: Setup, held: Held, call: AttentionCall) -> torch.Tensor:
    """One token a row: O(slots) work, in place. Returns `[b, h, 1, w]`.

    Attend with what is kept and the old state, add the step's weights to the scores, choose the victim, fold it in.
    """
    policy, rows, slots, real = setup.policy, held.rows, held.slots, call.real
    b, g, _, _ = call.key_states.shape
    counts = rows.counts_by_head()
    arrival = rows.seen.int().view(b, 1, 1).expand(b, g, 1)
    slot = slots.put(call.key_states, call.value_states, arrival, policy.arrival(arrival))

    columns = slots.columns()
    observes = policy.observed(counts, 1) > 0
    attended = call.query_states, columns.keys, columns.values, (columns.positions >= 0).unsqueeze(2), call.scaling
    if observes or any(each is not None for each in (held.state, call.softcap, call.sinks, columns.bias)):
        virtual = virtual_tokens(setup, held, call.query_states, call)
        output, weights = less_attention(*attended, call.softcap, call.sinks, virtual, columns.bias)
    else:  # nothing but the output is needed
        output = kept_attention(*attended)
    if real is not None:  # padding leaves no trace
        slots.set_positions(slot, arrival.masked_fill(~real.unsqueeze(-1), -1))
    if observes:
        query_positions = rows.seen.unsqueeze(-1)  # [b, 1]
        if real is not None:
            weights = weights * real[:, None, None, :, None]
            query_positions = query_positions.masked_fill(~real, -1)
        slots.set_scores(policy.observe(columns.scores, weights, query_positions))
    arrived = True if real is None else real.squeeze(-1)
    rows.step(arrived)
    if setup.memory is not None:
        setup.memory.pass_time(held.state, arrived)
    evict(setup, held, counts)
    return output


def evict(setup: Setup, held: Held, counts: torch.Tensor) -> None:
    """Bring every head back to its capacity after a step, and fold in what leaves."""
    policy, memory = setup.policy, setup.memory
    slots, seen = held.slots, held.rows.seen.view(-1, 1, 1)
    columns = slots.columns()
    capacity = policy.capacity(counts)
    if capacity is not None:  # at most one token a head is over
        victim = policy.victim(columns.scores, columns.positions, seen, counts)  # [b, g, 1]
        leaves = (columns.positions >= 0).sum(dim=-1, keepdim=True) > capacity
        victim_positions = columns.positions.gather(-1, victim)
        if memory is not None:
            memory.fold_in(held.state, *slots.pairs(victim), leaves, victim_positions, seen)
        slots.set_positions(victim, victim_positions.masked_fill(leaves, -1))
        return
    leaves = (columns.positions >= 0) & ~policy.keep(columns.scores, columns.positions, seen, counts)  # [b, g, c]
    if memory is not None and (most := int(leaves.sum(dim=-1).max())):
        victims = leaves.int().argsort(dim=-1, descending=True, stable=True)[..., :most]  # [b, g, m]
        positions = columns.positions.gather(-1, victims)
        memory.fold_in(held.state, *slots.pairs(victims), leaves.gather(-1, victims), positions, seen)
    slots.drop(leaves)


ReadPrompt = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def read_first(
    setup: Setup, held: Held, call: AttentionCall, tokens: int, attends: bool, read_prompt: ReadPrompt
) -> tuple[torch.Tensor | None, Draft]:
    """A block that nothing precedes: the policy's scores of its tokens, from which it chooses.

    Args:
        tokens: Seen after this block, padding included.
        attends: Whether the output is wanted too: `[b, h, n, w]`; else None is returned.
        read_prompt: Reads a prompt with no other padding than on the left, as `ops.prompt.read_prompt`.
    """
    policy = setup.policy
    b, g, n, _ = call.key_states.shape
    real = call.real_tokens
    positions = held.rows.read(real, policy, setup.shares)  # [b, n]
    by_head = positions.unsqueeze(1).expand(b, g, n)
    scores, output = policy.arrival(by_head), None
    observed = policy.observed(held.rows.counts_by_head(), n)
    if observed and call.padding is not None:
        scores, output = read_prompt(policy, call, scores, positions, 0 if attends else n - observed, attends)
    elif observed:
        for queries in query_blocks(n - _observed(setup, held, call), call, n):
            visible = visible_new(call.attention_mask, real, queries)  # [b, 1, queries, c]
            seen_columns = slice(0, visible.shape[-1])
            logits = attention_logits(
                call.query_states[:, :, queries], call.key_states[:, :, seen_columns], visible, call.scaling, call.softcap
            )
            weights, _ = sparse_softmax(logits, call.sinks)
            weights = weights * real[:, None, None, queries, None]
            scores[..., seen_columns] = policy.observe(scores[..., seen_columns], weights, positions[:, queries])
    draft = Draft(Columns(call.key_states, call.value_states, by_head, scores), call, real.sum(-1), tokens)
    if setup.fit:
        judge(setup, held, draft, References.of_prompt(setup.rotation, call.query_states, positions, held.rows.seen, g), True)
    return output, draft


def read_next(setup: Setup, held: Held, call: AttentionCall, tokens: int) -> tuple[torch.Tensor, Draft]:
    """A later block: causal attention to what is kept, the state and itself, `[b, h, n, w]`, and what to choose from.

    `tokens`: seen after this block, padding included.
    """
    policy = setup.policy
    b, g, n, _ = call.key_states.shape
    real, before, kept = call.real_tokens, held.rows.seen, held.slots.columns()
    positions = held.rows.read(real, policy, setup.shares)  # [b, n]
    columns = _joined(kept, call, positions, policy.arrival(positions.unsqueeze(1).expand(b, g, n)))
    alive = (kept.positions >= 0).unsqueeze(2)  # [b, g, 1, kept]
    unobserved = n - _observed(setup, held, call)
    outputs = []
    for queries in query_blocks(0, call, columns.keys.shape[2]):
        new = visible_new(call.attention_mask, real, queries).expand(b, g, -1, -1)
        visible = torch.cat([alive.expand(-1, -1, new.shape[2], -1), new], dim=-1)  # [b, g, queries, kept + new]
        seen_columns = slice(0, visible.shape[-1])
        query_states = call.query_states[:, :, queries]
        later = (positions[:, queries] - before.unsqueeze(-1)).clamp_min(0)
        output, weights = less_attention(
            query_states,
            columns.keys[:, :, seen_columns],
            columns.values[:, :, seen_columns],
            visible,
            call.scaling,
            call.softcap,
            call.sinks,
            virtual_tokens(setup, held, query_states, call, later),
            None if columns.bias is None else columns.bias[..., seen_columns],
        )
        outputs.append(output)
        late = max(unobserved - queries.start, 0)  # the first of these queries that the policy asks for
        if late < query_states.shape[2]:
            weights = weights[:, :, :, late:] * real[:, None, None, queries, None][:, :, :, late:]
            scores = columns.scores[..., seen_columns]
            columns.scores[..., seen_columns] = policy.observe(scores, weights, positions[:, queries][:, late:])
    draft = Draft(columns, call, real.sum(-1), tokens)
    if setup.fit:
        judge(setup, held, draft, References.of_prompt(setup.rotation, call.query_states, positions, held.rows.seen, g), True)
    return torch.cat(outputs, dim=2), draft


def _joined(kept: Columns, call: AttentionCall, positions: torch.Tensor, scores: torch.Tensor) -> Columns:
    """The kept tokens, then the new ones at `positions` `[b, n]` with their first scores, `[b, g, n]`."""
    joined = kept.followed_by((call.key_states, call.value_states, positions))
    joined.scores = torch.cat([kept.scores, scores], dim=-1)
    return joined


def _observed(setup: Setup, held: Held, call: AttentionCall) -> int:
    """How many of the block's last queries the policy must see."""
    n = call.num_tokens
    observed = setup.policy.observed(held.rows.counts_by_head(), n)
    if call.real is not None and not bool(call.real[:, n - observed :].all()):
        return n  # the last real queries of a row may come before padding
    return observed
