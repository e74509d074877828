"""What `less-cache eval recall` does: one table and one line of JSON."""

import dataclasses
import functools
import hashlib
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from less_cache import models
from less_cache.errors import LESSError
from less_cache.evaluation import texts
from less_cache.evaluation.recall import Measurement, measure, needles
from less_cache.integration.families import fingerprint
from less_cache.reports import machine, outputs
from less_cache.version import __version__


def run(
    model_name: str,
    data: list[Path],
    shares: list[float],
    length: int,
    count: int,
    decoded: int,
    dtype: str,
    seed: int,
    output: Path | None,
) -> None:
    """Measure every share on the same needles; print a table, then all of it as one JSON line."""
    outputs.check(output, None)
    weights_type = models.weights_type(dtype)
    for share in shares:
        if not 0 < share <= 1:
            raise LESSError(f"Expected --budget to be a share of a full cache's bytes, such as 0.1, got {share}.")
    texts.check(data)
    model, tokenizer = models.load(model_name, dtype=weights_type)
    hidden = needles(data, tokenizer, count, length, decoded, seed)
    console = Console(highlight=False, stderr=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("needles", total=(1 + 3 * len(shares)) * count)
        rows = measure(model, tokenizer, hidden, shares, functools.partial(progress.advance, task))
    console.print(table(rows, count))
    prompts = b"".join(needle.prompt.numpy().tobytes() for needle in hidden)
    report = {
        "model": Path(model_name).absolute().name if Path(model_name).exists() else model_name,
        "data": [path.name for path in data],
        "length": length,
        "needles": count,
        "decoded": decoded,
        "dtype": dtype,
        "seed": seed,
        "weights": fingerprint(model),
        "tokens_sha256": hashlib.sha256(prompts).hexdigest(),
        "less_cache": __version__,
        **machine.describe(model.device),
        "results": [dataclasses.asdict(row) for row in rows],
    }
    outputs.finish(report, output)


def table(rows: list[Measurement], count: int) -> Table:
    """What was found."""
    result = Table(box=box.SIMPLE_HEAD)
    result.add_column("cache")
    for name in ("budget", "bytes", f"found of {count}"):
        result.add_column(name, justify="right")
    for row in rows:
        result.add_row(row.cache, f"{row.share:.1%}", f"{row.bytes_share:.1%}", str(row.found))
    return result
