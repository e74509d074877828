"""Milliseconds a token at each context."""

import dataclasses
import time
from collections.abc import Callable

import torch
from rich import box
from rich.table import Table
from transformers import Cache

from less_cache.bench.contenders import Contender, Contest
from less_cache.bench.machine import synchronize
from less_cache.bench.options import BenchOptions
from less_cache.bench.timing import Spread, alternate, ratios
from less_cache.evaluation.perplexity import cache_bytes

NOTE = (
    "Full caches hold random keys and values; the others have read random tokens in chunks. "
    "The ratio is to DynamicCache, round by round."
)


@dataclasses.dataclass(frozen=True)
class DecodeRow:
    """One cache at one context, which grows while it is measured. `bytes`: that the cache holds at the end; `ratio`: to
    DynamicCache's time of the same round, median.
    """

    context: int
    cache: str
    ms_per_token: Spread
    bytes: int
    ratio: float | None


def runs(options: BenchOptions) -> int:
    """How often `measure` calls `advance`."""
    return len(options.contexts) * len(options.caches) * (options.rounds + 2)


@torch.no_grad()
def measure(contest: Contest, advance: Callable[[], object]) -> list[DecodeRow]:
    """Decode `options.tokens` tokens a run, feeding random ones."""
    options, rows = contest.options, []

    def decoding(contender: Contender, cache: Cache) -> Callable[[], float]:
        tokens = contest.tokens(options.batch, options.tokens).split(1, dim=1)

        def run() -> float:
            synchronize(contest.device)
            start = time.perf_counter()
            for token in tokens:
                contender.forward(input_ids=token, past_key_values=cache)
            synchronize(contest.device)
            return 1000 * (time.perf_counter() - start) / options.tokens

        return run

    for context in options.contexts:
        caches, contestants = {}, {}
        for contender in contest.contenders:
            cache = contest.fill(contender, context, options.batch, more=options.tokens * (options.rounds + 1))
            caches[contender.name], contestants[contender.name] = cache, decoding(contender, cache)
            advance()
        results = alternate(contestants, options.rounds, advance)
        compared = ratios(results, "dynamic")
        for name, times in results.items():
            rows.append(DecodeRow(context, name, Spread.of(times), cache_bytes(caches[name]), compared[name]))
    return rows


def table(rows: list[DecodeRow], labels: dict[str, str]) -> Table:
    """One line a cache and context."""
    result = Table(box=box.SIMPLE_HEAD, caption=NOTE)
    result.add_column("context", justify="right")
    result.add_column("cache", no_wrap=True)
    for name in ("ms a token", "quartiles", "ratio", "cache MiB"):
        result.add_column(name, justify="right")
    context = None
    for row in rows:
        if context not in (None, row.context):
            result.add_section()
        spread = row.ms_per_token
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        shown = "" if row.context == context else f"{row.context:,}"
        quartiles = f"{spread.lower:.2f} … {spread.upper:.2f}"
        result.add_row(shown, labels[row.cache], f"{spread.median:.2f}", quartiles, ratio, f"{row.bytes / 2**20:,.2f}")
        context = row.context
    return result
