"""The learned kernels φ and ψ.

Axes: `b` batch, `h` query heads, `g` KV heads, `n` tokens, `d` head dim, `m` hidden size, `r` rank.
"""

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu
from transformers import PreTrainedConfig, PreTrainedModel

from less_cache.attention import group_heads
from less_cache.centroids import LayerCentroids
from less_cache.config import LESSConfig
from less_cache.errors import LESSError
from less_cache.families import full_attention_layers, geometry
from less_cache.hub import client, files, publish
from less_cache.memory import TrainedMemory, by_head, by_row
from less_cache.policies import H2O, USUAL_BUDGET
from less_cache.soft_centroids import LayerSoftCentroids


class LayerKernels(TrainedMemory):
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
        features = gelu(torch.bmm(gelu(torch.bmm(by_head(query_states), self.query_in)), self.query_out)).abs()
        return by_row(features, query_states)

    def key_features(self, key_states: torch.Tensor) -> torch.Tensor:
        """ψ(k): `[b, g, n, d]` to `[b, g, n, r]`, float32, not negative."""
        u = gelu(torch.bmm(gelu(torch.bmm(by_head(key_states), self.key_in)), self.key_out))
        u = self.key_scale.abs().unsqueeze(1) * u
        return by_row((u + self.mix_scale.unsqueeze(1) * torch.bmm(u, self.key_mix)).abs(), key_states)

    def log_query_features(
        self, query_states: torch.Tensor, means: torch.Tensor, scaling: float, softcap: float | None = None
    ) -> torch.Tensor:
        features = self.query_features(query_states).clamp_min(torch.finfo(torch.float32).tiny)
        return group_heads(features.log(), self.sizes[1])

    @property
    def num_virtual_tokens(self) -> int:
        return self.sizes[-1]


MEMORIES: dict[str, type[TrainedMemory]] = {"low_rank": LayerKernels, "soft_centroids": LayerSoftCentroids}


class LESSKernels(nn.Module):
    """The kernels of a whole model: a `LayerKernels`, or what `config.memory` says, for every layer in `config.layers`.

    Stateless while generating: one object may serve many caches and threads.

    >>> kernels = LESSKernels(LESSConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16))
    >>> kernels.for_layer(0).query_features(torch.randn(1, 4, 10, 16)).shape
    torch.Size([1, 4, 10, 8])
    """

    def __init__(self, config: LESSConfig):
        super().__init__()
        self.config = config
        self.source: str | None = None  # the folder that they were loaded from; in the Hub's cache it names the commit
        memory = MEMORIES[config.memory]
        self.layers = nn.ModuleDict(
            {
                str(index): memory(config.num_attention_heads, config.num_key_value_heads, config.head_dim, m, r)
                for index, m, r in zip(config.layers or [], config.hidden_sizes, config.ranks, strict=True)
            }
        )
        self.requires_grad_(False)

    @classmethod
    def untrained(cls, model: PreTrainedModel | PreTrainedConfig, rank: int = 8) -> "LESSKernels":
        """A state for a model that nobody has trained kernels for: `LayerCentroids`, of the bytes of rank `rank`; for H2O
        with 5 % of the prompt unless told otherwise.
        """
        config = model if isinstance(model, PreTrainedConfig) else model.config
        if rank < 2 or rank % 2:
            raise LESSError(
                f"LESSKernels.untrained: expected an even rank (a centroid takes the bytes of two rows), got {rank}."
            )
        described = LESSConfig(
            **dataclasses.asdict(geometry(config)),
            rank=rank,
            layers=full_attention_layers(config),
            model_type=config.get_text_config(decoder=True).model_type,
            policy=H2O.from_budget(USUAL_BUDGET).to_dict(),
        )
        with torch.device("meta"):
            kernels = cls(described)
        kernels.source = "untrained"
        kernels.layers = nn.ModuleDict({name: LayerCentroids(rank // 2) for name in kernels.layers})
        return kernels

    @property
    def is_trained(self) -> bool:
        """Whether there is anything to save."""
        return any(True for _ in self.parameters())

    def for_layer(self, layer_idx: int) -> Any:
        """The kernels of a layer, or None where it has none."""
        key = str(layer_idx)
        return self.layers[key] if key in self.layers else None

    def save_pretrained(self, folder: str | os.PathLike, dtype: torch.dtype = torch.float32) -> None:
        """Write `less_config.json` and `less_kernels.safetensors` into `folder`, each in one atomic step.

        Args:
            folder: Made where it does not exist.
            dtype: What the file stores: float32, float16 or bfloat16. Kernels compute in float32 in any case.
        """
        if not self.is_trained:
            raise LESSError("Untrained kernels hold nothing to save: LESSKernels.untrained(model) makes them anywhere.")
        files.write(Path(folder), self.config, {name: tensor.detach() for name, tensor in self.state_dict().items()}, dtype)

    def push_to_hub(
        self,
        repo_id: str,
        revision: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        license: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> str:
        """Publish the kernels with a model card, in one commit of a Hub repository, which is created where it is missing.

        Args:
            repo_id: `organisation/name`.
            revision: Branch to commit to; default: main.
            token: Of an account that may write there; default: the one of `hf auth login`.
            private: Whether a new repository is private; default: as the account or organisation has it.
            license: Licence of the base model, as the Hub writes it, such as `apache-2.0`; default: the older card's.
            dtype: What the file stores: float32, float16 or bfloat16.

        Returns:
            The address of the commit.

        Raises:
            LESSError: The config does not name a Hub model as base model, or the Hub refused; nothing was changed then.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, dtype)
            return publish.push(Path(folder), repo_id, revision, token, private, license)

    @classmethod
    def from_pretrained(
        cls, folder_or_repo: str | os.PathLike, revision: str | None = None, token: str | bool | None = None
    ) -> "LESSKernels":
        """Kernels from a folder or a Hub repository.

        Args:
            folder_or_repo: A folder with the two files, or a Hub id; of a repository nothing but these files is read.
            revision: Branch, tag or commit of a repository; default: main.
            token: For private and gated repositories; default: the one of `hf auth login`.

        Raises:
            LESSError: The folder or a file is missing, is no safetensors file (pickle is never read), does not match
                its digest, or holds other tensors than the config describes; or the Hub does not hand it out.
        """
        folder = client.find(folder_or_repo, revision=revision, token=token)
        config = files.read_config(folder)
        h, g, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        shapes = {
            f"layers.{index}.{name}": shape
            for index, m, r in zip(config.layers or [], config.hidden_sizes, config.ranks, strict=True)
            for name, shape in MEMORIES[config.memory].shapes(h, g, d, m, r).items()
        }
        tensors = files.read_tensors(folder, config, shapes)
        with torch.device("meta"):  # no allocation, no random numbers drawn from the user's generator
            kernels = cls(config)
        kernels.load_state_dict(tensors, assign=True)
        kernels.source = str(folder)
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
        with torch.device("meta"):
            kernels = cls(config)
        for index, tensors in enumerate(converted):
            files.check_finite(f"official layer {index}", tensors)
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
