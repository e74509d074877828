"""What `less-cache demo` does: one text under several caches, with their bytes, speed and perplexity."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch.nn.functional import cross_entropy
from transformers import Cache, DynamicCache, TextStreamer
from transformers.utils import logging as transformers_logging

from less_cache import POLICIES, LESSCache, LESSError, LESSKernels, models

TEXT = Path(__file__).parent / "data" / "pride-and-prejudice-chapter-19.txt"
SCORED = 160  # tokens at the end of the text that are held out and scored


@dataclass(frozen=True)
class Measurement:
    """One row of the table."""

    label: str
    cache_bytes: int
    tokens_per_second: float
    perplexity: float


def run(
    model_name: str,
    kernels_name: str | None = None,
    policy_name: str = "h2o",
    budget: int | float = 0.05,
    prompt_file: Path | None = None,
    max_new_tokens: int = 48,
) -> list[Measurement]:
    """Print the demo and return what it measured. Raises `LESSError` on bad input."""
    console = Console(highlight=False)
    if policy_name not in POLICIES:
        raise LESSError(f"Expected policy to be one of {', '.join(POLICIES)}, got {policy_name!r}.")
    policy_class = POLICIES[policy_name]
    policy_class.from_budget(budget)  # a wrong budget is better reported before the model is loaded
    text = read_text(prompt_file or TEXT)
    if kernels_name is None:
        kernels_name = find_kernels(model_name, policy_name)
    kernels = LESSKernels.from_pretrained(kernels_name) if kernels_name not in (None, "none") else None

    with progress(console, f"Loading {model_name}"):
        model, tokenizer = models.load(model_name)
    prompt, continuation = split(tokenizer(text, return_tensors="pt").input_ids, model.config)
    if isinstance(budget, float):
        budget = max(2, round(budget * prompt.shape[1]))
    policy = policy_class.from_budget(budget)

    console.print(f"[bold]Text[/]     {(prompt_file or TEXT).name}: {prompt.shape[1]:,} tokens, then {SCORED} held out")
    console.print(f"[bold]Policy[/]   {policy}")
    console.print(f"[bold]Kernels[/]  {kernels_name if kernels else 'none: the full cache and the policy alone'}")

    demo = Demo(console, model, tokenizer, prompt, continuation)
    rows = [
        demo.measure("full cache", DynamicCache(config=model.config), max_new_tokens),
        demo.measure(f"{policy_name} alone", LESSCache(model, policy), max_new_tokens),
    ]
    if kernels is not None:
        less = demo.measure(f"less ({policy_name})", LESSCache(model, policy, kernels), max_new_tokens)
        # The policy alone once more, with the bytes of the low-rank state spent on tokens.
        token_bytes = rows[0].cache_bytes / (prompt.shape[1] + SCORED)
        extra = math.ceil((less.cache_bytes - rows[1].cache_bytes) / token_bytes)
        same_bytes = LESSCache(model, policy_class.from_budget(budget + extra))
        rows += [demo.measure(f"{policy_name} + {extra} tokens", same_bytes), less]
    console.print(table(rows))
    return rows
