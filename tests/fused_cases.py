"""The fused step of GPUs against the PyTorch step. `test_fused.py` runs this file; by hand:

TRITON_INTERPRET=1 python -m pytest tests/fused_cases.py
"""

import os
from unittest import mock

import pytest
import torch
import triton
from step_cases import *  # noqa: F403
from step_cases import assert_agree
from triton.runtime import interpreter

from less_cache import H2O
from less_cache.backends import triton as fused
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
    with mock.patch.object(fused, "TILE", 16 * 16):  # of a block: slots beyond 16 need a second one
        yield fused


def test_float16(form):
    assert_agree(form, H2O(3, 2), "soft_centroids", dtype=torch.float16)


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
