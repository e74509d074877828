"""What it costs to fold a long prompt in by blocks: one layer's memory, all at once beside blocks of so many numbers, in turns.

    python benchmarks/fold_blocks.py --tokens 2048 --tokens 8192 --output benchmarks/results/fold-blocks.json

Shaped like a layer of Llama-2-7B with the paper's hidden size unless told otherwise; random weights, keys and values, of which
5 % stay. Prints one JSON line: seconds, the peak above what was there before, and the median ratio to all at once, round by
round.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer

from less_cache.backends.choice import fold_in
from less_cache.bench.peak import PeakMemory
from less_cache.bench.timing import Spread, alternate, ratios
from less_cache.memory import MEMORIES, LayerCentroids, LayerMemory
from less_cache.ops import blocks
from less_cache.reports import outputs
from less_cache.reports.machine import describe
from less_cache.slots import Columns

AT_ONCE = 2**62


def fold(memory: LayerMemory, keys: torch.Tensor, values: torch.Tensor, leaves: torch.Tensor) -> None:
    """A prompt's pairs, into a new state."""
    b, g, n, d = keys.shape
    state, seen = memory.empty_state(b, g, d, keys.device), torch.full((b, 1, 1), n)
    positions = torch.arange(n, dtype=torch.int32).expand(b, g, n)
    fold_in(memory, state, Columns(keys, values, positions), leaves, seen)


def turn(memory: LayerMemory, states: tuple[torch.Tensor, ...], most: int, peaks: list[int | None]) -> float:
    """Seconds of one fold with at `most` so many numbers in a block; its peak goes to the end of `peaks`."""
    peak = PeakMemory(states[0].device)
    peak.start()
    with mock.patch.object(blocks, "NUMBERS", most):
        start = time.perf_counter()
        fold(memory, *states)
        seconds = time.perf_counter() - start
    peaks.append(peak.stop())
    return seconds


@torch.no_grad()
def main(
    tokens: Annotated[list[int], typer.Option(metavar="TOKENS", help="Of the prompt; repeatable.")],
    numbers: Annotated[
        list[int] | None, typer.Option(help="In a block; repeatable. Default: as in `less_cache.ops.blocks`.")
    ] = None,
    kv_heads: int = 32,
    head_dim: int = 128,
    hidden_size: int = 512,
    rank: int = 8,
    batch: int = 1,
    rounds: int = 7,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON line here too.")] = None,
) -> None:
    """Seconds and peak memory of every memory."""
    outputs.check(output, None)
    torch.manual_seed(0)
    sizes = {"kv_heads": kv_heads, "head_dim": head_dim, "hidden_size": hidden_size, "rank": rank, "batch": batch}
    memories = {name: kind(kv_heads, kv_heads, head_dim, hidden_size, rank) for name, kind in MEMORIES.items()}
    memories["untrained"] = LayerCentroids(rank // 2)
    results = []
    for n in tokens:
        keys, values = torch.randn(2, batch, kv_heads, n, head_dim)
        leaves = torch.rand(batch, kv_heads, n) >= 0.05
        for name, memory in memories.items():
            forms = {"all at once": AT_ONCE, **{f"{most:,}": most for most in numbers or [blocks.NUMBERS]}}
            peaks: dict[str, list[int | None]] = {form: [] for form in forms}
            turns = {
                form: functools.partial(turn, memory, (keys, values, leaves), most, peaks[form]) for form, most in forms.items()
            }
            times = alternate(turns, rounds)
            compared = ratios(times, "all at once")
            for form in forms:
                row = {"memory": name, "tokens": n, "numbers": form, "seconds": dataclasses.asdict(Spread.of(times[form]))}
                results.append({**row, "peak_bytes": peaks[form][-1], "ratio": compared[form]})
    report = {"benchmark": "fold-blocks", **sizes, "rounds": rounds, **describe(torch.device("cpu")), "results": results}
    outputs.finish(report, output)


if __name__ == "__main__":
    typer.run(main)
