"""What storing kernels in 16 bit costs: perplexity with them as a file of each type holds them.

    python benchmarks/dtypes.py MODEL KERNELS --data novel.txt --data news.txt --budget 39

KERNELS: a folder as training left it, in float32; one that `hub/publish.py` made is rounded already. Prints one JSON line:
for each type the bytes of the file, the share of weights that rounding changes, the perplexity, the gap recovered, and how
many nats a token it costs against float32, on the whole and in each batch of sequences.
"""

import math
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import Cache, DynamicCache

from less_cache import LESSCache, LESSKernels, models
from less_cache.bench.command import without_folder
from less_cache.cli.options import parse_budget
from less_cache.evaluation.perplexity import scored, stretches
from less_cache.kernels.folder import WEIGHTS_NAME
from less_cache.policies import policy_class
from less_cache.reports import outputs
from less_cache.reports.machine import describe

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def main(
    model_name: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, .gguf file or Hub id.")],
    folder: Annotated[str, typer.Argument(metavar="KERNELS", help="Folder or Hub id.")],
    data: Annotated[list[Path], typer.Option(metavar="FILE", help="UTF-8 text; several share the sequences.")],
    budget: Annotated[str, typer.Option(metavar="SIZE", help="Tokens that stay, or a share of the prompt.")] = "0.05",
    policy_name: Annotated[str, typer.Option("--policy", metavar="NAME")] = "h2o",
    sequences: int = 16,
    prompt_length: int = 512,
    decoded: int = 128,
    batch_size: int = 4,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON line here too.")] = None,
) -> None:
    """What storing kernels in 16 bit costs in perplexity, as one JSON line."""
    size = parse_budget(budget)
    policy = policy_class(policy_name).from_budget(size if isinstance(size, int) else max(2, round(size * prompt_length)))
    kernels = LESSKernels.from_pretrained(folder)
    sha256 = kernels.config.sha256
    model, tokenizer = models.load(model_name)
    batches = stretches(data, tokenizer, sequences, prompt_length + decoded).split(batch_size)

    def measured(cache: str, state: LESSKernels | None = None) -> list[float]:
        """Nats a token in each batch."""

        def make() -> Cache:
            return DynamicCache(config=model.config) if cache == "full" else LESSCache(model.config, policy, state)

        print(cache, flush=True)
        return [scored(model, batch, make(), prompt_length)[1].losses.mean().item() for batch in batches]

    def mean(nats: list[float]) -> float:
        return sum(each * len(batch) for each, batch in zip(nats, batches, strict=True)) / sequences

    full, alone = (math.exp(mean(measured(cache))) for cache in ("full", "policy"))
    rows: dict[str, dict] = {}
    exact: list[float] = []
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        with tempfile.TemporaryDirectory() as stored:
            kernels.save_pretrained(stored, dtype)
            rounded, held = LESSKernels.from_pretrained(stored), (Path(stored) / WEIGHTS_NAME).stat().st_size
        changed = sum(
            (one != other).sum().item() for one, other in zip(kernels.parameters(), rounded.parameters(), strict=True)
        )
        nats = measured(name, rounded)
        exact = exact or nats
        less = math.exp(mean(nats))
        rows[name] = {
            "file_bytes": held,
            "weights_changed": changed / sum(parameter.numel() for parameter in kernels.parameters()),
            "perplexity": less,
            "gap_recovered": (alone - less) / (alone - full) if alone > full else None,
            "nats_lost": mean(nats) - mean(exact),
            "nats_lost_by_batch": [one - other for one, other in zip(nats, exact, strict=True)],
        }
    report = {
        "model": without_folder(model_name),
        "kernels_sha256": sha256,
        "data": [path.name for path in data],
        "policy": policy.to_dict(),
        **{"sequences": sequences, "prompt_length": prompt_length, "decoded": decoded, "batch_size": batch_size},
        **describe(torch.device("cpu")),
        "full": full,
        "policy_alone": alone,
        "dtypes": rows,
    }
    outputs.finish(report, output)


if __name__ == "__main__":
    typer.run(main)
