"""Reading a prompt twice: the scores of its repetition, and what is chosen by them."""

import contextlib
import copy
import itertools
from unittest import mock

import pytest
import tiny
import torch
import zoo
from transformers import DynamicCache

from less_cache import H2O, AttentionMatching, LESSCache, LESSError, LESSKernels
from less_cache.cache import repeating
from less_cache.cache.allotment import Allotment
from less_cache.cache.layer import LESSLayer
from less_cache.integration.families import geometry
from less_cache.ops.call import AttentionCall

MODEL = tiny.tiny_llama()
TEXT = torch.randint(2, tiny.VOCAB, (2, 120), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("policy", [AttentionMatching(0.3, every=8), H2O(0.1, 0.1)], ids=["fitted", "h2o"])
@pytest.mark.parametrize("more", [5, 20], ids=["less than a block", "more"])
def test_what_follows_a_prompt_is_there_in_every_layer_and_head_budgets_stay(policy, more):
    """Heads keep their shares, and the tokens of a question are among the newest or were chosen from."""
    cache = LESSCache(MODEL, policy, heads="adaptive")
    MODEL(TEXT[:, :60], past_key_values=cache)
    before = torch.cat([layer.held.rows.counts[..., 0] for layer in cache.layers], dim=1)
    MODEL(TEXT[:, 60 : 60 + more], past_key_values=cache, position_ids=torch.arange(60, 60 + more)[None])
    after = torch.cat([layer.held.rows.counts[..., 0] for layer in cache.layers], dim=1)
    assert all(bool(layer.positions.amax(-1).eq(59 + more).all()) for layer in cache.layers)
    assert (after.sum(1) / before.sum(1)).sub((60 + more) / 60).abs().max() < 0.1
    assert not any(layer.allotment.waiting for layer in cache.layers)
    if policy.block_size is not None:
        assert before.float().std(dim=1).min() > 1
    if more == 5 and policy.block_size is not None:
        assert (after - before * 65 / 60).abs().max() < 2


@torch.no_grad()
def test_a_layer_that_keeps_everything_chooses_with_the_others():
    """It is within its budget, but the prompt goes on for the others."""
    calls = itertools.count()

    def judge(policy, weights, queries):
        return torch.full_like(weights[:, :, 0, 0], 1.0 if next(calls) % 4 < 2 else 0.01)  # of two layers of two heads

    cache = LESSCache(MODEL, AttentionMatching(0.7, every=8), heads="adaptive")
    with mock.patch.object(AttentionMatching, "judge", judge):
        MODEL(TEXT[:, :60], past_key_values=cache)
        assert [int((layer.positions >= 0).sum()) for layer in cache.layers] == [240, 96]
        MODEL(TEXT[:, 60:80], past_key_values=cache, position_ids=torch.arange(60, 80)[None])
    assert not any(layer.allotment.waiting for layer in cache.layers)
    assert all(bool(layer.positions.amax(-1).eq(79).all()) for layer in cache.layers)


# The scores of a repetition


def build(name: str, attn_implementation: str = "eager"):
    """A tiny model; of learned positions there are hardly more than the text has tokens."""
    if name == "gpt2":
        return zoo.build(name, attn_implementation, max_position_embeddings=70)
    return zoo.build(name, attn_implementation)


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch):
    monkeypatch.setattr(repeating, "STRETCH", 16)
    monkeypatch.setattr(repeating, "LEAD", 3)


@contextlib.contextmanager
def watched():
    """What `recall` was given and gave, for each layer."""
    real, seen = AttentionMatching.recall, []

    def recall(policy, scores, repeated):
        seen.append((repeated.clone(), real(policy, scores, repeated)))
        return seen[-1][1].clone()

    with mock.patch.object(AttentionMatching, "recall", recall):
        yield seen


def repeated(model, ids: torch.Tensor, mask: torch.Tensor | None = None, **options) -> list[torch.Tensor]:
    """Scores of the second pass, `[b, g, c]` a layer."""
    with watched() as seen:
        LESSCache(model, AttentionMatching(12, every=8)).read(model, ids, mask, **options)
    return [scores for scores, _ in seen]


