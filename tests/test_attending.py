"""A step between two choices in C++ beside the same in PyTorch: attention to slots, the newest tokens and the state."""

from unittest import mock

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

from less_cache import AttentionMatching
from less_cache.backends import cpu as native
from less_cache.backends import select
from less_cache.backends.cpu import build
from less_cache.cache.layer import LESSLayer
from less_cache.integration.rotation import Rotation
from less_cache.memory import LayerCentroids

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler here")
EVERY = 6


def neighbours(d: int) -> Rotation:
    """RoPE over all numbers of a head, each with its neighbour."""
    pairs = torch.arange(d // 2)
    return Rotation(torch.arange(d) ^ 1, torch.tensor([-1.0, 1.0]).repeat(d // 2), (0.5 ** pairs.float()).repeat_interleave(2))


def partial(d: int) -> Rotation:
    """RoPE over the first half of a head."""
    own, part = torch.arange(d), tiny.rotation(d // 2)
    zeros = torch.zeros(d - d // 2)
    return Rotation(torch.cat([part.partner, own[d // 2 :]]), *[torch.cat([each, zeros]) for each in (part.gains, part.angles)])


ROTATIONS = {"none": lambda d: None, "halves": tiny.rotation, "neighbours": neighbours, "partial": partial}


def make(g: int, s: int, d: int, slots: str, memory, rotation: str = "halves", **options) -> LESSLayer:
    states = {
        "none": lambda: None,
        "centroids": lambda: LayerCentroids(3),
        "low rank": lambda: tiny.layer_kernels(g * s, g, d),
        "trained centroids": lambda: tiny.layer_kernels(g * s, g, d, memory="soft_centroids"),
    }
    policy = AttentionMatching(12, every=EVERY)
    return LESSLayer(
        policy, states[memory](), layer_idx=1, leads=False, slots=slots, rotation=ROTATIONS[rotation](d), **options
    )


def compare(layers, states, real=None, steps: int = 2 * EVERY + 3, tolerance: float = 1e-4, **attention) -> int:
    """Feed a prompt and then tokens one by one, with and without C++; how many of them it took."""
    prompt, calls = states[0].shape[2] - steps, 0
    start = 0
    for n in [prompt] + [1] * steps:
        block = [each[:, :, start : start + n] for each in states]
        start += n
        with mock.patch.dict(select.BACKENDS, clear=True):
            expected = tiny.feed(layers[0], *block, [n], real, **attention)
        with mock.patch.object(native, "attend", wraps=native.attend) as attend:
            got = tiny.feed(layers[1], *block, [n], real, **attention)
        calls += attend.call_count
        there = slice(None) if real is None else real[:, start - n : start]
        if real is None:
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        else:
            torch.testing.assert_close(
                got.transpose(1, 2)[there], expected.transpose(1, 2)[there], rtol=tolerance, atol=tolerance
            )
    here, there = (layer.held for layer in layers)
    for name, tensor in here.newest.tensors().items():
        other = there.newest.tensors()[name]
        assert tensor.shape == other.shape and tensor.dtype == other.dtype, name
        if real is None:  # of padding they mean nothing
            close = (tensor.float() - other.float()).abs() <= 2e-3 * other.float().abs()
            assert close.float().mean() > 0.99, name
    assert torch.equal(here.rows.seen, there.rows.seen) and torch.equal(here.rows.settled, there.rows.settled)
    return calls


@pytest.mark.parametrize("memory", ["none", "centroids", "low rank", "trained centroids"])
@pytest.mark.parametrize("slots", ["float", "int8", "int4"])
@given(st.sampled_from([8, 64, 80, 96, 128]), st.sampled_from([1, 3, 4]), st.sampled_from(sorted(ROTATIONS)), SEEDS)
def test_cpp_equals_pytorch(slots, memory, d, s, rotation, seed):
    states = tiny.random_states(2, 2 * s, 2, 30 + 2 * EVERY + 3, d, seed=seed)
    layers = [make(2, s, d, slots, memory, rotation, fit=rotation != "none") for _ in range(2)]
    assert compare(layers, states) == 2 * EVERY + 3


@pytest.mark.parametrize("slots", ["float", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(seed=SEEDS)
def test_cpp_equals_pytorch_in_16_bits(slots, dtype, seed):
    states = [each.to(dtype) for each in tiny.random_states(2, 4, 2, 30 + EVERY - 1, 16, seed=seed)]
    layers = [make(2, 2, 16, slots, "centroids") for _ in range(2)]
    tolerance = 8 * torch.finfo(dtype).eps  # PyTorch rounds the decoded keys
    assert compare(layers, states, steps=EVERY - 1, tolerance=tolerance) == EVERY - 1


@pytest.mark.parametrize("slots", ["float", "int8", "int4"])
@given(st.lists(st.floats(0.1, 1.9), min_size=2, max_size=2), SEEDS, st.booleans())
def test_heads_of_different_sizes_and_padding(slots, sizes, seed, padded):
    shares = torch.tensor(sizes) * 2 / sum(sizes)
    states = tiny.random_states(2, 4, 2, 40 + 2 * EVERY + 3, 8, seed=seed)
    real = None
    if padded:
        real = torch.rand(2, states[0].shape[2], generator=torch.Generator().manual_seed(seed)) < 0.8
        real[:, 0] = True
    layers = [make(2, 2, 8, slots, "centroids", shares=shares) for _ in range(2)]
    assert compare(layers, states, real) == 2 * EVERY + 3


@pytest.mark.parametrize(
    "attention", [{"softcap": 2.0}, {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])}], ids=["softcap", "sinks"]
)
@given(SEEDS)
def test_softcap_and_sinks(attention, seed):
    states = tiny.random_states(2, 4, 2, 30 + 2 * EVERY + 3, 8, seed=seed)
    compare([make(2, 2, 8, "int4", "centroids") for _ in range(2)], states, **attention)


@given(SEEDS)
def test_far_positions(seed):
    """Where a turn is known to so many digits less; codes are turned as they were when they were made."""
    states = tiny.random_states(1, 4, 2, 30 + EVERY - 1, 16, seed=seed)
    layers = [make(2, 2, 16, "int4", "centroids") for _ in range(2)]
    for layer in layers:
        with mock.patch.dict(select.BACKENDS, clear=True):
            tiny.feed(layer, *[each[:, :, :30] for each in states], [30])
        far = layer.held.slots.positions
        far.add_((far >= 0).int() * 100_000)
        layer.held.rows.seen.add_(100_000)
    block = [each[:, :, 30:31] for each in states]
    with mock.patch.dict(select.BACKENDS, clear=True):
        expected = tiny.feed(layers[0], *block, [1])
    torch.testing.assert_close(tiny.feed(layers[1], *block, [1]), expected, rtol=1e-4, atol=1e-4)


def test_what_an_empty_slot_holds_is_not_read():
    states = tiny.random_states(1, 4, 2, 30, 8)
    layer = make(2, 2, 8, "float", "none", shares=torch.tensor([1.2, 0.8]))
    tiny.feed(layer, *states, [30])
    slots = layer.held.slots
    slots.set_positions(torch.zeros(1, 2, 1, dtype=torch.long), torch.full((1, 2, 1), -1, dtype=torch.int32))
    for name in ("keys", "values"):
        slots.stored[name][slots.positions < 0] = torch.nan
    with mock.patch.object(native, "attend", wraps=native.attend) as attend:
        assert tiny.feed(layer, *[each[:, :, :1] for each in states], [1]).isfinite().all()
    assert attend.call_count == 1


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads):
    states = tiny.random_states(3, 4, 2, 200, 64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        compare([make(2, 2, 64, "int4", "centroids", shares=torch.tensor([1.7, 0.3])) for _ in range(2)], states)
    finally:
        torch.set_num_threads(before)
