"""What `less-cache profile` does."""

import dataclasses
import time
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from less_cache import models
from less_cache.bench.command import without_folder
from less_cache.cache.cache import LESSCache
from less_cache.errors import LESSError
from less_cache.evaluation import profile, texts
from less_cache.evaluation.perplexity import stretches
from less_cache.files import atomic
from less_cache.integration.families import fingerprint, full_attention_layers, geometry
from less_cache.kernels import folder as files
from less_cache.kernels.config import LESSConfig
from less_cache.kernels.head_budgets import BUDGETS_NAME, HeadBudgets
from less_cache.policies import AttentionMatching

DIGITS = 4  # of a share, as it is stored


def run(
    model_name: str,
    data: list[Path],
    output: Path,
    budget: int | float,
    sequences: int,
    prompt_length: int,
    batch_size: int,
    dtype: str,
    base_model: str | None,
) -> None:
    """Measure a model's head budgets on stretches of text, print them by layer, and write them to a folder."""
    kernels = _checked(data, output, budget, sequences, prompt_length)
    weights_type = models.weights_type(dtype)
    console, began = Console(highlight=False, stderr=True), time.perf_counter()
    model, tokenizer = models.load(model_name, dtype=weights_type)
    tokens = stretches(data, tokenizer, sequences, prompt_length)
    layers, heads = full_attention_layers(model.config), geometry(model.config).num_key_value_heads
    budgets = HeadBudgets(
        shares=[[1.0] * heads] * len(layers),
        layers=layers,
        model_type=model.config.get_text_config(decoder=True).model_type,
        base_model=base_model or (kernels.base_model if kernels is not None else None) or without_folder(model_name),
        base_model_fingerprint=fingerprint(model),
        measured={
            "data": [path.name for path in data],
            "sequences": sequences,
            "prompt_length": prompt_length,
            "budget": budget,
            "policy": LESSCache(model.config, budget=budget).policy.to_dict(),
            "dtype": dtype,
        },
    )
    _check_place(output, budgets, kernels)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"Texts of {prompt_length:,} tokens", total=sequences)
        measured = profile.shares(model, tokens, budget, batch_size, lambda rows: progress.advance(task, rows))
    shares = [[round(share, DIGITS) for share in row] for row in profile.mean(measured).tolist()]
    budgets = dataclasses.replace(budgets, shares=shares)
    console.print(table(budgets, measured))
    console.print(
        f"{profile.explained(measured):.0%} of what tells heads apart is the same in every text. "
        f"{sequences} texts in {time.perf_counter() - began:.0f} s."
    )
    budgets.save_pretrained(output)
    print(output / BUDGETS_NAME)


def _checked(data: list[Path], output: Path, budget: int | float, sequences: int, prompt_length: int) -> LESSConfig | None:
    """The config of the kernels in the output folder; raises for what can be known to be wrong before a model is loaded."""
    AttentionMatching.from_budget(budget)
    if budget >= prompt_length:
        raise LESSError(f"Expected a budget below the prompt of {prompt_length} tokens, got {budget}, which keeps all of them.")
    texts.check(data)
    if sequences < len(data):
        raise LESSError(f"Expected at least one sequence for each of {len(data)} texts, got {sequences}.")
    if output.exists() and not output.is_dir():
        raise LESSError(f"Expected --output to be a folder, got {output}, which is a file.")
    found = sorted(entry.name for entry in output.iterdir()) if output.exists() else []
    if found and not {files.CONFIG_NAME, BUDGETS_NAME} & set(found):
        raise LESSError(
            f"Expected --output to be a new folder, or one of kernels or head budgets, got {output}, which holds "
            f"{', '.join(found[:8])}. Choose another folder."
        )
    kernels = files.read_config(output) if files.CONFIG_NAME in found else None
    HeadBudgets.of(output)
    atomic.replace(output, {})
    return kernels


def _check_place(output: Path, budgets: HeadBudgets, kernels: LESSConfig | None) -> None:
    """Raise where the output folder is another model's."""
    if kernels is not None:
        budgets.check_beside(kernels, str(output))
    before = HeadBudgets.of(output)
    if before is not None and before.base_model_fingerprint != budgets.base_model_fingerprint:
        raise LESSError(
            f"{output}: expected head budgets of this model, found those of another ({before.base_model}). "
            "Choose another folder, or remove the file."
        )


def table(budgets: HeadBudgets, measured: torch.Tensor) -> Table:
    """The shares by layer; `measured`: of each text, `[count, L, g]`."""
    result = Table(box=box.SIMPLE_HEAD)
    for name in ("layer", "share of the budget", "least head", "most", "± between texts"):
        result.add_column(name, justify="right")
    spread = measured.mean(-1).std(0, correction=0)  # [L]
    for layer, row, off in zip(budgets.layers or [], budgets.shares, spread.tolist(), strict=True):
        numbers = sum(row) / len(row), min(row), max(row), off
        result.add_row(str(layer), *(f"{number:.2f}" for number in numbers))
    return result
