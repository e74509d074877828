"""Times of runs that take turns."""

import dataclasses
import gc
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    lower: float
    upper: float

    @property
    def quartiles(self) -> str:
        """In words."""
        return f"{self.lower:.2f} … {self.upper:.2f}"

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Spread":
        if len(numbers) == 1:
            return cls(numbers[0], numbers[0], numbers[0])
        lower, median, upper = statistics.quantiles(numbers, n=4, method="inclusive")
        return cls(median, lower, upper)


def alternate(
    runs: Mapping[Name, Callable[[], float]], rounds: int, advance: Callable[[], object] = lambda: None
) -> dict[Name, list[float]]:
    """What each run returned in each of `rounds` rounds, after a first one that warms up and is not counted.

    All take their turn in every round, each time another one first: what slows the machine for a while slows all alike.
    """
    names = list(runs)
    results: dict[Name, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # what was there before is not gone through again during a run
    try:
        for index in range(rounds + 1):
            first = index % max(1, len(names))
            for name in names[first:] + names[:first]:
                result = runs[name]()
                advance()
                if index > 0:
                    results[name].append(result)
    finally:
        gc.unfreeze()
    return results


def ratios(results: Mapping[str, Sequence[float]], base: str) -> dict[str, float | None]:
    """Median over the rounds of each result divided by the same round's of `base`; None without `base`."""
    if base not in results:
        return dict.fromkeys(results)
    return {
        name: statistics.median(mine / other for mine, other in zip(numbers, results[base], strict=True))
        for name, numbers in results.items()
    }
