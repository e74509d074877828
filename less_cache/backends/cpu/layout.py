"""What Python and C++ must know alike: numbers of things, constants, and the structures that one hands to the other.

Axes: as in `step.h`. C++ gets `DEFINITIONS` when it is compiled, so that nothing of it is typed twice.
"""

import ctypes
from types import NoneType

import torch

from less_cache.memory import LayerCentroids, LayerKernels, LayerSoftCentroids
from less_cache.memory.centroids import MOST_SPREAD, SPREAD
from less_cache.memory.soft_centroids import MOST_WEIGHT
from less_cache.policies import CORM, H2O, SinkRecent
from less_cache.slots.formats import GROUP, FloatSlots, Int4Slots, Int8Slots

# The numbers that C++ knows them by
DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1}
ATTENDED_DTYPES = DTYPES | {torch.float16: 2}
FORMATS: dict[type, int] = {FloatSlots: 0, Int8Slots: 1, Int4Slots: 2}
STATES = {"none": 0, "sums": 1, "means": 2, "logits": 3}  # in what form attention gets the state
POLICIES: dict[type, int] = {H2O: 0, SinkRecent: 1, CORM: 2}
MEMORIES: dict[type, int] = {NoneType: 0, LayerKernels: 1, LayerSoftCentroids: 2, LayerCentroids: 3}

COUNTS = 2  # of each of these policies
MOST_QUERY_HEADS = 24  # of a KV head, in a prompt: rows that C++ weighs at once
RMS_EPS = 1e-6  # of the root mean square in `LayerSoftCentroids`

# The weights of φ and of ψ, in C++'s order, by our names; "": there is none
NETWORK = ("w1", "b1", "w2", "w3", "b2", "s1", "s2")
NETWORKS = {
    LayerKernels: (
        ("query_in", "", "query_out", "", "", "", ""),
        ("key_in", "", "key_out", "key_mix", "", "key_scale", "mix_scale"),
    ),
    LayerSoftCentroids: (
        ("query_in", "query_in_bias", "query_out", "query_skip", "query_bias", "", ""),
        ("key_in", "key_in_bias", "key_out", "key_skip", "key_bias", "", ""),
    ),
}


class Network(ctypes.Structure):
    """As in `step.h`."""

    _fields_ = [(name, ctypes.c_void_p) for name in NETWORK]


class Step(ctypes.Structure):
    """As in `step.h`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("b", "g", "s", "n", "d", "w", "e", "r", "m", "threads")),
        *((name, ctypes.c_int64) for name in ("counts_of_row", "counts_of_head")),
        *((name, ctypes.c_int32) for name in ("dtype", "policy", "memory")),
        *((name, ctypes.c_float) for name in ("scaling", "softcap")),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "real", "sinks")),
        *((name, ctypes.c_void_p) for name in ("starts", "keys", "values", "positions", "scores", "bias")),
        *((name, ctypes.c_void_p) for name in ("seen", "settled", "counts")),
        *((name, ctypes.c_void_p) for name in ("values_sum", "features_sum", "keys_sum", "squares_sum")),
        ("query_network", Network),
        ("key_network", Network),
        *((name, ctypes.c_void_p) for name in ("fading", "limit", "output")),
    ]


class Attend(ctypes.Structure):
    """As in `attend.h`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("b", "g", "s", "n", "e", "d", "w", "r", "p", "threads")),
        *((name, ctypes.c_int32) for name in ("dtype", "newest_dtype", "bias_dtype", "format", "state")),
        *((name, ctypes.c_float) for name in ("scaling", "softcap")),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "sinks")),
        *((name, ctypes.c_void_p) for name in ("starts", "positions", "bias", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("key_scales", "value_scales", "levels")),
        *((name, ctypes.c_void_p) for name in ("centers", "first_keys", "first_values")),
        *((name, ctypes.c_void_p) for name in ("pairs", "angles", "gains")),
        *((name, ctypes.c_void_p) for name in ("newest_keys", "newest_values", "newest_positions")),
        *((name, ctypes.c_void_p) for name in ("newest_codes", "newest_scales", "query_levels")),
        *((name, ctypes.c_void_p) for name in ("real", "seen", "settled")),
        *((f"taken_{name}", ctypes.c_void_p) for name in ("keys", "values", "positions", "codes", "scales")),
        *((name, ctypes.c_void_p) for name in ("counts", "state_keys", "state_values", "spreads", "output")),
    ]


class States(ctypes.Structure):
    """As in `prompt.cpp`."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("row", "head", "token"))]

    @classmethod
    def of(cls, tensor: torch.Tensor | None) -> "States":
        """A tensor `[b, heads, n, d]` whose last dimension is dense."""
        return cls() if tensor is None else cls(tensor.data_ptr(), *tensor.stride()[:3])


class Prompt(ctypes.Structure):
    """As in `prompt.cpp`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("b", "g", "s", "n", "d", "start", "threads")),
        ("scaling", ctypes.c_float),
        ("padding", ctypes.POINTER(ctypes.c_int64)),
        *((name, States) for name in ("query", "key", "value", "output")),
        ("received", ctypes.c_void_p),
    ]


DEFINITIONS: dict[str, int | float] = {
    "DTYPE_FLOAT32": DTYPES[torch.float32],
    "DTYPE_BFLOAT16": DTYPES[torch.bfloat16],
    "DTYPE_FLOAT16": ATTENDED_DTYPES[torch.float16],
    "FORMAT_FLOAT": FORMATS[FloatSlots],
    "FORMAT_INT8": FORMATS[Int8Slots],
    "FORMAT_INT4": FORMATS[Int4Slots],
    "STATE_NONE": STATES["none"],
    "STATE_SUMS": STATES["sums"],
    "STATE_MEANS": STATES["means"],
    "STATE_LOGITS": STATES["logits"],
    "GROUP": GROUP,
    "POLICY_H2O": POLICIES[H2O],
    "POLICY_SINK_RECENT": POLICIES[SinkRecent],
    "POLICY_CORM": POLICIES[CORM],
    "MEMORY_NONE": MEMORIES[NoneType],
    "MEMORY_LOW_RANK": MEMORIES[LayerKernels],
    "MEMORY_SOFT_CENTROIDS": MEMORIES[LayerSoftCentroids],
    "MEMORY_CENTROIDS": MEMORIES[LayerCentroids],
    "MOST_QUERY_HEADS": MOST_QUERY_HEADS,
    "MOST_WEIGHT": MOST_WEIGHT,
    "RMS_EPS": RMS_EPS,
    "SPREAD": SPREAD,
    "MOST_SPREAD": MOST_SPREAD,
    "BYTES_OF_STEP": ctypes.sizeof(Step),
    "BYTES_OF_ATTEND": ctypes.sizeof(Attend),
    "BYTES_OF_PROMPT": ctypes.sizeof(Prompt),
}
