"""An exception at any point of a forward: the next use is exact, or says that `reset` is needed."""

import itertools

import pytest
import torch
import zoo
from tiny import tiny_kernels, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, PreTrainedModel

from less_cache import CORM, H2O, LESSCache, LESSError, LESSKernels, SinkRecent
from less_cache.backends import select

PROMPT, NEXT, AFTER = (torch.randint(1, 97, (2, n), generator=torch.Generator().manual_seed(n)) for n in (20, 5, 1))


class Stopped(Exception):
    """What is raised in the middle of a forward."""


class StopAt(TorchDispatchMode):
    """Raises before the operation number `at`."""

    def __init__(self, at: int):
        super().__init__()
        self.remaining = at

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.remaining == 0:
            raise Stopped
        self.remaining -= 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def read(model: PreTrainedModel, cache: LESSCache, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, past_key_values=cache).logits


def assert_exact_or_refused(model: PreTrainedModel, make, block: torch.Tensor, every: int) -> None:
    """Stop the forward of `block`, after a prompt, at every `every`-th operation."""
    prefix = make()
    read(model, prefix, PROMPT)
    seen = prefix.get_seq_length()
    whole = prefix.fork()
    expected = read(model, whole, block)
    expected_after = read(model, whole, AFTER)
    exact = refused = finished = 0
    for at in itertools.count(step=every):
        cache = prefix.fork()
        try:
            with StopAt(at):
                read(model, cache, block)
            break  # it came to its end
        except Stopped:
            pass
        try:
            if cache.get_seq_length() == seen:
                torch.testing.assert_close(read(model, cache, block), expected, rtol=0, atol=0)
                exact += 1
            else:
                torch.testing.assert_close(read(model, cache, AFTER), expected_after, rtol=0, atol=0)
                finished += 1
        except LESSError as error:
            assert "cache.reset()" in str(error)
            refused += 1
            cache.reset()
            torch.testing.assert_close(read(model, cache, PROMPT), read(model, make(), PROMPT))
    assert exact and refused and finished, "all three happen"


@pytest.mark.parametrize("block", [AFTER, NEXT], ids=["step", "block"])
@pytest.mark.parametrize("policy", [H2O(4, 4), SinkRecent(2, 6), CORM(4, 4)], ids=lambda policy: policy.name)
def test_stopped_in_pytorch(policy, block, monkeypatch):
    monkeypatch.setattr(select, "BACKENDS", {})
    model = tiny_llama()
    kernels = tiny_kernels(model)
    assert_exact_or_refused(model, lambda: LESSCache(model, policy, kernels), block, every=5)


def test_stopped_around_the_native_step():
    model = tiny_llama()
    kernels = tiny_kernels(model, memory="soft_centroids")
    assert_exact_or_refused(model, lambda: LESSCache(model, H2O(4, 4), kernels), AFTER, every=2)


@pytest.mark.parametrize("block", [AFTER, NEXT], ids=["step", "block"])
@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "qwen3_next", "lfm2"])
def test_stopped_in_a_model_with_layers_of_its_own(family, block):
    """Sliding windows, convolutions and recurrent states have taken tokens in that the layers under LESS have not."""
    if family in ("qwen3_next", "lfm2") and not hasattr(Cache, "get_conv_state"):
        pytest.skip("older versions of transformers change a layer's convolution in place, and no cache sees it")
    model = zoo.build(family)
    assert_exact_or_refused(model, lambda: LESSCache(model, H2O(4, 4)), block, every=7)


@pytest.mark.parametrize("prompt_alone", [False, True])
def test_a_first_block_that_was_stopped_binds_nothing(prompt_alone):
    """Another batch may come after it."""
    model = tiny_llama()
    kernels = LESSKernels.untrained(model)
    expected = read(model, LESSCache(model, H2O(4, 4), kernels), PROMPT[:1])
    refused = 0
    for at in range(0, 400, 7):
        cache = LESSCache(model, H2O(4, 4), kernels)
        with pytest.raises(Stopped), StopAt(at):
            read(model, cache, PROMPT)
        if cache.get_seq_length():
            break
        try:
            output = read(model, cache, PROMPT[:1])
        except LESSError as error:
            assert "cache.reset()" in str(error)
            refused += 1
            cache.reset()
            output = read(model, cache, PROMPT[:1])
        torch.testing.assert_close(output, expected)
    assert refused


@pytest.mark.parametrize("where", ["before", "after"])
def test_stopped_by_the_keyboard_within_the_native_step(where, monkeypatch):
    """Python raises it between two of its own steps: before the call of C++ or after it."""
    from less_cache.backends import cpu

    model = tiny_llama()
    cache = LESSCache(model, H2O(4, 4))
    read(model, cache, PROMPT)
    native_step = cpu.step

    def interrupted(*args):
        if where == "after":
            native_step(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cpu, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            read(model, cache, AFTER)
    with pytest.raises(LESSError, match=r"interrupted .* cache\.reset\(\)"):
        read(model, cache, AFTER)
    with pytest.raises(LESSError, match=r"interrupted .* cache\.reset\(\)"):
        cache.save("never-written")
