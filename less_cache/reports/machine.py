"""What a measurement ran on."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from less_cache.version import __version__


def describe(device: torch.device) -> dict:
    """Processor or GPU, memory in bytes, threads, versions, and the commit of this checkout."""
    described: dict = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": memory(torch.device("cpu")),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        described |= {"gpu": torch.cuda.get_device_name(device), "gpu_memory": memory(device)}
    return {
        "machine": described,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
            "less_cache": __version__,
        },
        "commit": _commit(),
    }


def memory(device: torch.device) -> int | None:
    """Bytes of memory that the device has; None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return None


def out_of_memory(error: RuntimeError) -> bool:
    """Whether the device had no memory left; a processor's allocator has no exception of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "you tried to allocate" in str(error)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the checkout that the package lies in, with `-dirty` after local changes; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
