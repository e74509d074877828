"""A layer of fixed shapes and addresses, for `torch.compile` and CUDA graphs."""

import copy
from typing import Any

import torch
from torch._dynamo import mark_static_address

from less_cache.cache.layer import LESSLayer
from less_cache.errors import LESSError
from less_cache.ops.call import AttentionCall
from less_cache.policies import EvictionPolicy
from less_cache.slots import Held


class StaticLESSLayer(LESSLayer):
    """A `LESSLayer` whose step is one graph, the same for every token: fixed shapes, fixed addresses, no wait for the device.

    A step works in place in any layer. Here what brings new tensors, a block or a change of rows, is copied into the
    buffers that are there; `reset` keeps them. The number of tokens seen is a tensor. Blocks are never compiled, even where
    the model around them is.

    The shapes are those that the first prompt gives: budgets in tokens never change them, a fraction of the prompt does
    with the next prompt after a `reset`, and so does another batch size. Then new buffers come, and a step is compiled anew.
    """

    is_compileable = True
    is_croppable = False

    grows = False

    def __init__(self, policy: EvictionPolicy, *args: Any, **kwargs: Any):
        counts = policy.resolve(torch.ones(1, dtype=torch.long))  # [1, f]
        if policy.capacity(counts.T[:, :, None, None]) is None:
            raise LESSError(
                f"Expected a policy with a budget for static=True, got {policy!r}: without one, the number of tokens that it "
                "keeps is not fixed. Use a policy such as H2O, or static=False."
            )
        self._buffers: dict[str, torch.Tensor] = {}  # by the names of `tensors`
        with torch.inference_mode(False):
            self.cumulative_length = torch.zeros((), dtype=torch.long)
        super().__init__(policy, *args, **kwargs)

    def reset(self) -> None:
        length = self.cumulative_length
        super().reset()
        self.cumulative_length = length.zero_()

    def _begin(self, b: int, g: int, width: int, dtype: torch.dtype, value_dtype: torch.dtype, device: torch.device) -> None:
        super()._begin(b, g, width, dtype, value_dtype, device)
        self.cumulative_length = _in_place(self.cumulative_length.to(device))

    @torch.compiler.disable
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens seen, as a tensor; the number 0 before the first one, as in transformers' static layers."""
        return self.cumulative_length if self.is_initialized else 0

    def checks(self, num_tokens: int) -> bool:
        """Blocks alone, uncompiled: a step does not look at what the device holds."""
        return self.leads and num_tokens > 1 and not torch.compiler.is_compiling()

    @torch.compiler.disable
    def _block(self, call: AttentionCall) -> torch.Tensor | None:
        return super()._block(call)

    def _hold(self, held: Held) -> None:
        super()._hold(held.map(self._kept_in_place))

    def _kept_in_place(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The buffer of this name with what `tensor` holds; a new one for other shapes."""
        buffer = self._buffers.get(name)
        if buffer is None or any(getattr(buffer, a) != getattr(tensor, a) for a in ("shape", "dtype", "device")):
            self._buffers[name] = _in_place(tensor)
        elif buffer is not tensor:
            buffer.copy_(tensor)
        return self._buffers[name]

    def allocated(self) -> dict[str, torch.Tensor]:
        return self._buffers

    @torch.inference_mode(False)
    def fork(self) -> "StaticLESSLayer":
        other = copy.copy(self)
        other.owner = self.owner
        other._buffers = {}
        other.cumulative_length = _in_place(self.cumulative_length.clone())
        other.map(torch.clone)
        return other

    def activate_past_recording(self) -> None:
        raise self._cannot_crop()

    def check_crop(self, tokens_to_remove: int) -> None:
        raise self._cannot_crop()

    def _cannot_crop(self) -> LESSError:
        return LESSError(
            f"Layer {self.layer_idx}: a cache with static=True cannot give tokens back, which assisted and prompt-lookup "
            "decoding need. Use static=False."
        )


def _in_place(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, marked as one that stays where it is: CUDA graphs then read it there, and need no copy of it."""
    mark_static_address(tensor)
    return tensor
