"""The step in C++: that it computes what PyTorch does, when it is taken, and what happens where it cannot be built."""

import ctypes
import dataclasses
import hashlib
import itertools
import os
import platform
import re
import shutil
import stat
import subprocess
import warnings
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from step_cases import *  # noqa: F403
from step_cases import ONE_ROUNDING, assert_agree, layer_memory, padded, taken_by
from test_ops import full_layer, step

from less_cache import CORM, H2O, SinkRecent
from less_cache.backends import cpu as native
from less_cache.backends.cpu import build
from less_cache.backends.cpu.layout import DTYPES
from less_cache.cache.layer import LESSLayer
from less_cache.memory import LayerCentroids
from less_cache.ops import prompt
from less_cache.ops.call import AttentionCall
from less_cache.slots.formats import FORMATS, FloatSlots

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler here")

MEMORIES = (None, "low_rank", "soft_centroids", "untrained")
POLICY, STEPS = H2O(2, 2), 6


@pytest.fixture
def form():
    return native


@pytest.fixture
def built_anew(monkeypatch, tmp_path):
    """The user's cache folder, empty; the C++ step is looked for in it, and built in less time than it usually takes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ["-O0" if flag == "-O3" else flag for flag in build.FLAGS])
    build.library.cache_clear()
    yield tmp_path / "less-cache"
    build.library.cache_clear()


def outputs(policy=POLICY, memory=None, dtype=torch.float32, slots="float", **attention) -> tuple[torch.Tensor, LESSLayer]:
    """What a small layer gives for a prompt of five tokens and some steps, and the layer."""
    layer = LESSLayer(policy, memory, layer_idx=1, leads=False, slots=slots)
    states = (each.to(dtype) for each in tiny.random_states(1, 2, 1, 5 + STEPS, 8))
    return tiny.feed(layer, *states, [5] + [1] * STEPS, **attention), layer


def outputs_in_pytorch(**options) -> torch.Tensor:
    with mock.patch.dict("less_cache.backends.select.BACKENDS", clear=True):
        return outputs(**options)[0]


# What it computes, beside the cases of `step_cases`


@pytest.mark.parametrize("policy", [H2O(3, 2), SinkRecent(2, 3)], ids=["h2o", "sink_recent"])
@pytest.mark.parametrize("attention", [{"softcap": 5.0}, {"s_aux": torch.tensor([1.0, -2.0])}], ids=["softcap", "sinks"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_soft_caps_and_attention_sinks(policy, memory, attention):
    assert_agree(native, policy, memory, **attention)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 128])
def test_head_dims_that_the_compiler_knows(d, dtype):
    assert_agree(native, H2O(14, 5), "soft_centroids", b=2, g=2, s=3, d=d, prompt=30, dtype=dtype)


@pytest.mark.parametrize("policy", [H2O(3, 2), SinkRecent(2, 3)], ids=["h2o", "sink_recent"])
@pytest.mark.parametrize("real_steps", [False, True])
def test_untrained_centroids(policy, real_steps):
    """Empty ones first, then the nearest; rows of different lengths."""
    real = padded([9, 14, 20], 20) if real_steps else None
    assert_agree(native, policy, "untrained", b=3, g=2, d=12, prompt=8, steps=12, real=real, real_steps=real_steps)


def test_many_steps_in_threads():
    """Heads are shared out among threads: none comes late."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert_agree(native, H2O(6, 5), "soft_centroids", b=3, g=4, s=3, d=16, prompt=20, steps=100)
    finally:
        torch.set_num_threads(threads)


def test_large_logits():
    """Weights are 0 or 1; nothing overflows."""
    query_states, key_states, value_states = tiny.random_states(1, 2, 1, 9, 8)
    for memory in MEMORIES:
        assert_agree(native, H2O(3, 2), memory, (query_states * 100, key_states, value_states))


# CORM


