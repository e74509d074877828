"""The policy alone beside LESS at many lengths, budgets and policies: at none should LESS be the worse one.

    python benchmarks/lengths.py MODEL KERNELS --data novel.txt --data news.txt --length 256 --length 8192 --budget 0.05

Each sequence is read at once but for the last tokens, which are decoded one by one through the real cache. Measured, in nats a
token: the loss with the full cache, with the policy alone and with LESS, and how far the distributions of the last two are
from the full cache's (KL divergence), which text of any length tells with far less noise. Prints a table, and one JSON line
last, with every sequence's numbers.
"""

import json
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
from less_cache.evaluation.perplexity import decode, stretches
from less_cache.machine import describe
from less_cache.policies import POLICIES, policy_class

DIVERGENCES = ("alone_divergence", "less_divergence")


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
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON line here too.")] = None,
) -> None:
    """Nats a token of the policy alone and of LESS."""
    model, tokenizer = models.load(model_name, dtype=models.weights_type(dtype))
    kernels = LESSKernels.from_pretrained(folder)
    console = Console(stderr=True, highlight=False)
    table = Table("length", "policy", "full", "alone", "LESS", "ahead in", "KL alone", "KL LESS", "ahead in", title="nats")
    rows = []
    for tokens in length:
        texts = stretches(data, tokenizer, sequences, tokens)
        full = decoded_logits(model, texts, lambda: DynamicCache(config=model.config), decoded, batch_size)
        targets = texts[:, -decoded:]
        for used in (policy_class(name).from_budget(round(b * tokens)) for name in policy or POLICIES for b in budget):
            row = {"full": losses(full, targets)}
            for name, state in (("alone", None), ("less", kernels)):
                logits = decoded_logits(
                    model, texts, lambda used=used, state=state: LESSCache(model, used, state), decoded, batch_size
                )
                row |= {name: losses(logits, targets), f"{name}_divergence": divergences(logits, full)}
            rows.append({"length": tokens, "policy": used.to_dict(), **row})
            cells = [f"{tokens:,}", repr(used), *compared(row, "full", "alone", "less"), *compared(row, *DIVERGENCES)]
            table.add_row(*cells)
            console.print(*cells)
    console.print(table)
    report = {
        "benchmark": "lengths",
        "model": without_folder(model_name),
        "kernels_sha256": kernels.config.sha256,
        "data": [path.name for path in data],
        **{"sequences": sequences, "decoded": decoded, "dtype": dtype},
        **describe(torch.device("cpu")),
        "results": rows,
    }
    line = json.dumps(report)
    print(line)
    if output is not None:
        output.write_text(line + "\n")


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


def compared(row: dict[str, list[float]], *names: str) -> list[str]:
    """The means of lists, and in how many sequences the last one's number is below the one's before."""
    *_, alone, less = (row[name] for name in names)
    ahead = sum(one < other for one, other in zip(less, alone, strict=True))
    return [*(f"{statistics.fmean(row[name]):.4f}" for name in names), f"{ahead} of {len(less)}"]


if __name__ == "__main__":
    typer.run(main)
