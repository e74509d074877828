"""What a layer does on a processor, in C++: a decoding step in one call, and a prompt's attention together with its scores.

`native_step.cpp` takes a whole step, for which PyTorch needs 60 to 200 small operations: the new token, attention over slots
and virtual tokens, scores, the victim, φ, ψ and the state. `native_prompt.cpp` gives the output of attention to a prompt and
the attention that each token got, in about the time of torch's attention alone. The C++ compiler of the machine builds both
once, in a few seconds, into the user's cache folder; where there is none, PyTorch does it all.

`LESSLayer._step` and `prompt.read_prompt` are the oracles, and do what `can` and `can_read` refuse. Their rules stand in the
C++ files a second time: those of `attention.less_attention`, of `observe`, `protected`, `capacity` and `victim` of the policies
in `POLICIES`, and φ, ψ and the state of the memories in `MEMORIES`.

The steps of a model compiled with torch.compile never come here.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from less_cache.memory import LayerKernels
from less_cache.memory.base import TrainedMemory
from less_cache.memory.centroids import LayerCentroids
from less_cache.memory.soft_centroids import LayerSoftCentroids
from less_cache.ops.call import AttentionCall
from less_cache.policies import H2O, EvictionPolicy, SinkRecent
from less_cache.slots import Held, Setup

SOURCES = [Path(__file__).with_name(name) for name in ("step.cpp", "prompt.cpp", "vector_math.h")]
MOST_QUERY_HEADS = 24  # of a KV head, for a prompt: ROWS in the C++ file
# The numbers that the C++ file knows them by
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
POLICIES: dict[type, int] = {H2O: 0, SinkRecent: 1}  # what they count: (heavy, recent) and (sinks, recent)
MEMORIES = {type(None): 0, LayerKernels: 1, LayerSoftCentroids: 2, LayerCentroids: 3}

NETWORK = ("w1", "b1", "w2", "w3", "b2", "s1", "s2")
NETWORKS = {  # our names of these weights in φ and in ψ; "": none
    LayerKernels: (
        ("query_in", "", "query_out", "", "", "", ""),
        ("key_in", "", "key_out", "key_mix", "", "key_scale", "mix_scale"),
    ),
    LayerSoftCentroids: (
        ("query_in", "query_in_bias", "query_out", "query_skip", "query_bias", "", ""),
        ("key_in", "key_in_bias", "key_out", "key_skip", "key_bias", "", ""),
    ),
}

INSTRUCTIONS = {  # of a processor that torch calls so
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}


class Network(ctypes.Structure):
    """As in the C++ file."""

    _fields_ = [(name, ctypes.c_void_p) for name in NETWORK]


class Step(ctypes.Structure):
    """As in the C++ file."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("b", "g", "s", "c", "d", "w", "r", "m", "threads")),
        *((name, ctypes.c_int32) for name in ("dtype", "policy", "memory")),
        *((name, ctypes.c_float) for name in ("scaling", "softcap")),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "real", "sinks")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "positions", "scores", "seen", "counts", "settled")),
        *((name, ctypes.c_void_p) for name in ("values_sum", "features_sum", "keys_sum", "squares_sum")),
        ("query_network", Network),
        ("key_network", Network),
        *((name, ctypes.c_void_p) for name in ("fading", "limit", "output")),
    ]


