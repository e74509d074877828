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
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticSlidingWindowLayer

from less_cache.cache.layer import LESSLayer
from less_cache.errors import LESSError
from less_cache.files.atomic import replace
from less_cache.integration.families import fingerprint_with_adapters, geometry
from less_cache.integration.weights import device_of_layer, digest_of_weights, unwrapped
from less_cache.kernels.head_budgets import HeadBudgets
from less_cache.kernels.kernels import LESSKernels
from less_cache.policies import policy_from_dict
from less_cache.version import __version__

FORMAT_VERSION = 2  # 1: heads of one size without biases, stored as they are; 2: or others
OPTIONS = ("heads", "slots", "fit")  # of a `LESSCache`, which its file repeats
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
            layers[-1]["turned"] = isinstance(layer, LESSLayer) and layer.held.slots.coding.turns_keys
            kept = layer.tensors() if isinstance(layer, LESSLayer) else _own_tensors(layer)
            tensors |= {f"layers.{index}.{name}": tensor for name, tensor in kept.items()}
    is_plain = all(layer.is_empty or layer.held.slots.is_plain for layer in cache.layers if isinstance(layer, LESSLayer))
    header = {
        "format_version": 1 if is_plain else FORMAT_VERSION,  # as older versions read it, which ignore `weights` and `dtype`
        "model": _describe(cache.config, cache.model),
        **_describe_weights(cache.model),
        "policy": cache.policy.to_dict(),
        "kernels": None if cache.kernels is None else digest(cache.kernels.state_dict()),
        "layers": layers,
        **cache.options.to_dict(),  # older versions know the usual ones alone, and what others hold is of format 2
    }
    write(path, header, tensors)


@torch.inference_mode(False)  # what is loaded under inference mode may go on outside of it
def load(
    cache_class: Callable[..., Any],
    path: Path,
    model: PreTrainedModel | PreTrainedConfig,
    kernels: LESSKernels | None,
    static: bool,
) -> Any:
    """The cache of `cache_class` that `save` wrote."""
    header, tensors = read(path)
    _check_header(path, header)
    if kernels is None and header["kernels"] == digest({}):
        kernels = LESSKernels.untrained(model)  # they have no weights
    options = {"heads": "equal", **{name: header[name] for name in OPTIONS if name in header}}
    if isinstance(options["heads"], dict):
        options["heads"] = _profile(path, options["heads"])
    cache = cache_class(model, policy=policy_from_dict(header["policy"]), kernels=kernels, static=static, **options)
    _check_model(path, header, cache.config, cache.model)
    if header["kernels"] != (None if kernels is None else digest(kernels.state_dict())):
        had = "without kernels" if header["kernels"] is None else f"with kernels of digest {header['kernels'][:12]}…"
        raise LESSError(f"{path}: the cache was saved {had}. Pass the same as kernels=.")
    if len(header["layers"]) != len(cache.layers):
        raise _damaged(path, f"it has {len(header['layers'])} layers, the model {len(cache.layers)}")
    for index, (layer, saved) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        prefix = f"layers.{index}."
        device = torch.device("cpu") if cache.model is None else device_of_layer(unwrapped(cache.model), index)
        kept = {name.removeprefix(prefix): tensors[name].to(device) for name in tensors if name.startswith(prefix)}
        if not kept and saved["cumulative_length"] == 0:
            continue
        try:
            _fill(layer, kept, saved)
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise _damaged(path, f"layer {index} does not have what a {type(layer).__name__} holds: {error}") from error
        if isinstance(layer, LESSLayer) and layer.held.slots.coding.turns_keys != saved.get("turned", False):
            raise LESSError(
                f"{path}: layer {index}: expected a model whose keys turn with their position as the saved ones do. Load the "
                "cache with the model itself, not with its config, or read the text again."
            )
    return cache


def _profile(path: Path, entries: dict) -> HeadBudgets:
    """The head budgets that a cache was saved with."""
    try:
        return HeadBudgets.from_json(json.dumps(entries))
    except LESSError as error:
        raise _damaged(path, str(error)) from error


def _fill(layer: Any, kept: dict[str, torch.Tensor], saved: dict) -> None:
    """Give a new layer what a layer of its kind held."""
    if isinstance(layer, LESSLayer):
        dtype = getattr(torch, saved["dtype"]) if "dtype" in saved else kept["keys"].dtype
        layer.load(kept, dtype, saved["cumulative_length"])
    elif isinstance(layer, StaticSlidingWindowLayer):
        _fill_window(layer, kept["keys"], kept["values"], saved["cumulative_length"])
    else:
        layer.lazy_initialization(kept["keys"], kept["values"])
        layer.keys, layer.values = kept["keys"], kept["values"]
        layer.cumulative_length += saved["cumulative_length"]


