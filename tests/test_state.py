"""The low-rank state alone."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

from less_cache.memory.state import LowRankState


def empty(b=2, g=2, rank=3, d=4) -> LowRankState:
    return LowRankState.empty(b, g, rank, d, torch.device("cpu"))


def pairs(seed: int, m: int, b=2, g=2, rank=3, d=4) -> tuple[torch.Tensor, torch.Tensor]:
    """ψ(k) `[b, g, m, r]`, some of them 0, and values `[b, g, m, d]`."""
    generator = torch.Generator().manual_seed(seed)
    key_features = torch.randn(b, g, m, rank, generator=generator).relu()
    return key_features, torch.randn(b, g, m, d, generator=generator)


@given(SEEDS, st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_folding_piece_by_piece_is_the_sum_over_all_pairs(seed, pieces):
    key_features, values = pairs(seed, sum(pieces))
    state = empty()
    for features, piece in zip(key_features.split(pieces, dim=2), values.split(pieces, dim=2), strict=True):
        state.fold_in(features, piece)
    torch.testing.assert_close(state.values_sum, torch.einsum("bgmr,bgmd->bgrd", key_features, values))
    torch.testing.assert_close(state.features_sum, key_features.sum(dim=2))


@given(SEEDS)
def test_a_packed_state_says_the_same_and_does_not_wear_out(seed):
    generator = torch.Generator().manual_seed(seed)
    state = LowRankState.empty(2, 2, 3, 5, torch.device("cpu"))
    state.fold_in(torch.rand(2, 2, 7, 3, generator=generator), torch.randn(2, 2, 7, 5, generator=generator))
    packed = state.packed()
    unpacked = LowRankState.unpacked(packed)
    torch.testing.assert_close(unpacked.means(), state.means(), rtol=1e-3, atol=1e-3)
    assert torch.equal(unpacked.log_mass(), state.log_mass())
    assert torch.equal(unpacked.packed().means, packed.means)


@given(SEEDS)
def test_means_lie_among_the_evicted_values(seed):
    key_features, values = pairs(seed, 6)
    state = empty()
    state.fold_in(key_features, values)
    virtual = state.means()  # [b, g, r, d]
    reached = (state.features_sum > 0).unsqueeze(-1)
    assert torch.where(reached, virtual <= values.amax(dim=2, keepdim=True) + 1e-5, virtual == 0).all()
    assert torch.where(reached, virtual >= values.amin(dim=2, keepdim=True) - 1e-5, virtual == 0).all()


def test_features_of_zero_fold_nothing():
    state = empty()
    state.fold_in(torch.zeros(2, 2, 5, 3), torch.full((2, 2, 5, 4), 1e30))
    assert state.features_sum.eq(0).all() and state.values_sum.eq(0).all() and state.means().eq(0).all()


def test_the_state_is_float32_and_changes_in_place_whatever_the_values_are():
    state = empty()
    pointers = state.values_sum.data_ptr(), state.features_sum.data_ptr()
    state.fold_in(torch.ones(2, 2, 1, 3), torch.ones(2, 2, 1, 4, dtype=torch.bfloat16))
    assert state.values_sum.dtype == state.features_sum.dtype == torch.float32
    assert (state.values_sum.data_ptr(), state.features_sum.data_ptr()) == pointers
