"""The half of `compare_kvpress.py` that runs where kvpress is installed; what both halves time and count is here too.

    python benchmarks/kvpress_side.py MODEL TOKENS.safetensors PROMPT_LENGTH KEPT ROUNDS

Needs nothing of less-cache, whose transformers is too new for kvpress.
"""

import contextlib
import importlib.metadata
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Cache, DynamicCache

TIMED = 16  # tokens decoded in a timed run


def steps(model, batch: torch.Tensor, cache: Cache, prompt_length: int) -> Iterator[torch.Tensor]:
    """Logits `[b, vocab]` for each token after the prompt, `batch` `[b, p + n]`, at the positions of the whole text."""
    yield model(batch[:, :prompt_length], past_key_values=cache, logits_to_keep=1).logits[:, -1]
    for position in range(prompt_length, batch.shape[1] - 1):
        ids = torch.full((batch.shape[0], 1), position)  # a compressed cache would count on from what it kept
        yield model(batch[:, position : position + 1], past_key_values=cache, position_ids=ids).logits[:, -1]


def held_bytes(cache: Cache) -> int:
    """Bytes of keys and values."""
    return sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))


@torch.no_grad()
def decode_seconds(model, batch: torch.Tensor, cache: Cache, prompt_length: int) -> float:
    """Seconds a token after the prompt."""
    decoding = steps(model, batch[:, : prompt_length + TIMED + 1], cache, prompt_length)
    next(decoding)
    start = time.perf_counter()
    count = sum(1 for _ in decoding)
    return (time.perf_counter() - start) / count


def ratios(runs: Mapping[str, Callable[[], float]], rounds: int, base: str = "full") -> dict[str, dict[str, float]]:
    """Median seconds of runs that take turns, and the median of their ratios to `base`, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 1):  # the first warms up
        for name, run in runs.items():
            took = run()
            if index > 0:
                seconds[name].append(took)
    return {
        name: {
            "ms_per_token": 1000 * statistics.median(times),
            "ratio": statistics.median(mine / other for mine, other in zip(times, seconds[base], strict=True)),
        }
        for name, times in seconds.items()
    }


def presses(kept: int, prompt_length: int) -> dict[str, Callable]:
    """Makers of presses: those that compress the prompt to `kept` tokens and then grow, and those that stay at `kept`."""
    import kvpress

    ratio = 1 - (kept + 0.5) / prompt_length  # int(prompt_length · (1 − ratio)) is `kept`
    window = max(1, kept // 2)
    at_prefill = {
        "ObservedAttention": lambda: kvpress.ObservedAttentionPress(ratio),
        "SnapKV": lambda: kvpress.SnapKVPress(ratio, window_size=window),
        "ExpectedAttention": lambda: kvpress.ExpectedAttentionPress(ratio),
        "TOVA": lambda: kvpress.TOVAPress(ratio),
        "StreamingLLM": lambda: kvpress.StreamingLLMPress(ratio),
        "Knorm": lambda: kvpress.KnormPress(ratio),
    }

    def constant(make: Callable) -> Callable:
        decoding = {"compression_interval": 1, "target_size": kept, "hidden_states_buffer_size": 1}

        def both():
            base = make()
            base.compression_ratio = 0.0  # the decoding press chooses it at every step
            return kvpress.PrefillDecodingPress(make(), kvpress.DecodingPress(base, **decoding))

        return both

    while_decoding = {f"{name}, decoding": constant(at_prefill[name]) for name in ("TOVA", "StreamingLLM", "Knorm")}
    return {"full": contextlib.nullcontext, **at_prefill, **while_decoding}


@torch.no_grad()
def quality(model, tokens: torch.Tensor, make: Callable, prompt_length: int, batch_size: int = 8) -> dict[str, float]:
    """Perplexity, and bytes a sequence: after the last token, and the mean over the decoded ones."""
    loss, last, mean = 0.0, 0, 0.0
    for batch in tokens.split(batch_size):
        cache, held = DynamicCache(), []
        with pressed(make(), model):
            logits = steps(model, batch, cache, prompt_length)
            for each, target in zip(logits, batch[:, prompt_length:].T, strict=True):
                loss += cross_entropy(each.float(), target, reduction="sum").item()
                held.append(held_bytes(cache))
        last, mean = last + held[-1], mean + statistics.mean(held)
    count = tokens.shape[0] * (tokens.shape[1] - prompt_length)
    return {"perplexity": math.exp(loss / count), "bytes": last / tokens.shape[0], "mean_bytes": mean / tokens.shape[0]}


def pressed(press, model) -> contextlib.AbstractContextManager:
    """The press at work on the model; a context that does nothing stays one."""
    return press if isinstance(press, contextlib.nullcontext) else press(model)


def main(name: str, tokens_file: str, prompt_length: int, kept: int, rounds: int) -> None:
    from safetensors.torch import load_file

    tokens = load_file(tokens_file)["tokens"]
    sdpa, eager = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, attn_implementation=each).eval()
        for each in ("sdpa", "eager")
    )
    rows, runs = {}, {}
    for label, make in presses(kept, prompt_length).items():
        model = eager if label.startswith("Observed") else sdpa  # it reads the weights that only eager attention returns
        try:
            rows[label] = quality(model, tokens, make, prompt_length)
        except Exception as error:  # a press that cannot do it is a result too
            rows[label] = {"error": f"{type(error).__name__}: {error}"}
            continue

        def run(model=model, make=make) -> float:
            with pressed(make(), model):
                return decode_seconds(model, tokens[:1], DynamicCache(), prompt_length)

        runs[label] = run
        print(label, rows[label], file=sys.stderr)
    for label, speed in ratios(runs, rounds).items():
        rows[label] |= speed
    versions = {each: importlib.metadata.version(each) for each in ("kvpress", "torch", "transformers")}
    print(json.dumps({"versions": versions, "rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
