"""A layer's work under a policy that chooses in blocks, in PyTorch: between two choices, attention alone.

Axes: `b` rows, `h` query heads, `g` KV heads, `n` new tokens, `c` columns, `d` head dim, `w` width of values.
"""

import torch

from less_cache.backends.base import Backend
from less_cache.backends.choice import Draft, judge
from less_cache.backends.reading import query_blocks, virtual_tokens
from less_cache.fitting import References
from less_cache.ops.attention import less_attention
from less_cache.ops.call import AttentionCall
from less_cache.ops.masks import visible_new
from less_cache.slots import Asked, Columns, Held, Newest, Setup
from less_cache.slots.formats import QueryCodes


def read_first(setup: Setup, held: Held, call: AttentionCall, tokens: int) -> Draft:
    """A block that nothing precedes; the model's own attention gives its output. `tokens`: seen after it."""
    policy = setup.policy
    b, g, n, _ = call.key_states.shape
    real = call.real_tokens
    positions = held.rows.read(real, policy, setup.shares)  # [b, n]
    by_head = positions.unsqueeze(1).expand(b, g, n)
    held.newest = Newest.empty(call.query_states, call.key_states, call.value_states, setup.format.is_exact)
    held.asked = Asked.empty(call.query_states, g)
    held.asked.put(call.query_states, positions)
    held.is_whole = setup.format.is_exact and call.real is None
    draft = Draft(Columns(call.key_states, call.value_states, by_head), call, real.sum(-1), tokens)
    if _is_over(setup, held, draft):
        references = References.of_prompt(setup.rotation, call.query_states, positions, held.rows.seen, g)
        judge(setup, held, draft, references, setup.fit)
    return draft


def read_next(
    setup: Setup, held: Held, call: AttentionCall, before: int, backend: Backend | None
) -> tuple[torch.Tensor, Draft | None]:
    """Later tokens, after `before` others: attention to what is kept, the newest, the state and themselves, by the `backend`
    where it knows how.

    Returns their output, `[b, h, n, w]`, and what there is to choose from, once there are tokens for a choice.
    """
    policy, rows, newest = setup.policy, held.rows, held.newest
    n, ends = call.num_tokens, newest.count + call.num_tokens >= policy.block_size
    held.is_whole = held.is_whole and call.real is None
    at, output = rows.seen.int().unsqueeze(-1), None  # [b, 1]
    if backend is not None and not _is_own(held, call) and backend.can_attend(setup, held, call):
        output = backend.attend(setup, held, call, takes=not ends)
    if n > 1:
        positions = rows.read(call.real_tokens, policy, setup.shares)  # [b, n]
    else:
        positions = at if call.real is None else at.masked_fill(~call.real, -1)
    held.asked.put(call.query_states, positions)
    if output is not None and not ends:
        return output, None
    if n == 1:
        rows.step(True if call.real is None else call.real.squeeze(-1))
    real, came = call.real_tokens, (newest.positions >= 0).sum(-1)  # [b, n], [b]
    columns = held.slots.columns().followed_by(newest.tokens(), (call.key_states, call.value_states, positions))
    if output is None:
        output = _attend(setup, held, call, columns, positions, came, real)
    if not ends:
        newest.put(call.query_states, call.key_states, call.value_states, positions)
        return output, None
    columns.scores = held.slots.scores_by_column()  # of the kept ones, which come first
    draft = Draft(columns, call, came + real.sum(-1), before + n)
    if _is_over(setup, held, draft):
        judge(setup, held, draft, _references(setup, held, call, positions), setup.fit and n > policy.block_size)
    newest.clear()
    return output, draft


def _is_over(setup: Setup, held: Held, draft: Draft) -> bool:
    """Whether a head has more tokens than its budget; else all stay, and there is nothing to judge."""
    over = draft.over(setup, held)
    draft.is_over = None if over is None else over | held.rows.reallots
    if draft.is_over is None or bool(draft.is_over.any()):
        return True
    draft.columns.scores = torch.zeros_like(draft.columns.positions, dtype=torch.float32)
    return False


def _references(setup: Setup, held: Held, call: AttentionCall, positions: torch.Tensor) -> References:
    """Of a long block its own queries; else those that are held, and those of the tokens since the last choice."""
    asked, newest, n, g = held.asked, held.newest, call.num_tokens, call.key_states.shape[1]
    if n > setup.policy.block_size:
        return References.of_prompt(setup.rotation, call.query_states, positions, held.rows.seen, g)
    as_held = QueryCodes.decode(*QueryCodes.encode(call.query_states), call.query_states.shape[-1], asked.dtype)
    queries = torch.cat([asked.queries(), newest.queries(asked.dtype), as_held], dim=2)
    recent = torch.cat([newest.positions, positions], dim=-1).unsqueeze(1).expand(-1, asked.positions.shape[1], -1)
    at = torch.cat([asked.positions, recent], dim=-1)  # [b, s, k]
    seen = held.rows.seen
    return References.turned(setup.rotation, queries, at, seen, torch.full_like(seen, at.shape[-1]), setup.policy.block_size)


def _is_own(held: Held, call: AttentionCall) -> bool:
    """Whether the model's own attention sees all tokens as they came."""
    return held.is_whole and held.slots.bias is None and call.own is not None and call.num_tokens == 1


def _attend(
    setup: Setup,
    held: Held,
    call: AttentionCall,
    columns: Columns,
    positions: torch.Tensor,
    came: torch.Tensor,
    real: torch.Tensor,
) -> torch.Tensor:
    """Attention output of the new tokens, `[b, h, n, w]`."""
    n, c = call.num_tokens, columns.positions.shape[-1]
    if _is_own(held, call):  # as a DynamicCache would, to the bit
        assert call.own is not None
        output, _ = call.own(call.query_states, columns.keys, columns.values, None)
        return output.transpose(1, 2)
    alive = (columns.positions[..., : c - n] >= 0).unsqueeze(2)  # [b, g, 1, c − n]
    first = held.rows.seen - real.sum(-1) - came  # [b], tokens that the state knows of
    outputs = []
    for queries in query_blocks(0, call, c):
        new = visible_new(call.attention_mask, real, queries)  # [b, 1, queries, new]
        visible = torch.cat([alive.expand(-1, -1, new.shape[2], -1), new.expand(-1, alive.shape[1], -1, -1)], dim=-1)
        some = slice(visible.shape[-1])
        query_states = call.query_states[:, :, queries]
        later = (positions[:, queries] - first.unsqueeze(-1)).clamp_min(0)
        virtual = virtual_tokens(setup, held, query_states, call, later)
        bias = None if columns.bias is None else columns.bias[..., some]
        states = query_states, columns.keys[:, :, some], columns.values[:, :, some]
        outputs.append(less_attention(*states, visible, call.scaling, call.softcap, call.sinks, virtual, bias)[0])
    return torch.cat(outputs, dim=2)
