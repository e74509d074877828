"""Several processes of one training run, started by `accelerate launch` or `torchrun`; or just one."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather

T = TypeVar("T")


class Processes:
    """Shares work out over `accelerate`'s processes.

    Args:
        device: Where the model and all that is gathered are; None: where accelerate wants it.
    """

    def __init__(self, device: torch.device | None = None):
        on_cpu = not torch.accelerator.is_available() if device is None else device.type == "cpu"
        self.state: Any = PartialState(cpu=on_cpu)  # without `cpu` each of several processes on a CPU would be alone
        self.device: torch.device = self.state.device if device is None else device

    @property
    def is_first(self) -> bool:
        return self.state.is_main_process

    @property
    def count(self) -> int:
        return self.state.num_processes

    def share(self, work: Sequence[T]) -> list[T]:
        """This process's part: every k-th item."""
        return list(work[self.state.process_index :: self.count])

    def wait(self) -> None:
        """Until all processes have come here."""
        self.state.wait_for_everyone()

    def sum_in_order(self, mine: Sequence[torch.Tensor], count: int, size: int) -> torch.Tensor:
        """Sum of the `count` vectors `[size]` that all processes made of their shares, always in the order of the work."""
        processes = self.count
        each = -(-count // processes)
        stacked = torch.zeros(each, size, device=self.device)
        for row, vector in enumerate(mine):
            stacked[row] = vector
        everyone = gather(stacked).view(processes, each, size) if processes > 1 else stacked.unsqueeze(0)
        total = torch.zeros(size, device=self.device)
        for item in range(count):
            total += everyone[item % processes, item // processes]
        return total
