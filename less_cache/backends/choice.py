"""The choice at a block's end: which columns stay, what they should say, what becomes of the others.

Axes: `b` rows, `h` query heads, `g` KV heads, `n` new tokens, `c` columns, `t` kept ones, `d` head dim.
"""

import dataclasses
from typing import Any

import torch

from less_cache.backends.reading import virtual_tokens
from less_cache.fitting import References, Seen, ask, fit
from less_cache.memory import LayerMemory
from less_cache.memory.state import in_16_bits
from less_cache.ops.attention import group_heads
from less_cache.ops.blocks import blocks
from less_cache.ops.call import AttentionCall
from less_cache.slots import Coding, Columns, Held, Setup, Slots

FEW = 32  # tokens that pull the mean key of a first block to 0: the first token's key is like no other
NOTHING = -1.0  # score of a token that was never judged


@dataclasses.dataclass
class Draft:
    """All columns of a layer at a block's end, with their scores, before a choice."""

    columns: Columns
    call: AttentionCall  # the block
    came: torch.Tensor  # [b] real tokens since the choice before
    tokens: int  # seen by now, padding included
    is_over: torch.Tensor | None = None  # [b] bool, rows in which a head had more than its budget
    references: References | None = None  # None: nobody had to choose
    seen: Seen | None = None  # what reference queries see of all columns, where there is something to fit

    def over(self, setup: Setup, held: Held) -> torch.Tensor | None:
        """In which rows a head has more tokens than its budget, bool `[b]`; None: there are no budgets."""
        capacity = setup.policy.capacity(held.rows.counts_by_head())
        if capacity is None:
            return None
        return ((self.columns.positions >= 0).sum(-1, keepdim=True) > capacity).flatten(1).any(-1)

    def to_allot(self, setup: Setup, held: Held) -> torch.Tensor | None:
        """Of these the rows, bool `[b]`, whose heads have no budgets of their own yet, or whose prompt goes on."""
        over, rows = self.over(setup, held), held.rows
        return over if over is None or rows.allotted is None else over & ~(rows.allotted & rows.settled)


def judge(setup: Setup, held: Held, draft: Draft, references: References, fits: bool) -> None:
    """Score the draft's columns by what the references see; keep that for a fit."""
    policy, before = setup.policy, draft.columns.scores
    later = references.later + draft.came.unsqueeze(-1)  # than the state, which knows nothing of what came since
    virtual = virtual_tokens(setup, held, references.query_states, draft.call, later)
    scores, seen = ask(references, draft.columns, policy, draft.call, virtual)
    if policy.asks_references and before is not None:  # of the kept tokens, which are the first columns
        kept = before.shape[-1]
        blended = policy.remember(before.float(), scores[..., :kept]).where(before >= 0, scores[..., :kept])
        scores = torch.cat([blended, scores[..., kept:]], dim=-1)
    draft.columns.scores = scores
    draft.seen = seen if fits else None
    draft.references = references


def choose(setup: Setup, held: Held, draft: Draft) -> None:
    """The policy keeps some of the columns, all others are folded in, and what is kept is fitted."""
    policy, memory, columns = setup.policy, setup.memory, draft.columns
    seen, counts = held.rows.seen.view(-1, 1, 1), held.rows.counts_by_head()
    keep = policy.keep(columns.scores, columns.positions, seen, counts)  # [b, g, c]
    leaves = (columns.positions >= 0) & ~keep
    if memory is not None:
        state = setup.unpacked(held.state)
        memory.pass_time(state, draft.came)
        fold_in(memory, state, columns, leaves, seen)
        held.state = setup.packed(state)
    coding, before = _coding(setup, held, columns), held.slots
    if draft.seen is not None and bool(leaves.any()):
        columns, keep = _fitted(setup, held, draft, keep, leaves.flatten(1).any(-1), coding)
        before, coding = None, coding.meeting(columns.keys, columns.values, columns.positions)
    else:
        columns.bias = _with_equal_logits(setup, draft, coding, 0 if before is None else before.longest)
    if policy.block_size is None:
        grown = draft.tokens if setup.grows else None
        held.slots = Slots.keep(columns, keep, policy.capacity(counts), grown, coding)
        return
    if draft.is_over is not None:  # elsewhere there was no choice, and there is nothing to remember of it
        columns.scores = columns.scores.masked_fill(~draft.is_over.view(-1, 1, 1), NOTHING)
    columns.scores = columns.scores.half()
    columns.bias = None if columns.bias is None else columns.bias.half()
    held.slots = Slots.chosen(columns, keep, coding, before)
    held.is_whole = held.is_whole and not bool(leaves.any())


