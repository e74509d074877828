"""The policy alone beside LESS at many lengths, budgets and policies: at none should LESS be the worse one.

    python benchmarks/lengths.py MODEL KERNELS --data novel.txt --data news.txt --length 256 --length 8192 --budget 0.05

Each sequence is read at once but for the last tokens, which are decoded one by one through the real cache. Measured: nats a
token of each, and in how many sequences LESS is ahead. Prints a table, and one JSON line last.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from less_cache import LESSCache, LESSKernels, models
from less_cache.bench.command import without_folder
from less_cache.evaluation.perplexity import perplexity, stretches
from less_cache.machine import describe
from less_cache.policies import POLICIES, EvictionPolicy, policy_class


def main(
    model_name: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, .gguf file or Hub id.")],
    folder: Annotated[str, typer.Argument(metavar="KERNELS", help="Folder or Hub id.")],
    data: Annotated[list[Path], typer.Option(metavar="FILE", help="UTF-8 text; several share the sequences.")],
    length: Annotated[list[int], typer.Option(metavar="TOKENS", help="Of a sequence; repeatable.")],
    budget: Annotated[list[float], typer.Option(metavar="SHARE", help="Of the length; repeatable.")],
    policy: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Repeatable. Default: all.")] = None,
    sequences: int = 8,
    decoded: int = 64,
    dtype: str = "float32",
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON line here too.")] = None,
) -> None:
    """Nats a token of the policy alone and of LESS."""
    model, tokenizer = models.load(model_name, dtype=models.weights_type(dtype))
    kernels = LESSKernels.from_pretrained(folder)
    console = Console(stderr=True, highlight=False)
    table = Table("length", "policy", "alone", "LESS", "ahead in", title="nats a token")
    rows = []
    for tokens in length:
        texts = stretches(data, tokenizer, sequences, tokens)
        for used in (policy_class(name).from_budget(round(b * tokens)) for name in policy or POLICIES for b in budget):
            by_sequence = [nats(model, texts, used, state, decoded) for state in (None, kernels)]
            ahead = sum(less < alone for alone, less in zip(*by_sequence, strict=True))
            alone, less = map(statistics.fmean, by_sequence)
            rows.append({"length": tokens, "policy": used.to_dict(), "alone": alone, "less": less, "ahead": ahead})
            table.add_row(f"{tokens:,}", repr(used), f"{alone:.4f}", f"{less:.4f}", f"{ahead} of {sequences}")
            console.print(f"{tokens:,} {used}: {alone:.4f}, {less:.4f}")
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


def nats(model, texts: torch.Tensor, policy: EvictionPolicy, kernels: LESSKernels | None, decoded: int) -> list[float]:
    """Of each sequence, `texts` `[b, p + n]`: one at a time, for a prompt's scores take memory."""

    def make() -> LESSCache:
        return LESSCache(model, policy, kernels)

    prompt_length = texts.shape[1] - decoded
    return [math.log(perplexity(model, text[None], make, prompt_length, 1, lambda: None)[0]) for text in texts]


if __name__ == "__main__":
    typer.run(main)
