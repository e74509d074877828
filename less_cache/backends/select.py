"""Which backend does the work of a layer: the one of its device, or PyTorch.

The environment variable LESS_CACHE_NATIVE=0 turns the C++ backend off: nothing is compiled and nothing loaded.
"""

import functools
import importlib
import os
from typing import Any

import torch

from less_cache.backends import blocks
from less_cache.backends import torch as in_pytorch
from less_cache.backends.base import Backend
from less_cache.backends.choice import Draft
from less_cache.ops.call import AttentionCall
from less_cache.ops.prompt import read_prompt
from less_cache.policies import EvictionPolicy
from less_cache.slots import Held, Setup

# The module of the backend, by type of device. Triton's, `less_cache.backends.triton`, waits for a GPU to run it.
BACKENDS = {} if os.environ.get("LESS_CACHE_NATIVE") == "0" else {"cpu": "less_cache.backends.cpu"}


def take_step(setup: Setup, held: Held, call: AttentionCall, tokens: int) -> torch.Tensor:
    """Take one token a row into `held`, after the `tokens` that were seen: its output, `[b, h, 1, w]`."""
    held.make_room(setup.policy, tokens)
    backend = backend_of(call.query_states.device)
    if backend is not None and backend.can_step(setup, held, call):
        output = backend.step(setup, held, call)
        if output is not None:
            return output
    return in_pytorch.step(setup, held, call)


def take_block(setup: Setup, held: Held, call: AttentionCall, tokens: int) -> tuple[torch.Tensor | None, Draft | None]:
    """Take several tokens, or the first, or any under a policy that chooses in blocks, after the `tokens` that were seen.

    Returns their output, `[b, h, n, w]`, None for a first block whose output the model's own attention gives; and what there is
    to choose from, None where it is not yet time.
    """
    after = tokens + call.num_tokens  # may be a tensor, which stays as it is
    if setup.policy.block_size is not None:
        return (
            (None, blocks.read_first(setup, held, call, after))
            if held.slots is None
            else blocks.read_next(setup, held, call, tokens, backend_of(call.query_states.device))
        )
    if held.slots is not None:
        return in_pytorch.read_next(setup, held, call, after)
    return in_pytorch.read_first(setup, held, call, after, attends_prompt(setup.policy, call), read_first_block)


def attends_prompt(policy: EvictionPolicy, call: AttentionCall) -> bool:
    """Whether the first block's output comes with the weights that the policy asks for. Elsewhere than in float32 on a
    processor, the model's own attention is so much faster that it is called as well.
    """
    n, states = call.num_tokens, call.query_states
    if states.device.type != "cpu" or states.dtype != torch.float32:
        return False
    counts = policy.resolve(torch.tensor([n], device=states.device))  # [1, f]
    return policy.observed(counts.T[:, :, None, None], n) == n and call.padding is not None


def read_first_block(
    policy: EvictionPolicy, call: AttentionCall, scores: torch.Tensor, positions: torch.Tensor, start: int, attends: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`ops.prompt.read_prompt`, by the backend of the device where it knows how."""
    backend = backend_of(call.query_states.device)
    if backend is not None and backend.can_read(policy, call):
        return backend.read_prompt(policy, call, scores, positions, start, attends)
    return read_prompt(policy, call, scores, positions, start, attends)


def backend_of(device: torch.device) -> Backend | None:
    """The backend of this device, or None. torch.compile fuses a step in its own way."""
    if torch.compiler.is_compiling() or device.type not in BACKENDS:
        return None
    return _module(BACKENDS[device.type])


@functools.cache
def _module(name: str) -> Any:
    """The module of this name, imported at its first use; None where what it needs is not installed, as triton."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
