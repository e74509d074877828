"""Gradients through a cache: a DynamicCache's for the first block, an error for all that comes later."""

import pytest
import torch
import zoo
from tiny import VOCAB, tiny_kernels, tiny_llama
from transformers import DynamicCache

from less_cache import CORM, H2O, LESSCache, LESSError, SinkRecent

PROMPT, NEXT = (torch.randint(1, VOCAB, (2, n), generator=torch.Generator().manual_seed(n)) for n in (20, 6))
LATER = "carries no gradients through what came before a block"
WENT_ON = "carries the gradients of a text's first block alone, and this text went on"
POLICIES = [H2O(4, 4), SinkRecent(2, 6), CORM(6, 6), H2O(200, 200)]

each_policy = pytest.mark.parametrize("policy", POLICIES, ids=repr)


def loss_of(model, cache, tokens, **options) -> torch.Tensor:
    logits = model(tokens, past_key_values=cache, **options).logits
    if "attention_mask" in options:  # what is computed at padding means nothing
        logits = logits[options["attention_mask"].bool()]
    return logits.square().mean()


def gradients_of(model, cache, **options) -> list[torch.Tensor]:
    model.zero_grad()
    loss_of(model, cache, PROMPT, **options).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "falcon"])
@each_policy
def test_those_of_the_first_block_are_the_models_own(policy, family):
    model = tiny_llama() if family == "llama" else zoo.build(family)
    mask = torch.ones_like(PROMPT)
    mask[1, :5] = 0
    for options in ({}, {"attention_mask": mask}):
        expected = gradients_of(model, DynamicCache(config=model.config), **options)
        for given, right in zip(gradients_of(model, LESSCache(model, policy), **options), expected, strict=True):
            torch.testing.assert_close(given, right, rtol=1e-4, atol=1e-6)


@each_policy
@pytest.mark.parametrize("block", [NEXT, NEXT[:, :1]], ids=["block", "step"])
def test_those_of_a_later_block_raise(policy, block):
    model = tiny_llama()
    cache = LESSCache(model, policy, tiny_kernels(model))
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
        expected = model(block, past_key_values=cache.fork()).logits
    logits = model(block, past_key_values=cache).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    with pytest.raises(LESSError, match=LATER):
        logits.sum().backward(retain_graph=True)
    with pytest.raises(LESSError, match=LATER):
        torch.autograd.grad(logits.sum(), [model.model.embed_tokens.weight])
    with torch.no_grad():
        assert model(NEXT[:, :1], past_key_values=cache).logits.isfinite().all(), "the cache goes on"


def test_those_of_both_raise_by_either_way():
    """The weights are frozen: the second block has no gradients of its own, and lacks those of what it saw."""
    model = tiny_llama().requires_grad_(False)
    prompt = model.get_input_embeddings()(PROMPT).requires_grad_()
    for fork in (False, True):
        cache = LESSCache(model, POLICIES[0])
        first = model(inputs_embeds=prompt, past_key_values=cache).logits.sum()
        first.backward(retain_graph=True)
        second = loss_of(model, cache.fork() if fork else cache, NEXT)
        with pytest.raises(LESSError, match=f"{WENT_ON}|{LATER}"):
            torch.autograd.grad(first + second, [prompt], retain_graph=True)
        with pytest.raises(LESSError, match=f"{WENT_ON}|{LATER}"):
            (first + second).backward()


def test_a_text_that_goes_on_without_gradients_keeps_those_of_its_first_block():
    model = tiny_llama()
    expected = gradients_of(model, DynamicCache(config=model.config))
    model.zero_grad()
    cache = LESSCache(model, POLICIES[0])
    loss = loss_of(model, cache, PROMPT)
    with torch.no_grad():
        model(NEXT, past_key_values=cache)
    loss.backward()
    for parameter, right in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, right, rtol=1e-4, atol=1e-6)
    cache.reset()
    for given, right in zip(gradients_of(model, cache), expected, strict=True):
        torch.testing.assert_close(given, right, rtol=1e-4, atol=1e-6)


@each_policy
@pytest.mark.parametrize("static", [False, True])
def test_forwards_with_gradients_on_give_what_those_without_give(policy, static):
    """Whoever forgets torch.no_grad() and never asks for a gradient."""
    if static and isinstance(policy, CORM):
        pytest.skip("no budget")
    model = tiny_llama()
    outputs = []
    for enabled in (False, True):
        cache = LESSCache(model, policy, tiny_kernels(model), static=static)
        with torch.set_grad_enabled(enabled):
            outputs.append([model(each, past_key_values=cache).logits for each in (PROMPT, NEXT, NEXT[:, :1], NEXT[:, 1:2])])
        assert not any(tensor.requires_grad for layer in cache.layers for tensor in layer.tensors().values())
    for without, on in zip(*outputs, strict=True):
        assert on.requires_grad
        torch.testing.assert_close(on.detach(), without, rtol=1e-4, atol=1e-5)


def test_a_recording_keeps_no_graph():
    model = tiny_llama()
    cache = LESSCache(model, POLICIES[0])
    cache.activate_past_recording()
    for tokens in (PROMPT, NEXT):
        model(tokens, past_key_values=cache)
    recording = cache.layers[0]._recording
    assert not any(call.key_states.requires_grad or call.query_states.requires_grad for call in recording.calls)
    cache.crop(-3)
    logits = model(NEXT[:, 3:], past_key_values=cache).logits
    with pytest.raises(LESSError, match=LATER):
        logits.sum().backward()
