"""Seconds and peak memory of reading a prompt."""

import dataclasses
from collections.abc import Callable

import torch

from less_cache.bench.contenders import Contest
from less_cache.bench.options import BenchOptions
from less_cache.bench.peak import PeakMemory
from less_cache.bench.table import shown
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


COLUMNS: dict[str, Callable[[PrefillRow], str]] = {
    "seconds": lambda row: f"{row.seconds.median:.2f}",
    "quartiles": lambda row: row.seconds.quartiles,
    "ratio": lambda row: shown(row.ratio, ".2f"),
    "peak MiB": lambda row: shown(row.peak_bytes and row.peak_bytes / 2**20, ",.0f"),
}


def runs(options: BenchOptions) -> int:
    """How often `measure` calls `advance`."""
    return len(options.contexts) * len(options.caches) * (options.rounds + 1)


@torch.no_grad()
def measure(contest: Contest, advance: Callable[[], object]) -> list[PrefillRow]:
    """Read a prompt of each length with each cache, in one piece or in chunks."""
    options, rows = contest.options, []
    peaks: dict[str, list[int | None]] = {}

    def reading(name: str, tokens: torch.Tensor) -> Callable[[], float]:
        def run() -> float:
            peak = PeakMemory(contest.device)
            peak.start()
            seconds = contest.read(contest.make(name, tokens.shape[1]), tokens, options.chunk, options.padding)
            peaks[name].append(peak.stop())
            return seconds

        return run

    for context in options.contexts:
        tokens = contest.tokens(options.batch, context)
        contestants = {name: reading(name, tokens) for name in options.caches}
        peaks = {name: [] for name in contestants}
        results = alternate(contestants, options.rounds, advance)
        compared = ratios(results, "dynamic")
        for name, times in results.items():
            known = [peak for peak in peaks[name][1:] if peak is not None]
            rows.append(PrefillRow(context, name, Spread.of(times), max(known, default=None), compared[name]))
    return rows