CORM_MEMORIES = MEMORIES[:3]  # PyTorch clusters what leaves in one step


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", CORM_MEMORIES)
def test_corm(memory, dtype):
    """Slots come with the text."""
    layer = assert_agree(native, CORM(4, 3), memory, b=2, g=2, d=12, prompt=30, steps=90, dtype=dtype)
    assert ((layer.held.slots.positions >= 0).sum(-1) < 100).all()


@pytest.mark.parametrize("memory", CORM_MEMORIES)
def test_corm_in_rows_of_different_lengths(memory):
    real = padded([1, 18, 25], 25)  # the first row begins with the last step
    real[1, 20] = False
    layer = assert_agree(native, CORM(3, 2), memory, b=3, g=2, prompt=10, steps=15, real=real, real_steps=True)
    assert layer.held.rows.seen.tolist() == [1, 17, 25]


def test_corm_with_few_weights_above_the_mean():
    """Each query looks at its own token alone: others leave as soon as they may."""
    length = 20
    key_states = torch.arange(length).view(1, 1, length, 1).expand(1, 1, length, 8).float()
    states = torch.full((1, 2, length, 8), 50.0), key_states, torch.randn(1, 1, length, 8)
    layer = assert_agree(native, CORM(4, 2), "low_rank", states, prompt=10, steps=10)
    assert tiny.held_positions(layer) == [[[16, 17, 18, 19]]]


@pytest.mark.parametrize("memory", CORM_MEMORIES)
def test_several_tokens_leave_at_once(memory):
    """The first queries look at all tokens so far, as the mean does or more; the last at their own alone."""
    query_states, key_states, value_states = tiny.random_states(1, 2, 1, 20, 8)
    query_states[:, :, :12] *= 1e-3
    query_states[:, :, 12:] = 50 * key_states[:, :, 12:]
    states, held = (query_states, key_states, value_states), []
    take = native.step

    def counting(setup, of_layer, call):
        output = take(setup, of_layer, call)
        held.append(int((of_layer.slots.positions >= 0).sum()))
        return output

    with mock.patch.object(native, "step", counting):
        assert_agree(native, CORM(3, 2), memory, states, prompt=12, steps=8)
    assert min(after - before for before, after in itertools.pairwise(held)) < -1  # one has come, and at least three left


# Heads of different sizes

