"""What a decoding step costs under a fitted cache, beside H2O and a DynamicCache, at the same number of kept tokens.

    python benchmarks/fitted_step.py MODEL --kept 256 --kept 1024 --batch 1 --batch 8

Prompts are random tokens, four times as long as what is kept. The fitted caches choose once, at the prompt's end, and not while
their steps are timed; *choices* are steps of int4 slots that choose every 32 tokens, and its share says how much of that time
the choices take. All take turns in every round. Prints a table, and one JSON line: milliseconds a token, and the ratio to H2O's
of the same round, median.
"""

import copy
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import Cache, DynamicCache

from less_cache import H2O, AttentionMatching, LESSCache, LESSKernels, models
from less_cache.bench.command import without_folder
from less_cache.bench.timing import Spread, alternate, ratios
from less_cache.evaluation.perplexity import cache_bytes
from less_cache.reports import outputs
from less_cache.reports.machine import describe

EVERY = 32  # tokens from one choice to the next, where choices are timed
LONGER = 4  # times as long as what is kept are prompts


def main(
    model_name: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, .gguf file or Hub id.")],
    kept: Annotated[list[int], typer.Option(metavar="TOKENS", help="A KV head; repeatable.")],
    batch: Annotated[list[int], typer.Option(metavar="ROWS", help="Repeatable.")],
    rounds: int = 15,
    tokens: Annotated[int, typer.Option(help="Decoded in a run; of the choices' a multiple of 32.")] = EVERY,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON line here too.")] = None,
) -> None:
    """Milliseconds a token of each cache."""
    model, _ = models.load(model_name)
    console = Console(stderr=True, highlight=False)
    table = Table("kept", "rows", "cache", "ms a token", "of H2O's", "MB")
    rows = []
    for count in kept:
        for size in batch:
            times, held = measure(model, count, size, rounds, tokens)
            compared = ratios(times, "H2O")
            pairs = zip(times["choices"], times["int4, adaptive"], strict=True)
            share = Spread.of([1 - without / with_choices for with_choices, without in pairs]).median
            for name, own in times.items():
                spread, ratio = Spread.of(own), compared[name]
                table.add_row(str(count), str(size), name, f"{spread.median:.2f}", f"{ratio:.3f}", f"{held[name] / 1e6:.1f}")
                row = {"kept": count, "batch": size, "cache": name, "ms_per_token": dataclasses.asdict(spread)}
                rows.append({**row, "ratio": ratio, "bytes": held[name]})
            rows.append({"kept": count, "batch": size, "choices_share": share})
            table.add_row("", "", f"choices take {share:.1%} of the time", "", "", "")
    console.print(table)
    report = {
        "benchmark": "fitted_step",
        "model": without_folder(model_name),
        **{"rounds": rounds, "tokens": tokens, "every": EVERY, "prompt": f"{LONGER} × kept"},
        **describe(torch.device("cpu")),
        "results": rows,
    }
    outputs.finish(report, output)


@torch.no_grad()
def measure(model, kept: int, batch: int, rounds: int, tokens: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Milliseconds a token of every cache in every round, and the bytes that each holds before them."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (batch, LONGER * kept), generator=generator)
    fed = torch.randint(model.config.vocab_size, (batch, tokens), generator=generator)
    state = LESSKernels.untrained(model)
    never = AttentionMatching(kept, every=10**6)
    caches: dict[str, Cache] = {
        "DynamicCache": DynamicCache(config=model.config),
        "H2O": LESSCache(model, H2O.from_budget(kept)),
    }
    for slots in ("float", "int8", "int4"):
        caches[slots] = LESSCache(model, never, state, heads="equal", slots=slots)
    caches["int4, adaptive"] = LESSCache(model, never, state, heads="adaptive", slots="int4")
    caches["choices"] = LESSCache(model, AttentionMatching(kept, every=EVERY), state, heads="adaptive", slots="int4")
    for cache in caches.values():
        model(prompt, past_key_values=cache, logits_to_keep=1)
    held = {name: cache_bytes(cache) for name, cache in caches.items()}

    def run(cache: Cache) -> float:
        own = copy.deepcopy(cache)
        start = time.perf_counter()
        for token in fed.split(1, dim=1):
            model(token, past_key_values=own)
        return 1000 * (time.perf_counter() - start) / tokens

    runs: dict[str, Callable[[], float]] = {name: functools.partial(run, cache) for name, cache in caches.items()}
    return alternate(runs, rounds), held


if __name__ == "__main__":
    typer.run(main)
