"""The fused step of GPUs: when it is taken, what it falls back to, that it compiles. What it computes: `fused_cases.py`."""

import contextlib
import functools
import os
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from step_cases import taken_by
from test_ops import full_layer, step

pytest.importorskip("triton", reason="triton is not installed here")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from less_cache import CORM, H2O, SinkRecent
from less_cache.backends import select
from less_cache.backends import triton as fused
from less_cache.backends.triton import bridge, programs
from less_cache.cache.layer import LESSLayer
from less_cache.cache.static import StaticLESSLayer
from less_cache.memory import MEMORIES
from less_cache.memory.centroids import LayerCentroids
from less_cache.slots.formats import FORMATS, FloatSlots

MOST = {  # operations of a step beside the kernels, views included; lower a number when it has become lower
    ("h2o", "sparse"): 10,
    ("h2o", "low_rank"): 52,
    ("h2o", "soft_centroids"): 89,
    ("sink_recent", "sparse"): 10,
    ("sink_recent", "low_rank"): 52,
    ("sink_recent", "soft_centroids"): 89,
}
POLICY, STEPS = H2O(2, 2), 6
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class OtherSlots(FloatSlots):
    name = "other"


@pytest.fixture(autouse=True)
def no_other_form(monkeypatch):
    monkeypatch.setattr(select, "BACKENDS", {})


@contextlib.contextmanager
def fusing(**changed):
    """Steps on a processor are offered to the fused form as those on a GPU are. `changed`: names of `bridge`."""
    with taken_by(fused), mock.patch.multiple(bridge, _failed=False, **changed):
        yield


def outputs(policy=POLICY, memory=None, slots="float", **attention) -> tuple[torch.Tensor, LESSLayer]:
    """What a small layer gives for a prompt of five tokens and some steps, and the layer."""
    layer = LESSLayer(policy, memory, layer_idx=1, leads=False, slots=slots)
    states = tiny.random_states(1, 2, 1, 5 + STEPS, 8)
    return tiny.feed(layer, *states, [5] + [1] * STEPS, **attention), layer


