"""What a dense forward over one sequence leaves for the student: made once, kept on disk, used in several joint steps.

    lessons/sequence_00012.safetensors   each layer's keys and values [b, g, t, d], and for each example the logits of its
                                         decoded tokens [b, n, vocabulary], what the layers hand on, and who was kept

Axes: `b` sequences (1), `g` KV heads, `t` tokens, `n` decoded tokens, `d` head dim, `l` layers and the embeddings.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig

from less_cache.training.files import load_tensors, save_tensors
from less_cache.training.layers import TeacherLayer, roll_layers, teacher_cache
from less_cache.training.options import Example
from less_cache.training.simulate import Decode


@dataclasses.dataclass
class Task:
    """The block of tokens decoded after one example's prompt."""

    logits: torch.Tensor  # [b, n, vocabulary] of the full cache
    hidden_states: torch.Tensor  # [l, …, n, hidden] what each layer hands on, the embeddings first
    decodes: list[Decode]  # of each layer with kernels


@dataclasses.dataclass
class Lesson:
    """A sequence's dense keys and values, and a task for each example."""

    dense: Cache
    tasks: list[Task]

    @classmethod
    def of(cls, output: Any, dense: Cache, examples: Sequence[Example], decoded: int) -> "Lesson":
        """Of a forward with the cache `dense`; its `output` has logits of the examples' decoded tokens, one after another."""
        teachers = [layer for layer in dense.layers if isinstance(layer, TeacherLayer)]
        scores = zip(*(teacher.scores_after(examples) for teacher in teachers), strict=True)
        tasks = []
        for example, logits, each in zip(examples, output.logits.split(decoded, dim=1), scores, strict=True):
            span = slice(example.prompt_length, example.prompt_length + decoded)
            # The tokens are the last axis but one in every model; some have others before the batch.
            hidden_states = torch.stack([states[..., span, :] for states in output.hidden_states])
            tasks.append(Task(logits, hidden_states, roll_layers(teachers, example, each, decoded)))
        return cls(dense, tasks)

    def save(self, path: Path) -> None:
        """One safetensors file, in one atomic step."""
        tensors, metadata = {}, {"tasks": str(len(self.tasks))}
        layer: Any  # a TeacherLayer or a DenseLayer
        for index, layer in enumerate(self.dense.layers):
            tensors |= {f"layer {index} keys": layer.keys, f"layer {index} values": layer.values}
            if isinstance(layer, TeacherLayer):
                metadata[f"layer {index} scaling"] = repr(layer.scaling)
                if layer.softcap is not None:
                    metadata[f"layer {index} softcap"] = repr(layer.softcap)
                if layer.sinks is not None:
                    tensors[f"layer {index} sinks"] = layer.sinks
        for index, task in enumerate(self.tasks):
            tensors |= {f"task {index} logits": task.logits, f"task {index} hidden_states": task.hidden_states}
            for name in FIELDS:
                tensors[f"task {index} {name}"] = torch.stack([getattr(decode, name) for decode in task.decodes])
        save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path, config: PreTrainedConfig, with_kernels: Sequence[int], device: torch.device) -> "Lesson":
        """What `save` wrote. `with_kernels`: the layers of the model that have kernels."""
        tensors, metadata = load_tensors(path, device)
        dense = teacher_cache(config, with_kernels)
        layer: Any
        for index, layer in enumerate(dense.layers):
            layer.keys, layer.values = tensors[f"layer {index} keys"], tensors[f"layer {index} values"]
            if isinstance(layer, TeacherLayer):
                softcap = metadata.get(f"layer {index} softcap")
                layer.softcap = None if softcap is None else float(softcap)
                layer.scaling, layer.sinks = float(metadata[f"layer {index} scaling"]), tensors.get(f"layer {index} sinks")
        tasks = []
        for index in range(int(metadata["tasks"])):
            by_layer = zip(*(tensors[f"task {index} {name}"] for name in FIELDS), strict=True)
            decodes = [Decode(*each) for each in by_layer]
            tasks.append(Task(tensors[f"task {index} logits"], tensors[f"task {index} hidden_states"], decodes))
        return cls(dense, tasks)


FIELDS = [field.name for field in dataclasses.fields(Decode)]
