"""What a token costs after a long text, beside one after a short text, with the same tokens kept: contexts in turns.

    python benchmarks/constant_step.py MODEL KERNELS --context 2048 --context 32000 --budget 102

LESS alone. `less-cache bench decode` measures one context after the other, between which a machine may change its pace. Prompts
are random tokens, read in chunks of 512. Prints one JSON line: milliseconds a token, and the ratio to the first context's of
the same round, median.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import typer

from less_cache.bench.command import without_folder
from less_cache.bench.contenders import Contest
from less_cache.bench.options import BenchOptions
from less_cache.bench.timing import Spread, alternate, ratios
from less_cache.evaluation.perplexity import cache_bytes
from less_cache.reports import outputs
from less_cache.reports.machine import describe


def main(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, .gguf file or Hub id.")],
    kernels: Annotated[str, typer.Argument(metavar="KERNELS", help="Folder or Hub id.")],
    context: Annotated[list[int], typer.Option(metavar="TOKENS", help="Of a prompt; repeatable.")],
    budget: Annotated[int, typer.Option(metavar="TOKENS", help="Kept per KV head.")],
    device: str = "cpu",
    rounds: int = 15,
    tokens: Annotated[int, typer.Option(help="Decoded in a run.")] = 16,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON line here too.")] = None,
) -> None:
    """Milliseconds a token at each context."""
    options = BenchOptions(
        model, kernels=kernels, budget=budget, caches=("less",), contexts=tuple(context), chunk=512, device=device
    )
    contest = Contest(options)

    with torch.no_grad():
        caches = {length: contest.fill("less", length, options.batch) for length in context}
        fed = contest.tokens(options.batch, tokens)
        runs = {
            str(length): lambda cache=cache: 1000 * contest.read(cache, fed, 1) / tokens for length, cache in caches.items()
        }
        times = alternate(runs, rounds)
    compared = ratios(times, str(context[0]))
    report = {
        "benchmark": "constant_step",
        "model": without_folder(model),
        "kernels_sha256": contest.kernels.config.sha256,
        **{"policy": options.policy, "budget": budget, "dtype": options.dtype, "rounds": rounds, "tokens": tokens},
        **describe(contest.device),
        "results": [
            {
                "context": length,
                "ms_per_token": dataclasses.asdict(Spread.of(times[str(length)])),
                "ratio": compared[str(length)],
                "bytes": cache_bytes(cache),
            }
            for length, cache in caches.items()
        ],
    }
    outputs.finish(report, output)


if __name__ == "__main__":
    typer.run(main)
