"""A decoding step of one layer in two Triton kernels (`programs.py`), where the step in PyTorch waits for its launches.

    attend: write the new token, attention over slots and virtual tokens, scores, the victim and its pair
    fold in: the victim's pair into the state

φ(q) before the first kernel and ψ(k) of the victim between the two are the memory's own PyTorch. Launches of a step with H2O,
counted as operations that are neither views nor empty tensors (`tests/test_fused.py` counts all):

    kernels              PyTorch    fused: Triton + PyTorch
    none                 38         1 + 1
    low rank             73         2 + 25
    trained centroids    94         2 + 45

`backends.torch.step` is the oracle, and takes every step that `can_step` refuses.

Axes: `b` rows, `h` query heads, `g` KV heads, `s` query heads per KV head, `c` slots of a head, `d` head dim, `w` width of
values, `r` virtual tokens.
"""

import warnings
from typing import Any

import torch
import triton

from less_cache.backends.triton import programs
from less_cache.memory.state import LowRankState
from less_cache.ops.call import AttentionCall
from less_cache.policies import H2O, EvictionPolicy, SinkRecent
from less_cache.slots import Held, Setup

POLICIES = (H2O, SinkRecent)  # what they count: (heavy, recent) and (sinks, recent)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE, WARPS = 4096, 8  # numbers of a block of keys or values, and the warps whose registers hold them for d up to 128

_failed = False


def can_step(setup: Setup, held: Held, call: AttentionCall) -> bool:
    """Whether `step` knows how to take the one token of `call` into `held`."""
    return (
        not _failed
        and type(setup.policy) in POLICIES
        and held.slots.coding.format.name == "float"
        and (held.state is None or isinstance(held.state, LowRankState))
        and call.softcap is None
        and call.sinks is None
        and all(states.dtype in DTYPES for states in (*held.slots.stored.values(), call.query_states))
    )


def step(setup: Setup, held: Held, call: AttentionCall) -> torch.Tensor | None:
    """One token a row: `[b, h, 1, w]`; None, and nothing done, where the kernel does not run here."""
    slots, rows = held.slots, held.rows
    query_states, key_states, value_states = (
        states.contiguous() for states in (call.query_states, call.key_states, call.value_states)
    )
    b, h, _, d = query_states.shape
    g, w = key_states.shape[1], value_states.shape[-1]
    c = slots.positions.shape[-1]  # where heads differ, N: no head has more
    logits, means, r = None, None, 0
    if held.state is not None:
        logits, means = setup.memory.virtual_tokens(held.state, query_states, call.scaling)
        logits, means, r = logits.contiguous(), means.contiguous(), means.shape[2]  # [b, g, s, 1, r], [b, g, r, w]
    real = None if call.real is None else call.real.contiguous()  # [b, 1]
    output = value_states.new_empty(b, h, 1, w)
    key, value = torch.empty_like(key_states), torch.empty_like(value_states)  # of the token that leaves
    left = slots.positions.new_empty(b, g, 1)  # its position, -1 where none does
    width = max(_block(d), _block(w))
    attended = _launched(
        programs.attend,
        (b * g,),
        query_states,
        key_states,
        value_states,
        slots.stored["keys"],
        slots.stored["values"],
        slots.positions,
        slots.scores,
        slots.bias,
        slots.starts,
        rows.seen,
        rows.counts,
        rows.settled,
        real,
        logits,
        means,
        output,
        key,
        value,
        left,
        call.scaling,
        c,
        rows.counts.stride(0),
        rows.counts.stride(1) if rows.counts.dim() == 3 else 0,
        G=g,
        S=h // g,
        D=d,
        W=w,
        R=r,
        OBSERVES=isinstance(setup.policy, H2O),
        PADS=real is not None,
        RAGGED=slots.starts is not None,
        HAS_BIAS=slots.bias is not None,
        S_BLOCK=triton.next_power_of_2(h // g),
        C_BLOCK=max(16, min(64, _block(c), TILE // width)),
        D_BLOCK=_block(d),
        W_BLOCK=_block(w),
        R_BLOCK=_block(r),
        num_warps=WARPS,
    )
    if not attended:
        return None
    arrived = 1 if real is None else real.squeeze(-1)
    rows.seen += arrived
    if held.state is not None:
        memory: Any = setup.memory  # a trained one: `can_step` has looked
        weights = memory.pair_weights(key, left >= 0, left, rows.seen.view(-1, 1, 1))  # [b, g, 1, r]
        fold_in(held.state, weights, memory.remembered(key, value), memory.share_left(arrived))
    return output


def can_attend(setup: Setup, held: Held, call: AttentionCall) -> bool:
    """Policies that choose in blocks are PyTorch's."""
    return False


def attend(setup, held, call):
    """Never asked for."""
    raise NotImplementedError


def can_read(policy: EvictionPolicy, call: AttentionCall) -> bool:
    """A prompt is PyTorch's."""
    return False


def read_prompt(policy, call, scores, positions, start, attends):
    """Never asked for."""
    raise NotImplementedError


def fold_in(state: LowRankState, weights: torch.Tensor, remembered: torch.Tensor, factors: torch.Tensor | None = None) -> None:
    """Fold one pair a KV head into the state, in place:

        H ← γ H + ωᵀ v        z ← γ z + ωᵀ

    Args:
        weights: ω, what the pair weighs in each row of the state, 0 where none leaves: `[b, g, 1, r]`.
        remembered: v, what the state sums: `[b, g, 1, *]`.
        factors: γ, what stays of the old sums: `[g, r]` or `[b, g, r]`; None: all.
    """
    b, g, r, w = state.values_sum.shape
    if factors is not None:
        factors = factors.expand(b, g, r)
    folded = not _failed and _launched(
        programs.fold_in,
        (b * g,),
        state.values_sum,
        state.features_sum,
        weights.contiguous(),
        remembered.contiguous(),
        factors,
        *(factors.stride() if factors is not None else (0, 0, 0)),
        G=g,
        R=r,
        W=w,
        FADES=factors is not None,
        R_BLOCK=triton.next_power_of_2(r),
        W_BLOCK=triton.next_power_of_2(w),
    )
    if folded:
        return
    if factors is not None:
        state.values_sum *= factors.unsqueeze(-1)
        state.features_sum *= factors
    state.fold_in(weights, remembered)


def _launched(kernel: Any, grid: tuple[int], *arguments, **sizes) -> bool:
    """Run a kernel; False, for good and with one warning, where it cannot be compiled or started."""
    global _failed
    try:
        with torch.cuda.device_of(arguments[0]):  # not always the current one: a model may lie on several
            kernel[grid](*arguments, **sizes)
    except Exception as error:  # whatever triton, its compiler or the driver raise
        _failed = True
        warnings.warn(
            f"less_cache: the fused step does not run here ({type(error).__name__}: {error}). "
            "PyTorch does it, with the same result and more launches.",
            RuntimeWarning,
            stacklevel=2,
        )
    return not _failed


def _block(size: int) -> int:
    """The power of two that holds `size`, as wide as a product needs."""
    return max(16, triton.next_power_of_2(size))
