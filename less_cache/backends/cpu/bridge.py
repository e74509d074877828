"""What a layer does on a processor, in C++: a decoding step in one call, and a prompt's attention together with its scores.

`step.cpp` takes a whole step, for which PyTorch needs 60 to 200 small operations: the new token, attention over slots and
virtual tokens, scores, who leaves, φ, ψ and the state. `prompt.cpp` gives the output of attention to a prompt and the attention
that each token got, in about the time of torch's attention alone. The C++ compiler of the machine builds all of it once, in
less than a minute (`build.py`); where there is none, PyTorch does it all.

`backends.torch.step` and `ops.prompt.read_prompt` are the oracles, and do what `can_step` and `can_read` refuse. Their rules
stand in C++ a second time: those of `ops.attention.less_attention`, of the policies in `layout.POLICIES`, and φ, ψ and the
state of the memories in `layout.MEMORIES`.

Axes: `b` rows, `h` query heads, `g` KV heads, `n` tokens, `c` slots of a KV head, `N` slots of all heads, `d` head dim,
`w` width of values, `r` virtual tokens.
"""

import ctypes
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from less_cache.backends.cpu import build
from less_cache.backends.cpu.layout import (
    COUNTS,
    DTYPES,
    MEMORIES,
    MOST_QUERY_HEADS,
    NETWORKS,
    POLICIES,
    Network,
    Prompt,
    States,
    Step,
)
from less_cache.memory import LayerCentroids, LayerMemory, TrainedMemory
from less_cache.ops.call import AttentionCall
from less_cache.policies import CORM, H2O, EvictionPolicy
from less_cache.slots import Held, Setup
from less_cache.slots.formats import FloatSlots

Expected = tuple[torch.Tensor, torch.dtype, tuple[int, ...]]


def can_step(setup: Setup, held: Held, call: AttentionCall) -> bool:
    """Whether `step` knows how to take the one token of `call` into `held`. Anything odd is left to PyTorch, which says what is
    wrong with it: C++ reads and writes every tensor as what it should be.
    """
    memory, slots = setup.memory, held.slots
    if type(setup.policy) not in POLICIES or type(memory) not in MEMORIES or type(slots.coding.format) is not FloatSlots:
        return False
    if isinstance(memory, LayerCentroids) and isinstance(setup.policy, CORM):
        return False  # several tokens that leave in one step are clustered together
    (b, h, n, d), (_, g, _, w) = call.query_states.shape, call.value_states.shape
    if n != 1 or g == 0 or h % g or call.value_states.dtype not in DTYPES or held.rows.counts is None:
        return False
    if isinstance(memory, TrainedMemory) and memory.sizes[:3] != (h, g, d):
        return False
    return (
        fit(_expected_of_call(call, b, h, g, d, w))
        and fit(_expected_of_held(held, call.value_states.dtype, b, g, d, w), dense=True)
        and fit(_expected_of_state(memory, held.state, b, g, d, w), dense=True)
        and fit(_expected_of_weights(memory), dense=True)
        and build.library() is not None
    )


def fit(expected: Iterable[Expected] | None, dense: bool = False) -> bool:
    """Whether tensors on the processor are as expected, and `dense`: without gaps, in the order of their dimensions."""
    if expected is None:
        return False
    for tensor, dtype, shape in expected:
        if tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_cpu or (dense and not tensor.is_contiguous()):
            return False
    return True


def _expected_of_call(call: AttentionCall, b: int, h: int, g: int, d: int, w: int) -> list[Expected]:
    dtype = call.value_states.dtype
    expected: list[Expected] = [
        (call.query_states, dtype, (b, h, 1, d)),
        (call.key_states, dtype, (b, g, 1, d)),
        (call.value_states, dtype, (b, g, 1, w)),
    ]
    if call.real is not None:
        expected.append((call.real, torch.bool, (b, 1)))
    if call.sinks is not None:
        expected.append((call.sinks, call.sinks.dtype, (h,)))  # of any type: `step` makes floats of them
    return expected


