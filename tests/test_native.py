"""The step in C++: that it computes what PyTorch does, when it is taken, and what happens where it cannot be built."""

import dataclasses
import shutil
import subprocess
import warnings
from unittest import mock

import pytest
import tiny
import torch
from step_cases import *  # noqa: F403
from step_cases import ONE_ROUNDING, assert_agree, layer_memory, taken_by
from test_ops import full_layer, step

from less_cache import CORM, H2O, SinkRecent
from less_cache.backends import cpu as native
from less_cache.backends.cpu import build
from less_cache.backends.cpu.layout import DTYPES
from less_cache.cache.layer import LESSLayer
from less_cache.ops import prompt
from less_cache.ops.call import AttentionCall

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler here")

MEMORIES = (None, "low_rank", "soft_centroids", "untrained")
POLICY, STEPS = H2O(2, 2), 6


@pytest.fixture
def form():
    return native


@pytest.fixture
def built_anew(monkeypatch, tmp_path):
    """The user's cache folder, empty; the C++ step is looked for in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path / "less-cache"
    build.library.cache_clear()


def outputs(policy=POLICY, memory=None, dtype=torch.float32, **attention) -> tuple[torch.Tensor, LESSLayer]:
    """What a small layer gives for a prompt of five tokens and some steps, and the layer."""
    layer = LESSLayer(policy, memory, layer_idx=1, leads=False)
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
    real = padded([9, 14, 20], 20) if real_steps else None  # noqa: F405
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
@pytest.mark.parametrize("policy", [H2O(2, 2), SinkRecent(1, 3)])
def test_what_it_takes(policy, memory):
    with mock.patch.object(native, "step", wraps=native.step) as native_step:
        outputs(policy, layer_memory(memory, 2, 1, 8))
    assert native_step.call_count == STEPS


@pytest.mark.parametrize("refused", [{"policy": CORM(3, 2)}, {"dtype": torch.float16}], ids=lambda refused: next(iter(refused)))
def test_what_it_refuses(refused):
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


@pytest.mark.parametrize(
    "name, change",
    [
        ("positions", torch.Tensor.long),
        ("positions", lambda rows: rows[..., :2].contiguous()),
        ("keys", lambda rows: rows[..., :2, :].contiguous()),
        ("scores", torch.Tensor.double),
        ("counts", lambda rows: rows[:, :1].contiguous()),
        ("features_sum", lambda rows: rows[..., :1].contiguous()),
    ],
)
def test_a_layer_with_odd_tensors_is_left_to_pytorch(name, change):
    """As from a damaged file: C++ would read and write beyond them."""
    _, layer = outputs(memory=tiny.layer_kernels(2, 1, 8))
    layer.set_tensors({**layer.tensors(), name: change(layer.tensors()[name])})
    call = AttentionCall(*tiny.random_states(1, 2, 1, 1, 8), None, None, 1.0, None, None)
    assert not native.can(layer, call)


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


def test_a_broken_library_is_built_anew(built_anew, monkeypatch, tmp_path):
    outputs()
    [library] = built_anew.iterdir()
    broken = tmp_path / "other" / "less-cache" / library.name
    broken.parent.mkdir(parents=True)
    broken.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    build.library.cache_clear()
    with warnings.catch_warnings(action="error"):
        outputs()
    assert broken.stat().st_size > 0


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
    with pytest.warns(RuntimeWarning, match=r"could not be built \(no such option\)\. PyTorch takes its place") as warned:
        assert torch.equal(outputs()[0], outputs_in_pytorch())
    assert len(warned) == 1
    assert not list(built_anew.iterdir())


def test_a_folder_that_cannot_be_written_warns(built_anew, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match=r"could not be built \(.*Not a directory.*\$XDG_CACHE_HOME/less-cache"):
        assert torch.equal(outputs()[0], outputs_in_pytorch())
