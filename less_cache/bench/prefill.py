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
    """One cache, one prompt length. `padding`: tokens of the first sequence that were padding; `peak_bytes`: most that was held
    above the weights, the cache included; None: unknown. `ratio`: to the seconds of a DynamicCache with as much padding.
    """

    context: int
    cache: str
    padding: int
    seconds: Spread
    peak_bytes: int | None
    ratio: float | None


COLUMNS: dict[str, Callable[[PrefillRow], str]] = {
    "padding": lambda row: str(row.padding),
    "seconds": lambda row: f"{row.seconds.median:.2f}",
    "quartiles": lambda row: row.seconds.quartiles,
    "ratio": lambda row: shown(row.ratio, ".2f"),
    "peak MiB": lambda row: shown(row.peak_bytes and row.peak_bytes / 2**20, ",.0f"),
}


def runs(options: BenchOptions) -> int:
    """How often `measure` calls `advance`."""
    return len(options.contexts) * len(paddings(options)) * len(options.caches) * (options.rounds + 1)


def paddings(options: BenchOptions) -> list[int]:
    """Tokens of padding that are measured: none, and those that were asked for."""
    return sorted({0, options.padding})


@torch.no_grad()
def measure(contest: Contest, advance: Callable[[], object]) -> list[PrefillRow]:
    """Read a prompt of each length with each cache, in one piece or in chunks, without padding and with it."""
    options, rows = contest.options, []
    peaks: dict[tuple[str, int], list[int | None]] = {}

    def reading(name: str, padding: int, tokens: torch.Tensor) -> Callable[[], float]:
        def run() -> float:
            peak = PeakMemory(contest.device)
            peak.start()
            seconds = contest.read(contest.make(name, tokens.shape[1]), tokens, options.chunk, padding)
            peaks[name, padding].append(peak.stop())
            return seconds

        return run

    for context in options.contexts:
        tokens = contest.tokens(options.batch, context)
        contestants = {
            (name, padding): reading(name, padding, tokens) for padding in paddings(options) for name in options.caches
        }
        peaks = {each: [] for each in contestants}
        results = alternate(contestants, options.rounds, advance)
        for padding in paddings(options):
            times = {name: results[name, padding] for name in options.caches}
            compared = ratios(times, "dynamic")
            for name in options.caches:
                known = [peak for peak in peaks[name, padding][1:] if peak is not None]
                spread, peak = Spread.of(times[name]), max(known, default=None)
                rows.append(PrefillRow(context, name, padding, spread, peak, compared[name]))
    return rows
