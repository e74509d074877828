"""The fused step of GPUs against the PyTorch step. `test_fused.py` runs this file; by hand:

TRITON_INTERPRET=1 python -m pytest tests/fused_cases.py
"""

import os
from unittest import mock

import pytest
import step_cases
import torch
import triton
from step_cases import *  # noqa: F403
from step_cases import assert_agree, padded
from triton.runtime import interpreter

from less_cache import H2O, SinkRecent
from less_cache.backends import triton as fused
from less_cache.backends.triton import bridge, programs
from less_cache.cache.layer import LESSLayer
from less_cache.memory.state import LowRankState

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before triton is imported"
pytestmark = pytest.mark.filterwarnings("error")  # falling back warns

if triton.__version__.startswith("3.6."):  # there a loop's bound becomes int(array([n])), which numpy 2.4 refuses
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda number: number.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index


@pytest.fixture
def form():
    with mock.patch.object(bridge, "TILE", 16 * 16):  # of a block: slots beyond 16 need a second one
        yield fused


def test_float16(form):
    assert_agree(form, H2O(3, 2), "soft_centroids", dtype=torch.float16)


# Heads of different sizes, counts by head, a bias a slot


def assert_uneven_agree(form, policy, memory=None, shares=(0.5, 1.5), biased=False, **case) -> LESSLayer:
    """`assert_agree` for layers whose KV heads have these shares of the budget; `biased`: and whose slots get biases after the
    prompt, empty ones as well.
    """

    class UnevenLayer(LESSLayer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "shares": torch.tensor(shares)})

        def _block(self, call):
            output = super()._block(call)
            if biased:
                self.held.slots.bias = torch.randn(self.held.slots.positions.shape, generator=torch.Generator().manual_seed(1))
            return output

    with mock.patch.object(step_cases, "LESSLayer", UnevenLayer):
        return assert_agree(form, policy, memory, g=len(shares), **case)


@pytest.mark.parametrize("policy, sizes", [(H2O(2, 2), [[3, 7]]), (SinkRecent(1, 4), [[4, 8]])], ids=["h2o", "sink_recent"])
@pytest.mark.parametrize("memory", [None, "low_rank", "soft_centroids"])
def test_ragged(form, policy, sizes, memory):
    layer = assert_uneven_agree(form, policy, memory, prompt=5, steps=4)
    assert layer.held.slots.starts is not None
    assert layer.held.slots.sizes.tolist() == sizes
    assert (layer.held.slots.positions >= 0).sum() == sum(sizes[0]) - 2  # a slot a head is free
    if memory is not None:
        assert (layer.held.state.features_sum > 0).all()


def test_ragged_bfloat16(form):
    layer = assert_uneven_agree(form, H2O(2, 2), "soft_centroids", prompt=6, steps=3, dtype=torch.bfloat16)
    assert layer.held.slots.starts is not None


def test_ragged_blocks(form):
    """One block of slots in the first head, two in the second."""
    layer = assert_uneven_agree(form, H2O(10, 4), "low_rank", d=12, prompt=30, steps=2)
    assert layer.held.slots.starts is not None
    assert layer.held.slots.sizes.tolist() == [[8, 22]]


def test_ragged_rows_of_different_lengths(form):
    real = padded([1, 9], 9)  # the first row begins with the last step
    real[1, 7] = False
    layer = assert_uneven_agree(form, H2O(2, 2), "low_rank", b=2, prompt=5, steps=4, real=real, real_steps=True)
    assert layer.held.slots.starts is not None
    assert layer.held.rows.seen.tolist() == [1, 8]


def test_counts_by_head_in_equal_heads(form):
    layer = assert_uneven_agree(form, H2O(3, 2), "low_rank", shares=(0.75, 1.25), b=2, prompt=7, steps=2)
    assert layer.held.slots.starts is None
    assert layer.held.rows.counts.tolist() == [[[2, 2], [4, 2]]] * 2


def test_counts_by_head_and_row(form):
    layer = assert_uneven_agree(form, H2O(0.5, 0.25), "low_rank", b=2, prompt=8, steps=3, real=padded([9, 11], 11))
    assert layer.held.slots.starts is not None
    assert layer.held.rows.counts.tolist() == [[[2, 1], [4, 2]], [[2, 1], [6, 3]]]


@pytest.mark.parametrize("policy", [H2O(3, 2), SinkRecent(2, 3)], ids=["h2o", "sink_recent"])
def test_bias(form, policy):
    layer = assert_uneven_agree(form, policy, "soft_centroids", shares=(1.0, 1.0), biased=True, prompt=5, steps=4)
    assert layer.held.slots.starts is None
    biased = layer.held.slots.bias.count_nonzero(dim=-1)  # slots of a head, out of 6, that no new token came into
    assert ((biased > 0) & (biased < 6)).all()


def test_bias_in_ragged_heads(form):
    layer = assert_uneven_agree(form, H2O(2, 2), "low_rank", biased=True, prompt=5, steps=4)
    assert layer.held.slots.starts is not None
    assert layer.held.slots.bias.count_nonzero() > 0


# The state


@pytest.mark.parametrize("shape", [None, (2, 3), (2, 2, 3)], ids=["all stays", "by head", "by row"])
def test_fold_in(shape):
    state = LowRankState(torch.randn(2, 2, 3, 5), torch.rand(2, 2, 3))
    weights, remembered = torch.rand(2, 2, 1, 3), torch.randn(2, 2, 1, 5)
    factors = None if shape is None else torch.rand(shape)
    kept = torch.ones(2, 2, 3) if factors is None else factors.expand(2, 2, 3)
    values_sum = kept.unsqueeze(-1) * state.values_sum + weights.transpose(-1, -2) @ remembered
    features_sum = kept * state.features_sum + weights.squeeze(2)
    bridge.fold_in(state, weights, remembered, factors)
    torch.testing.assert_close(state.values_sum, values_sum)
    torch.testing.assert_close(state.features_sum, features_sum)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("fades", [False, True])
def test_fold_in_without_its_kernel(monkeypatch, fades):
    """The first kernel has run when the second does not: the step ends in PyTorch."""
    monkeypatch.setattr(bridge, "_failed", False)
    states = [LowRankState(torch.ones(1, 1, 3, 5), torch.ones(1, 1, 3)) for _ in range(2)]
    pair = torch.rand(1, 1, 1, 3), torch.randn(1, 1, 1, 5), torch.rand(1, 3) if fades else None
    bridge.fold_in(states[0], *pair)
    monkeypatch.setattr(programs, "fold_in", None)
    with pytest.warns(RuntimeWarning, match="does not run here"):
        bridge.fold_in(states[1], *pair)
    torch.testing.assert_close(vars(states[1]), vars(states[0]))
