"""Kernel files: a folder or Hub repository with `less_config.json` and `less_kernels.safetensors`."""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from less_cache.config import LESSConfig
from less_cache.errors import LESSError

CONFIG_NAME = "less_config.json"
WEIGHTS_NAME = "less_kernels.safetensors"


def find(folder_or_repo: str | os.PathLike, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The local folder that holds the two files: the given one, or a download of the Hub repository."""
    folder = Path(folder_or_repo)
    if os.path.isdir(folder):
        return folder
    if os.path.exists(folder):
        raise LESSError(f"Expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, got the file {folder}.")
    repo_id = os.fspath(folder_or_repo)
    try:
        paths = [
            huggingface_hub.hf_hub_download(repo_id, name, revision=revision, token=token)
            for name in (CONFIG_NAME, WEIGHTS_NAME)
        ]
    except hub_errors.HFValidationError as error:
        raise LESSError(
            f"Expected a folder with kernels or a Hub repository id, got {repo_id!r}: no such folder, and not a valid id."
        ) from error
    except hub_errors.LocalEntryNotFoundError as error:
        raise LESSError(
            f"Kernels {repo_id!r}: no such folder, not in the local cache, and the Hub cannot be reached. "
            "Check the path, or go online once to download them."
        ) from error
    except hub_errors.GatedRepoError as error:  # before its base class, RepositoryNotFoundError
        raise LESSError(f"Kernels {repo_id!r}: the repository is gated. Ask for access on its page and pass token=.") from error
    except hub_errors.HfHubHTTPError as error:
        raise LESSError(f"Kernels {repo_id!r} (revision {revision or 'main'}): the Hub answered: {error}") from error
    return Path(paths[0]).parent


def read_config(folder: Path) -> LESSConfig:
    """The folder's config. `LESSError` if it is missing or wrong."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise LESSError(f"{folder}: expected {CONFIG_NAME}, found {_listing(folder)}. Is this a folder of kernels?")
    try:
        return LESSConfig.from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise LESSError(f"{path}: expected JSON in UTF-8, got: {error}") from error
    except LESSError as error:
        raise LESSError(f"{folder}: {error}") from error


def read_tensors(folder: Path, config: LESSConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The folder's tensors, float32, after checking digest, names, shapes, dtypes and finiteness."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise LESSError(
            f"{folder}: expected {WEIGHTS_NAME}, found {_listing(folder)}. "
            "Only safetensors files are read; convert official .pt files with LESSKernels.from_official(…).save_pretrained(…)."
        )
    if config.sha256 is not None and (digest := hashlib.sha256(path.read_bytes()).hexdigest()) != config.sha256:
        raise LESSError(
            f"{path}: expected sha256 {config.sha256}, got {digest}: the file is damaged or was swapped. Download it again."
        )
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            if missing := sorted(set(shapes) - found):
                raise LESSError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]!r}.")
            if extra := sorted(found - set(shapes)):
                raise LESSError(f"{path}: {len(extra)} unexpected tensors, the first is {extra[0]!r}.")
            for name, shape in shapes.items():
                header = file.get_slice(name)
                if tuple(header.get_shape()) != shape:
                    raise LESSError(f"{path}: {name}: expected shape {list(shape)}, got {header.get_shape()}.")
                if header.get_dtype() not in ("F32", "F16", "BF16"):
                    raise LESSError(f"{path}: {name}: expected F32, F16 or BF16, got {header.get_dtype()}.")
                tensors[name] = file.get_tensor(name).float()
    except (SafetensorError, OSError) as error:
        raise LESSError(f"{path}: not a readable safetensors file (pickle is never read): {error}") from error
    check_finite(str(path), tensors)
    return tensors


def check_finite(source: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise if a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise LESSError(f"{source}: {name} holds NaN or infinity. Train again, or use an earlier version of the kernels.")


def write(folder: Path, config: LESSConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Write both files, weights first; records the weights' digest in `config`."""
    check_finite("kernels to save", tensors)
    folder.mkdir(parents=True, exist_ok=True)
    weights = save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    config.sha256 = hashlib.sha256(weights).hexdigest()
    try:
        text = config.to_json()
    except (TypeError, ValueError) as error:
        raise LESSError(f"kernels to save: config is not JSON: {error}") from error
    contents = {WEIGHTS_NAME: weights, CONFIG_NAME: text.encode()}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as draft:
        for name, content in contents.items():
            with open(Path(draft) / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(Path(draft) / name, 0o644)
        for name in contents:
            os.replace(Path(draft) / name, folder / name)


def _listing(folder: Path) -> str:
    return ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "an empty folder"
