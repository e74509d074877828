"""The policy alone, with the state's bytes as more recent tokens, and with LESS, at many lengths, budgets and policies.

    python benchmarks/lengths.py MODEL KERNELS --data novel.txt --data news.txt --length 256 --length 8192 --budget 0.05

At none should LESS be the worst of them. Each sequence is read at once but for the last tokens, which are decoded one by one
through the real cache. Measured, in nats a token: the loss, and how far the distribution is from the full cache's (KL
divergence), which a text of any length tells with far less noise. Prints a table, and one JSON line last, with every
sequence's numbers. `--known`: an earlier report, for other kernels; what does not depend on them is taken from there.
"""

import json
import operator
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy, kl_div
from transformers import Cache, DynamicCache

from less_cache import LESSCache, LESSKernels, models
from less_cache.bench.command import without_folder
from less_cache.evaluation.perplexity import decode, stretches, with_state_bytes
from less_cache.policies import POLICIES, policy_class
from less_cache.reports import outputs
from less_cache.reports.machine import describe


def main(
    model_name: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, .gguf file or Hub id.")],
    folder: Annotated[str, typer.Argument(metavar="KERNELS", help="Folder or Hub id.")],
    data: Annotated[list[Path], typer.Option(metavar="FILE", help="UTF-8 text; several share the sequences.")],
    length: Annotated[list[int], typer.Option(metavar="TOKENS", help="Of a sequence; repeatable.")],
    budget: Annotated[list[float], typer.Option(metavar="SHARE", help="Of the length; repeatable.")],
    policy: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Repeatable. Default: all.")] = None,
    sequences: int = 8,
    decoded: int = 64,
    batch_size: int = 8,
    dtype: str = "float32",
    known: Annotated[Path | None, typer.Option(metavar="FILE", help="An earlier report on the same text.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON line here too.")] = None,
) -> None:
    """Loss, and divergence from the full cache, of each cache on the same text."""
    model, tokenizer = models.load(model_name, dtype=models.weights_type(dtype))
    kernels = LESSKernels.from_pretrained(folder)
    console = Console(stderr=True, highlight=False)
    table = Table("length", "policy", "cache", "nats a token", "KL from full", "LESS is nearer in")
    asked = {"data": [path.name for path in data], "sequences": sequences, "decoded": decoded, "dtype": dtype}
    earlier = {} if known is None else read(known, {"model": without_folder(model_name), **asked})
    rows = []
    for tokens in length:
        texts = stretches(data, tokenizer, sequences, tokens)
        targets = texts[:, -decoded:]

        def logits_of(make: Callable[[], Cache], texts: torch.Tensor = texts) -> torch.Tensor:
            return decoded_logits(model, texts, make, decoded, batch_size)

        full = logits_of(lambda: DynamicCache(config=model.config))
        for used in (policy_class(name).from_budget(round(b * tokens)) for name in policy or POLICIES for b in budget):
            larger = with_state_bytes(used, kernels, model.dtype.itemsize)
            caches = {"less": (used, kernels), "policy": (used, None), "baseline+": (larger, None)}
            results = {"full": {"loss": losses(full, targets)}}
            before = earlier.get((tokens, json.dumps(used.to_dict())), {})
            if before and before["full"]["loss"] != results["full"]["loss"]:
                raise typer.BadParameter(f"{known}: the full cache had other losses; expected those of this text and machine.")
            for name, (kept, state) in caches.items():
                if state is None and before.get(name, {}).get("policy") == kept.to_dict():
                    results[name] = before[name]
                else:
                    logits = logits_of(lambda kept=kept, state=state: LESSCache(model, kept, state))
                    measured = {"loss": losses(logits, targets), "divergence": divergences(logits, full)}
                    results[name] = {"policy": kept.to_dict(), **measured}
                nearer = sum(map(operator.lt, results["less"]["divergence"], results[name]["divergence"]))
                cells = [f"{statistics.fmean(results[name][what]):.4f}" for what in ("loss", "divergence")]
                table.add_row(f"{tokens:,}", repr(kept), name, *cells, "" if name == "less" else f"{nearer} of {sequences}")
                console.print(f"{tokens:,} {kept} {name}", *cells, nearer)
            rows.append({"length": tokens, "policy": used.to_dict(), "caches": results})
    console.print(table)
    report = {
        "benchmark": "lengths",
        "model": without_folder(model_name),
        "kernels_sha256": kernels.config.sha256,
        **asked,
        **describe(torch.device("cpu")),
        "results": rows,
    }
    outputs.finish(report, output)


def read(known: Path, asked: dict) -> dict[tuple[int, str], dict]:
    """What each cache of an earlier report had, by length and policy, with machine, versions and commit of its measurement."""
    try:
        report = json.loads(known.read_text())
        for name, value in asked.items():
            if report[name] != value:
                raise typer.BadParameter(f"{known}: expected {name} {value}, as in this measurement, got {report[name]}.")
        origin = {name: report[name] for name in ("machine", "versions", "commit")}
        rows = {}
        for row in report["results"]:
            caches = {name: {"origin": origin, **each} for name, each in row["caches"].items()}
            rows[row["length"], json.dumps(row["policy"])] = caches
        return rows
    except (ValueError, KeyError) as error:
        raise typer.BadParameter(f"{known}: expected a report of benchmarks/lengths.py, got {error!r}.") from error


def decoded_logits(model, texts: torch.Tensor, make: Callable[[], Cache], decoded: int, batch_size: int) -> torch.Tensor:
    """Logits in float32 for the last tokens of `texts` `[count, p + n]`: `[count, n, vocab]`."""
    batches = []
    with torch.no_grad():
        for batch in texts.split(batch_size):
            steps = decode(model, batch, make(), batch.shape[1] - decoded)
            batches.append(torch.stack([logits.float() for logits in steps], dim=1))
    return torch.cat(batches)


def losses(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """Nats a token of each sequence; `[count, n, vocab]` and `[count, n]`."""
    return cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(-1).tolist()


def divergences(logits: torch.Tensor, full: torch.Tensor) -> list[float]:
    """KL(full cache || other), nats a token of each sequence; both `[count, n, vocab]`."""
    pairs = zip(logits.log_softmax(-1), full.log_softmax(-1), strict=True)
    return [kl_div(other, dense, reduction="batchmean", log_target=True).item() for other, dense in pairs]


if __name__ == "__main__":
    typer.run(main)
