"""What `less-cache demo` does: one text under several caches; their bytes, speed and perplexity."""

import copy
import io
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, TextStreamer

from less_cache import POLICIES, LESSCache, LESSError, LESSKernels, models
from less_cache.evaluation.perplexity import with_state_bytes
from less_cache.hub import catalogue
from less_cache.integration.families import fingerprint

TEXT = Path(__file__).parents[1] / "data" / "pride-and-prejudice-chapter-19.txt"
TAIL = 24  # tokens of the prompt that are shown before what was generated
SCORED = 128  # tokens at the end of the text that are held out, and scored under each cache


@dataclass(frozen=True)
class Measurement:
    """One row of the table."""

    label: str
    cache_bytes: int
    tokens_per_second: float
    perplexity: float


def run(
    model_name: str = models.DEFAULT_MODEL,
    kernels_name: str | None = None,
    policy_name: str = "h2o",
    budget: int | float = 0.05,
    prompt_file: Path | None = None,
    max_new_tokens: int = 48,
    prompt_tokens: int | None = None,
) -> list[Measurement]:
    """Print the demo and return what it measured. Raises `LESSError` on bad input.

    `prompt_tokens`: how many tokens before the held-out ones are read; default: the longest prompt that the kernels were
    trained on, or the whole text without kernels.
    """
    console = Console(highlight=False)
    if policy_name not in POLICIES:
        raise LESSError(f"Expected policy to be one of {', '.join(POLICIES)}, got {policy_name!r}.")
    from_budget = POLICIES[policy_name].from_budget
    from_budget(budget)  # a wrong budget is reported before the model is loaded
    text = read_text(prompt_file or TEXT)
    kernels = LESSKernels.from_pretrained(kernels_name) if kernels_name not in (None, "none") else None

    model, tokenizer = load(console, model_name)
    if kernels_name is None:
        kernels = find_kernels(model, policy_name)
    tokens = tokenize(tokenizer, text, model.config)
    if prompt_tokens is None:
        prompt_tokens = longest_trained(kernels) or len(tokens)
    tokens = tokens[-prompt_tokens - SCORED :]
    prompt_length = len(tokens) - SCORED
    size = budget if isinstance(budget, int) else max(2, round(budget * prompt_length))
    policy = from_budget(size)

    console.print(f"[bold]model[/]    {model_name}")
    console.print(f"[bold]text[/]     {(prompt_file or TEXT).name}: {prompt_length:,} tokens, and {SCORED} held out")
    console.print(f"[bold]policy[/]   {policy}")
    console.print(f"[bold]kernels[/]  {origin(kernels, kernels_name)}")

    state_name = "LESS" if kernels is None or kernels.is_trained else "the untrained state"
    contenders = {"full cache": DynamicCache(config=model.config), f"{policy_name} alone": LESSCache(model, policy)}
    if kernels is not None:
        contenders[f"{policy_name}, equal bytes"] = LESSCache(model, with_state_bytes(policy, kernels, model.dtype.itemsize))
        contenders[f"{state_name.removeprefix('the ')} on {policy_name}"] = LESSCache(model, policy, kernels, heads="equal")
        contenders["fitted"] = LESSCache(model, budget=min(1.0, size / prompt_length))
    rows = [measure(console, model, tokenizer, tokens, name, cache, max_new_tokens) for name, cache in contenders.items()]
    console.print(table(rows))
    if kernels is not None:
        console.print(verdict(policy_name, state_name, rows), soft_wrap=True)
    return rows


