"""What a layer is made of."""

import dataclasses
from typing import Any

import torch

from less_cache.errors import LESSError
from less_cache.memory import LayerMemory
from less_cache.policies import EvictionPolicy
from less_cache.slots.coding import Coding
from less_cache.slots.formats import SlotFormat


@dataclasses.dataclass(frozen=True)
class Setup:
    """What decides how a layer keeps its tokens; nothing in it changes with the text.

    Args:
        policy: Which tokens stay.
        memory: What the others are folded into; None: they are lost.
        format: How keys and values are stored.
        shares: How much of the policy's budget each KV head gets, `[g]`, 1 on average; None: the same for all.
        grows: Whether slots come with the text; else all at once, so that shapes never change.
        fit: Whether what is kept at a prompt's end is fitted to the attention of reference queries.
        rotation: How a query is turned to a later position; None: not known.
    """

    policy: EvictionPolicy
    memory: LayerMemory | None
    format: SlotFormat
    shares: torch.Tensor | None = None
    grows: bool = True
    fit: bool = False
    rotation: Any = None

    def coding(self, centers: torch.Tensor | None) -> Coding:
        """How keys and values are stored, less these mean keys."""
        turns_keys = not self.format.is_exact and self.rotation is not None and self.rotation.turns_keys
        return Coding(self.format, centers, self.rotation if turns_keys else None)

    @property
    def packs(self) -> bool:
        """Whether the state lies packed from choice to choice, as it does beside quantised slots."""
        return self.memory is not None and self.policy.block_size is not None and not self.format.is_exact

    def unpacked(self, state: Any) -> Any:
        """The state to read and to change, whether it lies packed or not; None without a memory."""
        return self.memory.unpacked(state) if self.packs else state

    def packed(self, state: Any) -> Any:
        """The state as it lies."""
        return self.memory.packed(state) if self.packs else state

    def on(self, device: torch.device, num_key_value_heads: int) -> "Setup":
        """This for the KV heads that this process has, on `device`: the user's kernels stay where they are."""
        memory = None if self.memory is None else self.memory.for_heads(num_key_value_heads).on(device)
        shares = None if self.shares is None else self._part_of_shares(num_key_value_heads).to(device)
        rotation = None if self.rotation is None else self.rotation.to(device)
        return dataclasses.replace(self, memory=memory, shares=shares, rotation=rotation)

    def _part_of_shares(self, num_key_value_heads: int) -> torch.Tensor:
        """Those of the heads that this process has: under tensor parallelism an equal part of them, in order."""
        assert self.shares is not None, "there are some"
        parts, rest = divmod(len(self.shares), num_key_value_heads)
        if rest or (parts != 1 and not torch.distributed.is_initialized()):
            raise LESSError(
                f"Expected shares of the budget for {num_key_value_heads} KV heads, as the model's attention has, got "
                f"{len(self.shares)}. Pass heads= for this model."
            )
        return self.shares if parts == 1 else self.shares.chunk(parts)[torch.distributed.get_rank() % parts]
