"""What a change of the code costs: this checkout and another, step by step in turns, on the same tokens.

    git worktree add ../before COMMIT
    python benchmarks/versions.py MODEL ../before --policy h2o --context 512 --context 2048
    python benchmarks/versions.py MODEL ../before --policy h2o --context 2048 --read

Two processes, one a checkout, of which one runs while the other waits: a machine changes its pace, but not between two turns.
The allocator keeps what it has: whether it gives memory back between two products is luck, and makes a prompt a fifth slower.
Random kernels, random tokens. Prints one JSON line: milliseconds a token, or with `--read` a prompt, and the ratio to the other
checkout's of the same round, median.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from less_cache.bench.contenders import Contest
from less_cache.bench.options import BenchOptions

HERE = Path(__file__).resolve().parents[1]
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**30)}


def serve(options: BenchOptions, cache: str, context: int, tokens: int) -> None:
    """Answer each line of the input with the milliseconds of one run; `tokens` 0: of reading a prompt."""
    contest = Contest(options)
    with torch.no_grad():
        filled = contest.fill(cache, context, options.batch) if tokens else None
        fed = contest.tokens(options.batch, tokens or context)
        for _ in sys.stdin:
            if filled is None:
                seconds = contest.read(contest.make(cache, context), fed, None)
            else:
                seconds = contest.read(filled, fed, 1) / tokens
            print(1000 * seconds, flush=True)


def main(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, .gguf file or Hub id.")],
    other: Annotated[Path, typer.Argument(metavar="CHECKOUT", help="Of the version to compare with.")],
    context: Annotated[list[int], typer.Option(metavar="TOKENS", help="Of a prompt; repeatable.")],
    cache: Annotated[str, typer.Option(help="policy or less.")] = "less",
    policy: str = "h2o",
    budget: Annotated[str, typer.Option(help="Kept per KV head: tokens, or a share of the context.")] = "0.05",
    batch: int = 1,
    dtype: str = "float32",
    read: Annotated[bool, typer.Option("--read", help="Read the prompt instead of decoding after it.")] = False,
    rounds: int = 15,
    tokens: Annotated[int, typer.Option(help="Decoded in a run.")] = 16,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON line here too.")] = None,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Milliseconds of both versions, and their ratio."""
    kept = float(budget) if "." in budget else int(budget)
    options = BenchOptions(
        model, policy=policy, budget=kept, caches=(cache,), contexts=tuple(context), batch=batch, chunk=512, dtype=dtype
    )
    if worker:
        serve(options, cache, context[0], 0 if read else tokens)
        return
    from less_cache.bench.command import without_folder
    from less_cache.bench.timing import Spread, alternate, ratios
    from less_cache.reports import outputs
    from less_cache.reports.machine import describe

    outputs.check(output, None)
    results = []
    for length in context:
        command = [sys.executable, __file__, model, str(other), "--worker", "--context", str(length), "--cache", cache]
        command += ["--policy", policy, "--budget", budget, "--batch", str(batch), "--dtype", dtype, "--tokens", str(tokens)]
        command += ["--read"] if read else []
        workers = {
            name: subprocess.Popen(
                command,
                env={**os.environ, **ALLOCATOR, "PYTHONPATH": str(checkout)},
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for name, checkout in (("before", other.resolve()), ("now", HERE))
        }

        def turn(process: subprocess.Popen) -> float:
            process.stdin.write("\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        try:
            times = alternate({name: lambda process=process: turn(process) for name, process in workers.items()}, rounds)
        finally:
            for process in workers.values():
                process.stdin.close()
                process.wait()
        compared = ratios(times, "before")
        results += [
            {"context": length, "version": name, "ms": dataclasses.asdict(Spread.of(times[name])), "ratio": compared[name]}
            for name in workers
        ]
    report = {
        "benchmark": "versions",
        "what": "prompt" if read else "token",
        "model": without_folder(model),
        **{"cache": cache, "policy": policy, "budget": kept, "batch": batch, "dtype": dtype, "rounds": rounds},
        "before": subprocess.run(["git", "rev-parse", "HEAD"], cwd=other, capture_output=True, text=True).stdout.strip(),
        **describe(torch.device("cpu")),
        "results": results,
    }
    outputs.finish(report, output)


if __name__ == "__main__":
    typer.run(main)
