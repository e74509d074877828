"""The largest batch that fits into a given memory, and how fast it decodes."""

import dataclasses
import time
from collections.abc import Callable

import torch
from rich import box
from rich.table import Table

from less_cache.bench.contenders import Contender, Contest
from less_cache.bench.machine import memory, synchronize
from less_cache.bench.options import BenchOptions
from less_cache.bench.peak import PeakMemory
from less_cache.bench.timing import Spread, alternate
from less_cache.evaluation.perplexity import cache_bytes

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


def runs(options: BenchOptions) -> int | None:
    """How often `measure` calls `advance`: it depends on what fits."""
    return None


@torch.no_grad()
def measure(contest: Contest, advance: Callable[[], object]) -> list[BatchRow]:
    """Compute the largest batch of each cache, run it, and time the batches up to it."""
    options, rows = contest.options, []
    weights = contest.weights
    for context in options.contexts:
        found = {}
        for contender in contest.contenders:
            one = cache_bytes(contest.fill(contender, context, 1, more=options.tokens))
            computed = (options.memory - weights) // one
            found[contender.name] = (one, computed, *_largest(contest, contender, context, computed, weights))
            advance()
        contestants = {
            (contender.name, batch): _decoding(contest, contender, context, batch)
            for contender in contest.contenders
            for batch in _sizes(found[contender.name][2])
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


def _largest(
    contest: Contest, contender: Contender, context: int, computed: int, weights: int
) -> tuple[int | None, int | None]:
    """The largest batch up to `computed` that decodes within the memory, and the bytes it took at most; None: cannot tell."""
    allowed, has = contest.options.memory, memory(contest.device)
    batch = computed
    while batch > 0:
        if has is None or allowed > USABLE * has:
            return None, None
        peak = PeakMemory(contest.device)
        peak.start()
        try:
            _decoding(contest, contender, context, batch)()
        except torch.OutOfMemoryError:
            batch = batch * 9 // 10
            continue
        held = peak.stop()
        if held is None or weights + held <= allowed:
            return batch, None if held is None else weights + held
        batch = min(batch - 1, int(batch * (allowed - weights) / held))
    return None, None


def _decoding(contest: Contest, contender: Contender, context: int, batch: int) -> Callable[[], float]:
    options = contest.options

    def run() -> float:
        cache = contest.fill(contender, context, batch, more=options.tokens + 1)
        first, *tokens = contest.tokens(batch, options.tokens + 1).split(1, dim=1)
        contender.forward(input_ids=first, past_key_values=cache)
        synchronize(contest.device)
        start = time.perf_counter()
        for token in tokens:
            contender.forward(input_ids=token, past_key_values=cache)
        synchronize(contest.device)
        return batch * options.tokens / (time.perf_counter() - start)

    return run


def table(rows: list[BatchRow], labels: dict[str, str]) -> Table:
    """One line a cache and context."""
    result = Table(box=box.SIMPLE_HEAD, caption=NOTE)
    result.add_column("context", justify="right")
    result.add_column("cache", no_wrap=True)
    for name in ("MiB each", "by bytes", "runs", "peak GiB", "tokens/s", "ratio"):
        result.add_column(name, justify="right")
    context = None
    for row in rows:
        if context not in (None, row.context):
            result.add_section()
        result.add_row(
            "" if row.context == context else f"{row.context:,}",
            labels[row.cache],
            f"{row.bytes_per_sequence / 2**20:,.2f}",
            f"{row.computed:,}",
            "" if row.largest is None else f"{row.largest:,}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:,.2f}",
            f"{row.points[-1].tokens_per_second.median:,.1f}" if row.points else "",
            "" if row.ratio is None else f"{row.ratio:.2f}",
        )
        context = row.context
    return result
