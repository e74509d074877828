"""Kernels of the official code's checkpoints."""

import os
from collections.abc import Mapping, Sequence

import torch

from less_cache.errors import LESSError
from less_cache.files.paths import expanded
from less_cache.kernels.config import LESSConfig
from less_cache.kernels.folder import check_finite
from less_cache.memory import LayerKernels


def convert(
    layers: Sequence[Mapping[str, torch.Tensor] | str | os.PathLike],
) -> tuple[LESSConfig, list[dict[str, torch.Tensor]]]:
    """The config, and each layer's tensors under our names: what `LESSKernels.from_official` is made of."""
    if isinstance(layers, Mapping | str | os.PathLike):
        raise LESSError(
            f"LESSKernels.from_official: expected a list, one state dict or path a layer, got one {type(layers).__name__}."
        )
    converted = [_convert_layer(index, layer) for index, layer in enumerate(layers)]
    if not converted:
        raise LESSError("LESSKernels.from_official: expected one state dict a layer, got none.")
    h, d, _ = converted[0]["query_in"].shape
    g = converted[0]["key_scale"].shape[0]
    ranks = [tensors["key_scale"].shape[-1] for tensors in converted]
    hidden_sizes = [tensors["query_in"].shape[-1] for tensors in converted]
    config = LESSConfig(len(converted), h, g, d, rank=ranks, hidden_size=hidden_sizes)
    for index, tensors in enumerate(converted):
        expected = LayerKernels.shapes(h, g, d, hidden_sizes[index], ranks[index])
        for name, tensor in tensors.items():
            if tensor.shape != expected[name]:
                raise LESSError(
                    f"LESSKernels.from_official: layer {index}: expected {OFFICIAL_NAMES[name]} to become "
                    f"{name} {list(expected[name])}, got {list(tensor.shape)}."
                )
        check_finite(f"official layer {index}", tensors)
    return config, converted


OFFICIAL_NAMES = {
    "query_in": "kernel_q_mat1",
    "query_out": "kernel_q_mat2",
    "key_in": "kernel_k_mat1",
    "key_out": "kernel_k_mat2",
    "key_mix": "interaction_k",
    "key_scale": "scalingD",
    "mix_scale": "scalingD2",
}


def _convert_layer(index: int, layer: Mapping[str, torch.Tensor] | str | os.PathLike) -> dict[str, torch.Tensor]:
    """One official layer under our names and shapes."""
    if isinstance(layer, str | os.PathLike):
        try:
            layer = torch.load(expanded(layer), map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise LESSError(f"LESSKernels.from_official: layer {index}: no such file: {layer}.") from error
        except Exception as error:  # torch.load raises many types on a file that is not a plain checkpoint
            raise LESSError(
                f"LESSKernels.from_official: layer {index}: {layer} is not a checkpoint of plain tensors "
                "(read with weights_only=True, code in it is never run). Save it again as a state dict of tensors."
            ) from error
    if not isinstance(layer, Mapping):
        raise LESSError(f"LESSKernels.from_official: layer {index}: expected a state dict, got {type(layer).__name__}.")
    tensors = {}
    remaining = set(layer)
    for ours, official in OFFICIAL_NAMES.items():
        if official in layer:
            tensor, key = layer[official], official
        elif f"{official}.weight" in layer:  # nn.Linear of the one KV head: [out, in]
            tensor, key = layer[f"{official}.weight"].T.unsqueeze(0), f"{official}.weight"
        else:
            raise LESSError(f"LESSKernels.from_official: layer {index}: expected {official!r}, got {sorted(map(str, layer))}.")
        remaining.discard(key)
        if not isinstance(layer[key], torch.Tensor):
            raise LESSError(
                f"LESSKernels.from_official: layer {index}: expected a tensor for {key!r}, got {type(layer[key]).__name__}."
            )
        if ours.endswith("scale"):
            if tensor.dim() != 4 or tensor.shape[0] != 1 or tensor.shape[2] != 1:
                raise LESSError(
                    f"LESSKernels.from_official: layer {index}: expected {official} of shape [1, heads, 1, rank], "
                    f"got {list(tensor.shape)}."
                )
            tensor = tensor[0, :, 0]
        if tensor.dim() != (2 if ours.endswith("scale") else 3):
            raise LESSError(f"LESSKernels.from_official: layer {index}: {official} has shape {list(tensor.shape)}.")
        tensors[ours] = tensor.float().contiguous()
    if remaining:
        raise LESSError(f"LESSKernels.from_official: layer {index}: unexpected entries {sorted(map(str, remaining))}.")
    return tensors
