"""Prompts with padding: rows are read as if each were alone, in C++ and in PyTorch, in memory that follows the length."""

import dataclasses
from unittest import mock

import pytest
import tiny
import torch
from step_cases import ONE_ROUNDING, layer_memory, padded
from test_layer import MODULE, NoSquares

from less_cache import CORM, H2O, AttentionMatching, SinkRecent
from less_cache.backends import cpu as native
from less_cache.backends.cpu import build
from less_cache.cache.layer import LESSLayer
from less_cache.memory import LayerCentroids
from less_cache.ops import blocks as in_blocks
from less_cache.ops import masks
from less_cache.ops.call import AttentionCall
from less_cache.ops.masks import left_padding
from less_cache.ops.prompt import read_prompt
from less_cache.testing.reference import reference_attention

POLICIES = {"h2o": H2O(6, 5), "h2o shares": H2O(0.2, 0.1), "corm": CORM(8, 4), "sink_recent": SinkRecent(2, 6)}
N = 41
LENGTHS = [N, 33, 17, 1, 0]  # of the rows: 0 to N tokens of padding

with_policies = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
in_cpp = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler here")
backends = pytest.mark.parametrize("backend", ["pytorch", pytest.param("c++", marks=in_cpp)])


@pytest.fixture(autouse=True)
def chosen(request, monkeypatch):
    """The backend that the test is for."""
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "pytorch":
        monkeypatch.setattr("less_cache.backends.select.BACKENDS", {})


def causal(real: torch.Tensor) -> torch.Tensor:
    """The mask of rows with padding, bool `[b, 1, n, n]`."""
    n = real.shape[1]
    return torch.ones(n, n, dtype=torch.bool).tril() & real[:, None, None, :]


def new_layer(policy, memory: str | None = "soft_centroids", h: int = 6, g: int = 2, d: int = 64) -> LESSLayer:
    return LESSLayer(policy, layer_memory(memory, h, g, d), layer_idx=1, leads=False)


# Which masks are causal but for padding on the left


def changed(b: int, query: int, column: int, visible: bool) -> torch.Tensor:
    mask = causal(padded([9, 6], 9))
    mask[b, 0, query, column] = visible
    return mask


@pytest.mark.parametrize(
    "mask, expected",
    [
        (causal(padded([9, 6], 9)), [0, 3]),
        (causal(padded([9, 9], 9)), [0, 0]),
        (causal(padded([0, 1], 9)), [9, 8]),
        (padded([9, 6], 9), [0, 3]),
        (changed(1, 2, 0, True), [0, 3]),  # what padding sees does not matter
        (changed(1, 1, 8, True), [0, 3]),
        (changed(0, 8, 0, False), None),  # hidden, though real
        (changed(1, 8, 3, False), None),
        (changed(1, 8, 0, True), None),  # seen, though padding
        (changed(0, 3, 4, True), None),  # seen, though later
        (padded([9, 6], 9).flip(-1), None),  # padding on the right
        (causal(padded([9, 6], 9).flip(-1)), None),
    ],
)
@pytest.mark.parametrize("form", ["bool", "float32", "bfloat16", "longer"])
@pytest.mark.parametrize("numbers", [in_blocks.NUMBERS, 40], ids=["one block", "blocks"])
def test_left_padding(mask, expected, form, numbers, monkeypatch):
    monkeypatch.setattr(in_blocks, "NUMBERS", numbers)
    real = masks.own_column(mask, 9)
    if form == "longer":
        mask = torch.nn.functional.pad(mask, (3, 0))
    elif form != "bool" and mask.dim() == 4:
        dtype = getattr(torch, form)
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    elif form != "bool":
        mask = mask.long()
    assert left_padding(mask, real) == expected


def test_without_a_mask_nothing_is_padding():
    assert left_padding(None, torch.ones(2, 5, dtype=torch.bool)) == [0, 0]
    assert AttentionCall(*tiny.random_states(3, 2, 1, 5, 8), None, None, 1.0, None, None).padding == [0, 0, 0]