EVEN_LESS, UNEVEN = torch.tensor([0.8, 1.2]), torch.tensor([0.25, 1.75])
UNEVEN_CASES = {  # a policy, and a prompt that is long enough for different sizes
    "h2o": (H2O(8, 8), 40),
    "sink_recent": (SinkRecent(2, 14), 40),
    "corm": (CORM(6, 100), 230),
}
WITH_MEMORIES = [(policy, memory) for policy in UNEVEN_CASES for memory in MEMORIES]
WITH_MEMORIES.remove(("corm", "untrained"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy, memory", WITH_MEMORIES)
def test_heads_of_different_sizes(policy, memory, dtype):
    policy, prompt = UNEVEN_CASES[policy]
    attention = {} if dtype == torch.float32 else {"softcap": 30.0}  # without, PyTorch may round more than the output
    layer = assert_agree(native, policy, memory, b=2, g=2, prompt=prompt, steps=20, shares=UNEVEN, dtype=dtype, **attention)
    assert layer.held.slots.starts is not None
    assert layer.held.rows.counts.shape == (2, 2, 2)


@pytest.mark.parametrize("policy, memory", WITH_MEMORIES)
def test_heads_of_different_sizes_in_rows_of_different_lengths(policy, memory):
    policy, prompt = UNEVEN_CASES[policy]
    real = padded([12, prompt, prompt + 12], prompt + 12)
    real[1, -2] = False
    states = {"b": 3, "g": 2, "prompt": prompt, "steps": 12, "real": real, "real_steps": True}
    layer = assert_agree(native, policy, memory, shares=UNEVEN, **states)
    assert layer.held.slots.starts is not None
    assert layer.held.rows.seen.tolist() == [12, prompt - 1, prompt + 12]


@pytest.mark.parametrize("d", [64, 128])
def test_heads_of_different_sizes_and_dims_that_the_compiler_knows(d):
    layer = assert_agree(native, H2O(8, 8), "soft_centroids", g=2, s=3, d=d, prompt=40, shares=UNEVEN)
    assert layer.held.slots.starts is not None


@pytest.mark.parametrize("policy", [H2O(0.5, 0.25), SinkRecent(1, 0.5), CORM(0.1, 0.4)], ids=["h2o", "sink_recent", "corm"])
@pytest.mark.parametrize("shares", [None, UNEVEN], ids=["rows", "rows and heads"])
def test_budgets_that_are_fractions(policy, shares):
    """Rows differ, and heads where they have shares."""
    real = padded([30, 150, 330], 330)
    layer = assert_agree(native, policy, "low_rank", b=3, g=2, prompt=318, steps=12, real=real, shares=shares)
    assert layer.held.slots.starts is not None
    assert layer.held.rows.counts.shape == ((3, 2) if shares is None else (3, 2, 2))


@pytest.mark.parametrize("policy", [H2O(8, 8), SinkRecent(2, 14), CORM(6, 100)], ids=["h2o", "sink_recent", "corm"])
def test_counts_by_head_in_heads_of_one_size(policy):
    layer = assert_agree(native, policy, "soft_centroids", b=2, g=2, prompt=40, steps=20, shares=EVEN_LESS)
    assert layer.held.slots.starts is None
    assert layer.held.rows.counts.shape == (2, 2, 2)


@pytest.mark.parametrize("threads", [1, 3, 6])
def test_heads_of_very_different_sizes_in_threads(threads):
    """One head takes several threads, several heads take one."""
    shares, before = torch.tensor([0.02, 0.1, 6.8, 0.5, 0.02, 0.04, 0.5, 0.02]), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        layer = assert_agree(native, H2O(60, 40), "soft_centroids", b=2, g=8, d=16, prompt=800, steps=20, shares=shares)
    finally:
        torch.set_num_threads(before)
    assert layer.held.slots.sizes[0].tolist() == [3, 11, 681, 51, 3, 5, 51, 3]


# A bias a slot


def assert_some_biased(layer: LESSLayer) -> None:
    """Kept tokens of the prompt have a bias; those that came later have none."""
    slots = layer.held.slots.columns()
    later = slots.positions >= layer.held.rows.seen.view(-1, 1, 1) - 5
    assert (slots.bias[(slots.positions >= 0) & ~later] != 0).any()
    assert (slots.bias[(slots.positions >= 0) & later] == 0).all()


@pytest.mark.parametrize("policy", [H2O(9, 6), SinkRecent(9, 6), CORM(9, 6)], ids=["h2o", "sink_recent", "corm"])
@pytest.mark.parametrize("memory", MEMORIES[:3])
def test_bias(policy, memory):
    layer = assert_agree(native, policy, memory, b=2, g=2, prompt=20, steps=5, bias=True)
    assert layer.held.slots.starts is None
    assert_some_biased(layer)


@pytest.mark.parametrize("policy, memory", WITH_MEMORIES)
def test_bias_softcap_and_sinks_in_heads_of_different_sizes(policy, memory):
    policy, prompt = UNEVEN_CASES[policy]
    attention = {"softcap": 5.0, "s_aux": torch.tensor([1.0, -2.0, 0.5, 3.0])}
    layer = assert_agree(native, policy, memory, b=2, g=2, prompt=prompt, steps=5, shares=UNEVEN, bias=True, **attention)
    assert layer.held.slots.starts is not None
    assert_some_biased(layer)


# What it reads of a prompt


def prompt_call(b: int, s: int, g: int, n: int, d: int, dtype: torch.dtype = torch.float32) -> AttentionCall:
    states = (each.to(dtype) for each in tiny.random_states(b, s * g, g, n, d))
    return AttentionCall(*states, None, None, d**-0.5, None, None)


def assert_read_alike(call: AttentionCall, start: int = 0, attends: bool = True) -> None:
    b, g, n, _ = call.key_states.shape
    before, positions = torch.rand(b, g, n), torch.arange(n).expand(b, n)
    expected = prompt.read_prompt(POLICY, call, before.clone(), positions, start, attends)
    assert native.can_read(POLICY, call)
    scores, output = native.read_prompt(POLICY, call, before, positions, start, attends)
    torch.testing.assert_close(scores, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output, expected[1], **ONE_ROUNDING[call.value_states.dtype])


@pytest.mark.parametrize("n", [1, 8, 15, 16, 17, 49, 200])
@pytest.mark.parametrize("s", [1, 3, 5, 24])
def test_prompts(n, s):
    """Of less than a tile of columns, of several, and of a part of one; groups that fill a block of rows and that do not."""
    assert_read_alike(prompt_call(2, s, 2, n, 64))


@pytest.mark.parametrize("start, attends", [(0, True), (0, False), (1, False), (30, False), (39, False)])
def test_the_last_queries_of_a_prompt(start, attends):
    assert_read_alike(prompt_call(2, 3, 2, 40, 128), start, attends)


def test_a_prompt_in_half_precision():
    assert_read_alike(prompt_call(1, 3, 1, 40, 64, torch.bfloat16))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_prompt_in_threads_is_the_same_in_every_run(threads):
    call, before = prompt_call(1, 3, 2, 150, 64), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_read_alike(call)
        positions = torch.arange(150).expand(1, 150)
        first, again = (native.read_prompt(POLICY, call, torch.zeros(1, 2, 150), positions, 0, True) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, first, again))


def test_a_prompt_of_large_logits():
    call = prompt_call(1, 3, 1, 60, 64)
    assert_read_alike(dataclasses.replace(call, scaling=100.0))


@pytest.mark.parametrize(
    "refused",
    [{"d": 8}, {"s": 25}, {"softcap": 5.0}, {"sinks": torch.zeros(2)}, {"policy": CORM(3, 2)}, {"policy": SinkRecent(1, 2)}],
    ids=lambda refused: next(iter(refused)),
)
def test_prompts_that_are_left_to_pytorch(refused):
    shape = {"b": 1, "s": 2, "g": 1, "n": 5, "d": 64} | {name: refused[name] for name in ("d", "s") if name in refused}
    attention = {name: refused[name] for name in ("softcap", "sinks") if name in refused}
    assert not native.can_read(refused.get("policy", POLICY), dataclasses.replace(prompt_call(**shape), **attention))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_reads_its_prompt_so(dtype):
    states = [each.to(dtype) for each in tiny.random_states(2, 6, 2, 50, 64)]
    layers = [LESSLayer(H2O(6, 5), layer_memory("soft_centroids", 6, 2, 64), layer_idx=1, leads=False) for _ in range(2)]
    with mock.patch.object(native, "read_prompt", wraps=native.read_prompt) as read:
        output = tiny.feed(layers[0], *states, [50])
    assert read.call_count == 1
    with mock.patch.dict("less_cache.backends.select.BACKENDS", clear=True):
        torch.testing.assert_close(output, tiny.feed(layers[1], *states, [50]), **ONE_ROUNDING[dtype])
    assert tiny.held_positions(layers[0]) == tiny.held_positions(layers[1])
    torch.testing.assert_close(layers[0].held.slots.scores, layers[1].held.slots.scores, rtol=1e-5, atol=1e-5)


# When it is taken


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("policy", [H2O(2, 2), SinkRecent(1, 3), CORM(3, 2)])
def test_what_it_takes(policy, memory):
    with mock.patch.object(native, "step", wraps=native.step) as native_step:
        outputs(policy, layer_memory(memory, 2, 1, 8))
    assert native_step.call_count == (0 if isinstance(policy, CORM) and memory == "untrained" else STEPS)


@dataclasses.dataclass(frozen=True)
class OtherH2O(H2O):
    """What its methods would do, C++ does not know."""


class OtherCentroids(LayerCentroids):
    pass


class OtherSlots(FloatSlots):
    pass


REFUSED = [
    {"dtype": torch.float16},
    {"policy": OtherH2O(2, 2)},
    {"policy": CORM(3, 2), "memory": LayerCentroids(2)},
    {"memory": OtherCentroids(2)},
    {"slots": "other"},
]


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: " and ".join(refused))
def test_what_it_refuses(refused, monkeypatch):
    monkeypatch.setitem(FORMATS, "other", OtherSlots)
    with mock.patch.object(native, "step", side_effect=AssertionError):
        outputs(**refused)


