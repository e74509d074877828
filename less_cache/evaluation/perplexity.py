"""Perplexity of fixed text, decoded token by token through the real cache.

Axes: `b` sequences at once, `p` prompt tokens, `n` decoded tokens.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import Cache, DynamicCache, PreTrainedModel

from less_cache.cache.cache import LESSCache
from less_cache.cache.layer import LESSLayer
from less_cache.errors import LESSError
from less_cache.kernels.kernels import LESSKernels
from less_cache.policies import EvictionPolicy


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One cache on one text.

    Args:
        cache: `full`, `policy`, `baseline+` (the policy with the state's bytes as more tokens), `untrained` (the policy with
            `LESSKernels.untrained`) or `less`.
        policy: The policy's JSON form; None for the full cache.
        perplexity: exp of the mean negative log-likelihood of the decoded tokens, nats.
        bytes: Held by the cache after the last token, mean over sequences.
        tokens: Kept by a KV head after the last token, mean over KV heads, layers and sequences; None: not measured.
        gap_recovered: (policy − this) / (policy − full), in perplexity; None where it says nothing.
        origin: Machine, versions and commit of a measurement that was taken from an earlier report; None: measured with
            the others.
    """

    cache: str
    policy: dict | None
    perplexity: float
    bytes: float
    tokens: float | None = None
    gap_recovered: float | None = None
    origin: dict | None = None


def stretches(texts: Sequence[Path], tokenizer, count: int, length: int) -> torch.Tensor:
    """`count` evenly spaced stretches of `length` tokens from text files, `[count, length]`; files share equally."""
    if count < len(texts):
        raise LESSError(f"Expected at least one sequence for each of {len(texts)} texts, got {count}.")
    rows = []
    for index, path in enumerate(texts):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise LESSError(f"{path}: expected text in UTF-8, got: {error}. Save it as UTF-8.") from error
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        share = count // len(texts) + (index < count % len(texts))
        if len(tokens) < length * share:
            raise LESSError(f"{path}: expected {share} stretches of {length} tokens, got {len(tokens)} tokens.")
        starts = torch.linspace(0, len(tokens) - length, share).long() if share > 1 else [0]
        rows += [tokens[start : start + length] for start in starts]
    return torch.stack(rows)


def measure(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    policy: EvictionPolicy,
    kernels: LESSKernels | None,
    prompt_length: int,
    batch_size: int = 8,
    advance: Callable[[], object] = lambda: None,
    known: Sequence[Measurement] = (),
) -> list[Measurement]:
    """Every cache at the policy's size on `tokens` `[count, p + n]`: one run, same text.

    Full cache, policy alone, baseline+ once for each count of the policy that could grow, the untrained state, and LESS
    where there are kernels. `advance` is called after each batch of each cache. `known`: measured before on these tokens;
    all but LESS is taken from there.
    """

    def run(name: str, make: Callable[[], Cache], used: EvictionPolicy | None) -> Measurement:
        description = used.to_dict() if used is not None else None
        for row in known:
            if (row.cache, row.policy) == (name, description) and name != "less":
                for _ in tokens.split(batch_size):
                    advance()
                return row
        return Measurement(name, description, *perplexity(model, tokens, make, prompt_length, batch_size, advance))

    def less(used: EvictionPolicy, state: LESSKernels | None) -> Callable[[], Cache]:
        return lambda: LESSCache(model.config, policy=used, kernels=state, heads="equal")

    untrained = LESSKernels.untrained(model)
    rows = [
        run("full", lambda: DynamicCache(config=model.config), None),
        run("policy", less(policy, None), policy),
    ]
    for name in growing(policy):
        larger = with_state_bytes(policy, kernels or untrained, model.dtype.itemsize, name)
        rows.append(run("baseline+", less(larger, None), larger))
    rows.append(run("untrained", less(policy, untrained), policy))
    if kernels is not None:
        rows.append(run("less", less(policy, kernels), policy))
    lost = rows[1].perplexity - rows[0].perplexity
    if lost > 0:
        won = [rows[1].perplexity - row.perplexity for row in rows[2:]]
        rows[2:] = [dataclasses.replace(row, gap_recovered=part / lost) for row, part in zip(rows[2:], won, strict=True)]
    return rows


def growing(policy: EvictionPolicy) -> list[str]:
    """The policy's counts that may be a fraction of the prompt: tokens that it keeps."""
    return [field.name for field in dataclasses.fields(policy) if not field.metadata.get("whole", False)]


def with_state_bytes(policy: EvictionPolicy, kernels: LESSKernels, itemsize: int, count: str | None = None) -> EvictionPolicy:
    """The policy with as many more tokens as the low-rank state's bytes would hold, rounded up.

    The state takes 4 (R·d + R) bytes a KV head, R the mean of the layers', a token 2·d·itemsize. `count`: which of the policy's
    counts grows, the last one by default. Counts of a policy without a budget, such as CORM, are not tokens: what it keeps then
    is measured.
    """
    if policy.is_fractional:
        raise LESSError(f"Expected token counts, got fractions: {policy}.")
    config = kernels.config
    state = 4 * sum(config.ranks) * (config.head_dim + 1)
    tokens = -(-state // (2 * config.head_dim * itemsize * max(1, len(config.ranks))))
    count = count or growing(policy)[-1]
    return dataclasses.replace(policy, **{count: getattr(policy, count) + tokens})


def perplexity(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    make: Callable[[], Cache],
    prompt_length: int,
    batch_size: int,
    advance: Callable[[], object],
) -> tuple[float, float, float]:
    """Perplexity of the tokens after the prompt, the cache's bytes a sequence, and the tokens that a KV head keeps."""
    loss, held, kept = 0.0, 0, 0.0
    with torch.no_grad():
        for batch in tokens.to(model.device).split(batch_size):
            cache = make()
            for logits, target in zip(decode(model, batch, cache, prompt_length), batch[:, prompt_length:].T, strict=True):
                loss += cross_entropy(logits.float(), target, reduction="sum").item()
            held += cache_bytes(cache)
            kept += kept_tokens(cache) * batch.shape[0]
            advance()
    count = tokens.shape[0] * (tokens.shape[1] - prompt_length)
    return math.exp(loss / count), held / tokens.shape[0], kept / tokens.shape[0]


def decode(model: PreTrainedModel, batch: torch.Tensor, cache: Cache, prompt_length: int) -> Iterator[torch.Tensor]:
    """Logits `[b, vocab]` for each token after the prompt, `batch` `[b, p + n]`."""
    yield model(batch[:, :prompt_length], past_key_values=cache, logits_to_keep=1).logits[:, -1]
    for position in range(prompt_length, batch.shape[1] - 1):
        yield model(batch[:, position : position + 1], past_key_values=cache).logits[:, -1]


def cache_bytes(cache: Cache) -> int:
    """Bytes of a cache's tensors."""
    if isinstance(cache, LESSCache):
        return cache.memory_footprint().total
    held = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def kept_tokens(cache: Cache) -> float:
    """Tokens that a KV head keeps, mean over KV heads, sequences and full-attention layers."""
    if not isinstance(cache, LESSCache):
        return float(cache.get_seq_length())
    slots = [layer.held.slots for layer in cache.layers if isinstance(layer, LESSLayer)]
    return sum((each.positions >= 0).sum().item() / each.sizes.numel() for each in slots) / len(slots)
