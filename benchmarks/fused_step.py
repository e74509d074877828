"""A fused step beside the PyTorch step: errors over many steps, and the time of each.

    python benchmarks/fused_step.py native --output native.json
    python benchmarks/fused_step.py triton --output triton.json

Without a GPU, Triton's interpreter runs its kernels, some 70 ms a KV head and step, and nothing is timed. Prints one JSON line.
Errors: largest absolute difference from the PyTorch step in float32 on the same numbers, rounded to the cache's type; over all
steps. So PyTorch's own are 0 in float32, and in 16 bit those of rounding the output, which no form avoids. `largest` is the
largest number that an error stands beside, `other_tokens` the steps after which other tokens were kept.
"""

import importlib
import itertools
import os
import time
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer

from less_cache import H2O, SinkRecent
from less_cache.backends import select
from less_cache.backends.cpu import build
from less_cache.bench.timing import Spread, alternate, ratios
from less_cache.cache.layer import LESSLayer
from less_cache.memory import MEMORIES
from less_cache.reports import machine, outputs

MODULE = torch.nn.Identity().eval()
FUSED = {"native": "less_cache.backends.cpu.bridge", "triton": "less_cache.backends.triton.bridge"}
MEMORY_NAMES = (None, *MEMORIES)
FORMS = ("pytorch", "fused")
SHOWN = {"output": "output", "scores": "scores", "values_sum": "H", "features_sum": "z"}


