"""Milliseconds a token at each context."""

import dataclasses
import operator
import statistics
from collections.abc import Callable

import torch
from transformers import Cache

from less_cache.bench.contenders import Contest
from less_cache.bench.options import BenchOptions
from less_cache.bench.table import shown
from less_cache.bench.timing import Spread, alternate, ratios
from less_cache.evaluation.perplexity import cache_bytes

COPY = "copy"  # among the caches in a round
NOTE = (
    "Full caches hold random keys and values; the others have read random tokens in chunks. With "
    "--compile, the models around static caches are compiled, as generate does on a GPU. The ratio is to DynamicCache, "
    "round by round; limit: times as long as a copy would take to move the weights and the cache once; MiB: of the cache."
)


@dataclasses.dataclass(frozen=True)
class DecodeRow:
    """One cache at one context, which grows while it is measured.

    `bytes`: that the cache holds at the end; `ratio`: to DynamicCache's time of the same round, median; `times_the_limit`: to
    the time in which weights and cache would move once, at the bandwidth of a copy in the same round, median.
    """

    context: int
    cache: str
    ms_per_token: Spread
    bytes: int
    ratio: float | None
    times_the_limit: float


COLUMNS: dict[str, Callable[[DecodeRow], str]] = {
    "ms a token": lambda row: f"{row.ms_per_token.median:.2f}",
    "quartiles": lambda row: row.ms_per_token.quartiles,
    "ratio": lambda row: shown(row.ratio, ".2f"),
    "limit": lambda row: f"{row.times_the_limit:.2f}",
    "MiB": lambda row: f"{row.bytes / 2**20:,.2f}",
}


def runs(options: BenchOptions) -> int:
    """How often `measure` calls `advance`."""
    caches = len(options.caches)
    return len(options.contexts) * (caches + (caches + 1) * (options.rounds + 1))


@torch.no_grad()
def measure(contest: Contest, advance: Callable[[], object]) -> list[DecodeRow]:
    """Decode `options.tokens` tokens a run, feeding random ones."""
    options, rows = contest.options, []

    def decoding(cache: Cache) -> Callable[[], float]:
        tokens = contest.tokens(options.batch, options.tokens)
        return lambda: 1000 * contest.read(cache, tokens, 1) / options.tokens

    for context in options.contexts:
        caches, contestants = {}, {}
        for name in options.caches:
            caches[name] = contest.fill(name, context, options.batch, more=options.tokens * (options.rounds + 1))
            contestants[name] = decoding(caches[name])
            advance()
        results = alternate({**contestants, COPY: contest.copy}, options.rounds, advance)
        bandwidths = [contest.copied / seconds for seconds in results.pop(COPY)]
        compared = ratios(results, "dynamic")
        for name, times in results.items():
            held = cache_bytes(caches[name])
            limits = [1000 * (contest.read_weights + held) / bandwidth for bandwidth in bandwidths]
            times_the_limit = statistics.median(map(operator.truediv, times, limits))
            rows.append(DecodeRow(context, name, Spread.of(times), held, compared[name], times_the_limit))
    return rows
