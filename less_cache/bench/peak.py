"""The most memory that was held at once."""

import ctypes
import gc
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Bytes above those at `start`: of the allocator on a GPU, resident memory of the process on Linux, elsewhere None.

    Resident memory misses what fits into memory that the process had freed but kept: `start` gives that back first.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.before: int | None = None

    def start(self) -> None:
        """Forget the peak so far."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return
        try:
            ctypes.CDLL(None).malloc_trim(0)
            CLEAR.write_text("5")  # the peak becomes what is resident now
        except (OSError, AttributeError):
            return
        self.before = _resident("VmRSS")

    def stop(self) -> int | None:
        """Bytes since `start`."""
        if self.before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return max(0, _resident("VmHWM") - self.before)


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