def test_a_mask_is_read_once_unless_it_changes():
    """All layers of a model get the same one; it may be changed in place for the next forward."""
    mask, real = causal(padded([9, 6], 9)), padded([9, 6], 9)
    with mock.patch.object(masks, "_left_padding", wraps=masks._left_padding) as read:
        assert [left_padding(mask, real) for _ in range(3)] == [[0, 3]] * 3
        assert read.call_count == 1
        mask[0, 0, 8, 0] = False
        assert left_padding(mask, real) is None
        mask[0, 0, 8, 0] = True
        assert left_padding(mask, real) == [0, 3]
        assert left_padding(mask, padded([5, 5], 5)) == [0, 0]  # of the last tokens
        assert left_padding(mask.clone(), real) == [0, 3]
        assert read.call_count == 5


def test_a_mask_made_in_inference_mode_is_read_each_time():
    """It does not say whether it was changed."""
    with torch.inference_mode():
        mask, real = causal(padded([9, 6], 9)), padded([9, 6], 9)
        assert left_padding(mask, real) == [0, 3]
        mask[0, 0, 8, 0] = False
        assert left_padding(mask, real) is None


# Rows with padding


@backends
@with_policies
@pytest.mark.parametrize("memory", [None, "soft_centroids", "untrained"])
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_rows_are_as_each_alone(policy, memory, backend, additive):
    real = padded(LENGTHS, N)
    states = tiny.random_states(len(LENGTHS), 6, 2, N, 64)
    together = new_layer(policy, memory)
    output = tiny.feed(together, *states, [N], real, additive)
    for row, length in enumerate(LENGTHS[:-1]):
        alone = new_layer(policy, memory)
        own = [each[row : row + 1, :, N - length :] for each in states]
        expected = tiny.feed(alone, *own, [length])
        torch.testing.assert_close(output[row : row + 1, :, N - length :], expected, rtol=1e-5, atol=1e-5)
        assert tiny.held_positions(together)[row] == tiny.held_positions(alone)[0]
        one = together.held.select(torch.tensor([row]))
        if memory is not None:
            for name, expected in vars(alone.held.state).items():
                torch.testing.assert_close(getattr(one.state, name), expected, rtol=1e-4, atol=1e-4)
    assert together.held.rows.seen.tolist() == LENGTHS


@backends
@pytest.mark.parametrize("memory", [None, "low_rank", "soft_centroids"])
@pytest.mark.parametrize("policy", [*POLICIES.values(), AttentionMatching(11, every=4)], ids=[*POLICIES, "attention matching"])
def test_padded_prompts_are_the_reference(policy, memory, backend):
    """The plain O(T²) formula for rows that begin at columns of their own, and the same steps after them."""
    blocks = [N, *[1] * 6]
    real = padded([length + 6 for length in LENGTHS[:-1]], sum(blocks))
    states, rotation = tiny.random_states(len(real), 6, 2, sum(blocks), 64), None
    if policy.asks_references:
        states = 0.1 * states[0], *states[1:]  # weights that are all but 1 would be ties, which rounding decides
        rotation = tiny.rotation(64)
    layer = LESSLayer(policy, layer_memory(memory, 6, 2, 64), layer_idx=1, leads=False, rotation=rotation)
    expected, kept = reference_attention(*states, policy, blocks, layer.setup.memory, real, rotation=rotation)
    start = 0
    for n, kept_after in zip(blocks, kept, strict=True):
        block = slice(start, start + n)
        output = tiny.feed(layer, *(each[:, :, block] for each in states), [n], real)
        seen = real[:, None, block, None].expand_as(output)
        torch.testing.assert_close(output[seen].double(), expected[:, :, block][seen], rtol=1e-5, atol=1e-5)
        start += n
        assert torch.equal(tiny.held_tokens(layer, real[:, :start]), kept_after[..., :start])
    assert not kept[-1].all(-1).any(), "something leaves in every head"


@backends
def test_nothing_of_padding_is_nan(backend):
    """The output there is 0, whatever the model computed."""
    layer, real = new_layer(H2O(6, 5)), padded(LENGTHS, N)
    states = [each.masked_fill(~real[:, None, :, None], torch.nan) for each in tiny.random_states(len(LENGTHS), 6, 2, N, 64)]
    query, key, value = states
    output, _ = layer.attend(mock.Mock(side_effect=AssertionError), MODULE, query, *layer.update(key, value), causal(real))
    assert output.is_contiguous() and output.isfinite().all()
    assert (output[~real] == 0).all() and (output[real] != 0).all()
    assert all(each.isfinite().all() for each in layer.tensors().values())


