"""The file of a saved cache: one safetensors file, with a JSON header in its metadata."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from less_cache.cache.layer import LESSLayer
from less_cache.errors import LESSError
from less_cache.files.atomic import replace
from less_cache.integration.families import fingerprint, geometry
from less_cache.kernels.kernels import LESSKernels
from less_cache.policies import policy_from_dict
from less_cache.version import __version__

FORMAT_VERSION = 2  # 1: heads of one size without biases, stored as they are; 2: or others
HEADER, DIGEST = "less_cache", "sha256"  # keys in the file's metadata


def save(cache: Any, path: Path) -> None:
    """Write what a `LESSCache` has seen."""
    layers: list[dict] = []
    tensors: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, LESSLayer | DynamicSlidingWindowLayer):
            raise LESSError(f"Layer {index}: a cache with {type(layer).__name__} cannot be saved.")
        layers.append({"type": type(layer).__name__, "cumulative_length": int(layer.cumulative_length)})
        if layer.cumulative_length > 0:
            layers[-1]["dtype"] = str(layer.dtype).removeprefix("torch.")
            kept = layer.tensors() if isinstance(layer, LESSLayer) else _own_tensors(layer)
            tensors |= {f"layers.{index}.{name}": tensor for name, tensor in kept.items()}
    is_plain = all(layer.is_empty or layer.held.slots.is_plain for layer in cache.layers if isinstance(layer, LESSLayer))
    header = {
        "format_version": 1 if is_plain else FORMAT_VERSION,  # as older versions read it
        "model": _describe(cache.config, cache.model),
        "policy": cache.policy.to_dict(),
        "kernels": None if cache.kernels is None else digest(cache.kernels.state_dict()),
        "layers": layers,
    }
    write(path, header, tensors)


def load(
    cache_class: Callable[..., Any],
    path: Path,
    model: PreTrainedModel | PreTrainedConfig,
    kernels: LESSKernels | None,
    static: bool,
) -> Any:
    """The cache of `cache_class` that `save` wrote."""
    header, tensors = read(path)
    cache = cache_class(model, policy=policy_from_dict(header["policy"]), kernels=kernels, static=static)
    saved_for, loaded = header["model"], _describe(cache.config, cache.model)
    if saved_for["fingerprint"] is None or loaded["fingerprint"] is None:
        saved_for["fingerprint"] = loaded["fingerprint"] = None
    if saved_for != loaded:
        raise LESSError(f"{path}: the cache was saved for another model: expected {saved_for}, got {loaded}.")
    if header["kernels"] != (None if kernels is None else digest(kernels.state_dict())):
        had = "without kernels" if header["kernels"] is None else f"with kernels of digest {header['kernels'][:12]}…"
        raise LESSError(f"{path}: the cache was saved {had}. Pass the same as kernels=.")
    device = getattr(model, "device", torch.device("cpu"))
    for index, (layer, saved) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        prefix = f"layers.{index}."
        kept = {name.removeprefix(prefix): tensors[name].to(device) for name in tensors if name.startswith(prefix)}
        if not kept:
            continue
        if isinstance(layer, LESSLayer):
            dtype = getattr(torch, saved["dtype"]) if "dtype" in saved else kept["keys"].dtype
            layer.load(kept, dtype, saved["cumulative_length"])
        else:
            layer.lazy_initialization(kept["keys"], kept["values"])
            layer.keys, layer.values = kept["keys"], kept["values"]
            layer.cumulative_length += saved["cumulative_length"]
    return cache


def _describe(config: PreTrainedConfig, model: PreTrainedModel | None) -> dict:
    """What a saved cache says about its model."""
    return {
        "model_type": config.get_text_config(decoder=True).model_type,
        **dataclasses.asdict(geometry(config)),
        "fingerprint": None if model is None else fingerprint(model),
    }


def _own_tensors(layer: DynamicSlidingWindowLayer) -> dict[str, torch.Tensor]:
    assert layer.keys is not None and layer.values is not None, "a layer that has seen tokens holds some"
    return {"keys": layer.keys, "values": layer.values}


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
    text = json.dumps({"less_cache_version": __version__, **header})
    content = safetensors.torch.save(tensors, metadata={"format": "pt", HEADER: text, DIGEST: digest(tensors, text)})
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
    if version not in range(1, FORMAT_VERSION + 1):
        raise LESSError(
            f"{path}: expected format_version 1 to {FORMAT_VERSION}, got {version!r}, written by less-cache {written_by}. "
            "Read it with that version."
        )
    if metadata.get(DIGEST) != digest(tensors, metadata[HEADER]):
        raise LESSError(f"{path}: this is not what was saved: the file is damaged. Save the cache again.")
    return header, tensors