@pytest.mark.parametrize("change", [{"dtype": torch.float16}, {"device": "meta"}], ids=lambda change: next(iter(change)))
def test_kernels_that_changed_are_left_to_pytorch(change):
    """Which says what is wrong; C++ would read their bytes as float32, wherever they point."""
    memory = tiny.layer_kernels(2, 1, 8)
    _, layer = outputs(memory=memory)
    memory.to(**change)
    with pytest.raises(RuntimeError, match=r"Half|meta"):
        tiny.feed(layer, *tiny.random_states(1, 2, 1, 1, 8), [1])


def test_weights_that_were_replaced_are_read():
    memory = tiny.layer_kernels(2, 1, 8)
    _, layer = outputs(memory=memory)
    memory.load_state_dict(tiny.layer_kernels(2, 1, 8, seed=1).state_dict(), assign=True)
    other, states = layer.fork(), tiny.random_states(1, 2, 1, 1, 8)
    output = tiny.feed(layer, *states, [1])
    with mock.patch.dict("less_cache.backends.select.BACKENDS", clear=True):
        torch.testing.assert_close(output, tiny.feed(other, *states, [1]))


def test_kernels_of_other_heads_are_left_to_pytorch():
    with mock.patch.object(native, "step", side_effect=AssertionError), pytest.raises(RuntimeError):
        outputs(memory=tiny.layer_kernels(3, 1, 8))