def fold_in(memory: LayerMemory, state: Any, columns: Columns, leaves: torch.Tensor, seen: torch.Tensor) -> None:
    """Fold the columns that leave, bool `[b, g, c]`, into the state, in place, some at a time; `seen`: as the memory's own."""
    b, g, c = leaves.shape
    for part in [slice(0, c)] if memory.numbers_to_fold is None else blocks(0, c, b * g * memory.numbers_to_fold):
        pairs = columns.keys[:, :, part], columns.values[:, :, part]
        memory.fold_in(state, *pairs, leaves[..., part], columns.positions[..., part], seen)


def _coding(setup: Setup, held: Held, columns: Columns) -> Coding:
    """How keys are stored: where they are quantised, less the mean of the first block of a text, as if `FEW` tokens more were
    there whose keys are 0.
    """
    if held.slots is not None:
        new = slice(held.slots.longest, None)
        return held.slots.coding.meeting(columns.keys[:, :, new], columns.values[:, :, new], columns.positions[:, :, new])
    coding = setup.coding(centers=None)
    if setup.format.is_exact:
        return coding
    there = (columns.positions >= 0).unsqueeze(-1)
    keys = coding.turned_back(columns.keys, columns.positions).float()
    sums = keys.masked_fill(~there, 0).sum(2, keepdim=True)
    coding = setup.coding(in_16_bits(sums / (there.sum(2, keepdim=True) + FEW)))
    return coding.meeting(columns.keys, columns.values, columns.positions)


def _read_back(coding: Coding, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Keys `[b, g, c, d]` as slots give them."""
    return coding.with_first(coding.keys(coding.encode_keys(keys, positions), positions, keys.dtype), positions, "keys")


def _with_equal_logits(setup: Setup, draft: Draft, coding: Coding, stored: int) -> torch.Tensor | None:
    """Biases of the columns, `[b, g, c]`, with which keys that get stored have the logits that they had, as the references'
    mean query sees it, where it is known how queries turn. The first columns are `stored` already.
    """
    columns, references = draft.columns, draft.references
    if references is None or draft.is_over is None or setup.rotation is None or setup.format.is_exact:
        return columns.bias
    keys = columns.keys[:, :, stored:]
    decoded = _read_back(coding, keys, columns.positions[:, :, stored:])
    queries = group_heads(references.query_states, keys.shape[1]).float()  # [b, g, s, k, d]
    there = references.there[:, None, :, :, None]
    mean = (queries * there).sum((2, 3)) / there.sum((2, 3)).clamp_min(1)  # [b, g, d]
    missing = ((keys.float() - decoded.float()) @ mean.unsqueeze(-1)).squeeze(-1) * draft.call.scaling  # [b, g, c − stored]
    missing = torch.nn.functional.pad(missing.where(draft.is_over.view(-1, 1, 1), 0), (stored, 0))
    return missing if columns.bias is None else columns.bias.float() + missing


def _fitted(
    setup: Setup, held: Held, draft: Draft, keep: torch.Tensor, rows: torch.Tensor, coding: Coding
) -> tuple[Columns, torch.Tensor]:
    """The kept columns alone, and which of them there are, `[b, g, t]`; with biases and values that were fitted in the `rows`,
    bool `[b]`, that have lost something.
    """
    assert draft.seen is not None, "there is something to fit"
    most = int(keep.sum(-1).max())
    order = (~keep).int().argsort(dim=-1, stable=True)[..., :most]  # [b, g, t], kept ones first
    there = keep.gather(-1, order)

    def gathered(tensor: torch.Tensor) -> torch.Tensor:
        index = order if tensor.dim() == 3 else order.unsqueeze(-1).expand(*order.shape, tensor.shape[-1])
        return tensor.gather(2, index)

    columns = draft.columns
    bias = None if columns.bias is None else gathered(columns.bias)
    scores = None if columns.scores is None else gathered(columns.scores)
    kept = Columns(gathered(columns.keys), gathered(columns.values), gathered(columns.positions), scores, bias)
    kept.positions = kept.positions.masked_fill(~there, -1)
    kept.keys = _read_back(coding, kept.keys, kept.positions)  # the fit makes up for their errors
    references = draft.seen.references
    virtual = virtual_tokens(setup, held, references.query_states, draft.call, references.later)
    bias, values, change = fit(draft.seen, kept, draft.call, virtual, rows)
    if change is not None:
        state = setup.unpacked(held.state)
        setup.memory.change_values(state, change)
        held.state = setup.packed(state)
    kept.bias, kept.values = bias.masked_fill(~there, 0), values.to(columns.values.dtype)
    return kept, there
