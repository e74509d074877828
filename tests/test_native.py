"""The step in C++: that it computes what PyTorch does, when it is taken, and what happens where it cannot be built."""

import shutil
import subprocess
import warnings
from unittest import mock

import pytest
import tiny
import torch
from step_cases import *  # noqa: F403
from step_cases import assert_agree, layer_memory, taken_by
from test_ops import full_layer, step

from less_cache import CORM, H2O, SinkRecent, native
from less_cache.layer import LESSLayer

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="there is no C++ compiler here")

MEMORIES = (None, "low_rank", "soft_centroids", "untrained")
POLICY, STEPS = H2O(2, 2), 6


@pytest.fixture
def form():
    return native


@pytest.fixture
def built_anew(monkeypatch, tmp_path):
    """The user's cache folder, empty; the C++ step is looked for in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._compiled.cache_clear()
    yield tmp_path / "less-cache"
    native._compiled.cache_clear()


def outputs(policy=POLICY, memory=None, dtype=torch.float32, **attention) -> tuple[torch.Tensor, LESSLayer]:
    """What a small layer gives for a prompt of five tokens and some steps, and the layer."""
    layer = LESSLayer(policy, memory, layer_idx=1, leads=False)
    states = (each.to(dtype) for each in tiny.random_states(1, 2, 1, 5 + STEPS, 8))
    return tiny.feed(layer, *states, [5] + [1] * STEPS, **attention), layer


def outputs_in_pytorch(**options) -> torch.Tensor:
    with mock.patch.dict("less_cache.layer.FUSED", clear=True):
        return outputs(**options)[0]


# What it computes, beside the cases of `step_cases`


@pytest.mark.parametrize("policy", [H2O(3, 2), SinkRecent(2, 3)], ids=["h2o", "sink_recent"])
@pytest.mark.parametrize("attention", [{"softcap": 5.0}, {"s_aux": torch.tensor([1.0, -2.0])}], ids=["softcap", "sinks"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_soft_caps_and_attention_sinks(policy, memory, attention):
    assert_agree(native, policy, memory, **attention)


@pytest.mark.parametrize("dtype", native.DTYPES)
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


def test_kernels_of_another_type_are_left_to_pytorch():
    """Which says what is wrong; the C++ step would read their bytes as numbers of its own type."""
    with mock.patch.object(native, "step", side_effect=AssertionError), pytest.raises(RuntimeError, match="Half"):
        outputs(memory=tiny.layer_kernels(2, 1, 8).half())


def test_kernels_of_other_heads_are_left_to_pytorch():
    with mock.patch.object(native, "step", side_effect=AssertionError), pytest.raises(RuntimeError):
        outputs(memory=tiny.layer_kernels(3, 1, 8))


def test_torch_compile_never_asks_for_it():
    with (
        taken_by(native),
        mock.patch("torch.compiler.is_compiling", return_value=True),
        mock.patch("less_cache.layer._module", side_effect=AssertionError),
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
    native._compiled.cache_clear()
    monkeypatch.setattr(subprocess, "run", mock.Mock(side_effect=AssertionError))
    torch.testing.assert_close(outputs()[0], expected)
    assert [library] == list(built_anew.iterdir())


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
    with pytest.warns(RuntimeWarning, match=r"could not be built \(no such option\)\. PyTorch takes the steps") as warned:
        assert torch.equal(outputs()[0], outputs_in_pytorch())
    assert len(warned) == 1
    assert not list(built_anew.iterdir())


def test_a_folder_that_cannot_be_written_warns(built_anew, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match=r"could not be built \(.*Not a directory.*\$XDG_CACHE_HOME/less-cache"):
        assert torch.equal(outputs()[0], outputs_in_pytorch())
