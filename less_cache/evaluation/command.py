"""What `less-cache eval perplexity` does: one table and one line of JSON."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from less_cache import models
from less_cache.errors import LESSError
from less_cache.evaluation import texts
from less_cache.evaluation.perplexity import Measurement, list_contenders, measure, stretches
from less_cache.evaluation.plot import draw
from less_cache.integration.families import fingerprint
from less_cache.kernels.kernels import LESSKernels
from less_cache.policies import policy_class
from less_cache.reports import machine, outputs
from less_cache.version import __version__


def run(
    model_name: str,
    kernels_name: str | None,
    policy_name: str,
    budgets: list[int | float],
    data: list[Path],
    sequences: int,
    prompt_length: int,
    decoded: int,
    batch_size: int,
    dtype: str,
    known: Path | None,
    output: Path | None,
    plot: Path | None,
) -> None:
    """Measure every budget on the same text; print a table each, then all of it as one JSON line."""
    outputs.check(output, plot)
    weights_type = models.weights_type(dtype)
    console = Console(highlight=False, stderr=True)
    make = policy_class(policy_name).from_budget
    for budget in budgets:
        make(budget)  # a wrong one is reported as it was given
    policies = [make(budget if isinstance(budget, int) else max(2, round(budget * prompt_length))) for budget in budgets]
    kernels = LESSKernels.from_pretrained(kernels_name) if kernels_name else None
    texts.check(data)
    protocol = {
        "model": model_name,
        "data": [path.name for path in data],
        "sequences": sequences,
        "prompt_length": prompt_length,
        "decoded": decoded,
        "dtype": dtype,
    }
    if known is not None:
        read(known, protocol)  # a wrong one is reported before the model is loaded
    model, tokenizer = models.load(model_name, dtype=weights_type)
    tokens = stretches(data, tokenizer, sequences, prompt_length + decoded)
    protocol |= {"weights": fingerprint(model), "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()}
    measured = [] if known is None else read(known, protocol)
    batches = -(-sequences // batch_size)
    results: list[list[dict]] = []
    for policy in policies:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(str(policy), total=len(list_contenders(model, policy, kernels)) * batches)
            advance = functools.partial(progress.advance, task)
            rows = measure(model, tokens, policy, kernels, prompt_length, batch_size, advance, measured)
        measured += rows
        console.print(table(str(policy), rows))
        results.append([dataclasses.asdict(row) for row in rows])
    sha256 = kernels.config.sha256 if kernels is not None else None
    described = machine.describe(model.device)
    report = {**protocol, "kernels_sha256": sha256, "less_cache": __version__, **described, "results": results}
    outputs.finish(report, output, plot, lambda report: draw({", ".join(report["data"]): report}))


def read(report: Path, protocol: dict) -> list[Measurement]:
    """What a report of the same protocol measured, each with its origin."""
    try:
        written = json.loads(report.read_text("utf-8"))
        origin = {name: written[name] for name in ("machine", "versions", "commit")}
        rows = [Measurement(**{**row, "origin": row.get("origin") or origin}) for rows in written["results"] for row in rows]
        for row in rows:
            if not all(type(value) in (int, float) for value in (row.perplexity, row.bytes)):
                raise TypeError(f"{row.cache} has the perplexity {row.perplexity!r} and the bytes {row.bytes!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LESSError(f"Expected --known to be a report of eval perplexity, got {report}: {error!r}") from error
    for name, value in protocol.items():
        if written.get(name) != value:
            raise LESSError(f"{report}: expected {name} {value!r}, as in this measurement, got {written.get(name)!r}.")
    return rows


def table(title: str, rows: list[Measurement]) -> Table:
    """One policy's measurements."""
    result = Table(title=title, box=box.SIMPLE_HEAD)
    result.add_column("cache")
    for name in ("tokens kept", "bytes", "perplexity", "gap recovered", "divergence"):
        result.add_column(name, justify="right")
    for row in rows:
        recovered = "" if row.gap_recovered is None else f"{row.gap_recovered:.0%}"
        name = row.cache
        if name == "baseline+" and row.policy is not None:
            name += f" ({', '.join(str(count) for count in list(row.policy.values())[1:])})"
        kept = "" if row.tokens is None else f"{row.tokens:.0f}"
        divergence = "" if row.divergence is None else f"{row.divergence:.3f}"
        result.add_row(name, kept, f"{row.bytes:,.0f}", f"{row.perplexity:.2f}", recovered, divergence)
    return result
