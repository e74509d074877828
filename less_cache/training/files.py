"""Files that are whole or absent."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from less_cache.errors import LESSError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write` to a draft beside `path`, then put it in its place: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(draft)
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except Exception as error:  # a full disk shows in as many types as there are writers
        raise LESSError(f"Cannot write {path} ({error}). What was finished before stays: the same command goes on.") from error
    finally:
        draft.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, in one atomic step."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda draft: save_file(contiguous, draft, metadata=dict(metadata or {})))


def load_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors, memory-mapped on a CPU, and metadata of a safetensors file."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        return tensors, file.metadata() or {}
