"""Bytes of each cache at each context, held and by formula.

Axes: `b` sequences, `g` KV heads, `d` head dim, `r` rank, `c` slots, `f` token counts of the policy.
"""

import dataclasses
from collections.abc import Callable

import torch

from less_cache.bench.contenders import Contest
from less_cache.bench.options import BenchOptions
from less_cache.bench.table import shown
from less_cache.evaluation.perplexity import cache_bytes
from less_cache.integration.families import full_attention_layers, geometry

NOTE = (
    "Formula, a layer with g KV heads of dimension d, numbers of i bytes, b sequences of T tokens: full cache 2·i·b·g·d·T; "
    "policy with a budget of c − 1 tokens and f counts b·(g·c·(2·i·d + 8) + 8·f + 9); LESS with r centroids "
    "4·b·g·r·(2·d + 1) more, of low rank r 4·b·g·r·(d + 1)."
)


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """One cache at one context. `formula`: the bytes that it should hold; None where there is no formula."""

    context: int
    cache: str
    bytes: int
    formula: int | None
    ratio: float | None


COLUMNS: dict[str, Callable[[MemoryRow], str]] = {
    "bytes": lambda row: f"{row.bytes:,}",
    "formula": lambda row: shown(row.formula, ","),
    "ratio": lambda row: shown(row.ratio, ".3f"),
}


def runs(options: BenchOptions) -> int:
    """How often `measure` calls `advance`."""
    return len(options.contexts) * len(options.caches)


@torch.no_grad()
def measure(contest: Contest, advance: Callable[[], object]) -> list[MemoryRow]:
    """Fill each cache and count its tensors."""
    rows = []
    for context in contest.options.contexts:
        held = {}
        for name in contest.options.caches:
            held[name] = cache_bytes(contest.fill(name, context, contest.options.batch))
            advance()
        for name, count in held.items():
            ratio = count / held["dynamic"] if "dynamic" in held else None
            rows.append(MemoryRow(context, name, count, formula(contest, name, context), ratio))
    return rows


def formula(contest: Contest, name: str, context: int) -> int | None:
    """Bytes of a cache at `context` tokens; None for a policy without a budget, or layers of other kinds."""
    config = contest.model.config
    sizes, layers = geometry(config), len(full_attention_layers(config))
    if layers < sizes.num_hidden_layers:
        return None
    b, g, d, i = contest.options.batch, sizes.num_key_value_heads, sizes.head_dim, contest.model.dtype.itemsize
    if name in ("dynamic", "static"):
        return layers * 2 * i * b * g * d * context
    policy = contest.policy(context)
    counts = policy.resolve(torch.tensor([context]))  # [1, f]
    capacity = policy.capacity(counts.T[:, :, None, None])
    if capacity is None:
        return None
    c, f = int(capacity) + 1, counts.shape[1]
    total = layers * b * (g * c * (2 * i * d + 8) + 8 * f + 9)
    if name.startswith("less") and contest.kernels is not None:
        memories = (contest.kernels.for_layer(index) for index in contest.kernels.config.layers or [])
        total += sum(4 * b * g * memory.num_virtual_tokens * (d + memory.extra_dims + 1) for memory in memories)
    return total