def _fill_window(layer: StaticSlidingWindowLayer, keys: torch.Tensor, values: torch.Tensor, seen: int) -> None:
    """Put the newest of `seen` tokens where the layer has them: from the first slot, or up to the last once all are full."""
    window, n = layer.max_cache_len, min(keys.shape[-2], layer.max_cache_len)
    layer.lazy_initialization(keys, values)
    slots = slice(window - n, window) if seen >= window else slice(n)
    layer.keys[:, :, slots], layer.values[:, :, slots] = keys[:, :, -n:], values[:, :, -n:]
    layer.cumulative_length += min(seen, n)
    layer.cumulative_length_int = seen


def _describe(config: PreTrainedConfig, model: PreTrainedModel | None) -> dict:
    """What a saved cache says about its model, in every version."""
    return {
        "model_type": config.get_text_config(decoder=True).model_type,
        **dataclasses.asdict(geometry(config)),
        "fingerprint": None if model is None else fingerprint_with_adapters(model),
    }


def _describe_weights(model: PreTrainedModel | None) -> dict[str, str | None]:
    """What it says of the weights beside that: all of them, and the type that the model computes in."""
    if model is None:
        return {"weights": None, "dtype": None}
    return {"weights": digest_of_weights(model), "dtype": str(model.dtype).removeprefix("torch.")}


def _check_model(path: Path, header: dict, config: PreTrainedConfig, model: PreTrainedModel | None) -> None:
    """Raise unless the cache was saved for these weights, as far as both are known."""
    expected, got = dict(header["model"]), _describe(config, model)
    of_weights = _describe_weights(model)
    dtypes = header.get("dtype"), of_weights["dtype"]
    if None not in dtypes and dtypes[0] != dtypes[1] and {**expected, "fingerprint": None} == {**got, "fingerprint": None}:
        raise LESSError(
            f"{path}: the cache was saved for a model in another type: expected {dtypes[0]}, got {dtypes[1]}. "
            f"Load the model with dtype={dtypes[0]!r}, or let this one read the text again."
        )
    if header.get("weights") is not None and of_weights["weights"] is not None:
        expected["fingerprint"], got["fingerprint"] = header["weights"], of_weights["weights"]
    if expected["fingerprint"] is None or got["fingerprint"] is None:
        expected["fingerprint"] = got["fingerprint"] = None
    if expected != got:
        raise LESSError(
            f"{path}: the cache was saved for another model: expected {expected}, got {got}. "
            "The fingerprint is of all weights, adapters included: load those that it was saved with, or read the text again."
        )


def _check_header(path: Path, header: dict) -> None:
    """Raise unless every entry is there and of its type."""
    wanted: dict[str, Any] = {"model": dict, "policy": dict, "kernels": str | None, "layers": list}
    for name, kind in wanted.items():
        if name not in header:
            raise _damaged(path, f"expected an entry {name!r}, got {sorted(header)}")
        if not isinstance(header[name], kind):
            raise _damaged(path, f"expected {name!r} to be {KINDS[kind]}, got {header[name]!r}")
    for name, kinds in {"heads": str | list | dict, "slots": str, "fit": bool}.items():
        if name in header and not isinstance(header[name], kinds):
            raise _damaged(path, f"expected {name!r} to be one of {kinds}, got {header[name]!r}")
    for name in ("weights", "dtype"):  # newer than the format
        if not isinstance(header.get(name), str | None):
            raise _damaged(path, f"expected {name!r} to be a text or null, got {header[name]!r}")
    if "fingerprint" not in header["model"]:
        raise _damaged(path, f"expected the model to have a fingerprint, got {header['model']}")
    for index, layer in enumerate(header["layers"]):
        length = layer.get("cumulative_length") if isinstance(layer, dict) else None
        if type(length) is not int or length < 0:
            raise _damaged(path, f"expected layer {index} to have a cumulative_length, got {layer!r}")
        if not isinstance(getattr(torch, str(layer.get("dtype", "float32")), None), torch.dtype):
            raise _damaged(path, f"expected layer {index} to have a dtype of torch, got {layer['dtype']!r}")


KINDS: dict[Any, str] = {dict: "a JSON object", list: "a list", str | None: "a text or null"}


def _damaged(path: Path, why: str) -> LESSError:
    return LESSError(f"{path}: the header of the saved cache is damaged: {why}. Save the cache again.")


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
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if version not in range(1, FORMAT_VERSION + 1):
        raise LESSError(
            f"{path}: expected format_version 1 to {FORMAT_VERSION}, got {version!r}, written by less-cache {written_by}. "
            "Read it with that version."
        )
    if metadata.get(DIGEST) != digest(tensors, metadata[HEADER]):
        raise LESSError(f"{path}: this is not what was saved: the file is damaged. Save the cache again.")
    return header, tensors
