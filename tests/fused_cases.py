"""The fused step against the PyTorch step. `test_fused.py` runs this file; by hand:

    TRITON_INTERPRET=1 python -m pytest tests/fused_cases.py

Tiny sizes: a launch of one program takes the interpreter some 70 ms.
"""

import os
from unittest import mock

import pytest
import tiny
import torch
import triton
from triton.runtime import interpreter

from less_cache import H2O, SinkRecent, fused
from less_cache import layer as layer_module
from less_cache.layer import LESSLayer
from less_cache.state import LowRankState

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before triton is imported"
pytestmark = pytest.mark.filterwarnings("error")  # falling back warns

if triton.__version__.startswith("3.6."):  # there a loop's bound becomes int(array([n])), which numpy 2.4 refuses
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda number: number.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index

TIGHT = {"rtol": 1e-5, "atol": 1e-5}
ONE_ROUNDING = {  # of the output; scores and state are float32
    torch.float32: TIGHT,
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-5},
    torch.float16: {"rtol": 2**-10, "atol": 1e-5},
}


def assert_agree(
    policy,
    memory: str | None = None,
    states: tuple[torch.Tensor, ...] | None = None,
    b: int = 1,
    s: int = 2,
    g: int = 1,
    d: int = 8,
    dtype: torch.dtype = torch.float32,
    prompt: int = 3,
    steps: int = 6,
    real: torch.Tensor | None = None,
    real_steps: bool = False,
) -> LESSLayer:
    """The same tokens to two layers, of which one takes every step in the fused form; that one.

    `real` `[b, prompt + steps]`: which tokens are not padding; in the prompt alone, without `real_steps`.
    """
    states = states or tiny.random_states(b, s * g, g, prompt + steps, d)
    states = tuple(each.to(dtype) for each in states)
    kernels = tiny.layer_kernels(s * g, g, d, memory=memory) if memory else None
    plain, layer = (LESSLayer(policy, kernels, layer_idx=1, leads=False) for _ in range(2))
    start = 0
    for n in [prompt] + [1] * steps:
        block = [each[:, :, start : start + n] for each in states]
        mask = real if n > 1 or real_steps else None
        expected = tiny.feed(plain, *block, [n], mask)
        with (
            mock.patch.object(layer_module, "FUSED_ON", {"cpu"}),
            mock.patch.object(fused, "step", wraps=fused.step) as fused_step,
        ):
            output = tiny.feed(layer, *block, [n], mask)
        assert fused_step.call_count == (n == 1)
        start += n
        if n == 1:
            torch.testing.assert_close(output, expected, **ONE_ROUNDING[dtype])
            assert tiny.held_positions(layer) == tiny.held_positions(plain)
    for name, rows in plain.tensors().items():
        torch.testing.assert_close(layer.tensors()[name], rows, **TIGHT, msg=lambda message, name=name: f"{name}: {message}")
    return layer


# Both policies, every memory, before the cache is full and after


