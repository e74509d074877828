"""Files of a run: whole or absent, and one error where the disk is full."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from less_cache.errors import LESSError
from less_cache.files.atomic import replace


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one atomic step."""
    try:
        replace(path.parent, {path.name: content})
    except LESSError as error:
        raise LESSError(f"{error} What was finished before stays: the same command goes on.") from error


def differences(expected: Mapping[str, Any], got: Mapping[str, Any]) -> str:
    """What two descriptions of a run do not share, for an error."""
    names = [name for name in {**expected, **got} if expected.get(name) != got.get(name)]
    return "; ".join(f"{name}: expected {expected.get(name)}, got {got.get(name)}" for name in names)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, in one atomic step."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(contiguous, metadata=dict(metadata or {})))


def load_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors, memory-mapped on a CPU, and metadata of a safetensors file."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        return tensors, file.metadata() or {}