def main(
    form: Annotated[str, typer.Argument(help="native: C++, on a processor; triton: on a GPU, or interpreted.")],
    steps: int = 200,
    budget: int = 32,
    head_dim: int = 80,
    query_heads: Annotated[int, typer.Option(help="A KV head; one KV head, one row.")] = 2,
    rounds: Annotated[int, typer.Option(help="Of timing, 100 steps each.")] = 20,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON line here too.")] = None,
) -> None:
    """Errors and time of a fused step, as one JSON line."""
    device = torch.device("cuda" if form == "triton" and torch.cuda.is_available() else "cpu")
    interpreted = form == "triton" and device.type == "cpu"
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    fused = importlib.import_module(FUSED[form])
    if form == "native" and build.compiler() is None:
        raise SystemExit("error: expected a C++ compiler")
    torch.set_default_device(device)
    select.BACKENDS = {device.type: fused.__name__}
    policies = [H2O(budget // 2, budget - budget // 2), SinkRecent(4, budget - 4)]
    table = []
    for policy, memory, dtype in itertools.product(policies, MEMORY_NAMES, fused.DTYPES):
        row = {"policy": policy.name, "memory": memory, "dtype": str(dtype).removeprefix("torch.")}
        row |= errors(policy, memory, dtype, steps, query_heads, head_dim)
        table.append(row)
        shown = "  ".join(f"{SHOWN[name]} {row['fused'][name]:.1e}" for name in row["fused"])
        print(f"{policy.name:12} {memory or 'none':15} {row['dtype']:9} {shown}", flush=True)
    described = machine.describe(device)
    if form == "triton":
        described["versions"]["triton"] = importlib.import_module("triton").__version__
    report = {
        **described,
        **{"form": form, "interpreted": interpreted},
        **{"steps": steps, "budget": budget, "head_dim": head_dim, "query_heads": query_heads},
        "errors": table,
        "timing": "unmeasured: no GPU" if interpreted else timing(device, rounds),
    }
    assert form == "native" or not fused._failed, "the kernels did not run"
    outputs.finish(report, output)


def errors(policy, memory: str | None, dtype: torch.dtype, steps: int, query_heads: int, head_dim: int) -> dict:
    """Of both forms in `dtype`, beside PyTorch in float32."""
    prompt = 2 * sum(policy.resolve(torch.ones(1, dtype=torch.long))[0].tolist())
    kernels = memory and random_kernels(memory, query_heads, 1, head_dim)
    tokens = [each.to(dtype) for each in random_tokens(1, query_heads, 1, prompt + steps, head_dim)]
    oracle = LESSLayer(policy, kernels, layer_idx=1, leads=False)
    layers = {form: LESSLayer(policy, kernels, layer_idx=1, leads=False) for form in FORMS}
    found: dict = {form: {"output": 0.0, "scores": 0.0} for form in FORMS}
    largest: dict = {}
    other_tokens = dict.fromkeys(FORMS, 0)
    for start, stop in [(0, prompt), *((token, token + 1) for token in range(prompt, prompt + steps))]:
        block = [each[:, :, start:stop] for each in tokens]
        exact = read(oracle, [each.float() for each in block], "pytorch")
        for form, layer in layers.items():
            attended = read(layer, block, form)
            if stop - start > 1:  # the prompt: the step starts after it
                continue
            expected = {"output": exact, **oracle.tensors()}
            held = {"output": attended, **layer.tensors()}
            other_tokens[form] += not torch.equal(held["positions"], expected["positions"])
            for name in SHOWN.keys() & expected.keys():
                error = (held[name].double() - expected[name].double()).abs().max().item()
                found[form][name] = max(found[form].get(name, 0.0), error)
                largest[name] = max(largest.get(name, 0.0), expected[name].abs().max().item())
    return {**found, "largest": largest, "other_tokens": other_tokens}


def timing(device: torch.device, rounds: int, steps: int = 100) -> list[dict]:
    """Microseconds of one layer's step, in turns: 32 query heads, 8 KV heads of 128, 256 tokens kept, bfloat16."""
    rows = []
    for policy, memory, b in itertools.product([H2O(128, 128), SinkRecent(4, 252)], MEMORY_NAMES, (1, 16)):
        kernels = memory and random_kernels(memory, 32, 8, 128)
        tokens = [each.to(torch.bfloat16) for each in random_tokens(b, 32, 8, 513, 128)]
        prompt, token = [each[:, :, :512] for each in tokens], [each[:, :, 512:] for each in tokens]
        layers = {form: LESSLayer(policy, kernels, layer_idx=1, leads=False) for form in FORMS}
        for form, layer in layers.items():
            read(layer, prompt, form)

        def run(form: str, layers=layers, token=token) -> float:
            machine.synchronize(device)
            start = time.perf_counter()
            for _ in range(steps):
                read(layers[form], token, form)
            machine.synchronize(device)
            return (time.perf_counter() - start) / steps * 1e6

        taken = alternate({form: lambda form=form: run(form) for form in FORMS}, rounds)
        row = {"policy": policy.name, "memory": memory, "batch_size": b}
        row |= {form: vars(Spread.of(numbers)) for form, numbers in taken.items()}
        rows.append({**row, "ratio": ratios(taken, "pytorch")["fused"]})
    return rows


@torch.no_grad()
def read(layer: LESSLayer, block: list[torch.Tensor], form: str) -> torch.Tensor:
    """Give a layer tokens, a single one in the given form; its output."""
    query_states, key_states, value_states = block
    with mock.patch.dict(select.BACKENDS, clear=form == "pytorch"):
        key_states, value_states = layer.update(key_states, value_states)
        return layer.attend(no_attention, MODULE, query_states, key_states, value_states, None)[0]


def no_attention(module, query_states, *arguments, **options):
    """In place of a model's attention to the prompt, of which nothing here asks the output."""
    return query_states.transpose(1, 2), None


def random_kernels(memory: str, h: int, g: int, d: int) -> torch.nn.Module:
    """Kernels heavy enough that the state has a share of attention: by `random_tokens` 0.3 (low rank) and 0.7 on average."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    kernels = MEMORIES[memory](h, g, d, 32, 8)
    kernels.reset_parameters(generator)
    for name, parameter in kernels.named_parameters():
        if name.endswith("scale"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        if name.endswith(("bias", "skip")):
            torch.nn.init.uniform_(parameter, -0.3, 0.3, generator=generator)
    return kernels.requires_grad_(False)


def random_tokens(b: int, h: int, g: int, length: int, d: int) -> list[torch.Tensor]:
    """Queries `[b, h, length, d]`, keys and values `[b, g, length, d]`; some keys get much attention, most get little.

    With larger queries one kept key would have all of it, and the state, which is to be tested too, none.
    """
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    query_states = 0.5 * torch.randn(b, h, length, d, generator=generator)
    key_states = torch.randn(b, g, length, d, generator=generator) * torch.randn(b, g, length, 1, generator=generator).exp()
    value_states = torch.randn(b, g, length, d, generator=generator)
    return [query_states, key_states, value_states]


if __name__ == "__main__":
    typer.run(main)