@backends
@with_policies
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_on_the_left_is_read_as_any_mask(policy, dtype, backend):
    """The fast way and the general one: what padding sees is the only difference."""
    real, states = padded(LENGTHS, N), [each.to(dtype) for each in tiny.random_states(len(LENGTHS), 6, 2, N, 64)]
    layers = [new_layer(policy) for _ in range(2)]
    output = tiny.feed(layers[0], *states, [N], real)
    with mock.patch("less_cache.ops.call.left_padding", return_value=None):
        expected = tiny.feed(layers[1], *states, [N], real)
    seen = real[:, None, :, None].expand_as(output)
    torch.testing.assert_close(output[seen], expected[seen], **ONE_ROUNDING[dtype])
    assert tiny.held_positions(layers[0]) == tiny.held_positions(layers[1])
    if not isinstance(policy, CORM):  # of queries that are older than its window it may know nothing
        torch.testing.assert_close(layers[0].held.slots.scores, layers[1].held.slots.scores, rtol=1e-5, atol=1e-4)


@backends
@with_policies
def test_chunks_and_steps_after_padding(policy, backend):
    """Rows whose padding is longer than a chunk, as each alone would be in the same chunks."""
    lengths, total = [30, 21, 6], 30
    states, real = tiny.random_states(3, 6, 2, total, 64), padded([30, 21, 6], 30)
    parts = [12, 12, 4, 1, 1]
    together = new_layer(policy)
    output = tiny.feed(together, *states, parts, real)
    general = new_layer(policy)
    with mock.patch("less_cache.ops.call.left_padding", return_value=None):
        expected = tiny.feed(general, *states, parts, real)
    seen = real[:, None, :, None].expand_as(output)
    torch.testing.assert_close(output[seen], expected[seen], rtol=1e-5, atol=1e-5)
    assert tiny.held_positions(together) == tiny.held_positions(general)
    assert together.held.rows.seen.tolist() == lengths


@in_cpp
@pytest.mark.parametrize("s, g, d, start, attends", [(1, 3, 64, 0, True), (5, 2, 128, 0, True), (3, 2, 64, 20, False)])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", ["heads first", "tokens first", "gaps"])
def test_cpp_reads_padded_rows_as_pytorch(s, g, d, start, attends, threads, layout):
    """From states that lie as the model left them: projections give tokens first."""
    lengths, n = [50, 1, 17, 0, 49], 50
    real, states = padded(lengths, n), tiny.random_states(len(lengths), s * g, g, n, d)
    if layout == "tokens first":
        states = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in states]
    elif layout == "gaps":
        states = [torch.stack([each, each], dim=-1)[..., 0] for each in states]
    call = AttentionCall(*states, causal(real), real, d**-0.5, None, None)
    before, positions, policy = torch.rand(len(lengths), g, n), real.cumsum(-1) - 1, H2O(6, 5)
    expected = read_prompt(policy, call, before.clone(), positions, start, attends)
    assert native.can_read(policy, call)
    set_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scores, output = native.read_prompt(policy, call, before, positions, start, attends)
        for row, length in enumerate(lengths):  # as this row alone, to the bit
            own = [each[row : row + 1, :, n - length :] for each in states]
            alone = AttentionCall(*own, None, None, d**-0.5, None, None)
            own = before[row : row + 1, :, n - length :], positions[row : row + 1, n - length :]
            own_scores, own_output = native.read_prompt(policy, alone, *own, max(start - n + length, 0), attends)
            assert torch.equal(scores[row : row + 1, :, n - length :], own_scores)
            assert not attends or torch.equal(output[row : row + 1, :, n - length :], own_output)
    finally:
        torch.set_num_threads(set_before)
    torch.testing.assert_close(scores, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output, expected[1], rtol=1e-5, atol=1e-5)


