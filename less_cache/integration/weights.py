"""A model's weights, wherever they are: on its devices, offloaded by accelerate, with PEFT's adapters or without them."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

MOST_ELEMENTS = 1 << 18  # of one weight that a digest reads: a row each of the largest vocabularies
ORIGINALS = ("base_layer", "original_module", "token_adapter")  # names that PEFT gives to a module that it has wrapped


class Unreadable(Exception):
    """A weight is on no device, and nothing says where it is."""


def unwrapped(model: Any) -> Any:
    """The model inside of what torch.compile and PEFT made of it."""
    while True:
        inner = getattr(model, "_orig_mod", model)
        inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
        if inner is model:
            return model
        model = inner


class Weights:
    """The weights of a model: which there are, and their values. A weight that is tied to another counts once."""

    def __init__(self, model: nn.Module):
        self.model = unwrapped(model)
        prompts: Any = getattr(model, "prompt_encoder", {})  # PEFT's, outside of the model
        self._prompts = [prompts[name] for name in prompts if name == getattr(model, "active_adapter", None)]
        self._places = _offloaded(self.model)
        self._tied = _tied_and_offloaded(self.model)

    def of_the_base(self) -> Iterator[torch.Tensor]:
        """Parameters without those of adapters, in the order of `model.parameters()`; `read` has their values."""
        return self._once(parameter for module in _original_modules(self.model) for parameter in _own(module._parameters))

    def in_use(self) -> Iterator[torch.Tensor]:
        """All that the model computes with, adapters in use and saved buffers included; `read` has the values."""
        return self._once(tensor for module in (self.model, *self._prompts) for tensor in _in_use(module))

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The weight itself, from where it was offloaded to. Raises `Unreadable` where nobody knows."""
        if not tensor.is_meta:
            return tensor.detach()
        try:
            weights_map, name = self._places[id(tensor)]
            return weights_map[name].detach()
        except (KeyError, OSError) as error:
            raise Unreadable from error

    def _once(self, tensors: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        seen = {}  # they live as long as their ids are compared
        for tensor in tensors:
            if id(tensor) not in seen and id(tensor) not in self._tied:
                seen[id(tensor)] = tensor
                yield tensor


def digest_of_weights(model: nn.Module) -> str | None:
    """Equal for models that compute the same: a digest of all weights' types, shapes and samples, adapters included.

    Reads all of a vector, and of a matrix one element in every row and in every column, at fixed places (at most
    `MOST_ELEMENTS`), so it is a matter of milliseconds on a GPU and of tenths of a second for 7 billion parameters on a
    processor. It sees what training, merging, quantising or casting does, and a row of an embedding; not a single element that
    somebody sets by hand. Of a PEFT model it sees the adapters in use and their scales; where they are turned off, it is
    that of the bare model. Of a weight that processes share it sees this process's part. None: a weight cannot be read.
    """
    weights, sha256 = Weights(model), hashlib.sha256()
    try:
        for tensor in weights.in_use():
            for part in parts(weights.read(tensor)):
                sha256.update(f"{part.dtype} {list(part.shape)}".encode())
                sha256.update(bytes_of(_sample(part)))
    except Unreadable:
        return None
    return sha256.hexdigest()


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """One element of every row and of every column, at fixed places; of a vector all, or as many."""
    if tensor.dim() < 2 or tensor.numel() == 0:
        return tensor.reshape(-1)[:: max(1, tensor.numel() // MOST_ELEMENTS)]
    matrix = tensor.reshape(-1, tensor.shape[-1])  # experts one below the other
    rows, columns = matrix.shape
    places = torch.arange(min(max(rows, columns), MOST_ELEMENTS), device=tensor.device)
    return matrix[places * max(1, rows // len(places)) % rows, places % columns]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a weight that processes share, as under tensor parallelism."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that a tensor is made of: codes and scales of a quantised one, this process's part of a shared one."""
    if isinstance(tensor, DTensor):
        yield from parts(tensor.to_local())
    elif hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from parts(getattr(tensor, name))
    elif tensor.is_quantized:
        yield tensor.int_repr()
    else:  # no indexing of 8-bit floats everywhere
        yield tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def bytes_of(tensor: torch.Tensor) -> bytes:
    """A plain tensor's elements."""
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


# Modules, with PEFT's around them


def _original(module: nn.Module) -> nn.Module | None:
    """The module that PEFT has wrapped into this one; None: it did not."""
    if hasattr(type(module), "adapter_layer_names"):
        return next((module._modules[name] for name in ORIGINALS if module._modules.get(name) is not None), None)
    return None


def _original_modules(module: nn.Module) -> Iterator[nn.Module]:
    """As `module.modules()`, without what adapters brought."""
    original = _original(module)
    if original is not None:
        yield from _original_modules(original)
        return
    yield module
    for child in module.children():
        yield from _original_modules(child)


def _in_use(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and saved buffers that a module computes with."""
    original: Any = _original(module)
    if original is not None:
        wrapper: Any = module
        names = [] if wrapper.disable_adapters else wrapper.active_adapters
        copies = wrapper._modules.get("modules_to_save", {})
        trained = [copies[name] for name in names if name in copies]  # a module of its own in the original's place
        for each in trained or [original]:
            yield from _in_use(each)
        if not trained:
            yield from _adapters(wrapper, original, names)
        return
    if hasattr(module, "_weight_bias"):  # torch's own quantisation packs them
        packed: Any = module
        yield from (tensor for tensor in packed._weight_bias() if tensor is not None)
        return
    yield from _own(module._parameters)
    yield from (
        buffer
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    )
    for child in module.children():
        yield from _in_use(child)


def _adapters(wrapper: Any, original: nn.Module, names: list[str]) -> Iterator[torch.Tensor]:
    """What the adapters of these names bring beside the original: their tensors, modules and numbers."""
    containers = [child for child in wrapper.children() if child is not original]
    containers += [getattr(wrapper, name, None) for name in wrapper.other_param_names]  # scales, token indices
    for container in containers:
        for name in names:
            held = container[name] if hasattr(container, "keys") and name in container.keys() else None  # noqa: SIM118
            if isinstance(held, nn.Module):
                yield from _in_use(held)
            elif isinstance(held, torch.Tensor):
                yield held
            elif isinstance(held, int | float | list):
                yield torch.tensor(held, dtype=torch.float64, device="cpu")
    if names:
        yield from _own(wrapper._parameters)


def _own(parameters: Mapping[str, torch.Tensor | None]) -> Iterator[torch.Tensor]:
    return (parameter for parameter in parameters.values() if parameter is not None)


# accelerate: weights that come to their device for a forward alone


def hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks of a module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _offloaded(model: nn.Module) -> dict[int, tuple[Mapping[str, torch.Tensor], str]]:
    """Where each weight is that a forward brings, by its id: a mapping, and its name in it."""
    places: dict[int, tuple[Mapping[str, torch.Tensor], str]] = {}
    for module in model.modules():
        for hook in hooks(module):
            if getattr(hook, "weights_map", None) is None:
                continue
            for named in (module.named_parameters, module.named_buffers):
                for name, tensor in named(recurse=hook.place_submodules):
                    if tensor.is_meta:
                        places.setdefault(id(tensor), (hook.weights_map, name))
    return places


def _tied_and_offloaded(model: nn.Module) -> set[int]:
    """Ids of offloaded weights that are tied to another: they were one tensor, and are two placeholders."""
    tied = set()
    for name in getattr(model, "all_tied_weights_keys", None) or {}:
        path, _, last = name.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:  # of a part that was exchanged
            continue
        while (original := _original(module)) is not None:
            module = original
        parameter = module._parameters.get(last)
        if parameter is not None and parameter.is_meta:
            tied.add(id(parameter))
    return tied


def device_of_layer(model: nn.Module, layer_idx: int) -> torch.device:
    """Where the attention of a layer computes, which is where its keys come from."""
    of_layer = [module for module in model.modules() if getattr(module, "layer_idx", None) == layer_idx]
    of_layer.sort(key=lambda module: "attention" not in type(module).__name__.lower())  # before a block that has its number
    for part in (part for module in of_layer for part in module.modules()):
        for hook in hooks(part):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
        for parameter in part._parameters.values():
            if parameter is not None and not parameter.is_meta:
                return parameter.device
    device = torch.device(getattr(model, "device", "cpu"))
    return torch.device("cpu") if device.type == "meta" else device