class Prompt(ctypes.Structure):
    """As in the C++ file."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("heads", "s", "n", "d", "start", "threads")),
        ("scaling", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "received", "output")),
    ]


def can_step(setup: Setup, held: Held, call: AttentionCall) -> bool:
    """Whether `step` knows how to take the one token of `call` into `held`. Anything odd is left to PyTorch, which says what is
    wrong with it.
    """
    if not held.slots.is_plain:
        return False
    tensors, memory = held.tensors(), setup.memory
    dtype = tensors["keys"].dtype
    (b, h, _, d), (g, c, w) = call.query_states.shape, tensors["values"].shape[1:]
    if type(setup.policy) not in POLICIES or type(memory) not in MEMORIES or dtype not in DTYPES:
        return False
    floats, numbers = torch.float32, torch.int64
    expected = {
        **{"keys": ((b, g, c, d), dtype), "values": ((b, g, c, w), dtype)},
        **{"positions": ((b, g, c), torch.int32), "scores": ((b, g, c), floats)},
        **{"seen": ((b,), numbers), "counts": ((b, 2), numbers), "settled": ((b,), torch.bool)},
    }
    if isinstance(memory, LayerCentroids):
        r = memory.num_centroids
        expected |= {"count": ((b, g, r), floats), "squares_sum": ((b, g, r), floats)}
        expected |= {"keys_sum": ((b, g, r, d), floats), "values_sum": ((b, g, r, w), floats)}
    elif memory is not None:
        r = memory.num_virtual_tokens
        expected |= {"features_sum": ((b, g, r), floats), "values_sum": ((b, g, r, w + memory.extra_dims), floats)}
    return (
        tensors.keys() == expected.keys()
        and all(_is_plain(tensors[name], dtype) and tensors[name].shape == shape for name, (shape, dtype) in expected.items())
        and all(states.dtype == dtype for states in (call.query_states, call.key_states, call.value_states))
        and call.key_states.shape == (b, g, 1, d)
        and call.value_states.shape == (b, g, 1, w)
        and (call.sinks is None or call.sinks.shape == (h,))
        and (not isinstance(memory, TrainedMemory) or memory.sizes[:3] == (h, g, d))
        and _compiled() is not None
    )


def _is_plain(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype and tensor.device.type == "cpu" and tensor.is_contiguous()


def step(setup: Setup, held: Held, call: AttentionCall) -> torch.Tensor | None:
    """One token a row: `[b, h, 1, w]`; None, and nothing done, where the kernels are not float32 on a processor."""
    library = _compiled()
    assert library is not None, "`can` says whether it is there"
    query_states, key_states, value_states = (
        states.contiguous() for states in (call.query_states, call.key_states, call.value_states)
    )
    b, h, _, d = query_states.shape
    slots, rows, state = held.slots, held.rows, held.state
    g, c, w = slots.values.shape[1:]
    output = value_states.new_empty(b, h, 1, w)
    real = None if call.real is None else call.real.contiguous()
    sinks = None if call.sinks is None else call.sinks.detach().float().contiguous()
    memory = setup.memory
    weights = {} if memory is None else dict(memory.named_parameters(recurse=False))
    if not all(_is_plain(each, torch.float32) for each in weights.values()):
        return None
    arguments = Step(
        *(b, g, h // g, c, d, w, 0, 0, torch.get_num_threads()),
        *(DTYPES[query_states.dtype], POLICIES[type(setup.policy)], MEMORIES[type(memory)]),
        *(call.scaling, call.softcap or 0.0),
        *(query_states.data_ptr(), key_states.data_ptr(), value_states.data_ptr()),
        *(None if given is None else given.data_ptr() for given in (real, sinks)),
        *(slots.keys.data_ptr(), slots.values.data_ptr(), slots.positions.data_ptr(), slots.scores.data_ptr()),
        *(rows.seen.data_ptr(), rows.counts.data_ptr(), rows.settled.data_ptr()),
        output=output.data_ptr(),
    )
    if memory is not None:
        arguments.values_sum = state.values_sum.data_ptr()
    if isinstance(memory, LayerCentroids):
        arguments.r = memory.num_centroids
        arguments.features_sum = state.count.data_ptr()
        arguments.keys_sum = state.keys_sum.data_ptr()
        arguments.squares_sum = state.squares_sum.data_ptr()
    elif memory is not None:
        pointers = {name: each.data_ptr() for name, each in weights.items()}
        query, key = NETWORKS[type(memory)]
        arguments.r, arguments.m = memory.num_virtual_tokens, memory.sizes[3]
        arguments.features_sum = state.features_sum.data_ptr()
        arguments.query_network = Network(*(pointers.get(name) for name in query))
        arguments.key_network = Network(*(pointers.get(name) for name in key))
        arguments.fading, arguments.limit = pointers.get("fading"), pointers.get("limit")
    library.less_step(ctypes.byref(arguments))
    return output


def can_read(policy: EvictionPolicy, call: AttentionCall) -> bool:
    """Whether `read_prompt` knows how to read the prompt of `call`."""
    (_, h, _, d), g = call.query_states.shape, call.key_states.shape[1]
    return (
        type(policy) is H2O
        and call.key_states.shape == call.value_states.shape
        and d % 64 == 0
        and h // g <= MOST_QUERY_HEADS
        and call.softcap is None
        and call.sinks is None
        and _compiled() is not None
    )


def read_prompt(
    policy: EvictionPolicy,
    call: AttentionCall,
    scores: torch.Tensor,
    positions: torch.Tensor,
    start: int,
    attends: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `prompt.read_prompt` does for H2O: scores `[b, g, n]` and output `[b, h, n, d]`."""
    library = _compiled()
    assert library is not None, "`can_read` says whether it is there"
    query_states, key_states, value_states = (
        states.float().contiguous() for states in (call.query_states, call.key_states, call.value_states)
    )
    b, h, n, d = query_states.shape
    g = key_states.shape[1]
    scores = scores.clone(memory_format=torch.contiguous_format)
    output = torch.empty_like(query_states) if attends else None
    arguments = Prompt(
        *(b * g, h // g, n, d, start, torch.get_num_threads(), call.scaling),
        *(query_states.data_ptr(), key_states.data_ptr(), value_states.data_ptr() if attends else None),
        *(scores.data_ptr(), None if output is None else output.data_ptr()),
    )
    library.less_read_prompt(ctypes.byref(arguments))
    return scores, None if output is None else output.to(call.value_states.dtype)


def compiler() -> str | None:
    """The C++ compiler: $CXX, or what is called c++ or g++; None where there is none that we can drive."""
    if sys.platform == "win32":
        return None
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


@functools.cache
def _compiled() -> ctypes.CDLL | None:
    """The C++ functions, built where this user has not built them before; None without a compiler and, with a warning, where
    that fails.
    """
    found = compiler()
    if found is None:
        return None
    try:
        library = _build(shlex.split(found))
        for function in (library.less_step, library.less_read_prompt):
            function.restype, function.argtypes = None, [ctypes.c_void_p]
    except (OSError, RuntimeError, ValueError, AttributeError, subprocess.CalledProcessError) as error:
        reason = " ".join((getattr(error, "stderr", None) or str(error)).split())[:300]
        warnings.warn(
            f"less_cache: the C++ form could not be built ({reason}). PyTorch takes its place, with the same result in more "
            "time. The compiler is $CXX, or c++; it writes into $XDG_CACHE_HOME/less-cache, or ~/.cache/less-cache.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return library


def _build(compile_with: list[str]) -> ctypes.CDLL:
    """The library of this source, command and kind of machine; a file that does not load is built anew."""
    command = [*compile_with, "-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"]
    command += INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])
    command += ["-fopenmp"] if sys.platform == "linux" else []  # Apple's compiler has none: one thread
    said = [platform.machine(), *command, *(source.read_text("utf-8") for source in SOURCES)]
    digest = hashlib.sha256("\0".join(said).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "less-cache"
    library = folder / f"native-{digest[:16]}.so"
    if library.exists():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(library))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        built = Path(work) / library.name
        sources = [source for source in SOURCES if source.suffix == ".cpp"]
        subprocess.run([*command, *sources, "-o", built], check=True, capture_output=True, text=True, errors="replace")
        built.replace(library)  # other processes may build it at the same time: each sees all of it or nothing
    return ctypes.CDLL(str(library))