@pytest.mark.parametrize("policy", [H2O(3, 2), SinkRecent(2, 3)], ids=["h2o", "sink_recent"])
@pytest.mark.parametrize("memory", [None, "low_rank", "soft_centroids"])
def test_float32(policy, memory):
    layer = assert_agree(policy, memory)
    assert (layer.positions >= 0).sum() == 5
    if memory is not None:
        assert (layer.state.features_sum > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    assert_agree(H2O(3, 2), "soft_centroids", dtype=dtype)


def test_rows_and_heads():
    """Three rows of two KV heads, one query head each, of a head dim that is no power of two."""
    assert_agree(H2O(3, 2), "low_rank", b=3, g=2, s=1, d=12, prompt=5, steps=2)


def test_three_query_heads():
    assert_agree(H2O(2, 2), "soft_centroids", s=3, d=12, steps=3)


@mock.patch.object(fused, "TILE", 16 * 16)
def test_many_slots():
    """Two blocks of them."""
    layer = assert_agree(H2O(14, 4), "low_rank", d=12, prompt=30, steps=4)
    assert layer.keys.shape[2] > 16


def test_wide_values():
    """Values wider than the keys."""
    query_states, key_states, _ = tiny.random_states(1, 2, 1, 9, 8)
    assert_agree(H2O(3, 2), None, (query_states, key_states, torch.randn(1, 1, 9, 12)), prompt=5, steps=4)


# Rows of different lengths


def padded(lengths: list[int], total: int) -> torch.Tensor:
    """Left padding: `[b, total]`, True at the last of each row's tokens."""
    return torch.arange(total) >= total - torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("policy", [H2O(2, 2), SinkRecent(1, 3), H2O(0.5, 0.25)], ids=["h2o", "sink_recent", "fractions"])
def test_rows_of_different_lengths(policy):
    layer = assert_agree(policy, "low_rank", b=3, prompt=6, steps=4, real=padded([5, 8, 10], 10))
    assert layer.seen.tolist() == [5, 8, 10]


def test_padding_among_the_steps():
    real = padded([1, 6, 9], 9)  # the first row begins with the last step
    real[1, 7] = False
    layer = assert_agree(H2O(2, 2), "soft_centroids", b=3, prompt=5, steps=4, real=real, real_steps=True)
    assert layer.seen.tolist() == [1, 5, 9]
    assert layer.settled.tolist() == [False, True, True]


# Ties


@mock.patch.object(fused, "TILE", 16 * 16)
@pytest.mark.parametrize("policy", [H2O(3, 2), H2O(16, 2)], ids=["one block", "two blocks"])
def test_ties(policy):
    """Every query sees its own token alone, so that all scores are equal: the oldest token leaves."""
    capacity, steps = policy.heavy + policy.recent, 4
    length = capacity + steps
    key_states = torch.arange(length).view(1, 1, length, 1).expand(1, 1, length, 8).float()
    states = torch.full((1, 2, length, 8), 50.0), key_states, torch.randn(1, 1, length, 8)
    layer = assert_agree(policy, "low_rank", states, prompt=capacity, steps=steps)
    assert tiny.held_positions(layer) == [[list(range(steps, length))]]
    assert (layer.scores[layer.positions >= 0] == 2).all()


def test_equal_weights():
    query_states, key_states, value_states = tiny.random_states(1, 2, 1, 9, 8)
    assert_agree(H2O(3, 2), None, (query_states * 0, key_states, value_states))


# The state


@pytest.mark.parametrize("shape", [None, (2, 3), (2, 2, 3)], ids=["all stays", "by head", "by row"])
def test_fold_in(shape):
    state = LowRankState(torch.randn(2, 2, 3, 5), torch.rand(2, 2, 3))
    weights, remembered = torch.rand(2, 2, 1, 3), torch.randn(2, 2, 1, 5)
    factors = None if shape is None else torch.rand(shape)
    kept = torch.ones(2, 2, 3) if factors is None else factors.expand(2, 2, 3)
    values_sum = kept.unsqueeze(-1) * state.values_sum + weights.transpose(-1, -2) @ remembered
    features_sum = kept * state.features_sum + weights.squeeze(2)
    fused.fold_in(state, weights, remembered, factors)
    torch.testing.assert_close(state.values_sum, values_sum)
    torch.testing.assert_close(state.features_sum, features_sum)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("fades", [False, True])
def test_fold_in_without_its_kernel(monkeypatch, fades):
    """The first kernel has run when the second does not: the step ends in PyTorch."""
    monkeypatch.setattr(fused, "_failed", False)
    states = [LowRankState(torch.ones(1, 1, 3, 5), torch.ones(1, 1, 3)) for _ in range(2)]
    pair = torch.rand(1, 1, 1, 3), torch.randn(1, 1, 1, 5), torch.rand(1, 3) if fades else None
    fused.fold_in(states[0], *pair)
    monkeypatch.setattr(fused, "_fold_in", None)
    with pytest.warns(RuntimeWarning, match="does not run here"):
        fused.fold_in(states[1], *pair)
    torch.testing.assert_close(vars(states[1]), vars(states[0]))
