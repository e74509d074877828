"""A fused form of the step against PyTorch's, which is its oracle: cases for every form.

A file that imports them has a fixture `form`, the module. Tiny sizes: a launch of one program takes Triton's interpreter some
70 ms.
"""

from types import ModuleType
from unittest import mock

import pytest
import tiny
import torch

from less_cache import H2O, SinkRecent
from less_cache.backends import select
from less_cache.cache.layer import LESSLayer
from less_cache.memory.base import LayerMemory
from less_cache.memory.centroids import LayerCentroids

TIGHT = {"rtol": 1e-5, "atol": 1e-5}
ONE_ROUNDING = {  # of the output; scores and state are float32
    torch.float32: TIGHT,
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-5},
    torch.float16: {"rtol": 2**-10, "atol": 1e-5},
}


def taken_by(form: ModuleType):
    """Steps on a processor are offered to `form` alone."""
    return mock.patch.dict(select.BACKENDS, {"cpu": form.__name__}, clear=True)


def layer_memory(name: str | None, h: int, g: int, d: int) -> LayerMemory | None:
    """A memory of one layer; `untrained`: centroids of what was evicted."""
    if name == "untrained":
        return LayerCentroids(2)
    return name and tiny.layer_kernels(h, g, d, memory=name)


def assert_agree(
    form: ModuleType,
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
    shares: torch.Tensor | None = None,
    bias: bool = False,
    **attention,
) -> LESSLayer:
    """The same tokens to two layers, of which one takes every step in the fused form; that one.

    `real` `[b, prompt + steps]`: which tokens are not padding; in the prompt alone, without `real_steps`. `shares` `[g]`: what
    KV heads get of the budget, as in `Setup`. `bias`: after the prompt every slot has one, the empty ones too.
    """
    states = states or tiny.random_states(b, s * g, g, prompt + steps, d)
    states = tuple(each.to(dtype) for each in states)
    kernels = layer_memory(memory, s * g, g, d)
    uneven = {} if shares is None else {"shares": shares}
    plain, layer = (LESSLayer(policy, kernels, layer_idx=1, leads=False, **uneven) for _ in range(2))
    start = 0
    for n in [prompt] + [1] * steps:
        block = [each[:, :, start : start + n] for each in states]
        mask = real if n > 1 or real_steps else None
        with mock.patch.dict(select.BACKENDS, clear=True):
            expected = tiny.feed(plain, *block, [n], mask, **attention)
        with taken_by(form), mock.patch.object(form, "step", wraps=form.step) as fused_step:
            output = tiny.feed(layer, *block, [n], mask, **attention)
        assert fused_step.call_count == (n == 1 and start > 0)
        if bias and start == 0:
            for each in (plain, layer):
                where = each.held.slots.positions.shape
                each.held.slots.bias = torch.randn(where, generator=torch.Generator().manual_seed(1))
        start += n
        if n == 1:
            torch.testing.assert_close(output, expected, **ONE_ROUNDING[dtype])
            assert tiny.held_positions(layer) == tiny.held_positions(plain)
    for name, rows in plain.tensors().items():
        close = {"rtol": 1e-5, "atol": 1e-5 * max(1, rows.float().abs().max().item())}  # sums of large terms may be small
        torch.testing.assert_close(layer.tensors()[name], rows, **close, msg=lambda message, name=name: f"{name}: {message}")
    return layer


# Both policies, every memory, before the cache is full and after


@pytest.mark.parametrize("policy", [H2O(3, 2), SinkRecent(2, 3)], ids=["h2o", "sink_recent"])
@pytest.mark.parametrize("memory", [None, "low_rank", "soft_centroids"])
def test_float32(form, policy, memory):
    layer = assert_agree(form, policy, memory)
    assert (layer.held.slots.positions >= 0).sum() == 5
    if memory is not None:
        assert (layer.held.state.features_sum > 0).all()


def test_bfloat16(form):
    assert_agree(form, H2O(3, 2), "soft_centroids", dtype=torch.bfloat16)


def test_rows_and_heads(form):
    """Three rows of two KV heads, one query head each, of a head dim that is no power of two."""
    assert_agree(form, H2O(3, 2), "low_rank", b=3, g=2, s=1, d=12, prompt=5, steps=2)


def test_three_query_heads(form):
    assert_agree(form, H2O(2, 2), "soft_centroids", s=3, d=12, steps=3)


def test_many_slots(form):
    """More than fit one block of a form that goes through them in blocks of 16."""
    layer = assert_agree(form, H2O(14, 4), "low_rank", d=12, prompt=30, steps=4)
    assert layer.keys.shape[2] > 16


def test_wide_values(form):
    """Values wider than the keys."""
    query_states, key_states, _ = tiny.random_states(1, 2, 1, 9, 8)
    assert_agree(form, H2O(3, 2), None, (query_states, key_states, torch.randn(1, 1, 9, 12)), prompt=5, steps=4)


# Rows of different lengths


def padded(lengths: list[int], total: int) -> torch.Tensor:
    """Left padding: `[b, total]`, True at the last of each row's tokens."""
    return torch.arange(total) >= total - torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("policy", [H2O(2, 2), SinkRecent(1, 3), H2O(0.5, 0.25)], ids=["h2o", "sink_recent", "fractions"])
def test_rows_of_different_lengths(form, policy):
    layer = assert_agree(form, policy, "low_rank", b=3, prompt=6, steps=4, real=padded([5, 8, 10], 10))
    assert layer.held.rows.seen.tolist() == [5, 8, 10]


def test_padding_among_the_steps(form):
    real = padded([1, 6, 9], 9)  # the first row begins with the last step
    real[1, 7] = False
    layer = assert_agree(form, H2O(2, 2), "soft_centroids", b=3, prompt=5, steps=4, real=real, real_steps=True)
    assert layer.held.rows.seen.tolist() == [1, 5, 9]
    assert layer.held.rows.settled.tolist() == [False, True, True]


# Ties


@pytest.mark.parametrize("policy", [H2O(3, 2), H2O(16, 2)], ids=["one block", "two blocks"])
def test_ties(form, policy):
    """Every query sees its own token alone, so that all scores are equal: the oldest token leaves."""
    capacity, steps = policy.heavy + policy.recent, 4
    length = capacity + steps
    key_states = torch.arange(length).view(1, 1, length, 1).expand(1, 1, length, 8).float()
    states = torch.full((1, 2, length, 8), 50.0), key_states, torch.randn(1, 1, length, 8)
    layer = assert_agree(form, policy, "low_rank", states, prompt=capacity, steps=steps)
    assert tiny.held_positions(layer) == [[list(range(steps, length))]]
    assert (layer.held.slots.scores[layer.held.slots.positions >= 0] == 2).all()


def test_equal_weights(form):
    query_states, key_states, value_states = tiny.random_states(1, 2, 1, 9, 8)
    assert_agree(form, H2O(3, 2), None, (query_states * 0, key_states, value_states))