def _expected_of_held(held: Held, dtype: torch.dtype, b: int, g: int, d: int, w: int) -> list[Expected] | None:
    slots, rows = held.slots, held.rows
    where = tuple(slots.positions.shape)  # [b, g, c], or [N]
    if where[:-1] != ((b, g) if slots.starts is None else ()):
        return None
    expected: list[Expected] = [
        (slots.stored["keys"], dtype, (*where, d)),
        (slots.stored["values"], dtype, (*where, w)),
        (slots.positions, torch.int32, where),
        (slots.scores, torch.float32, where),
        (rows.seen, torch.int64, (b,)),
        (rows.settled, torch.bool, (b,)),
        (rows.counts, torch.int64, (b, COUNTS) if rows.counts.dim() == 2 else (b, g, COUNTS)),
    ]
    if slots.bias is not None:
        expected.append((slots.bias, torch.float32, where))
    if slots.starts is not None:
        expected.append((slots.starts, torch.int64, (b * g + 1,)))
    return expected


def _expected_of_state(memory: LayerMemory | None, state: Any, b: int, g: int, d: int, w: int) -> list[Expected]:
    floats = torch.float32
    if isinstance(memory, TrainedMemory):
        r = memory.num_virtual_tokens
        return [(state.features_sum, floats, (b, g, r)), (state.values_sum, floats, (b, g, r, w + memory.extra_dims))]
    if isinstance(memory, LayerCentroids):
        r = memory.num_centroids
        return [
            (state.count, floats, (b, g, r)),
            (state.squares_sum, floats, (b, g, r)),
            (state.keys_sum, floats, (b, g, r, d)),
            (state.values_sum, floats, (b, g, r, w)),
        ]
    return []


def _expected_of_weights(memory: LayerMemory | None) -> list[Expected] | None:
    if not isinstance(memory, TrainedMemory):
        return []
    weights, shapes = memory.weights, _shapes(type(memory), memory.sizes)
    if weights.keys() != shapes.keys():
        return None
    return [(weights[name], torch.float32, shape) for name, shape in shapes.items()]