def biased_layer(memory: str | None, shares: torch.Tensor | None = UNEVEN) -> LESSLayer:
    """Two rows of two heads, of different sizes or of one, with a bias a slot."""
    layer = LESSLayer(H2O(8, 8), layer_memory(memory, 4, 2, 8), layer_idx=1, leads=False, shares=shares)
    tiny.feed(layer, *tiny.random_states(2, 4, 2, 40, 8), [40])
    layer.held.slots.bias = torch.zeros_like(layer.held.slots.scores)
    return layer


def call_of_a_step(**changed) -> AttentionCall:
    """Of a `biased_layer`."""
    states = tiny.random_states(2, 4, 2, 1, 8)
    call = AttentionCall(*states, None, torch.ones(2, 1, dtype=torch.bool), 1.0, None, torch.zeros(4))
    return dataclasses.replace(call, **changed)


ODD = {  # as from a damaged file: C++ would read and write beyond them, or something else than is meant
    "meta": lambda tensor: tensor.to("meta"),
    "type": lambda tensor: tensor.to(torch.int16 if tensor.dtype.is_floating_point else torch.float64),
    "few": lambda tensor: tensor[..., :1].contiguous(),
    "first": lambda tensor: tensor[:1].contiguous(),
    "more dims": lambda tensor: tensor.unsqueeze(0),
    "gaps": lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0],
}
with_odd = pytest.mark.parametrize("odd", ODD.values(), ids=ODD)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("shares", [None, UNEVEN], ids=["even", "uneven"])
@with_odd
def test_a_layer_with_odd_tensors_is_left_to_pytorch(memory, shares, odd):
    layer, call = biased_layer(memory, shares), call_of_a_step()
    assert native.can_step(layer.setup, layer.held, call)
    names = set(layer.tensors())
    assert names >= {"keys", "values", "positions", "scores", "bias", "seen", "settled", "counts"}
    assert ("starts" in names) == (shares is not None)
    for changed in names:
        held = layer.held.map(lambda name, tensor, changed=changed: odd(tensor) if name == changed else tensor)
        assert not native.can_step(layer.setup, held, call), changed


