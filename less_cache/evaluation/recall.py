"""Recall: a number in a long text that nothing in it points at, asked for once the cache has chosen what it keeps.

Axes: `p` prompt tokens, `q` tokens of a question.
"""

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from less_cache.cache.cache import LESSCache
from less_cache.errors import LESSError
from less_cache.evaluation.texts import encoded
from less_cache.policies import H2O

# As RULER hides them (Hsieh et al., arXiv 2404.06654), but for the announcement before the text.
NEEDLE = " One of the special magic numbers for {word} is: {number}. "
QUESTION = (
    "\nWhat is the special magic number for {word} mentioned in the provided text? "
    "The special magic number for {word} mentioned in the provided text is:"
)
WORDS = ("apple", "bridge", "candle", "castle", "forest", "garden", "mirror", "river", "violin", "window")
ANSWER = 8  # tokens in which the number must come


@dataclasses.dataclass(frozen=True)
class Needle:
    """A number in a text, and what is asked for it."""

    prompt: torch.Tensor  # [p]
    following: torch.Tensor  # tokens that are decoded before the question
    question: torch.Tensor  # [q]
    number: str
    depth: float  # where in the prompt it is, 0 to 1


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One cache at one size.

    Args:
        cache: `full`, `h2o` (as many 16-bit tokens as the share has), `less` (the default) or `less, read twice`.
        share: Of a full cache's bytes, which the cache was made for.
        found: Needles whose number is in the answer.
        depths: Where those lie that are not found, 0 to 1.
        bytes_share: Held after the answers, numbers that are not quantised in 16 bits, as a share of a 16-bit full cache.
    """

    cache: str
    share: float
    found: int
    depths: list[float]
    bytes_share: float


def needles(texts: Sequence[Path], tokenizer, count: int, length: int, decoded: int, seed: int) -> list[Needle]:
    """`count` needles over all depths, each in a random stretch of one of the texts: prompts of `length` tokens."""
    draw = random.Random(seed)

    def tokens_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    pages = []
    for path in texts:
        pages.append(encoded(path, tokenizer))
        if len(pages[-1]) < length + decoded:
            raise LESSError(f"{path}: expected at least {length + decoded} tokens, got {len(pages[-1])}.")
    hidden = []
    for index in range(count):
        word, number = draw.choice(WORDS), str(draw.randrange(1000, 10000))
        page, needle = pages[index % len(pages)], tokens_of(NEEDLE.format(word=word, number=number))
        around = length - len(needle)
        if around < 1:
            raise LESSError(f"Expected a length of more than the {len(needle)} tokens of a needle, got {length}.")
        start, depth = draw.randrange(len(page) - length - decoded + 1), (index + 0.5) / count
        at, end = start + int(depth * around), start + around
        prompt = torch.tensor([*page[start:at], *needle, *page[at:end]])
        following = torch.tensor(page[end : end + decoded], dtype=torch.long)
        hidden.append(Needle(prompt, following, torch.tensor(tokens_of(QUESTION.format(word=word))), number, depth))
    return hidden


def measure(
    model: PreTrainedModel,
    tokenizer,
    hidden: Sequence[Needle],
    shares: Sequence[float],
    advance: Callable[[], object] = lambda: None,
) -> list[Measurement]:
    """The full cache, then H2O and LESS at each share of its bytes. `advance` is called after each needle of each cache."""
    rows = [_measured(model, tokenizer, hidden, "full", 1.0, lambda: DynamicCache(config=model.config), advance)]
    for share in shares:
        h2o = H2O.from_budget(max(2, round(share * len(hidden[0].prompt))))
        less = functools.partial(LESSCache, model, budget=share)
        made = {"h2o": functools.partial(LESSCache, model, h2o), "less": less, "less, read twice": less}
        rows += [_measured(model, tokenizer, hidden, name, share, make, advance) for name, make in made.items()]
    return rows


def _measured(
    model: PreTrainedModel,
    tokenizer,
    hidden: Sequence[Needle],
    name: str,
    share: float,
    make: Callable[[], Cache],
    advance: Callable[[], object],
) -> Measurement:
    missed, held = [], 0.0
    for needle in hidden:
        cache = make()
        if needle.number not in answer(model, tokenizer, cache, needle, twice=name.endswith("twice")):
            missed.append(needle.depth)
        held += share_of_bytes(cache, model)
        advance()
    return Measurement(name, share, len(hidden) - len(missed), missed, held / len(hidden))


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer, cache: Cache, needle: Needle, twice: bool = False) -> str:
    """What the model writes after the question. The cache has read the prompt, `twice` or once, and decoded what follows."""
    prompt, following = needle.prompt[None].to(model.device), needle.following[None].to(model.device)
    if twice:
        assert isinstance(cache, LESSCache), "a cache that can read a prompt twice"
        cache.read(model, prompt)
    else:
        model(prompt, past_key_values=cache, logits_to_keep=1)
    for token in following.T:
        model(token[None], past_key_values=cache)
    text = torch.cat([prompt, following, needle.question[None].to(model.device)], dim=1)
    mask, tokens = torch.ones_like(text), {"min_new_tokens": ANSWER, "max_new_tokens": ANSWER}
    generate: Callable[..., torch.Tensor] = model.generate  # type: ignore[assignment]
    written = generate(text, attention_mask=mask, past_key_values=cache, do_sample=False, **tokens)
    return tokenizer.decode(written[0, text.shape[1] :])


def share_of_bytes(cache: Cache, model: PreTrainedModel) -> float:
    """Bytes of a cache as a share of a full one's for as many tokens, numbers that are not quantised in 16 bits."""
    if not isinstance(cache, LESSCache):
        return 1.0
    footprint, to_16_bits = cache.memory_footprint(), 2 / model.dtype.itemsize
    exact = cache.options.slots == "float"
    held = footprint.keys_values * (to_16_bits if exact else 1) + footprint.low_rank_state + footprint.bookkeeping
    return held / (footprint.full_cache * to_16_bits)
