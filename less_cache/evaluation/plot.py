"""A plot of what `less-cache eval perplexity` measured."""

from collections.abc import Mapping
from typing import Any

from less_cache.reports import plots

CACHES = ("policy", "baseline+", "untrained", "less", "fitted", "fitted, trained")


def draw(reports: Mapping[str, dict]) -> Any:
    """Perplexity over the bytes of the cache: a panel for each report, by its name; a point for each budget."""
    figure, panels = plots.figure(len(reports))
    for axes, (name, report) in zip(panels, reports.items(), strict=True):
        axes.set(title=name, xlabel="MB a sequence", ylabel="perplexity")
        axes.axhline(report["results"][0][0]["perplexity"], color="grey", linestyle="--", label="full cache")
        for cache in CACHES:
            measured = [[row for row in rows if row["cache"] == cache] for rows in report["results"]]  # one list a budget
            best = [min(rows, key=lambda row: row["perplexity"]) for rows in measured if rows]
            points = sorted((row["bytes"] / 1e6, row["perplexity"]) for row in best)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=cache)
        axes.legend()
    return figure
