"""What `less-cache bench` does: one table and one line of JSON."""

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from less_cache.bench import batch, decode, memory, plot, prefill
from less_cache.bench.contenders import Contest
from less_cache.bench.options import BenchOptions
from less_cache.bench.table import table
from less_cache.reports import machine, outputs

BENCHMARKS: dict[str, Any] = {"decode": decode, "prefill": prefill, "memory": memory, "batch": batch}


def run(benchmark: str, options: BenchOptions, output: Path | None, picture: Path | None) -> None:
    """Measure, then print the table, and all of it as one JSON line; draw `picture` from that."""
    outputs.check(output, picture)
    console = Console(highlight=False, stderr=True)
    module = BENCHMARKS[benchmark]
    contest = Contest(options)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(benchmark, total=module.runs(options))
        rows = module.measure(contest, lambda: progress.advance(task))
    labels = {
        "dynamic": "DynamicCache",
        "static": "StaticCache",
        "policy": f"{options.policy} alone",
        "less": f"LESS on {options.policy}",
        "policy_static": f"{options.policy} alone, static",
        "less_static": f"LESS on {options.policy}, static",
    }
    labels = {name: label for name, label in labels.items() if name in options.caches}
    console.print(table(rows, labels, module.COLUMNS, module.NOTE))
    report = {
        "benchmark": benchmark,
        **dataclasses.asdict(options),
        "model": without_folder(options.model),
        "kernels": None if options.kernels is None else without_folder(options.kernels),
        "kernels_sha256": None if contest.kernels is None else contest.kernels.config.sha256,
        "parameters": sum(parameter.numel() for parameter in contest.model.parameters()),
        **machine.describe(contest.device),
        "labels": labels,
        "results": [dataclasses.asdict(row) for row in rows],
    }
    outputs.finish(report, output, picture, plot.draw)


def without_folder(source: str) -> str:
    """A Hub id as it is; of a path its last part, as a report goes to others."""
    return Path(source).absolute().name if Path(source).exists() else source
