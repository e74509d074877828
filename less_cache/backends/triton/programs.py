"""What runs on a GPU: a decoding step of one layer, one program a KV head of a row.

The rules of PyTorch's step stand here a second time: those of `ops.attention.less_attention`, and `observe`, `protected`,
`capacity` and `victim` of H2O and of sinks + recent.

Axes: `b` rows, `g` KV heads, `s` query heads per KV head, `c` slots of a head, `N` slots of all heads, `d` head dim, `w` width
of values, `r` virtual tokens, `f` token counts of the policy: 2.
"""

import triton
import triton.language as tl


@triton.jit
def attend(
    query,  # [b, g, s, d], of the new token
    key,  # [b, g, d]
    value,  # [b, g, w]
    keys,  # [b, g, c, d], of the slots, as all up to the bias; with RAGGED [N, d]
    values,  # [b, g, c, w]
    positions,  # [b, g, c] int32
    scores,  # [b, g, c] float32
    bias,  # [b, g, c] float32
    starts,  # [b·g + 1] int64, where each head's slots begin and the last one's end
    seen,  # [b] int64
    counts,  # [b, f] or [b, g, f] int64, of the strides below
    settled,  # [b] bool
    real,  # [b] bool
    virtual_logits,  # [b, g, s, r] float32
    virtual_values,  # [b, g, r, w] float32
    output,  # [b, g, s, w], written, as all below
    victim_key,  # [b, g, d]
    victim_value,  # [b, g, w]
    left,  # [b, g] int32
    scaling,
    c,  # with RAGGED every head reads its own
    counts_row_stride,
    counts_head_stride,  # 0: the same for all heads
    G: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    OBSERVES: tl.constexpr,  # H2O; else sinks + recent
    PADS: tl.constexpr,
    RAGGED: tl.constexpr,  # heads have different numbers of slots
    HAS_BIAS: tl.constexpr,
    S_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
    W_BLOCK: tl.constexpr,
    R_BLOCK: tl.constexpr,
):
    """One KV head of one row. Reads the keys once, for H2O twice: a weight is known when all of them have been read."""
    head = tl.program_id(0).to(tl.int64)  # out of b·g
    row = head // G
    if RAGGED:
        begin = tl.load(starts + head)
        c = (tl.load(starts + head + 1) - begin).to(tl.int32)
    else:
        begin = head * c
    keys += begin * D
    values += begin * W
    positions += begin
    scores += begin
    if HAS_BIAS:
        bias += begin
    before = tl.load(seen + row).to(tl.int32)  # tokens before this one: its position
    arrives = 1
    if PADS:
        arrives = tl.load(real + row).to(tl.int32)

    head_index = tl.arange(0, S_BLOCK)
    is_head = head_index < S
    dim, width = tl.arange(0, D_BLOCK), tl.arange(0, W_BLOCK)
    group = head * S + head_index[:, None]
    queries = tl.load(query + group * D + dim[None, :], mask=is_head[:, None] & (dim < D)[None, :], other=0.0)
    queries = queries.to(tl.float32) * scaling  # [s, d]
    new_key = tl.load(key + head * D + dim, mask=dim < D, other=0.0)  # [d]
    new_value = tl.load(value + head * W + width, mask=width < W, other=0.0)  # [w]

    # Softmax over the kept tokens, as one pass: the new token, then the slots, of which its own is still empty.
    new_logit = tl.sum(queries * new_key.to(tl.float32)[None, :], axis=1)  # [s]
    largest = new_logit  # of the logits so far
    mass = tl.full([S_BLOCK], 1.0, tl.float32)  # Σ e^(l − largest)
    mean = tl.zeros([S_BLOCK, W_BLOCK], tl.float32) + new_value.to(tl.float32)[None, :]  # Σ e^(l − largest) v
    slot = c
    held = arrives
    for start in range(0, c, C_BLOCK):
        column = start + tl.arange(0, C_BLOCK)
        position = tl.load(positions + column, mask=column < c, other=-1)
        kept = position >= 0
        slot = tl.minimum(slot, tl.min(tl.where(kept, c, column), axis=0))
        held += tl.sum(kept.to(tl.int32), axis=0)
        logits = _logits(queries, keys, bias, column, kept, D, HAS_BIAS, D_BLOCK)  # [s, block]
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        shrink = tl.exp(largest - larger)
        weights = tl.exp(logits - larger[:, None])
        block_mask = kept[:, None] & (width < W)[None, :]
        block = tl.load(values + column[:, None] * W + width[None, :], mask=block_mask, other=0.0).to(tl.float32)
        mass = mass * shrink + tl.sum(weights, axis=1)
        mean = mean * shrink[:, None] + tl.dot(weights, block, input_precision="ieee")
        largest = larger

    # The virtual tokens are in the output, not in the weights that the policy sees.
    total = mass
    if R > 0:
        rank = tl.arange(0, R_BLOCK)
        by_rank = tl.load(
            virtual_logits + group * R + rank[None, :], mask=is_head[:, None] & (rank < R)[None, :], other=float("-inf")
        )  # [s, r]
        rank_values = tl.load(
            virtual_values + (head * R + rank[:, None]) * W + width[None, :],
            mask=(rank < R)[:, None] & (width < W)[None, :],
            other=0.0,
        )  # [r, w]
        largest_of_all = tl.maximum(largest, tl.max(by_rank, axis=1))
        shrink_to_all = tl.exp(largest - largest_of_all)
        by_rank = tl.exp(by_rank - largest_of_all[:, None])
        total = mass * shrink_to_all + tl.sum(by_rank, axis=1)
        mean = mean * shrink_to_all[:, None] + tl.dot(by_rank, rank_values, input_precision="ieee")
    tl.store(output + group * W + width[None, :], mean / total[:, None], mask=is_head[:, None] & (width < W)[None, :])

    # Scores, and the victim: of the lowest scores that nothing protects, the oldest. The new token is protected.
    counts += row * counts_row_stride + (head % G) * counts_head_stride
    heavy_or_sinks = tl.load(counts).to(tl.int32)
    recent = tl.load(counts + 1).to(tl.int32)
    lowest_score = float("inf")
    oldest = 2147483647
    victim = 0
    for start in range(0, c, C_BLOCK):
        column = start + tl.arange(0, C_BLOCK)
        position = tl.load(positions + column, mask=column < c, other=-1)
        kept = position >= 0
        score = tl.load(scores + column, mask=kept, other=0.0)
        may_go = kept & (position < before + arrives - recent)
        if OBSERVES:
            logits = _logits(queries, keys, bias, column, kept, D, HAS_BIAS, D_BLOCK)
            weights = tl.exp(logits - largest[:, None]) / mass[:, None]
            score += arrives * tl.sum(tl.where(is_head[:, None], weights, 0.0), axis=0)
            tl.debug_barrier()  # several threads may hold one score: all must have read it
            tl.store(scores + column, score, mask=kept)
        else:
            may_go = may_go & (position >= heavy_or_sinks)
        lowest = tl.min(tl.where(may_go, score, float("inf")), axis=0)
        is_lowest = may_go & (score == lowest)
        first = tl.min(tl.where(is_lowest, position, 2147483647), axis=0)
        at = tl.max(tl.where(is_lowest & (position == first), column, 0), axis=0)
        better = (lowest < lowest_score) | ((lowest == lowest_score) & (first < oldest))
        lowest_score = tl.where(better, lowest, lowest_score)
        oldest = tl.where(better, first, oldest)
        victim = tl.where(better, at, victim)
    leaves = (held > heavy_or_sinks + recent) & (oldest < 2147483647)

    tl.store(left + head, tl.where(leaves, oldest, -1))
    old_key = tl.load(keys + victim * D + dim, mask=dim < D, other=0.0)
    old_value = tl.load(values + victim * W + width, mask=width < W, other=0.0)
    tl.store(victim_key + head * D + dim, old_key, mask=dim < D)
    tl.store(victim_value + head * W + width, old_value, mask=width < W)

    tl.debug_barrier()  # all that was kept has been read
    tl.store(keys + slot * D + dim, new_key, mask=(dim < D) & (slot < c))
    tl.store(values + slot * W + width, new_value, mask=(width < W) & (slot < c))
    tl.store(positions + slot, tl.where(arrives > 0, before, -1), mask=slot < c)
    new_score = 0.0
    if OBSERVES:
        new_score = arrives * tl.sum(tl.where(is_head, tl.exp(new_logit - largest) / mass, 0.0), axis=0)
    tl.store(scores + slot, new_score, mask=slot < c)
    if HAS_BIAS:
        tl.store(bias + slot, 0.0, mask=slot < c)
    tl.store(positions + victim, -1, mask=leaves)
    if head % G == 0:
        tl.store(settled + row, (tl.load(settled + row) != 0) | ((before > 0) & (arrives > 0)))


