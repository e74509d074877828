"""What the first stage trains on: each layer's activations for a few sequences, on disk.

A forward of the model writes one shard a layer as it passes the layer, so that no more than one layer is in memory.

    capture/layer_05/sequence_0012.safetensors   keys and values [g, t, d], and for each example its prompt scores
                                                 [g, p], and queries and outputs [h, n, d] of its decoded tokens
    capture/layer_05/projection.safetensors      the output projection's weight, where the layer has one

Axes: `h` query heads, `g` KV heads, `t` tokens, `p` prompt tokens, `n` decoded tokens, `d` head dim.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel

from less_cache.training.data import TokenSampler
from less_cache.training.layers import TeacherLayer
from less_cache.training.options import Example, TrainingOptions, draw_examples
from less_cache.training.work import load_tensors, readable, save_tensors

STAGE = "capture"
OUTPUT_PROJECTIONS = ("o_proj", "dense", "out_proj", "c_proj")


@dataclasses.dataclass
class Decoded:
    """Of one example, what its decoded tokens bring."""

    scores: torch.Tensor  # [g, p] the policy's scores after the prompt
    queries: torch.Tensor  # [h, n, d]
    outputs: torch.Tensor  # [h, n, d] dense attention, before the output projection


@dataclasses.dataclass
class Shard:
    """One layer's activations for one sequence."""

    keys: torch.Tensor  # [g, t, d]
    values: torch.Tensor  # [g, t, d]
    sinks: torch.Tensor | None  # [h]
    scaling: float
    softcap: float | None
    decoded: list[Decoded]

    @classmethod
    def read(cls, path: Path, device: torch.device) -> "Shard":
        with readable(path):
            tensors, metadata = load_tensors(path, device)
            examples = range(int(metadata["examples"]))
            names = [field.name for field in dataclasses.fields(Decoded)]
            return cls(
                keys=tensors["keys"],
                values=tensors["values"],
                sinks=tensors.get("sinks"),
                scaling=float(metadata["scaling"]),
                softcap=float(metadata["softcap"]) if "softcap" in metadata else None,
                decoded=[Decoded(**{name: tensors[f"{index}.{name}"] for name in names}) for index in examples],
            )

    def write(self, path: Path) -> None:
        tensors = {"keys": self.keys, "values": self.values}
        if self.sinks is not None:
            tensors["sinks"] = self.sinks
        for index, decoded in enumerate(self.decoded):
            tensors |= {f"{index}.{name}": tensor for name, tensor in vars(decoded).items()}
        metadata = {"examples": str(len(self.decoded)), "scaling": repr(self.scaling)}
        if self.softcap is not None:
            metadata["softcap"] = repr(self.softcap)
        save_tensors(path, tensors, metadata)


class CaptureLayer(TeacherLayer):
    """Dense attention over one sequence, written to a shard and let go of."""

    def __init__(self, folder: Path, sequence: int, examples: list[Example], steps: int):
        super().__init__()
        self.folder, self.sequence, self.examples, self.steps = folder, sequence, examples, steps

    def attend(self, original: Callable, module: torch.nn.Module, *args, **kwargs):
        result = super().attend(original, module, *args, **kwargs)
        decoded = []
        for example, scores in zip(self.examples, self.scores_after(self.examples), strict=True):
            span = slice(example.prompt_length, example.prompt_length + self.steps)
            decoded.append(Decoded(scores[0], self.queries[0, :, span], result[0][0, span].transpose(0, 1)))
        projection_path = self.folder / "projection.safetensors"
        if (projection := output_projection(module)) is not None and not projection_path.exists():
            save_tensors(projection_path, {"weight": projection})
        shard = Shard(self.keys[0], self.values[0], self.sinks, self.scaling, self.softcap, decoded)
        shard.write(shard_path(self.folder, self.sequence))
        self.release()
        return result


@torch.no_grad()
def capture(
    model: PreTrainedModel,
    sampler: TokenSampler,
    options: TrainingOptions,
    folder: Path,
    layers: list[int],
    sequences: list[int],
    advance: Callable[[int], object],
) -> None:
    """Write the shards of `sequences` for `layers`; a sequence whose shards are all there is passed over."""
    for done, sequence in enumerate(sequences, start=1):
        folders = {layer_idx: layer_folder(folder, layer_idx) for layer_idx in layers}
        if not all(shard_path(path, sequence).exists() for path in folders.values()):
            examples = draw_examples(options, STAGE, sequence)
            length = examples[-1].prompt_length + options.decoded
            generator = torch.Generator().manual_seed(options.seed * 1_000_003 + sequence)
            cache = DynamicCache(config=model.config)
            for layer_idx, path in folders.items():
                cache.layers[layer_idx] = CaptureLayer(path, sequence, examples, options.decoded)
            tokens = sampler.batch(1, length, generator).to(model.device)
            model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        advance(done)


def layer_folder(folder: Path, layer_idx: int) -> Path:
    return folder / f"layer_{layer_idx:02d}"


def shard_path(folder: Path, sequence: int) -> Path:
    return folder / f"sequence_{sequence:04d}.safetensors"


def output_projection(module: torch.nn.Module) -> torch.Tensor | None:
    """Weight `[hidden, h·d]` of an attention module's output projection, None where it goes by another name."""
    for name in OUTPUT_PROJECTIONS:
        projection = getattr(module, name, None)
        if isinstance(projection, torch.nn.Linear):
            return projection.weight
    return None
