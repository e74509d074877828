"""Fitted caches against the full cache, H2O and H2O with trained kernels, at shares of the full cache's bytes.

    python benchmarks/fitted.py MODEL --data wikitext.txt --data novel.txt --share 0.05 --kernels KERNELS

The first tokens of each sequence are read at once, the others decoded through the real cache: H2O's one by one, fitted ones
in the blocks that lie between two choices, which gives the same. For every text and share: perplexity, the part of what H2O
loses that is won back, the divergence from the full cache in nats a token (KL), also by quarter of the decoded tokens, and
the bytes held: mean over the decoded tokens, as a share of a 16-bit full cache of the whole sequence. H2O gets that share in
16-bit tokens, its kernels' state comes on top of them. Prints a table, and one JSON line last.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import Cache, DynamicCache

from less_cache import H2O, LESSCache, LESSKernels, models
from less_cache.bench.command import without_folder
from less_cache.cache import spending
from less_cache.evaluation.perplexity import cache_bytes, stretches
from less_cache.integration.families import full_attention_layers, geometry
from less_cache.reports import outputs
from less_cache.reports.machine import describe
from less_cache.slots import format_of


def main(
    model_name: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, .gguf file or Hub id.")],
    data: Annotated[list[Path], typer.Option(metavar="FILE", help="UTF-8 text; a row for each.")],
    share: Annotated[list[float], typer.Option(metavar="SHARE", help="Of a 16-bit full cache's bytes; repeatable.")],
    kernels: Annotated[str | None, typer.Option(metavar="KERNELS", help="Trained for H2O: folder or Hub id.")] = None,
    sequences: int = 32,
    prompt_length: int = 512,
    decoded: int = 512,
    every: Annotated[int, typer.Option(help="Tokens from one choice to the next.")] = 16,
    slots: str = "int4",
    batch_size: int = 4,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON line here too.")] = None,
) -> None:
    """Perplexity, divergence and bytes of each cache."""
    model, tokenizer = models.load(model_name)
    trained = None if kernels is None else LESSKernels.from_pretrained(kernels)
    console = Console(stderr=True, highlight=False)
    length = prompt_length + decoded
    table = Table("text", "share", "cache", "perplexity", "won back", "KL from full", "of H2O's", "by quarter", "bytes")
    rows = []
    for path in data:
        texts = stretches([path], tokenizer, sequences, length)
        caches: dict[tuple[float, str], tuple[Callable[[], Cache], int]] = {}
        for each in share:
            tokens = round(each * length)
            h2o = H2O.from_budget(tokens)
            sizes, format = geometry(model.config), format_of(slots)
            caches[each, "H2O"] = (lambda h2o=h2o: LESSCache(model, h2o)), 1
            if trained is not None:
                caches[each, "LESS on H2O"] = (lambda h2o=h2o: LESSCache(model, h2o, trained)), 1
            for name, state in {"fitted": LESSKernels.untrained(model), "fitted, trained state": trained}.items():
                if state is not None:
                    fitted = spending.worth(tokens, sizes, format, state, every)
                    options = {"policy": fitted, "kernels": state, "heads": "adaptive", "slots": slots}
                    caches[each, name] = (lambda options=options: LESSCache(model, **options)), every
        measured = measure(model, texts, prompt_length, caches, batch_size, console)
        full = measured.pop((1.0, "full"))
        for (each, name), result in measured.items():
            lost = measured[each, "H2O"]["perplexity"] - full["perplexity"]
            won = (measured[each, "H2O"]["perplexity"] - result["perplexity"]) / lost
            relative = result["divergence"] / measured[each, "H2O"]["divergence"]
            quarters = " ".join(f"{quarter:.3f}" for quarter in result["quarters"])
            cells = [f"{result['perplexity']:.2f}", f"{won:.0%}", f"{result['divergence']:.4f}", f"{relative:.2f}", quarters]
            table.add_row(path.name, f"{each:.1%}", name, *cells, f"{result['bytes_share']:.1%}")
            rows.append({"text": path.name, "share": each, "cache": name, "won_back": won, "of_h2o": relative, **result})
        rows.append({"text": path.name, "share": 1.0, "cache": "full", **full})
        table.add_row(path.name, "100%", "full", f"{full['perplexity']:.2f}", "", "0", "0", "", "")
    console.print(table)
    report = {
        "benchmark": "fitted",
        "model": without_folder(model_name),
        "kernels_sha256": None if trained is None else trained.config.sha256,
        "sequences": sequences,
        "prompt_length": prompt_length,
        "decoded": decoded,
        "every": every,
        "slots": slots,
        **describe(torch.device("cpu")),
        "results": rows,
    }
    outputs.finish(report, output)


def measure(
    model,
    texts: torch.Tensor,
    prompt_length: int,
    caches: dict[tuple[float, str], tuple[Callable[[], Cache], int]],
    batch_size: int,
    console: Console,
) -> dict[tuple[float, str], dict]:
    """Every cache, and the full one, on `texts` `[count, p + n]`; `caches`: how to make each, and tokens between choices."""
    dense = (1.0, "full")
    caches = {dense: ((lambda: DynamicCache(config=model.config)), texts.shape[1]), **caches}
    losses: dict[tuple[float, str], float] = dict.fromkeys(caches, 0.0)
    divergences: dict[tuple[float, str], list[torch.Tensor]] = {name: [] for name in caches}
    held: dict[tuple[float, str], list[float]] = {name: [] for name in caches}
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        full = None
        for name, (make, every) in caches.items():
            log_probabilities, nbytes = decode(model, batch, prompt_length, make(), every)
            full = log_probabilities if full is None else full
            targets = batch[:, prompt_length:, None]
            losses[name] -= log_probabilities.gather(-1, targets).sum().item()
            divergences[name].append((full.exp() * (full - log_probabilities)).sum(-1))
            held[name].append(nbytes / len(batch))
            console.print(f"sequences {start + len(batch)} of {len(texts)}", *name, divergences[name][-1].mean().item())
    count = texts[:, prompt_length:].numel()
    sizes = geometry(model.config)
    layers = len(full_attention_layers(model.config))
    dense_bytes = 2 * 2 * sizes.num_key_value_heads * sizes.head_dim * layers * texts.shape[1]
    return {
        name: {
            "perplexity": math.exp(losses[name] / count),
            "divergence": torch.cat(divergences[name]).mean().item(),
            "quarters": [quarter.mean().item() for quarter in torch.cat(divergences[name]).chunk(4, dim=1)],
            "bytes_share": sum(held[name]) / len(held[name]) / dense_bytes,
        }
        for name in caches
    }


@torch.no_grad()
def decode(model, batch: torch.Tensor, prompt_length: int, cache: Cache, every: int) -> tuple[torch.Tensor, float]:
    """Log-probabilities `[b, n, vocab]` of the tokens after the prompt, and the bytes held, mean over these tokens."""
    stop = batch.shape[1] - 1
    outputs = [model(batch[:, :prompt_length], past_key_values=cache, logits_to_keep=1).logits]
    position, held = prompt_length, []
    while position < stop:
        came = (position - prompt_length) % every  # tokens since the last choice
        half = every // 2  # so many are there on average
        size = 1 if position == prompt_length else half - came if came < half else every - came  # the first ends the prompt
        block = batch[:, position : min(position + size, stop)]
        outputs.append(model(block, past_key_values=cache).logits)
        position += block.shape[1]
        if (position - prompt_length) % every == half:
            held.append(cache_bytes(cache))
    return torch.cat(outputs, dim=1).float().log_softmax(-1), sum(held) / max(1, len(held))


if __name__ == "__main__":
    typer.run(main)
