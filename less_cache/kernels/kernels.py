"""The kernels of a whole model: what is trained, stored and published."""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from less_cache.errors import LESSError
from less_cache.files.paths import expanded
from less_cache.integration.families import full_attention_layers, geometry
from less_cache.kernels import folder as files
from less_cache.kernels import official
from less_cache.kernels.config import LESSConfig
from less_cache.kernels.head_budgets import BUDGETS_NAME, HeadBudgets
from less_cache.memory import MEMORIES, LayerCentroids
from less_cache.policies import H2O, USUAL_BUDGET


class LESSKernels(nn.Module):
    """The kernels of a whole model: a `LayerKernels`, or what `config.memory` says, for every layer in `config.layers`.

    Stateless while generating: one object may serve many caches and threads. Kernels compute in float32: `half()` and
    `to(torch.bfloat16)` leave them as they are, `to(device, dtype)` moves them. `save_pretrained` stores 16 bit on request.

    >>> kernels = LESSKernels(LESSConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16))
    >>> kernels.for_layer(0).query_features(torch.randn(1, 4, 10, 16)).shape
    torch.Size([1, 4, 10, 8])
    """

    def __init__(self, config: LESSConfig):
        super().__init__()
        self.config = config
        self.source: str | None = None  # the folder that they were loaded from; in the Hub's cache it names the commit
        self.head_budgets: HeadBudgets | None = None  # that lie beside them
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

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "LESSKernels":
        """What `to`, `half`, `cuda` and the like do to each tensor. They may move it, but it stays float32."""

        def keeping_the_type(tensor: torch.Tensor) -> torch.Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        super()._apply(keeping_the_type, recurse)
        return self

    @property
    def is_trained(self) -> bool:
        """Whether there is anything to save."""
        return any(True for _ in self.parameters())

    def for_layer(self, layer_idx: int) -> Any:
        """The kernels of a layer, or None where it has none."""
        key = str(layer_idx)
        return self.layers[key] if key in self.layers else None

    def save_pretrained(self, folder: str | os.PathLike, dtype: torch.dtype = torch.float32) -> None:
        """Write `less_config.json` and `less_kernels.safetensors` into `folder`, and `head_budgets.json` where there are head
        budgets, each in one atomic step. Without any, those that the folder holds stay, if they are of the same model.

        Args:
            folder: Made where it does not exist.
            dtype: What the file stores: float32, float16 or bfloat16. Kernels compute in float32 in any case.
        """
        if not self.is_trained:
            raise LESSError("Untrained kernels hold nothing to save: LESSKernels.untrained(model) makes them anywhere.")
        folder, budgets = expanded(folder), self.head_budgets
        if (beside := budgets or HeadBudgets.of(folder)) is not None:
            beside.check_beside(self.config, str(folder))
        tensors = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        files.write(folder, self.config, tensors, dtype, {} if budgets is None else {BUDGETS_NAME: budgets.to_json().encode()})

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
        from less_cache.hub import publish  # the network: when it is asked for

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, dtype)
            return publish.push(Path(folder), repo_id, revision, token, private, license)

    @classmethod
    def from_pretrained(
        cls, folder_or_repo: str | os.PathLike, revision: str | None = None, token: str | bool | None = None
    ) -> "LESSKernels":
        """Kernels from a folder or a Hub repository.

        Args:
            folder_or_repo: A folder with the two files, or a Hub id; of a repository nothing but these files is read, and
                `head_budgets.json` where it has one.
            revision: Branch, tag or commit of a repository; default: main.
            token: For private and gated repositories; default: the one of `hf auth login`.

        Raises:
            LESSError: The folder or a file is missing, is no safetensors file (pickle is never read), does not match
                its digest, or holds other tensors than the config describes; or the Hub does not hand it out.
        """
        folder = expanded(folder_or_repo)
        if not os.path.isdir(folder) or revision is not None:
            from less_cache.hub import client  # the network: when it is asked for

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
        kernels.source, kernels.head_budgets = str(folder), HeadBudgets.of(folder)
        if kernels.head_budgets is not None:
            kernels.head_budgets.check_beside(config, str(folder))
        return kernels.requires_grad_(False)

    @classmethod
    def from_official(cls, layers: Sequence[Mapping[str, torch.Tensor] | str | os.PathLike]) -> "LESSKernels":
        """Kernels from the official code's per-layer checkpoints, in layer order.

        Args:
            layers: A state dict a layer, or the path of a `.pt` file (read with `weights_only=True`). Both official
                forms are taken: multi-head (`kernel_k_mat1 [h, d, m]`) and Falcon's multi-query
                (`kernel_k_mat1.weight [m, d]`, one KV head).
        """
        config, converted = official.convert(layers)
        with torch.device("meta"):
            kernels = cls(config)
        for index, tensors in enumerate(converted):
            kernels.layers[str(index)].load_state_dict(tensors, assign=True)
        return kernels.requires_grad_(False)