def test_heads_of_one_size_do_not_lie_as_others_do():
    """In a block without `starts`, and others with them."""
    layer, call = biased_layer(None), call_of_a_step()
    uneven = dataclasses.replace(layer.held.slots, starts=None)
    assert not native.can_step(layer.setup, dataclasses.replace(layer.held, slots=uneven), call)
    layer = biased_layer(None, shares=None)
    even = dataclasses.replace(layer.held.slots, starts=torch.arange(5) * 17)
    assert not native.can_step(layer.setup, dataclasses.replace(layer.held, slots=even), call)


@pytest.mark.parametrize("memory", ["low_rank", "soft_centroids"])
@with_odd
def test_odd_weights_are_left_to_pytorch(memory, odd):
    layer, call = biased_layer(memory), call_of_a_step()
    kernels = layer.setup.memory
    for name, weight in dict(kernels.named_parameters()).items():
        kernels.register_parameter(name, torch.nn.Parameter(odd(weight), requires_grad=False))
        assert not native.can_step(layer.setup, layer.held, call), name
        kernels.register_parameter(name, weight)
    kernels.register_parameter("another", torch.nn.Parameter(torch.zeros(1)))
    assert not native.can_step(layer.setup, layer.held, call)


@pytest.mark.parametrize(
    "name, odd",
    [
        *itertools.product(["query_states", "key_states", "value_states"], ["meta", "type", "few", "first"]),
        *itertools.product(["real", "sinks"], ["meta", "first", "more dims"]),
        ("real", "type"),
    ],
)
def test_odd_calls_are_left_to_pytorch(name, odd):
    """Those with gaps are copied, and sinks may be of any type."""
    layer, call = biased_layer(None), call_of_a_step()
    assert not native.can_step(layer.setup, layer.held, dataclasses.replace(call, **{name: ODD[odd](getattr(call, name))}))


@pytest.mark.parametrize(
    "starts", [[1, 5, 34, 39, 68], [0, 5, 34, 39, 69], [0, 5, 34, 39, 67], [0, 5, 5, 39, 68], [0, 40, 34, 39, 68]]
)
def test_heads_that_do_not_lie_one_after_the_other(starts):
    """As from a damaged file: nothing is done."""
    layer, call = biased_layer("soft_centroids"), call_of_a_step()
    assert layer.held.slots.starts.tolist() == [0, 5, 34, 39, 68]
    layer.held.slots.starts[:] = torch.tensor(starts)
    before = layer.fork().tensors()
    assert native.can_step(layer.setup, layer.held, call)
    assert native.step(layer.setup, layer.held, call) is None
    assert all(torch.equal(rows, before[name]) for name, rows in layer.tensors().items())


def test_torch_compile_never_asks_for_it():
    with (
        taken_by(native),
        mock.patch("torch.compiler.is_compiling", return_value=True),
        mock.patch("less_cache.backends.select._module", side_effect=AssertionError),
    ):
        outputs()


@pytest.mark.parametrize("policy", ["h2o", "sink_recent"])
@pytest.mark.parametrize("kernels", ["sparse", *MEMORIES[1:]])
def test_a_step_takes_few_operations(policy, kernels):
    """Beside the call: views of the new states, and the tensor for the output."""
    layer = full_layer(policy, kernels)
    addresses = {name: rows.data_ptr() for name, rows in layer.tensors().items()}
    operations = step(layer)
    assert len(operations.names) <= 7, operations.names
    assert max(operations.allocated) == 2 * 2 * 16  # the output
    assert {name: rows.data_ptr() for name, rows in layer.tensors().items()} == addresses


# What it is built with


