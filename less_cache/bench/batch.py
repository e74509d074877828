"""The largest batch that fits into a given memory, and how fast it decodes."""

import dataclasses
from collections.abc import Callable

import torch

from less_cache.bench.contenders import Contest
from less_cache.bench.options import BenchOptions
from less_cache.bench.peak import PeakMemory
from less_cache.bench.table import shown
from less_cache.bench.timing import Spread, alternate
from less_cache.evaluation.perplexity import cache_bytes
from less_cache.reports.machine import memory, out_of_memory

NOTE = (
    "By bytes: memory less weights, divided by the bytes of one sequence. Runs: the largest batch that was seen to fit, "
    "working memory included; empty where this machine is too small. Ratio: of tokens a second to DynamicCache's."
)
STEP = 4  # from one measured batch to the next
USABLE = 0.9  # of the machine's memory


@dataclasses.dataclass(frozen=True)
class Point:
    """Throughput of one batch."""

    batch: int
    tokens_per_second: Spread


@dataclasses.dataclass(frozen=True)
class BatchRow:
    """One cache at one context.

    Args:
        context: Tokens of each sequence.
        cache: One of `CACHES`.
        bytes_per_sequence: Of the cache.
        computed: Largest batch by these bytes.
        largest: Largest batch that was run within the memory; None: this machine has less.
        peak_bytes: Weights, cache and working memory in that run; None: unknown.
        points: Throughput, smallest batch first, `largest` last.
        ratio: Of the last point's throughput to DynamicCache's.
    """

    context: int
    cache: str
    bytes_per_sequence: int
    computed: int
    largest: int | None
    peak_bytes: int | None
    points: tuple[Point, ...]
    ratio: float | None = None


COLUMNS: dict[str, Callable[[BatchRow], str]] = {
    "MiB each": lambda row: f"{row.bytes_per_sequence / 2**20:,.2f}",
    "by bytes": lambda row: f"{row.computed:,}",
    "runs": lambda row: shown(row.largest, ","),
    "peak GiB": lambda row: shown(row.peak_bytes and row.peak_bytes / 2**30, ",.2f"),
    "tokens/s": lambda row: f"{row.points[-1].tokens_per_second.median:,.1f}" if row.points else "",
    "ratio": lambda row: shown(row.ratio, ".2f"),
}


def runs(options: BenchOptions) -> int | None:
    """How often `measure` calls `advance`: it depends on what fits."""
    return None


@torch.no_grad()
def measure(contest: Contest, advance: Callable[[], object]) -> list[BatchRow]:
    """Compute the largest batch of each cache, run it, and time the batches up to it."""
    options, rows = contest.options, []
    for context in options.contexts:
        found = {}
        for name in options.caches:
            one = cache_bytes(contest.fill(name, context, 1, more=options.tokens))
            computed = (options.memory - contest.weights) // one
            found[name] = (one, computed, *_largest(contest, name, context, computed))
            advance()
        contestants = {
            (name, batch): _decoding(contest, name, context, batch)
            for name in options.caches
            for batch in _sizes(found[name][2])
        }
        results = alternate(contestants, options.rounds, advance)
        measured = []
        for name, (one, computed, largest, peak) in found.items():
            points = tuple(Point(batch, Spread.of(rates)) for (other, batch), rates in results.items() if other == name)
            measured.append(BatchRow(context, name, one, computed, largest, peak, points))
        best = {row.cache: row.points[-1].tokens_per_second.median for row in measured if row.points}
        base = best.get("dynamic")
        for row in measured:
            ratio = best[row.cache] / base if base is not None and row.cache in best else None
            rows.append(dataclasses.replace(row, ratio=ratio))
    return rows


def _sizes(largest: int | None) -> list[int]:
    """1, 4, 16, … and the largest."""
    sizes, batch = [], 1
    while batch < (largest or 0):
        sizes.append(batch)
        batch *= STEP
    return [*sizes, largest] if largest else []


def _largest(contest: Contest, name: str, context: int, computed: int) -> tuple[int | None, int | None]:
    """The largest batch up to `computed` that decodes within the memory, and the bytes it took at most; None: cannot tell."""
    allowed, has, weights = contest.options.memory, memory(contest.device), contest.weights
    batch = computed
    while batch > 0:
        if has is None or allowed > USABLE * has:
            return None, None
        peak = PeakMemory(contest.device)
        peak.start()
        try:
            _decoding(contest, name, context, batch)()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            batch = batch * 9 // 10
            continue
        held = peak.stop()
        if held is None or weights + held <= allowed:
            return batch, None if held is None else weights + held
        batch = min(batch - 1, int(batch * (allowed - weights) / held))
    return None, None


def _decoding(contest: Contest, name: str, context: int, batch: int) -> Callable[[], float]:
    options = contest.options

    def run() -> float:
        cache = contest.fill(name, context, batch, more=options.tokens + 1)
        tokens = contest.tokens(batch, options.tokens + 1)
        contest.read(cache, tokens[:, :1], 1)
        return batch * options.tokens / contest.read(cache, tokens[:, 1:], 1)

    return run
