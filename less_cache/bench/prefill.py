"""Seconds and peak memory of reading a prompt."""

import dataclasses
import time
from collections.abc import Callable

import torch
from rich import box
from rich.table import Table

from less_cache.bench.contenders import Contender, Contest
from less_cache.bench.machine import synchronize
from less_cache.bench.options import BenchOptions
from less_cache.bench.peak import PeakMemory
from less_cache.bench.timing import Spread, alternate, ratios

NOTE = "Random tokens, into an empty cache. Peak: above the model's weights. The ratio is to DynamicCache, round by round."


@dataclasses.dataclass(frozen=True)
class PrefillRow:
    """One cache, one prompt length. `peak_bytes`: most that was held above the weights, the cache included; None: unknown."""

    context: int
    cache: str
    seconds: Spread
    peak_bytes: int | None
    ratio: float | None


def names(options: BenchOptions) -> list[str]:
    """A static cache reads as a dynamic one does."""
    return [name for name in options.caches if name != "static"]


def runs(options: BenchOptions) -> int:
    """How often `measure` calls `advance`."""
    return len(options.contexts) * len(names(options)) * (options.rounds + 1)


@torch.no_grad()
def measure(contest: Contest, advance: Callable[[], object]) -> list[PrefillRow]:
    """Read a prompt of each length with each cache, in one piece or in chunks."""
    options, rows = contest.options, []
    peaks: dict[str, list[int | None]] = {}

    def reading(contender: Contender, tokens: torch.Tensor) -> Callable[[], float]:
        def run() -> float:
            peak = PeakMemory(contest.device)
            peak.start()
            cache = contender.make(tokens.shape[1], 0)
            synchronize(contest.device)
            start = time.perf_counter()
            contest.read(contender, cache, tokens, options.chunk)
            synchronize(contest.device)
            seconds = time.perf_counter() - start
            peaks[contender.name].append(peak.stop())
            return seconds

        return run

    for context in options.contexts:
        tokens = contest.tokens(options.batch, context)
        contestants = {each.name: reading(each, tokens) for each in contest.contenders if each.name in names(options)}
        peaks = {name: [] for name in contestants}
        results = alternate(contestants, options.rounds, advance)
        compared = ratios(results, "dynamic")
        for name, times in results.items():
            known = [peak for peak in peaks[name][1:] if peak is not None]
            rows.append(PrefillRow(context, name, Spread.of(times), max(known, default=None), compared[name]))
    return rows


def table(rows: list[PrefillRow], labels: dict[str, str]) -> Table:
    """One line a cache and prompt."""
    result = Table(box=box.SIMPLE_HEAD, caption=NOTE)
    result.add_column("prompt", justify="right")
    result.add_column("cache", no_wrap=True)
    for name in ("seconds", "quartiles", "ratio", "peak MiB"):
        result.add_column(name, justify="right")
    context = None
    for row in rows:
        if context not in (None, row.context):
            result.add_section()
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}"
        shown = "" if row.context == context else f"{row.context:,}"
        quartiles = f"{row.seconds.lower:.2f} … {row.seconds.upper:.2f}"
        result.add_row(shown, labels[row.cache], f"{row.seconds.median:.2f}", quartiles, ratio, peak)
        context = row.context
    return result