def test_built_once(built_anew, monkeypatch):
    expected = outputs_in_pytorch()
    torch.testing.assert_close(outputs()[0], expected)
    [library] = built_anew.iterdir()  # no temporary file is left
    build.library.cache_clear()
    monkeypatch.setattr(subprocess, "run", mock.Mock(side_effect=AssertionError))
    torch.testing.assert_close(outputs()[0], expected)
    assert [library] == list(built_anew.iterdir())


@pytest.fixture
def loaded(monkeypatch) -> list[Path]:
    """The files that are loaded, and that each has the checksum in its name when it is."""
    files, load = [], ctypes.CDLL

    def checking(name):
        files.append(Path(name))
        assert Path(name).stem.endswith(hashlib.sha256(Path(name).read_bytes()).hexdigest())
        return load(name)

    monkeypatch.setattr(ctypes, "CDLL", checking)
    return files


def another_folder(monkeypatch, built_anew: Path) -> Path:
    """What is loaded must not be overwritten: from here on built files are looked for in another folder, empty."""
    other = built_anew.parent / "other" / "less-cache"
    other.mkdir(mode=0o700, parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(other.parent))
    build.library.cache_clear()
    return other


@pytest.mark.parametrize("broken", [lambda content: b"", lambda content: content[:-1], lambda content: content[:-1] + b"x"])
def test_a_broken_library_is_built_anew(built_anew, loaded, monkeypatch, broken):
    outputs()
    [library] = built_anew.iterdir()
    again = another_folder(monkeypatch, built_anew) / library.name
    again.write_bytes(broken(library.read_bytes()))
    with warnings.catch_warnings(action="error"):
        outputs()
    assert loaded == [library, again]
    assert again.read_bytes() == library.read_bytes()


def test_a_library_of_another_name_is_not_loaded(built_anew, loaded, monkeypatch):
    outputs()
    [library] = built_anew.iterdir()
    again = another_folder(monkeypatch, built_anew) / library.name
    again.with_name(library.name[:-10] + "0123456.so").write_bytes(library.read_bytes())
    outputs()
    assert loaded == [library, again]


def test_a_library_that_does_not_load_is_built_anew(built_anew, monkeypatch):
    """As where what it links to is gone."""
    outputs()
    [library] = built_anew.iterdir()
    folder, content = another_folder(monkeypatch, built_anew), b"no library"
    other = folder / f"{library.name.rpartition('-')[0]}-{hashlib.sha256(content).hexdigest()}.so"
    other.write_bytes(content)
    with warnings.catch_warnings(action="error"):
        outputs()
    assert set(folder.iterdir()) == {other, folder / library.name}


def test_what_is_built_is_on_the_disk_before_it_has_its_name(built_anew, monkeypatch):
    sync, at_that_time = os.fsync, []

    def syncing(descriptor):
        at_that_time.append([path for path in built_anew.iterdir() if path.is_file()])
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", syncing)
    outputs()
    assert at_that_time == [[]]
    assert len(list(built_anew.iterdir())) == 1


def test_the_folder_is_for_this_user_alone(built_anew):
    mask = os.umask(0)
    try:
        assert build.own_folder() == built_anew
    finally:
        os.umask(mask)
    assert stat.S_IMODE(built_anew.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_refused(built_anew, mode):
    outputs()
    built_anew.chmod(mode)
    build.library.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"others may write into .*less-cache; .*PyTorch takes its place"):
        assert torch.equal(outputs()[0], outputs_in_pytorch())
    built_anew.chmod(0o755)
    build.library.cache_clear()
    with warnings.catch_warnings(action="error"):
        outputs()


def test_a_folder_of_another_user_is_refused(built_anew, monkeypatch):
    built_anew.mkdir(mode=0o700)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.warns(RuntimeWarning, match=r"less-cache belongs to another user.*PyTorch takes its place"):
        assert torch.equal(outputs()[0], outputs_in_pytorch())
    assert not list(built_anew.iterdir())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives a link away")