def read_text(path: Path) -> str:
    """The text of a UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise LESSError(f"Expected a readable UTF-8 text file, got {path}: {error}") from error


def load(console: Console, model_name: str) -> tuple[Any, Any]:
    """Model and tokenizer. One bar stands for the reading of a GGUF file; the Hub client and safetensors show their own."""
    if models.locate(model_name)[1] is None:
        return models.load(model_name)
    with progress(console, "Loading the model"), redirect_stderr(io.StringIO()):
        return models.load(model_name)


def find_kernels(model: Any, policy_name: str) -> LESSKernels | None:
    """The catalogue's kernels for the model's weights: those trained with the policy, or else the first; without any the
    untrained state, and None for a model whose heads differ in size.
    """
    sources = catalogue.find(None, fingerprint(model))
    local = [source for source in sources if Path(source).is_dir()]
    found = [LESSKernels.from_pretrained(source) for source in local or sources]
    if found:
        return min(found, key=lambda kernels: (kernels.config.policy or {}).get("name") != policy_name)
    try:
        return LESSKernels.untrained(model)
    except LESSError:
        return None


def longest_trained(kernels: LESSKernels | None) -> int | None:
    """The longest prompt that the kernels were trained on; None where nothing is said of prompts."""
    prompts = kernels.config.training.get("prompts") if kernels is not None else None
    if prompts is None:
        return None
    if not isinstance(prompts, list) or not prompts or not all(type(length) is int and length > 0 for length in prompts):
        raise LESSError(
            f"The kernels' config: expected training.prompts to be a list of prompt lengths, got {prompts!r}. "
            "Pass --prompt-tokens."
        )
    return max(prompts)


def origin(kernels: LESSKernels | None, name: str | None) -> str:
    """Where the kernels come from, or what is shown without any."""
    if kernels is None:
        return "none: only the full cache and the policy are shown"
    if not kernels.is_trained:
        return "none for this model: the untrained state is shown"
    return name or shown(kernels)


def verdict(policy_name: str, state_name: str, rows: list[Measurement]) -> str:
    """Who comes closest to the full cache, in a sentence; `rows` as the table has them."""
    full, alone, _, state, fitted = rows
    best = min(rows[1:], key=lambda row: row.perplexity)
    if best not in (state, fitted):
        others = ", ".join(f"{row.label} {row.perplexity:.2f}" for row in (state, fitted))
        return f"{best.label} wins here: perplexity {best.perplexity:.2f}, {others}."
    if alone.perplexity <= full.perplexity:
        return f"{policy_name} loses nothing on this text: there is nothing to win back."
    won_back, by_fit = ((alone.perplexity - row.perplexity) / (alone.perplexity - full.perplexity) for row in (state, fitted))
    return f"Of the perplexity that {policy_name} loses, {state_name} wins back {won_back:.0%}, a fitted cache {by_fit:.0%}."


def shown(kernels: LESSKernels) -> str:
    """Where kernels came from, as a path from here where that is shorter."""
    source = Path(kernels.source or "").resolve()
    return str(source.relative_to(Path.cwd()) if source.is_relative_to(Path.cwd()) else source)


def tokenize(tokenizer: Any, text: str, config: Any) -> torch.Tensor:
    """Token ids `[n]` of the whole text; an error if it is too short or too long for the model."""
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    longest = getattr(config, "max_position_embeddings", None) or len(tokens)
    if not SCORED + 64 <= len(tokens) <= longest:
        raise LESSError(f"Expected a text of {SCORED + 64} to {longest} tokens, got {len(tokens)}. Try another --prompt-file.")
    return tokens


def measure(
    console: Console, model: Any, tokenizer: Any, tokens: torch.Tensor, label: str, cache: Any, new_tokens: int
) -> Measurement:
    """Prefill the cache with all but the held-out tokens, continue freely on a copy, then score what was held out."""
    console.print()
    console.rule(f"[bold]{label}", align="left")
    prompt, held_out = tokens[None, :-SCORED], tokens[-SCORED - 1 :]  # the prompt's last token predicts the first scored one
    layers = model.config.get_text_config().num_hidden_layers
    with progress(console, f"Reading {prompt.shape[1]:,} tokens", layers) as advance:
        prefill(model, prompt[:, :-1], cache, advance)
    streamer = ConsoleStreamer(console, tokenizer)
    streamer.show(tokenizer.decode(prompt[0, -TAIL:]).split(maxsplit=1)[-1], style="dim")
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=copy.deepcopy(cache),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
        streamer=streamer,
    )
    with progress(console, f"Scoring {SCORED} held-out tokens", SCORED) as advance:
        perplexity, tokens_per_second = score(model, held_out, cache, advance)
    cache_bytes = cache.memory_footprint().total if isinstance(cache, LESSCache) else full_cache_bytes(cache)
    return Measurement(label, cache_bytes, tokens_per_second, perplexity)


@torch.no_grad()
def prefill(model: Any, tokens: torch.Tensor, cache: Any, after_layer: Callable[[], None]) -> None:
    """Read `[b, n]` tokens into the cache in one forward pass, telling when a decoder layer is done."""
    depth = model.config.get_text_config().num_hidden_layers
    stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == depth]
    hooks = [layer.register_forward_hook(lambda *_: after_layer()) for layer in (stacks[0] if stacks else ())]
    try:
        model.base_model(tokens, past_key_values=cache, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def score(model: Any, tokens: torch.Tensor, cache: Any, after_token: Callable[[], None]) -> tuple[float, float]:
    """Perplexity of `tokens[1:]`, fed one by one through the cache, and tokens per second."""
    losses = []
    start = time.perf_counter()
    for token, target in pairwise(tokens):
        logits = model(token.view(1, 1), past_key_values=cache, use_cache=True).logits[0, -1]
        losses.append(cross_entropy(logits.float(), target).item())
        after_token()
    return math.exp(sum(losses) / len(losses)), len(losses) / (time.perf_counter() - start)


def full_cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in an ordinary cache."""
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def table(rows: list[Measurement]) -> Table:
    """The measurements; the first row is what the others are compared with."""
    result = Table(box=box.SIMPLE_HEAD, caption=f"Speed and perplexity over the {SCORED} held-out tokens.")
    result.add_column("cache")
    for name in ("bytes", "saved", "tokens/s", "perplexity"):
        result.add_column(name, justify="right")
    for row in rows:
        saved = 1 - row.cache_bytes / rows[0].cache_bytes
        result.add_row(
            row.label, f"{row.cache_bytes:,}", f"{saved:.1%}", f"{row.tokens_per_second:.1f}", f"{row.perplexity:.2f}"
        )
    return result


@contextmanager
def progress(console: Console, label: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """A bar on a terminal while the body runs, then one line with the time that it took."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    start = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)
    console.print(f"[dim]{label}: {time.perf_counter() - start:.1f} s[/]")


class ConsoleStreamer(TextStreamer):
    """Prints text as it comes, indented and wrapped between words."""

    def __init__(self, console: Console, tokenizer: Any):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console = console
        self.column = 0
        self.gap = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.show(text)
        if stream_end:
            self.console.print()

    def show(self, text: str, style: str | None = None) -> None:
        """Print `text` after what was printed before it; a line break counts as a space."""
        for word in re.findall(r"\s+|\S+", text):
            if word.isspace():
                self.gap = " "
                continue
            if self.column + len(self.gap + word) > self.console.width - 4:
                self.console.print()
                self.column = 0
            word = self.gap + word if self.column else "  " + word
            self.console.print(word, end="", style=style, markup=False, soft_wrap=True)
            self.column += len(word)
            self.gap = ""