@functools.cache
def _shapes(memory: type[TrainedMemory], sizes: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
    return memory.shapes(*sizes)


def step(setup: Setup, held: Held, call: AttentionCall) -> torch.Tensor | None:
    """Take one token a row into `held`, where `can_step` said yes: its output, `[b, h, 1, w]`; None where the slots of heads do
    not lie one after the other, and nothing was done.
    """
    library = build.library()
    assert library is not None, "`can_step` says whether it is there"
    memory, slots, rows, counts = setup.memory, held.slots, held.rows, held.rows.counts
    (b, h, _, d), (_, g, _, w) = call.query_states.shape, call.value_states.shape
    query_states, key_states, value_states, real, sinks = dense(call)
    output = value_states.new_empty(b, h, 1, w)
    arguments = Step(
        b=b,
        g=g,
        s=h // g,
        n=slots.positions.numel(),
        d=d,
        w=w,
        threads=torch.get_num_threads(),
        counts_of_row=counts.stride(0),
        counts_of_head=0 if counts.dim() == 2 else counts.stride(1),
        dtype=DTYPES[value_states.dtype],
        policy=POLICIES[type(setup.policy)],
        memory=MEMORIES[type(memory)],
        scaling=call.scaling,
        softcap=call.softcap or 0.0,
        query=query_states.data_ptr(),
        key=key_states.data_ptr(),
        value=value_states.data_ptr(),
        real=address(real),
        sinks=address(sinks),
        starts=address(slots.starts),
        keys=slots.stored["keys"].data_ptr(),
        values=slots.stored["values"].data_ptr(),
        positions=slots.positions.data_ptr(),
        scores=slots.scores.data_ptr(),
        bias=address(slots.bias),
        seen=rows.seen.data_ptr(),
        settled=rows.settled.data_ptr(),
        counts=counts.data_ptr(),
        output=output.data_ptr(),
    )
    if isinstance(memory, TrainedMemory):
        _hand_over_trained(arguments, memory, held.state)
    elif isinstance(memory, LayerCentroids):
        _hand_over_centroids(arguments, held.state)
    return output if library.less_step(ctypes.byref(arguments)) else None


def dense(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Queries, keys, values, which are real and sinks in float32, as C++ reads them: without gaps."""
    return (
        call.query_states.contiguous(),
        call.key_states.contiguous(),
        call.value_states.contiguous(),
        None if call.real is None else call.real.contiguous(),
        None if call.sinks is None else call.sinks.detach().float().contiguous(),
    )


def _hand_over_trained(arguments: Step, memory: TrainedMemory, state: Any) -> None:
    addresses = {name: weight.data_ptr() for name, weight in memory.weights.items()}
    query, key = NETWORKS[type(memory)]
    arguments.m = memory.sizes[3]
    arguments.r, arguments.e = state.values_sum.shape[2:]
    arguments.values_sum, arguments.features_sum = state.values_sum.data_ptr(), state.features_sum.data_ptr()
    arguments.query_network = Network(*[addresses.get(name) for name in query])
    arguments.key_network = Network(*[addresses.get(name) for name in key])
    arguments.fading, arguments.limit = addresses.get("fading"), addresses.get("limit")


def _hand_over_centroids(arguments: Step, state: Any) -> None:
    arguments.r, arguments.e = state.values_sum.shape[2:]
    arguments.values_sum, arguments.features_sum = state.values_sum.data_ptr(), state.count.data_ptr()
    arguments.keys_sum, arguments.squares_sum = state.keys_sum.data_ptr(), state.squares_sum.data_ptr()


def _rows_dense(states: torch.Tensor) -> torch.Tensor:
    """The same, its last dimension without gaps."""
    return states if states.stride(-1) == 1 else states.contiguous()


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def can_read(policy: EvictionPolicy, call: AttentionCall) -> bool:
    """Whether `read_prompt` knows how to read the prompt of `call`."""
    states = call.query_states, call.key_states, call.value_states
    (b, h, n, d), g = call.query_states.shape, call.key_states.shape[1]
    return (
        type(policy) is H2O
        and call.key_states.shape == call.value_states.shape == (b, g, n, d)
        and d % 64 == 0
        and h % g == 0
        and h // g <= MOST_QUERY_HEADS
        and call.softcap is None
        and call.sinks is None
        and call.padding is not None
        and all(each.is_cpu and each.is_floating_point() for each in states)
        and build.library() is not None
    )


def read_prompt(
    policy: EvictionPolicy,
    call: AttentionCall,
    scores: torch.Tensor,
    positions: torch.Tensor,
    start: int,
    attends: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `ops.prompt.read_prompt` does for H2O: scores `[b, g, n]` and output `[b, h, n, d]`, dense as `[b, n, h, d]`."""
    library = build.library()
    assert library is not None and call.padding is not None, "`can_read` says whether it is there"
    query_states, key_states, value_states = (
        _rows_dense(states.float()) for states in (call.query_states, call.key_states, call.value_states)
    )
    (b, h, n, d), g = query_states.shape, key_states.shape[1]
    scores = scores.float().clone(memory_format=torch.contiguous_format)
    output = None
    if attends:
        output = (query_states.new_zeros if any(call.padding) else query_states.new_empty)(b, n, h, d).transpose(1, 2)
    arguments = Prompt(
        b=b,
        g=g,
        s=h // g,
        n=n,
        d=d,
        start=start,
        threads=torch.get_num_threads(),
        scaling=call.scaling,
        padding=(ctypes.c_int64 * b)(*call.padding),
        query=States.of(query_states),
        key=States.of(key_states),
        value=States.of(value_states if attends else None),
        output=States.of(output),
        received=scores.data_ptr(),
    )
    library.less_read_prompt(ctypes.byref(arguments))
    return scores, None if output is None else output.to(call.value_states.dtype)
