"""The two files of a set of kernels: `less_config.json` and `less_kernels.safetensors` in one folder."""

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from less_cache.errors import LESSError
from less_cache.files import atomic
from less_cache.kernels.config import LESSConfig

T = TypeVar("T")

CONFIG_NAME = "less_config.json"
WEIGHTS_NAME = "less_kernels.safetensors"
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # safetensors' names of what may be stored
MOST_CONFIG_BYTES = 10_000_000  # beyond any real config; nothing larger is read into memory
MOST_HEADER_BYTES = 1_000  # a tensor, in the safetensors header


def read_config(folder: Path) -> LESSConfig:
    """The folder's config. `LESSError` if it is missing or wrong."""
    return read_json(folder, CONFIG_NAME, LESSConfig.from_json)


def read_json(folder: Path, name: str, parse: Callable[[str], T]) -> T:
    """What `parse` makes of a text file of the folder. `LESSError` if it is missing, too long or wrong."""
    path = locate(folder, name)
    if path.stat().st_size > MOST_CONFIG_BYTES:
        raise LESSError(f"{path}: expected at most {MOST_CONFIG_BYTES:,} bytes of JSON, got {path.stat().st_size:,}.")
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise LESSError(f"{path}: expected JSON in UTF-8, got: {error}") from error
    except LESSError as error:
        raise LESSError(f"{folder}: {error}") from error


def read_tensors(folder: Path, config: LESSConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The folder's tensors, float32, after checking size, digest, names, shapes, dtypes and finiteness."""
    path = locate(folder, WEIGHTS_NAME)
    most = sum(4 * math.prod(shape) + MOST_HEADER_BYTES for shape in shapes.values()) + MOST_HEADER_BYTES
    if path.stat().st_size > most:  # before anything reads it: a file may claim any size
        raise LESSError(f"{path}: expected at most {most:,} bytes for the sizes in {CONFIG_NAME}, got {path.stat().st_size:,}.")
    check_digest(folder, config)
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            if missing := sorted(set(shapes) - found):
                raise LESSError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]!r}.")
            if extra := sorted(found - set(shapes)):
                raise LESSError(f"{path}: {len(extra)} unexpected tensors, the first is {extra[0]!r}.")
            headers = {name: file.get_slice(name) for name in shapes}
            for name, shape in shapes.items():  # all of them before the first is read
                if tuple(headers[name].get_shape()) != shape:
                    raise LESSError(f"{path}: {name}: expected shape {list(shape)}, got {headers[name].get_shape()}.")
                if (dtype := headers[name].get_dtype()) not in STORED:
                    raise LESSError(f"{path}: {name}: expected F32, F16 or BF16, got {dtype}.")
            tensors = {name: file.get_tensor(name).float() for name in shapes}
    except (SafetensorError, OSError) as error:
        raise LESSError(f"{path}: not a readable safetensors file (pickle is never read): {error}") from error
    check_finite(str(path), tensors)
    return tensors


def check_digest(folder: Path, config: LESSConfig) -> None:
    """Raise if the weights are not those that the config names. A config without a digest takes any."""
    path = locate(folder, WEIGHTS_NAME)
    if config.sha256 is not None and (digest := sha256(path)) != config.sha256:
        raise LESSError(
            f"{path}: expected sha256 {config.sha256}, got {digest}: the file is damaged or was swapped. Download it again."
        )


def check_finite(source: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise if a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise LESSError(f"{source}: {name} holds NaN or infinity. Train again, or use an earlier version of the kernels.")


def sha256(path: Path) -> str:
    """Digest of a file, hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write(
    folder: Path,
    config: LESSConfig,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write both files, weights first, stored as `dtype`, then those `beside` them; records the weights' digest in `config`."""
    if dtype not in STORED.values():
        raise LESSError(f"Expected dtype to be torch.float32, torch.float16 or torch.bfloat16, got {dtype}.")
    stored = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    check_finite("kernels to save", stored)  # as stored: float16 ends at 65,504
    weights = save(stored, metadata={"format": "pt"})
    config.sha256 = hashlib.sha256(weights).hexdigest()
    try:
        text = config.to_json()
    except LESSError as error:
        raise LESSError(f"kernels to save: config: {error}") from error
    atomic.replace(folder, {WEIGHTS_NAME: weights, CONFIG_NAME: text.encode(), **(beside or {})})


def describe(folder: Path) -> str:
    """Types and size of the weights file, in words."""
    path = locate(folder, WEIGHTS_NAME)
    with safe_open(path, framework="pt") as file:
        dtypes = sorted({str(STORED[file.get_slice(name).get_dtype()]).removeprefix("torch.") for name in file.keys()})  # noqa: SIM118
    return f"{' and '.join(dtypes)}, {path.stat().st_size / 1e6:.1f} MB"


def locate(folder: Path, name: str) -> Path:
    """A file of the folder. `LESSError` if it is missing, closed to this user, or a symbolic link to elsewhere than the blobs
    of the Hub's cache.
    """
    path = folder / name
    if path.exists() and not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise LESSError(f"{path}: this user may not read it. Change its mode, or download it again.")
    if not path.is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "an empty folder"
        raise LESSError(
            f"{folder}: expected {name}, found {found}. Is this a folder of kernels? Only safetensors files are read; "
            "convert official .pt files with LESSKernels.from_official(…).save_pretrained(…)."
        )
    home = folder.resolve()
    if not any(path.resolve().is_relative_to(place) for place in (home, home.parent.parent / "blobs")):
        raise LESSError(f"{path}: expected a file, got a symbolic link out of the folder. Copy the file to where it belongs.")
    return path
