"""Perplexity of fixed text, and how far a cache is from the full one, decoded through the real cache.

Axes: `b` sequences at once, `p` prompt tokens, `n` decoded tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from less_cache.cache import spending
from less_cache.cache.cache import LESSCache
from less_cache.cache.layer import LESSLayer
from less_cache.errors import LESSError
from less_cache.evaluation.texts import encoded
from less_cache.integration.families import geometry
from less_cache.kernels.kernels import LESSKernels
from less_cache.policies import EvictionPolicy
from less_cache.slots import format_of

SLOTS, EVERY = "int4", 16  # of fitted caches


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One cache on one text.

    Args:
        cache: `full`, `policy`, `baseline+` (the policy with the state's bytes as more tokens), `untrained` (the policy with
            `LESSKernels.untrained`), `less`, `fitted` (a cache that is fitted without training, in the bytes of the policy's
            tokens in 16 bits) or `fitted, trained` (the same with the kernels as its state).
        policy: The policy's JSON form; None for the full cache.
        perplexity: exp of the mean negative log-likelihood of the decoded tokens, nats.
        bytes: Held by the cache for a sequence, mean over the decoded tokens and sequences.
        tokens: Kept by a KV head after the last token, mean over KV heads, layers and sequences; None: not measured.
        gap_recovered: (policy − this) / (policy − full), in perplexity; None where it says nothing.
        divergence: Of the next token's distribution from the full cache's, KL(full ‖ this) in nats, mean over the decoded
            tokens.
        quarters: The divergence of each quarter of the decoded tokens.
        origin: Machine, versions and commit of a measurement that was taken from an earlier report; None: measured with
            the others.
    """

    cache: str
    policy: dict | None
    perplexity: float
    bytes: float
    tokens: float | None = None
    gap_recovered: float | None = None
    divergence: float | None = None
    quarters: list[float] | None = None
    origin: dict | None = None


def stretches(texts: Sequence[Path], tokenizer, count: int, length: int) -> torch.Tensor:
    """`count` evenly spaced stretches of `length` tokens from text files, `[count, length]`; files share equally."""
    if count < len(texts):
        raise LESSError(f"Expected at least one sequence for each of {len(texts)} texts, got {count}.")
    rows = []
    for index, path in enumerate(texts):
        tokens = torch.tensor(encoded(path, tokenizer))
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

    Full cache, policy alone, baseline+ once for each count of the policy that could grow, the untrained state, LESS where there
    are kernels, and fitted caches where the policy has a budget. `advance` is called after each batch of each cache. `known`:
    measured before on these tokens; all that the kernels take no part in is taken from there.
    """
    contenders = list_contenders(model, policy, kernels)
    rows: list[Measurement | None] = []
    for name, used, _ in contenders:
        described = None if used is None else used.to_dict()
        same = [row for row in known if (row.cache, row.policy) == (name, described)]
        rows.append(same[0] if same and name not in WITH_KERNELS and same[0].divergence is not None else None)
    scores: list[list[Score]] = [[] for _ in contenders]
    for batch in tokens.to(model.device).split(batch_size):
        full = None
        for (_, _, make), row, own in zip(contenders, rows, scores, strict=True):
            if row is None or (full is None and None in rows):  # of the full cache at least what others are compared with
                log_probabilities, score = scored(model, batch, make(), prompt_length, full)
                full = log_probabilities if full is None else full
                own.append(score)
            advance()
    for index, (name, used, _) in enumerate(contenders):
        if rows[index] is None:
            rows[index] = _measurement(name, None if used is None else used.to_dict(), scores[index])
    dense, alone, *others = [row for row in rows if row is not None]
    if (lost := alone.perplexity - dense.perplexity) > 0:
        others = [dataclasses.replace(row, gap_recovered=(alone.perplexity - row.perplexity) / lost) for row in others]
    return [dense, alone, *others]


WITH_KERNELS = ("less", "fitted, trained")


def list_contenders(
    model: PreTrainedModel, policy: EvictionPolicy, kernels: LESSKernels | None
) -> list[tuple[str, EvictionPolicy | None, Callable[[], Cache]]]:
    """Name, policy and how to make it of each cache that `measure` compares."""

    def less(used: EvictionPolicy, state: LESSKernels | None) -> Callable[[], Cache]:
        return lambda: LESSCache(model.config, policy=used, kernels=state, heads="equal")

    untrained = LESSKernels.untrained(model)
    contenders: list[tuple[str, EvictionPolicy | None, Callable[[], Cache]]] = [
        ("full", None, lambda: DynamicCache(config=model.config)),
        ("policy", policy, less(policy, None)),
    ]
    for name in growing(policy):
        larger = with_state_bytes(policy, kernels or untrained, model.dtype.itemsize, name)
        contenders.append(("baseline+", larger, less(larger, None)))
    contenders.append(("untrained", policy, less(policy, untrained)))
    if kernels is not None:
        contenders.append(("less", policy, less(policy, kernels)))
    capacity = policy.capacity(policy.resolve(torch.ones(1, dtype=torch.long)).T)
    if capacity is None or policy.block_size is not None:
        return contenders
    for name, state in (("fitted", untrained), ("fitted, trained", kernels)):
        if state is not None:
            fitted = spending.worth(int(capacity), geometry(model.config), format_of(SLOTS), state, EVERY)
            make = functools.partial(LESSCache, model, fitted, state, heads="adaptive", slots=SLOTS)
            contenders.append((name, fitted, make))
    return contenders


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


@dataclasses.dataclass(frozen=True)
class Score:
    """Of one cache on a batch."""

    losses: torch.Tensor  # [b, n], nats
    divergences: torch.Tensor  # [b, n], nats
    bytes: float  # of all sequences, mean over the decoded tokens
    tokens: float  # of all sequences, kept by a KV head after the last one


def _measurement(name: str, policy: dict | None, scores: Sequence[Score]) -> Measurement:
    losses, divergences = (torch.cat([getattr(each, of) for each in scores]) for of in ("losses", "divergences"))
    count = len(losses)
    return Measurement(
        name,
        policy,
        math.exp(losses.double().mean().item()),
        sum(each.bytes for each in scores) / count,
        sum(each.tokens for each in scores) / count,
        divergence=divergences.double().mean().item(),
        quarters=[quarter.double().mean().item() for quarter in divergences.chunk(4, dim=1)],
    )


@torch.no_grad()
def scored(
    model: PreTrainedModel, batch: torch.Tensor, cache: Cache, prompt_length: int, full: torch.Tensor | None = None
) -> tuple[torch.Tensor, Score]:
    """Log-probabilities `[b, n, vocab]` of the tokens after the prompt, `batch` `[b, p + n]`, and what they come to.

    `full`: the full cache's log-probabilities; None: this is the full cache.
    """
    outputs, held = [], []
    for logits in decode(model, batch, cache, prompt_length):
        outputs.append(logits.float().log_softmax(-1))
        held.append(cache_bytes(cache))
    log_probabilities = torch.stack(outputs, dim=1)
    losses = -log_probabilities.gather(-1, batch[:, prompt_length:, None]).squeeze(-1)
    full = log_probabilities if full is None else full
    divergences = (full.exp() * (full - log_probabilities)).sum(-1)
    return log_probabilities, Score(losses, divergences, sum(held) / len(held), kept_tokens(cache) * len(batch))


def decode(model: PreTrainedModel, batch: torch.Tensor, cache: Cache, prompt_length: int) -> Iterator[torch.Tensor]:
    """Logits `[b, vocab]` for each token after the prompt, `batch` `[b, p + n]`, which are read one by one."""
    with torch.no_grad():
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
