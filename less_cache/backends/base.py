"""What a backend is: a module or object that does, for one kind of device, what `backends.torch` does for all.

Axes: `b` rows, `h` query heads, `g` KV heads, `n` tokens, `w` width of values.
"""

from typing import Protocol

import torch

from less_cache.ops.call import AttentionCall
from less_cache.policies import EvictionPolicy
from less_cache.slots import Held, Setup


class Backend(Protocol):
    """The work of a layer where it pays to have it done by one kernel. `backends.torch` is the oracle: the same, in PyTorch.

    A backend gets all that it works on as arguments and keeps nothing. What it does not know it refuses, and PyTorch takes it.
    """

    def can_step(self, setup: Setup, held: Held, call: AttentionCall) -> bool:
        """Whether `step` knows how to take the one token of `call`."""

    def step(self, setup: Setup, held: Held, call: AttentionCall) -> torch.Tensor | None:
        """Take one token a row into `held`, in place: its output `[b, h, 1, w]`; None where it cannot, with nothing done."""

    def can_attend(self, setup: Setup, held: Held, call: AttentionCall) -> bool:
        """Whether `attend` knows how to attend with the one token of `call`."""

    def attend(self, setup: Setup, held: Held, call: AttentionCall, takes: bool) -> torch.Tensor | None:
        """Attention of one token a row to what is held and itself, under a policy that chooses in blocks: `[b, h, 1, w]`; None
        where it cannot, with nothing done. `takes`: the token is counted, and goes to the newest ones.
        """

    def can_read(self, policy: EvictionPolicy, call: AttentionCall) -> bool:
        """Whether `read_prompt` knows how to read the prompt of `call`."""

    def read_prompt(
        self,
        policy: EvictionPolicy,
        call: AttentionCall,
        scores: torch.Tensor,
        positions: torch.Tensor,
        start: int,
        attends: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The policy's scores `[b, g, n]` of a prompt after its queries from `start` on, and with `attends` their output
        `[b, h, n, w]`; as `ops.prompt.read_prompt`.
        """
