"""A picture of what `less-cache eval perplexity` measured."""

import io
from collections.abc import Mapping

from less_cache.errors import LESSError

CACHES = ("policy", "baseline+", "untrained", "less")


def draw(reports: Mapping[str, dict]) -> bytes:
    """Perplexity over the bytes of the cache, PNG: a panel for each report, by its name; a point for each budget."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LESSError("The plot needs matplotlib: pip install 'less-cache[train]'. Or leave the plot out.") from error
    figure = Figure(figsize=(4.5 * len(reports), 3.5), layout="constrained")
    for index, (name, report) in enumerate(reports.items(), start=1):
        axes = figure.add_subplot(1, len(reports), index, title=name, xlabel="MB a sequence", ylabel="perplexity")
        axes.axhline(report["results"][0][0]["perplexity"], color="grey", linestyle="--", label="full cache")
        for cache in CACHES:
            measured = [[row for row in rows if row["cache"] == cache] for rows in report["results"]]  # one list a budget
            best = [min(rows, key=lambda row: row["perplexity"]) for rows in measured if rows]
            points = sorted((row["bytes"] / 1e6, row["perplexity"]) for row in best)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=cache)
        axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100, metadata={"Software": None})
    return image.getvalue()