@torch.no_grad()
def plainly(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """The same of one row, by a full cache and the weights that eager attention returns."""
    full, t = DynamicCache(config=model.config), ids.shape[1]
    model(ids, past_key_values=full)
    largest: dict[int, torch.Tensor] = {}
    for start in range(0, t, 16):
        stretch = ids[:, max(0, start - 3) : start + 16]
        n = stretch.shape[1]
        first = min(t, model.config.max_position_embeddings - n)
        again = model(
            stretch,
            past_key_values=copy.deepcopy(full),
            position_ids=torch.arange(first, first + n)[None],
            output_attentions=True,
        )
        for index, weights in enumerate(again.attentions):
            if weights is not None and weights.shape[-1] >= t + n:  # not those of a window
                of_groups = weights[..., :t].unflatten(1, (-1, weights.shape[1] // groups(model))).amax((2, 3))
                largest[index] = largest.get(index, of_groups).maximum(of_groups)
    return [largest[layer.layer_idx] for layer in LESSCache(model, H2O(1, 1)).layers if isinstance(layer, LESSLayer)]


def groups(model) -> int:
    return geometry(model.config).num_key_value_heads


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt2", "falcon new"])
def test_scores_are_those_of_plain_attention(name):
    """Grouped queries; windows and soft caps; sinks; learned positions."""
    expected = plainly(build(name), TEXT[:1, :60])
    got = repeated(build(name, "eager" if name in zoo.WITHOUT_SDPA else "sdpa"), TEXT[:1, :60])
    assert len(got) == len(expected) > 0
    for scores, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(scores, plain, rtol=1e-3, atol=1e-5)
        assert scores.max() > 1.2 * scores.min()


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_next"])
def test_chunks_of_any_size_give_the_same_scores(name):
    model = build(name)
    expected = repeated(model, TEXT[:, :60])
    for size in (1, 3, 8, 16):
        for scores, other in zip(repeated(model, TEXT[:, :60], chunk_size=size), expected, strict=True):
            torch.testing.assert_close(scores, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_rows_with_padding_are_as_single_ones(name):
    model, padding = build(name), (0, 21)
    mask = torch.stack([torch.arange(60) >= each for each in padding]).long()
    batch = repeated(model, TEXT[:, :60], mask, chunk_size=7)
    for row, each in enumerate(padding):
        for scores, alone in zip(batch, repeated(model, TEXT[row : row + 1, each:60]), strict=True):
            assert scores[row, :, :each].eq(0).all()
            torch.testing.assert_close(scores[row, :, each:], alone[0], rtol=1e-3, atol=1e-5)


# What is chosen by them

FITTED = {
    "adaptive": {"heads": "adaptive", "slots": "int4"},
    "equal": {"heads": "equal", "fit": False},
    "shares": {"heads": [[0.5, 1.5], [1.2, 0.8]], "slots": "int8"},
}


def fitted(options: dict, budget: int = 16) -> LESSCache:
    return LESSCache(MODEL, AttentionMatching(budget, every=8), LESSKernels.untrained(MODEL), **options)


def kept(cache: LESSCache) -> list[set[int]]:
    """Positions of the kept tokens, by layer, row and head."""
    return [set(head.tolist()) - {-1} for layer in cache.layers for head in layer.positions.flatten(0, 1)]


@torch.no_grad()
@pytest.mark.parametrize("options", FITTED.values(), ids=FITTED)
def test_layers_hold_what_one_pass_with_these_scores_would_choose(options):
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :9] = 0
    twice, once, plain = fitted(options), fitted(options), fitted(options)
    with watched() as seen:
        twice.read(MODEL, TEXT[:, :60], mask)
    heads = iter([combined[:, head : head + 1] for _, combined in seen for head in range(2)])  # in the order of `ask`
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    MODEL(TEXT[:, :60], attention_mask=mask, position_ids=positions, past_key_values=plain)
    with mock.patch.object(AttentionMatching, "judge", lambda *_: next(heads)):
        MODEL(TEXT[:, :60], attention_mask=mask, position_ids=positions, past_key_values=once)
    for layer, other in zip(twice.layers, once.layers, strict=True):
        held, expected = layer.tensors(), other.tensors()
        assert held.keys() == expected.keys()
        for name, tensor in held.items():
            assert torch.equal(tensor, expected[name]), name
    assert kept(twice) != kept(plain) and sum(map(len, kept(twice))) == sum(map(len, kept(plain)))
    if options["heads"] != "adaptive":  # there heads may be padded in other layers
        assert twice.memory_footprint() == plain.memory_footprint()


def test_a_cache_that_holds_everything_is_a_full_cache_to_the_bit():
    """There is nothing to choose, so that nothing is read twice either."""
    cache, full = LESSCache(MODEL, AttentionMatching(200, every=8)), DynamicCache(config=MODEL.config)
    with watched() as seen:
        cache.read(MODEL, TEXT[:1, :60])
    assert not seen
    options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        MODEL(TEXT[:1, :60], past_key_values=full)
    got, expected = (MODEL.generate(TEXT[:1, :61], past_key_values=each, **options) for each in (cache, full))
    assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))


def test_a_conversation_goes_on():
    """With a question, an answer and another one, in batches with padding, as after a prompt that generate has read."""
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[0, :9] = 0
    cache = fitted(FITTED["adaptive"])
    cache.read(MODEL, TEXT[:, :60], mask[:, :60])
    assert cache.get_seq_length() == 60
    answer = MODEL.generate(TEXT[:, :70], attention_mask=mask[:, :70], past_key_values=cache, max_new_tokens=5, do_sample=False)
    again = torch.cat([answer, TEXT[:, 70:85]], dim=1)
    MODEL.generate(again, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert cache.get_seq_length() == 94


@pytest.mark.parametrize(
    "context", [torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)], ids=["inference", "autocast"]
)
def test_a_prompt_is_read_as_its_continuation_is(context):
    """A cache that was filled in such a context goes on there, and with float32 scores."""
    cache = fitted(FITTED["adaptive"])
    with context:
        with watched() as seen:
            cache.read(MODEL, TEXT[:, :60])
        MODEL.generate(TEXT[:, :70], past_key_values=cache, max_new_tokens=12, do_sample=False)
    assert cache.get_seq_length() == 81 and all(scores.dtype == torch.float32 for scores, _ in seen)


# Errors


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 9, 16])
def test_an_exception_leaves_nothing_behind(at, error, monkeypatch):
    """In either pass: the cache is empty and reads the prompt as a new one does; the model is as it was."""
    model = tiny.tiny_llama()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    cache, attend, calls = fitted(FITTED["adaptive"]), AttentionCall.of, []

    def failing(*given):
        calls.append(given)
        if len(calls) == at:
            raise error("stopped")
        return attend(*given)

    with monkeypatch.context() as patch, pytest.raises(error, match="stopped"):
        patch.setattr(AttentionCall, "of", failing)
        cache.read(model, TEXT[:, :60], chunk_size=8)
    assert cache.get_seq_length() == 0 and all(layer.is_empty for layer in cache.layers)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    other = fitted(FITTED["adaptive"])
    for each in (cache, other):
        each.read(model, TEXT[:, :60])
    for layer, fresh in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(layer.positions, fresh.positions) and isinstance(layer.allotment, Allotment)
        assert type(layer.allotment) is Allotment


@pytest.mark.parametrize(
    "make, inputs, match",
    [
        (lambda: LESSCache(MODEL, H2O(4, 4)), {}, "H2O.* scores tokens while they are read"),
        (lambda: seen_something(), {}, "expected a cache that has seen nothing"),
        (lambda: fitted({}), {"input_ids": TEXT[0]}, r"expected input_ids \[b, n\]"),
        (lambda: fitted({}), {"attention_mask": torch.ones(2, 61)}, "expected a mask of the shape"),
        (lambda: fitted({}), {"chunk_size": 0}, "expected chunk_size to be an int >= 1"),
    ],
)
def test_what_cannot_be_read_twice_is_refused(make, inputs, match):
    with pytest.raises(LESSError, match=match):
        make().read(MODEL, **{"input_ids": TEXT[:, :60], **inputs})


def seen_something() -> LESSCache:
    cache = fitted({})
    cache.read(MODEL, TEXT[:, :60])
    return cache
