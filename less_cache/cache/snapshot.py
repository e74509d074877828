"""The file of a saved cache: one safetensors file, with a JSON header in its metadata."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from less_cache.errors import LESSError
from less_cache.files.atomic import replace
from less_cache.version import __version__

FORMAT_VERSION = 1
HEADER, DIGEST = "less_cache", "sha256"  # keys in the file's metadata


def digest(tensors: Mapping[str, torch.Tensor], text: str = "") -> str:
    """SHA-256 of `text` and of the tensors' names, types, shapes and bytes, hex."""
    sha256 = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha256.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def write(path: Path, header: dict, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors` and `header` (JSON) to `path` in one atomic step, with a digest of both."""
    if path.is_dir():
        raise LESSError(f"Expected the name of a file to save the cache to, got the folder {path}.")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format_version": FORMAT_VERSION, "less_cache_version": __version__, **header})
    content = save(tensors, metadata={"format": "pt", HEADER: text, DIGEST: digest(tensors, text)})
    replace(path.parent, {path.name: content})


def read(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The header and the tensors that `write` wrote. Raises `LESSError` for any other file, or a damaged one."""
    if not path.is_file():
        raise LESSError(f"{path}: expected the file of a saved cache, found {'a folder' if path.is_dir() else 'no such file'}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LESSError(f"{path}: not a readable safetensors file (pickle is never read): {error}") from error
    if HEADER not in metadata:
        raise LESSError(f"{path}: expected the file of a saved cache, got a safetensors file without its header.")
    try:
        header = json.loads(metadata[HEADER])
        written_by, version = header["less_cache_version"], header["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise LESSError(f"{path}: the header of the saved cache is damaged: {error}") from error
    if version != FORMAT_VERSION:
        raise LESSError(
            f"{path}: expected format_version {FORMAT_VERSION}, got {version!r}, written by less-cache {written_by}. "
            "Read it with that version."
        )
    if metadata.get(DIGEST) != digest(tensors, metadata[HEADER]):
        raise LESSError(f"{path}: this is not what was saved: the file is damaged. Save the cache again.")
    return header, tensors
