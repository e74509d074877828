"""A plot of a report, from its JSON."""

from typing import Any

from less_cache.reports import plots

STYLES: dict[str, dict[str, Any]] = {  # static caches dashed: they often lie on the others
    "dynamic": {"color": "black"},
    "static": {"color": "tab:gray", "linestyle": "--"},
    "policy": {"color": "tab:orange"},
    "less": {"color": "tab:blue"},
    "policy_static": {"color": "tab:red", "linestyle": "--"},
    "less_static": {"color": "tab:cyan", "linestyle": "--"},
}


def draw(report: dict[str, Any]) -> Any:
    """Against the context: time and bytes; against the batch: throughput, a panel a context."""
    panels = PANELS[report["benchmark"]]
    contexts = sorted({row["context"] for row in report["results"]})
    columns = contexts if panels is None else panels
    figure, drawn = plots.figure(len(columns))
    for axes, column in zip(drawn, columns, strict=True):
        if panels is None:
            _throughput(axes, report, column)
        else:
            _against_context(axes, report, *column)
        axes.grid(alpha=0.3, which="both")
    named = {text: line for axes in drawn for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3 * len(columns) - 1)
    title = f"{report['model']}, {report['dtype']}, {report['machine'].get('gpu') or report['machine']['cpu']}"
    figure.suptitle(f"{title}, budget {report['budget']}, batch {report['batch']}" if panels else title, fontsize=9)
    return figure


# Field of a row, label of its axis, unit; a spread is drawn with its quartiles.
PANELS: dict[str, list[tuple[str, str, float]] | None] = {
    "decode": [("ms_per_token", "ms a token", 1), ("bytes", "cache, MiB", 2**20)],
    "prefill": [("seconds", "seconds", 1), ("peak_bytes", "peak above the weights, MiB", 2**20)],
    "memory": [("bytes", "cache, MiB", 2**20)],
    "batch": None,
}


def _against_context(axes: Any, report: dict[str, Any], field: str, label: str, unit: float) -> None:
    for name, text in report["labels"].items():
        rows = [row for row in report["results"] if row["cache"] == name and row[field] is not None]
        rows = [row for row in rows if row.get("padding", 0) == report.get("padding", 0)]  # else a prompt's have two each
        if not rows:
            continue
        contexts = [row["context"] for row in rows]
        if isinstance(rows[0][field], dict):
            _spread(axes, contexts, [row[field] for row in rows], text, STYLES[name])
        else:
            axes.plot(contexts, [row[field] / unit for row in rows], marker="o", markersize=4, label=text, **STYLES[name])
        if formula := [(row["context"], row["formula"] / unit) for row in rows if row.get("formula")]:
            axes.plot(*zip(*formula, strict=True), linestyle="none", marker="x", markersize=9, color=STYLES[name]["color"])
    axes.set(xlabel="tokens", ylabel=label, xscale="log")
    if unit == 1:
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
    contexts = sorted({row["context"] for row in report["results"]})
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.set_xticks([], minor=True)


def _throughput(axes: Any, report: dict[str, Any], context: int) -> None:
    for row in report["results"]:
        if row["context"] == context and row["points"]:
            batches, spreads = zip(*((point["batch"], point["tokens_per_second"]) for point in row["points"]), strict=True)
            _spread(axes, list(batches), list(spreads), report["labels"][row["cache"]], STYLES[row["cache"]])
    axes.set(xlabel="batch", ylabel="tokens a second", xscale="log", yscale="log", title=f"{context:,} tokens each")


def _spread(axes: Any, places: list[int], spreads: list[dict[str, float]], text: str, style: dict[str, Any]) -> None:
    """Medians with their quartiles."""
    medians = [spread["median"] for spread in spreads]
    below = [spread["median"] - spread["lower"] for spread in spreads]
    above = [spread["upper"] - spread["median"] for spread in spreads]
    drawn = {"marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.2}
    axes.errorbar(places, medians, yerr=[below, above], label=text, **drawn, **style)