def test_a_link_of_another_user_is_refused(built_anew, tmp_path):
    (tmp_path / "own").mkdir(mode=0o700)
    built_anew.symlink_to(tmp_path / "own")
    assert build.own_folder() == built_anew
    os.lchown(built_anew, 12345, -1)
    with pytest.raises(RuntimeError, match="belongs to another user"):
        build.own_folder()


@pytest.mark.parametrize("given", ["here", "./here", ""])
def test_a_relative_cache_folder_is_ignored(monkeypatch, tmp_path, given):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert build.own_folder() == tmp_path / "home" / ".cache" / "less-cache"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def digest() -> str:
    return build.digest(build.command(build.compiler()))


@pytest.mark.parametrize("change", ["CXX", "FLAGS", "DEFINITIONS", "COMPILED", "INCLUDED", "machine", "capability", "CPU_INFO"])
def test_what_is_built_again_for_another(change, monkeypatch, tmp_path):
    """Compiler, flags, constant, source, machine, instructions, processor."""
    before = digest()
    assert before == digest()
    other = tmp_path / "other"
    other.write_text("model name : another\n")
    changed = {
        "FLAGS": [*build.FLAGS, "-g"],
        "DEFINITIONS": {**build.DEFINITIONS, "SPREAD": 0.5},
        "COMPILED": [*build.COMPILED[:-1], other],
        "INCLUDED": [*build.INCLUDED[:-1], other],
        "CPU_INFO": other,
    }
    if change == "CXX":
        monkeypatch.setenv("CXX", "another-compiler")
    elif change == "machine":
        monkeypatch.setattr(platform, "machine", lambda: "another")
    elif change == "capability":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    else:
        monkeypatch.setattr(build, change, changed[change])
    assert digest() != before


def test_every_source_is_said():
    """What a wheel holds is what is compiled."""
    files = {path for path in build.HERE.iterdir() if path.suffix in (".cpp", ".h")}
    assert files == {*build.COMPILED, *build.INCLUDED}


def test_python_says_the_constants():
    """No source has a number of its own for what Python defines."""
    sources = "".join(path.read_text("utf-8") for path in (*build.COMPILED, *build.INCLUDED))
    for name in build.DEFINITIONS:
        assert not re.search(rf"(#define\s+{name}\b|\b{name}\s*=[^=])", sources), name
    command = build.command("c++")
    assert {"-DMOST_WEIGHT=20.0f", "-DPOLICY_CORM=2", "-DRMS_EPS=1e-06f", "-DMOST_QUERY_HEADS=24"} <= set(command)


@pytest.mark.parametrize("compiler, reason", [("g++ 'a", "No closing quotation"), ("no-such-compiler", "No such file")])
def test_what_is_no_compiler_warns(built_anew, monkeypatch, compiler, reason):
    monkeypatch.setenv("CXX", compiler)
    with pytest.warns(RuntimeWarning, match=rf"could not be built \(.*{reason}.*PyTorch takes its place"):
        assert torch.equal(outputs()[0], outputs_in_pytorch())


def test_without_a_compiler_pytorch_takes_the_steps(built_anew, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with warnings.catch_warnings(action="error"), mock.patch.object(native, "step", side_effect=AssertionError):
        assert torch.equal(outputs()[0], outputs_in_pytorch())


def test_a_compiler_that_fails_warns_once(built_anew, monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'no such\noption' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    run = mock.Mock(wraps=subprocess.run)
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.warns(RuntimeWarning, match=r"could not be built \(no such option\)\. PyTorch takes its place") as warned:
        assert torch.equal(outputs()[0], outputs_in_pytorch())
    assert len(warned) == run.call_count == 1
    assert not list(built_anew.iterdir())


def test_a_folder_that_cannot_be_written_warns(built_anew, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match=r"could not be built \(.*Not a directory.*\$XDG_CACHE_HOME/less-cache"):
        assert torch.equal(outputs()[0], outputs_in_pytorch())