def test_same_as_pytorch():
    """`fused_cases.py`, in a process whose triton interprets kernels: that is settled when triton is first imported."""
    cases = Path(__file__).with_name("fused_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


# When it is taken


def test_torch_compile_never_asks_for_it():
    with (
        fusing(),
        mock.patch("torch.compiler.is_compiling", return_value=True),
        mock.patch.object(select, "_module", side_effect=AssertionError),
    ):
        outputs()


@pytest.mark.parametrize(
    "refused",
    [{"policy": CORM(3, 2)}, {"memory": LayerCentroids(2)}, {"softcap": 5.0}, {"s_aux": torch.zeros(2)}, {"slots": "other"}],
    ids=lambda refused: next(iter(refused)),
)
def test_what_it_refuses(refused, monkeypatch):
    monkeypatch.setitem(FORMATS, "other", OtherSlots)
    with fusing(), mock.patch.object(fused, "step", side_effect=AssertionError):
        outputs(**refused)


@pytest.mark.parametrize("memory", [None, *MEMORIES])
@pytest.mark.parametrize("policy", [H2O(2, 2), SinkRecent(1, 3)])
def test_what_it_takes(policy, memory):
    with fusing(), mock.patch.object(fused, "step", return_value=None) as fused_step:
        outputs(policy, memory and tiny.layer_kernels(2, 1, 8, memory=memory))
    assert fused_step.call_count == STEPS


# What it falls back to


def test_without_triton(monkeypatch):
    expected, _ = outputs()
    for module in (fused, bridge, programs):
        monkeypatch.delitem(sys.modules, module.__name__)
    monkeypatch.delattr("less_cache.backends.triton")
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it raises
    select._module.cache_clear()
    try:
        with taken_by(fused), warnings.catch_warnings(action="error"):
            assert torch.equal(outputs()[0], expected)
            assert select._module("less_cache.backends.triton") is None
    finally:
        select._module.cache_clear()


def test_a_kernel_that_does_not_run_warns_once():
    """There is no GPU under these tensors: triton raises."""
    kernels = tiny.layer_kernels(2, 1, 8)
    expected, plain = outputs(memory=kernels)
    with fusing(), pytest.warns(RuntimeWarning, match="the fused step does not run here") as warned:
        output, layer = outputs(memory=kernels)
        assert bridge._failed
    assert len(warned) == 1
    assert torch.equal(output, expected)
    assert all(torch.equal(rows, plain.tensors()[name]) for name, rows in layer.tensors().items())


# What it costs


@pytest.mark.parametrize("policy, kernels", MOST)
def test_a_step_takes_few_operations(policy, kernels):
    layer, static = (full_layer(policy, kernels, layer_class=layer_class) for layer_class in (LESSLayer, StaticLESSLayer))
    addresses = {name: rows.data_ptr() for name, rows in layer.tensors().items()}
    launched = mock.Mock(return_value=True)
    with fusing(_launched=launched):
        names, static_names = step(layer).names, step(static).names
    assert launched.call_count == 2 * (1 if kernels == "sparse" else 2)
    assert len(names) <= MOST[policy, kernels], names
    assert len(static_names) == len(names) + 1  # the number of tokens seen is a tensor
    assert "aten::_local_scalar_dense" not in names  # nothing waits for the device: a CUDA graph can take it
    assert {name: rows.data_ptr() for name, rows in layer.tensors().items()} == addresses


def uneven_layer(policy: str, kernels: str, dtype: torch.dtype = torch.float32) -> LESSLayer:
    """As `full_layer`, of heads of different sizes and with a bias a slot."""
    with_shares = functools.partial(LESSLayer, shares=torch.tensor([0.5, 1.5]))
    layer = full_layer(policy, kernels, layer_class=with_shares, dtype=dtype)
    assert layer.held.slots.starts is not None
    layer.held.slots.bias = torch.zeros_like(layer.held.slots.scores)
    return layer


@pytest.mark.parametrize("policy, kernels", MOST)
def test_uneven_heads_take_no_more_operations(policy, kernels):
    with fusing(_launched=mock.Mock(return_value=True)):
        assert step(uneven_layer(policy, kernels)).names == step(full_layer(policy, kernels)).names


# On GPUs: the compiler needs none


class Compiled:
    """In place of a kernel: compiles it for `target`, as it would be for the arguments of a launch, and runs nothing."""

    def __init__(self, kernel, target: GPUTarget):
        self.kernel, self.target, self.binaries = kernel, target, []

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, num_warps: int = 4, **sizes):
        given = dict(zip(self.kernel.arg_names, arguments, strict=False)) | sizes
        signature, constants = {}, {}
        for index, name in enumerate(self.kernel.arg_names):
            argument = given[name]
            if name in sizes or argument is None:
                signature[name], constants[index,] = "constexpr", argument
            elif isinstance(argument, torch.Tensor):
                signature[name] = TYPES[argument.dtype]
            else:
                signature[name] = "fp32" if isinstance(argument, float) else "i32"
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants)
        self.binaries.append(triton.compile(source, target=self.target, options={"num_warps": num_warps}).asm["cubin"])


@pytest.mark.parametrize("of", [full_layer, uneven_layer])
@pytest.mark.parametrize(
    "capability, policy, kernels, dtype",
    [
        (80, "h2o", "low_rank", torch.bfloat16),
        (90, "sink_recent", "soft_centroids", torch.float32),
        (100, "h2o", "soft_centroids", torch.bfloat16),
    ],
)
def test_compiles_for(monkeypatch, tmp_path, capability, policy, kernels, dtype, of):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    layer = of(policy, kernels, dtype=dtype)
    attend, fold_in = (Compiled(kernel, GPUTarget("cuda", capability, 32)) for kernel in (programs.attend, programs.fold_in))
    with fusing(), mock.patch.multiple(programs, attend=attend, fold_in=fold_in):
        step(layer, dtype=dtype)
        assert not bridge._failed
    assert attend.binaries and fold_in.binaries
