"""Attention to what a policy that chooses in blocks holds, on a processor, in C++: `attend.cpp`, which reads codes as they lie.

`backends.blocks` is the oracle, and does what `can_attend` refuses. The rules of `slots.formats`, `slots.coding`,
`Rotation.turn` and `LayerCentroids.virtual_tokens` stand in C++ a second time.

Axes: `b` rows, `h` query heads, `g` KV heads, `N` slots of all heads, `e` newest tokens, `d` head dim, `w` width of values,
`r` virtual tokens.
"""

import ctypes
from typing import Any

import torch

from less_cache.backends.cpu import build
from less_cache.backends.cpu.bridge import Expected, address, dense, fit
from less_cache.backends.cpu.layout import ATTENDED_DTYPES, FORMATS, STATES, Attend
from less_cache.backends.reading import virtual_tokens
from less_cache.memory import LayerCentroids
from less_cache.memory.centroids import PackedCentroids
from less_cache.ops.call import AttentionCall
from less_cache.slots import Coding, Held, Setup
from less_cache.slots.formats import GROUP, FloatSlots, Int4Slots, QuantizedSlots, QueryCodes


def can_attend(setup: Setup, held: Held, call: AttentionCall) -> bool:
    """Whether `attend` knows how to attend with the one token of `call`. Anything odd is left to PyTorch."""
    (b, h, n, d), (_, g, _, w) = call.query_states.shape, call.value_states.shape
    dtype, slots, newest = call.value_states.dtype, held.slots, held.newest
    if n != 1 or g == 0 or h % g or dtype not in ATTENDED_DTYPES or type(slots.coding.format) not in FORMATS:
        return False
    if type(slots.coding.format) is not FloatSlots and (d % 8 or w % 2):  # C++ reads codes by fours
        return False
    where = tuple(slots.positions.shape)  # [b, g, c], or [N]
    if where[:-1] != ((b, g) if slots.starts is None else ()) or newest.keys.dtype not in ATTENDED_DTYPES:
        return False
    expected: list[Expected] = [
        (call.query_states, dtype, (b, h, 1, d)),
        (call.key_states, dtype, (b, g, 1, d)),
        (call.value_states, dtype, (b, g, 1, w)),
        (newest.keys, newest.keys.dtype, (b, g, newest.count, d)),
        (newest.values, newest.keys.dtype, (b, g, newest.count, w)),
        (newest.query_codes, torch.uint8, (b, h, newest.count, -(-d // 4))),
        (newest.query_scales, torch.float16, (b, h, newest.count, 1)),
    ]
    if call.real is not None:
        expected.append((call.real, torch.bool, (b, 1)))
    if call.sinks is not None:
        expected.append((call.sinks, call.sinks.dtype, (h,)))
    of_slots: list[Expected] = [
        (slots.positions, torch.int32, where),
        (newest.positions, torch.int32, (b, newest.count)),
        (held.rows.seen, torch.int64, (b,)),
        (held.rows.settled, torch.bool, (b,)),
    ]
    if slots.bias is not None:
        is_half = slots.bias.dtype == torch.float16
        of_slots.append((slots.bias, torch.float16 if is_half else torch.float32, where))
    if slots.starts is not None:
        of_slots.append((slots.starts, torch.int64, (b * g + 1,)))
    return (
        fit(expected)
        and fit(of_slots, dense=True)
        and fit(_expected_of_stored(slots.stored, slots.coding, dtype, where, b, g, d, w), dense=True)
        and fit(_expected_of_centroids(setup.memory, held.state, b, g, d, w), dense=True)
        and build.library() is not None
    )


def _expected_of_stored(
    stored: dict[str, torch.Tensor], coding: Coding, dtype: torch.dtype, where: tuple[int, ...], b: int, g: int, d: int, w: int
) -> list[Expected] | None:
    if type(coding.format) is FloatSlots:
        return [(stored["keys"], dtype, (*where, d)), (stored["values"], dtype, (*where, w))]
    if coding.rotation is not None and (coding.rotation.pairs is None or len(coding.rotation.angles) != d):
        return None
    expected: list[Expected] = []
    for of, size in (("keys", d), ("values", w)):
        in_bytes = size // 2 if type(coding.format) is Int4Slots else size
        expected.append((stored[f"{of}_codes"], torch.uint8, (*where, in_bytes)))
        expected.append((stored[f"{of}_scales"], torch.float16, (*where, -(-size // GROUP))))
    if coding.centers is not None:
        expected.append((coding.centers, torch.float16, (b, g, 1, d)))
    if (coding.first_keys is None) != (coding.first_values is None):
        return None
    if coding.first_keys is not None and coding.first_values is not None:
        expected.append((coding.first_keys, torch.float16, (b, g, 1, d)))
        expected.append((coding.first_values, torch.float16, (b, g, 1, w)))
    return expected


def _expected_of_centroids(memory: Any, state: Any, b: int, g: int, d: int, w: int) -> list[Expected]:
    """Of untrained centroids; PyTorch computes what other memories say."""
    if type(memory) is not LayerCentroids:
        return []
    r, is_packed = memory.num_centroids, isinstance(state, PackedCentroids)
    keys, values = (state.mean_keys, state.mean_values) if is_packed else (state.keys_sum, state.values_sum)
    dtype = torch.float16 if is_packed else torch.float32
    return [
        (state.count, torch.float32, (b, g, r)),
        (keys, dtype, (b, g, r, d)),
        (values, dtype, (b, g, r, w)),
        (state.variance if is_packed else state.squares_sum, torch.float32, (b, g, r)),
    ]


def attend(setup: Setup, held: Held, call: AttentionCall, takes: bool) -> torch.Tensor | None:
    """Attention of one token a row, where `can_attend` said yes: `[b, h, 1, w]`; None where the slots of heads do not lie one
    after the other, and nothing was done. `takes`: the token is counted, and goes to the newest ones.
    """
    library = build.library()
    assert library is not None, "`can_attend` says whether it is there"
    slots, newest, coding = held.slots, held.newest, held.slots.coding
    (b, h, _, d), (_, g, _, w) = call.query_states.shape, call.value_states.shape
    query_states, key_states, value_states, real, sinks = dense(call)
    newest = newest.map(lambda name, tensor: tensor.contiguous())
    output = value_states.new_empty(b, h, 1, w)
    arguments = Attend(
        b=b,
        g=g,
        s=h // g,
        n=slots.positions.numel(),
        e=newest.count,
        d=d,
        w=w,
        threads=torch.get_num_threads(),
        dtype=ATTENDED_DTYPES[value_states.dtype],
        newest_dtype=ATTENDED_DTYPES[newest.keys.dtype],
        bias_dtype=ATTENDED_DTYPES[torch.float32 if slots.bias is None else slots.bias.dtype],
        format=FORMATS[type(coding.format)],
        scaling=call.scaling,
        softcap=call.softcap or 0.0,
        query=query_states.data_ptr(),
        key=key_states.data_ptr(),
        value=value_states.data_ptr(),
        sinks=address(sinks),
        starts=address(slots.starts),
        positions=slots.positions.data_ptr(),
        bias=address(slots.bias),
        newest_keys=newest.keys.data_ptr(),
        newest_values=newest.values.data_ptr(),
        newest_positions=newest.positions.data_ptr(),
        newest_codes=newest.query_codes.data_ptr(),
        newest_scales=newest.query_scales.data_ptr(),
        query_levels=QueryCodes.levels.data_ptr(),
        real=address(real),
        seen=held.rows.seen.data_ptr(),
        settled=held.rows.settled.data_ptr(),
        output=output.data_ptr(),
    )
    if type(coding.format) is FloatSlots:
        arguments.keys, arguments.values = slots.stored["keys"].data_ptr(), slots.stored["values"].data_ptr()
    else:
        _hand_over_codes(arguments, slots.stored, coding)
    if type(setup.memory) is LayerCentroids:
        _hand_over_centroids(arguments, held.state)
    elif setup.memory is not None:
        later = (newest.positions >= 0).sum(-1, keepdim=True)  # than what the state knows of, [b, 1]
        virtual = virtual_tokens(setup, held, call.query_states, call, later if call.real is None else later * call.real)
        assert virtual is not None, "there is a memory"
        logits, values = (each.contiguous() for each in virtual)  # [b, g, s, 1, r], [b, g, r, w]
        arguments.state, arguments.r = STATES["logits"], logits.shape[-1]
        arguments.counts, arguments.state_values = logits.data_ptr(), values.data_ptr()
    taken = None
    if takes:
        taken = newest.longer()
        arguments.taken_keys, arguments.taken_values = taken.keys.data_ptr(), taken.values.data_ptr()
        arguments.taken_positions = taken.positions.data_ptr()
        arguments.taken_codes, arguments.taken_scales = taken.query_codes.data_ptr(), taken.query_scales.data_ptr()
    if not library.less_attend(ctypes.byref(arguments)):
        return None
    if taken is not None:
        held.newest = taken
    return output


def _hand_over_codes(arguments: Attend, stored: dict[str, torch.Tensor], coding: Coding) -> None:
    arguments.keys, arguments.key_scales = stored["keys_codes"].data_ptr(), stored["keys_scales"].data_ptr()
    arguments.values, arguments.value_scales = stored["values_codes"].data_ptr(), stored["values_scales"].data_ptr()
    assert isinstance(coding.format, QuantizedSlots), "`can_attend` knows no other format with codes"
    arguments.levels = coding.format.levels.data_ptr()
    arguments.centers = address(coding.centers)
    arguments.first_keys, arguments.first_values = address(coding.first_keys), address(coding.first_values)
    if coding.rotation is not None:
        pairs, angles, gains = coding.rotation.pairs
        arguments.p, arguments.pairs = len(angles), pairs.data_ptr()
        arguments.angles, arguments.gains = angles.data_ptr(), gains.data_ptr()


def _hand_over_centroids(arguments: Attend, state: Any) -> None:
    is_packed = isinstance(state, PackedCentroids)
    keys, values = (state.mean_keys, state.mean_values) if is_packed else (state.keys_sum, state.values_sum)
    arguments.state, arguments.r = STATES["means" if is_packed else "sums"], keys.shape[2]
    arguments.counts, arguments.state_keys, arguments.state_values = state.count.data_ptr(), keys.data_ptr(), values.data_ptr()
    arguments.spreads = (state.variance if is_packed else state.squares_sum).data_ptr()
