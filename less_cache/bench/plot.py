"""Pictures of a report, from its JSON."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = {"dynamic": "black", "static": "tab:gray", "policy": "tab:orange", "less": "tab:blue"}


def draw(report: dict[str, Any], picture: Path) -> None:
    """Against the context: time and bytes; against the batch: throughput, a panel a context."""
    panels = PANELS[report["benchmark"]]
    contexts = sorted({row["context"] for row in report["results"]})
    columns = contexts if panels is None else panels
    figure = Figure(figsize=(5 * len(columns), 3.8), layout="constrained")
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        if panels is None:
            _throughput(axes, report, column)
        else:
            _against_context(axes, report, *column)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    title = f"{report['model']}, {report['dtype']}, {report['machine'].get('gpu') or report['machine']['cpu']}"
    figure.suptitle(f"{title}, budget {report['budget']}, batch {report['batch']}" if panels else title, fontsize=9)
    figure.savefig(picture, dpi=120)


# Field of a row, label of its axis, unit; a spread is drawn with its quartiles.
PANELS: dict[str, list[tuple[str, str, float]] | None] = {
    "decode": [("ms_per_token", "ms a token", 1), ("bytes", "cache, MiB", 2**20)],
    "prefill": [("seconds", "seconds", 1), ("peak_bytes", "peak memory above the weights, MiB", 2**20)],
    "memory": [("bytes", "cache, MiB", 2**20)],
    "batch": None,
}


def _against_context(axes: Axes, report: dict[str, Any], field: str, label: str, unit: float) -> None:
    for name, text in report["labels"].items():
        rows = [row for row in report["results"] if row["cache"] == name and row[field] is not None]
        if not rows:
            continue
        contexts = [row["context"] for row in rows]
        if isinstance(rows[0][field], dict):
            _spread(axes, contexts, [row[field] for row in rows], text, COLORS[name])
        else:
            axes.plot(contexts, [row[field] / unit for row in rows], marker="o", markersize=4, label=text, color=COLORS[name])
        if formula := [(row["context"], row["formula"] / unit) for row in rows if row.get("formula")]:
            axes.plot(*zip(*formula, strict=True), linestyle="none", marker="x", markersize=9, color=COLORS[name])
    axes.set(xlabel="tokens", ylabel=label, xscale="log")
    if unit == 1:
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
    contexts = sorted({row["context"] for row in report["results"]})
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.minorticks_off()


def _throughput(axes: Axes, report: dict[str, Any], context: int) -> None:
    for row in report["results"]:
        if row["context"] == context and row["points"]:
            batches, spreads = zip(*((point["batch"], point["tokens_per_second"]) for point in row["points"]), strict=True)
            _spread(axes, list(batches), list(spreads), report["labels"][row["cache"]], COLORS[row["cache"]])
    axes.set(xlabel="batch", ylabel="tokens a second", xscale="log", yscale="log", title=f"{context:,} tokens each")


def _spread(axes: Axes, places: list[int], spreads: list[dict[str, float]], text: str, color: str) -> None:
    """Medians with their quartiles."""
    medians = [spread["median"] for spread in spreads]
    below = [spread["median"] - spread["lower"] for spread in spreads]
    above = [spread["upper"] - spread["median"] for spread in spreads]
    axes.errorbar(
        places, medians, yerr=[below, above], marker="o", markersize=4, capsize=3, linewidth=1.2, label=text, color=color
    )