def test_soft_caps_and_sinks_in_padded_rows():
    """PyTorch reads them by row as well."""
    real, states = padded(LENGTHS, N), tiny.random_states(len(LENGTHS), 6, 2, N, 64)
    for attention in ({"softcap": 3.0}, {"s_aux": torch.linspace(-1, 1, 6)}):
        layers = [new_layer(H2O(6, 5)) for _ in range(2)]
        output = tiny.feed(layers[0], *states, [N], real, **attention)
        with mock.patch("less_cache.ops.call.left_padding", return_value=None):
            expected = tiny.feed(layers[1], *states, [N], real, **attention)
        seen = real[:, None, :, None].expand_as(output)
        torch.testing.assert_close(output[seen], expected[seen], rtol=1e-5, atol=1e-5)
        assert tiny.held_positions(layers[0]) == tiny.held_positions(layers[1])


# Memory


@backends
@pytest.mark.parametrize("masked", ["left", "packed"])
def test_a_masked_prompt_takes_no_square_of_its_length(masked, backend, monkeypatch):
    n, real = 130, padded([130, 120], 130)
    mask = causal(real)
    if masked == "packed":
        mask[:, :, 60:, 20:60] = False
    layer = new_layer(H2O(6, 5), "untrained", 2, 2, 64)
    query, key, value = tiny.random_states(2, 2, 2, n, 64)
    attention = mock.Mock(side_effect=lambda module, query, *rest, **options: (query.transpose(1, 2), None))
    masks._left_padding(mask, real)  # the look at the mask itself is a square of bools, in blocks
    monkeypatch.setattr(in_blocks, "NUMBERS", 2 * 2 * n * 8)
    with torch.no_grad(), NoSquares(n + 1), Largest(2 * 2 * n * 64):
        layer.attend(attention, MODULE, query, *layer.update(key, value), mask, scaling=0.125)
    assert attention.called == (masked == "packed")


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where an operation makes a tensor of floats with more numbers than `most`."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        for each in result if isinstance(result, tuple | list) else [result]:
            is_new = isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in given
            if is_new and each.is_floating_point():
                assert each.numel() <= self.most, f"{function} gave shape {list(each.shape)}"
        return result


@pytest.mark.parametrize("memory", ["low_rank", "soft_centroids"])
def test_a_long_prompt_is_folded_in_in_blocks(memory, monkeypatch):
    """The hidden layer of ψ is not there for all tokens at once. The same state, but for rounding."""
    n, hidden_size = 60, 500
    kernels = tiny.layer_kernels(2, 2, 8, hidden_size=hidden_size, memory=memory)
    layers = [LESSLayer(SinkRecent(2, 5), kernels, layer_idx=0) for _ in range(2)]
    states = tiny.random_states(2, 2, 2, n, 8)
    tiny.feed(layers[0], *states, [n])
    most = 2 * 2 * hidden_size * 8
    monkeypatch.setattr(in_blocks, "NUMBERS", most)
    with Largest(most):
        tiny.feed(layers[1], *states, [n])
    for name, expected in vars(layers[0].held.state).items():
        torch.testing.assert_close(getattr(layers[1].held.state, name), expected, rtol=1e-5, atol=1e-5)
    assert tiny.held_positions(layers[0]) == tiny.held_positions(layers[1])


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_centroids_are_clustered_by_head(heads, monkeypatch):
    """What is clustered at once is never divided: the same state in fewer numbers."""
    b, g, m, d = 3, 5, 70, 8
    memory, (_, keys, values) = LayerCentroids(4), tiny.random_states(b, g, g, m, d)
    leaves = torch.rand(b, g, m, generator=torch.Generator().manual_seed(0)) < 0.8
    states = [memory.empty_state(b, g, d, keys.device) for _ in range(2)]
    for first in (0, 35):
        part = slice(first, first + 35)
        pairs = keys[:, :, part], values[:, :, part], leaves[:, :, part], torch.zeros(b, g, 35), torch.zeros(b, 1, 1)
        memory.fold_in(states[0], *pairs)
        with monkeypatch.context() as patch, Largest(max(b * g * 4 * d, heads * 35 * 2 * d)):
            patch.setattr(in_blocks, "NUMBERS", heads * 35 * 6 * d)
            memory.fold_in(states[1], *pairs)
    for name, expected in dataclasses.asdict(states[0]).items():
        torch.testing.assert_close(getattr(states[1], name), expected, rtol=1e-6, atol=1e-6)
