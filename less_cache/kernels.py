"""The learned kernels φ and ψ.

Axes: `b` batch, `h` query heads, `g` KV heads, `n` tokens, `d` head dim, `m` hidden size, `r` rank.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import gelu

from less_cache import hub
from less_cache.config import LESSConfig
from less_cache.errors import LESSError


class LayerKernels(nn.Module):
    """φ and ψ of one layer: one φ per query head, one ψ per KV head; float32, no bias, g is GELU.

        φ(q) = | g( g(q W_φ1) W_φ2 ) |
        u(k) = |s1| ⊙ g( g(k W_ψ1) W_ψ2 )
        ψ(k) = | u + s2 ⊙ (u W_ψ3) |

    q and k are the states that attention sees (after RoPE), without the 1/√d of attention.

    Names: W_φ1 `query_in [h, d, m]`, W_φ2 `query_out [h, m, r]`, W_ψ1 `key_in [g, d, m]`, W_ψ2 `key_out [g, m, r]`,
    W_ψ3 `key_mix [g, r, r]`, s1 `key_scale [g, r]`, s2 `mix_scale [g, r]`.

    Source: Dong et al., "Get More with LESS", ICML 2024 (arXiv 2402.09398), section 4.
    """

    query_in: nn.Parameter
    query_out: nn.Parameter
    key_in: nn.Parameter
    key_out: nn.Parameter
    key_mix: nn.Parameter
    key_scale: nn.Parameter
    mix_scale: nn.Parameter

    def __init__(self, num_attention_heads: int, num_key_value_heads: int, head_dim: int, hidden_size: int, rank: int):
        super().__init__()
        h, g, d, m, r = num_attention_heads, num_key_value_heads, head_dim, hidden_size, rank
        for name, shape in self.shapes(h, g, d, m, r).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)))
        self.reset_parameters()

    @staticmethod
    def shapes(h: int, g: int, d: int, m: int, r: int) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, in the order that they are stored."""
        return {
            "query_in": (h, d, m),
            "query_out": (h, m, r),
            "key_in": (g, d, m),
            "key_out": (g, m, r),
            "key_mix": (g, r, r),
            "key_scale": (g, r),
            "mix_scale": (g, r),
        }

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Matrices from U(±√(6 / (fan_in + fan_out))), scales 1e-4, as in the official code."""
        for name, parameter in self.named_parameters():
            if name.endswith("scale"):
                nn.init.constant_(parameter, 1e-4)
            else:
                bound = (6 / (parameter.shape[-2] + parameter.shape[-1])) ** 0.5
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def query_features(self, query_states: torch.Tensor) -> torch.Tensor:
        """φ(q): `[b, h, n, d]` to `[b, h, n, r]`, float32, not negative."""
        return gelu(gelu(query_states.float() @ self.query_in) @ self.query_out).abs()

    def key_features(self, key_states: torch.Tensor) -> torch.Tensor:
        """ψ(k): `[b, g, n, d]` to `[b, g, n, r]`, float32, not negative."""
        u = self.key_scale.abs().unsqueeze(1) * gelu(gelu(key_states.float() @ self.key_in) @ self.key_out)
        return (u + self.mix_scale.unsqueeze(1) * (u @ self.key_mix)).abs()

    def part(self, index: int, parts: int) -> "LayerKernels":
        """Kernels of the heads that process `index` of `parts` has under tensor parallelism: an equal share, in order."""
        (h, d, m), (g, r) = self.query_in.shape, self.key_scale.shape
        with torch.device("meta"):
            kernels = LayerKernels(h // parts, g // parts, d, m, r)
        heads = {name: tensor.chunk(parts)[index].clone() for name, tensor in self.state_dict().items()}
        kernels.load_state_dict(heads, assign=True)
        return kernels.requires_grad_(False)

    @property
    def rank(self) -> int:
        return self.query_out.shape[-1]


class LESSKernels(nn.Module):
    """The kernels of a whole model: a `LayerKernels` for every layer named in `config.layers`.

    Stateless while generating: one object may serve many caches and threads.

    >>> kernels = LESSKernels(LESSConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16))
    >>> kernels.for_layer(0).query_features(torch.randn(1, 4, 10, 16)).shape
    torch.Size([1, 4, 10, 8])
    """

    def __init__(self, config: LESSConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict(
            {
                str(index): LayerKernels(
                    config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size, config.rank
                )
                for index in config.layers or []
            }
        )
        self.requires_grad_(False)

    def for_layer(self, layer_idx: int) -> LayerKernels | None:
        """The kernels of a layer, or None where it has none."""
        key = str(layer_idx)
        return self.layers[key] if key in self.layers else None  # type: ignore[return-value]

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `less_config.json` and `less_kernels.safetensors` (float32) into `folder`, each in one atomic step."""
        hub.write(Path(folder), self.config, {name: tensor.detach() for name, tensor in self.state_dict().items()})

    @classmethod
    def from_pretrained(
        cls, folder_or_repo: str | os.PathLike, revision: str | None = None, token: str | bool | None = None
    ) -> "LESSKernels":
        """Kernels from a folder or a Hub repository.

        Raises:
            LESSError: The folder or a file is missing, is no safetensors file (pickle is never read), does not match
                its digest, or holds other tensors than the config describes.
        """
        folder = hub.find(folder_or_repo, revision=revision, token=token)
        config = hub.read_config(folder)
        shapes = LayerKernels.shapes(
            config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size, config.rank
        )
        tensors = hub.read_tensors(
            folder, config, {f"layers.{index}.{name}": shape for index in config.layers or [] for name, shape in shapes.items()}
        )
        with torch.device("meta"):  # no allocation, no random numbers drawn from the user's generator
            kernels = cls(config)
        kernels.load_state_dict(tensors, assign=True)
        return kernels.requires_grad_(False)

    @classmethod
    def from_official(cls, layers: Sequence[Mapping[str, torch.Tensor] | str | os.PathLike]) -> "LESSKernels":
        """Kernels from the official code's per-layer checkpoints, in layer order.

        Args:
            layers: A state dict a layer, or the path of a `.pt` file (read with `weights_only=True`). Both official
                forms are taken: multi-head (`kernel_k_mat1 [h, d, m]`) and Falcon's multi-query
                (`kernel_k_mat1.weight [m, d]`, one KV head).
        """
        if isinstance(layers, Mapping | str | os.PathLike):
            raise LESSError(
                f"LESSKernels.from_official: expected a list, one state dict or path a layer, got one {type(layers).__name__}."
            )
        converted = [_convert_official(index, layer) for index, layer in enumerate(layers)]
        if not converted:
            raise LESSError("LESSKernels.from_official: expected one state dict a layer, got none.")
        h, d, m = converted[0]["query_in"].shape
        g, r = converted[0]["key_scale"].shape
        config = LESSConfig(
            num_hidden_layers=len(converted),
            num_attention_heads=h,
            num_key_value_heads=g,
            head_dim=d,
            rank=r,
            hidden_size=m,
        )
        expected = LayerKernels.shapes(h, g, d, m, r)
        for index, tensors in enumerate(converted):
            for name, tensor in tensors.items():
                if tensor.shape != expected[name]:
                    raise LESSError(
                        f"LESSKernels.from_official: layer {index}: expected {OFFICIAL_NAMES[name]} to become "
                        f"{name} {list(expected[name])}, got {list(tensor.shape)}."
                    )
        with torch.device("meta"):
            kernels = cls(config)
        for index, tensors in enumerate(converted):
            hub.check_finite(f"official layer {index}", tensors)
            kernels.layers[str(index)].load_state_dict(tensors, assign=True)
        return kernels.requires_grad_(False)


OFFICIAL_NAMES = {
    "query_in": "kernel_q_mat1",
    "query_out": "kernel_q_mat2",
    "key_in": "kernel_k_mat1",
    "key_out": "kernel_k_mat2",
    "key_mix": "interaction_k",
    "key_scale": "scalingD",
    "mix_scale": "scalingD2",
}


def _convert_official(index: int, layer: Mapping[str, torch.Tensor] | str | os.PathLike) -> dict[str, torch.Tensor]:
    """One official layer under our names and shapes."""
    if isinstance(layer, str | os.PathLike):
        try:
            layer = torch.load(layer, map_location="cpu", weights_only=True)
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