@triton.jit
def _logits(queries, keys, bias, column, kept, D: tl.constexpr, HAS_BIAS: tl.constexpr, D_BLOCK: tl.constexpr):
    """q k of some slots and their bias, `[s, block]`, -inf for empty ones. The products are exact to float32, as in PyTorch."""
    dim = tl.arange(0, D_BLOCK)
    block = tl.load(keys + column[:, None] * D + dim[None, :], mask=kept[:, None] & (dim < D)[None, :], other=0.0)
    logits = tl.dot(queries, tl.trans(block.to(tl.float32)), input_precision="ieee")
    if HAS_BIAS:
        logits += tl.load(bias + column, mask=kept, other=0.0)[None, :]
    return tl.where(kept[None, :], logits, float("-inf"))


@triton.jit
def fold_in(
    values_sum,  # [b, g, r, w] float32
    features_sum,  # [b, g, r] float32
    pair_weights,  # [b, g, r] float32
    remembered,  # [b, g, w]
    factors,  # [b, g, r], of the strides that follow
    row_stride,
    head_stride,
    rank_stride,
    G: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    FADES: tl.constexpr,
    R_BLOCK: tl.constexpr,
    W_BLOCK: tl.constexpr,
):
    """The state of one KV head of one row."""
    head = tl.program_id(0).to(tl.int64)  # out of b·g
    rank, width = tl.arange(0, R_BLOCK), tl.arange(0, W_BLOCK)
    is_rank = rank < R
    weights = tl.load(pair_weights + head * R + rank, mask=is_rank, other=0.0).to(tl.float32)  # [r]
    pair = tl.load(remembered + head * W + width, mask=width < W, other=0.0).to(tl.float32)  # [w]
    sums_at = values_sum + (head * R + rank[:, None]) * W + width[None, :]
    sums_mask = is_rank[:, None] & (width < W)[None, :]
    sums = tl.load(sums_at, mask=sums_mask, other=0.0)  # [r, w]
    features = tl.load(features_sum + head * R + rank, mask=is_rank, other=0.0)  # [r]
    if FADES:
        factors += (head // G) * row_stride + (head % G) * head_stride
        factor = tl.load(factors + rank * rank_stride, mask=is_rank, other=0.0).to(tl.float32)
        sums *= factor[:, None]
        features *= factor
    tl.store(sums_at, sums + weights[:, None] * pair[None, :], mask=sums_mask)
    tl.store(features_sum + head * R + rank, features + weights, mask=is_rank)
