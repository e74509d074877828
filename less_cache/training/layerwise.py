"""The first stage: each layer's kernels on that layer's captured activations, without the model.

Loss of an example: |LESS − dense|² / |policy alone − dense|² over its decoded tokens, after the output projection: the
share of the policy's error that is left, the same scale for every layer.

Axes: `b` examples, `h` query heads, `g` KV heads, `p` prompt tokens, `n` decoded tokens, `d` head dim.
"""

import collections
import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from less_cache.errors import LESSError
from less_cache.files import plain_json
from less_cache.memory.base import TrainedMemory
from less_cache.ops.attention import attention_logits
from less_cache.training.capture import STAGE, Shard, shard_path
from less_cache.training.options import TrainingOptions, draw_examples, falling
from less_cache.training.simulate import Decode, attend, columns, roll
from less_cache.training.work import load_tensors, readable, save_tensors

ROLLED_AT_ONCE = 16  # examples


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """How well one layer's kernels do on the held-out sequences, shares of the policy's error left before and after training,
    and the first stage's losses.
    """

    layer: int
    before: float
    after: float
    losses: list[float]


class LayerTask:
    """One layer's shards of `sequences`, and what the policy keeps at every step of their examples."""

    def __init__(self, folder: Path, options: TrainingOptions, sequences: Sequence[int], device: torch.device):
        self.folder, self.options, self.sequences, self.device = folder, options, sequences, device
        path = folder / "projection.safetensors"
        with readable(path, f"Remove {folder}: the same command makes it anew."):
            self.projection = load_tensors(path, device)[0]["weight"] if path.exists() else None  # [hidden, h·d]
        self.decodes = self._roll()

    def shard(self, sequence: int) -> Shard:
        return Shard.read(shard_path(self.folder, sequence), self.device)

    @torch.no_grad()
    def _roll(self) -> dict[tuple[int, int], Decode]:
        """By sequence and example. Those of one prompt length and policy are rolled as one batch."""
        groups = collections.defaultdict(list)
        for sequence in self.sequences:
            for index, example in enumerate(draw_examples(self.options, STAGE, sequence)):
                groups[example.prompt_length, example.policy.name].append((sequence, index, example))
        decodes = {}
        for (p, _), members in groups.items():
            for first in range(0, len(members), ROLLED_AT_ONCE):
                chunk = members[first : first + ROLLED_AT_ONCE]
                shards = [self.shard(sequence) for sequence, _, _ in chunk]
                decoded = [shard.decoded[index] for shard, (_, index, _) in zip(shards, chunk, strict=True)]
                length = torch.full((1,), p, device=self.device)
                counts = torch.cat([example.policy.resolve(length) for _, _, example in chunk])
                rolled = roll(
                    chunk[0][2].policy,  # what differs between the policies of a chunk is in `counts`
                    torch.stack([each.queries for each in decoded]),
                    torch.stack([shard.keys[:, : p + self.options.decoded] for shard in shards]),
                    torch.stack([each.scores for each in decoded]),
                    counts.T[:, :, None, None],
                    shards[0].scaling,
                    shards[0].softcap,
                    shards[0].sinks,
                )
                for (sequence, index, _), decode in zip(chunk, rolled.split(1), strict=True):
                    decodes[sequence, index] = decode
        return decodes

    def losses(self, kernels: TrainedMemory, sequence: int) -> list[torch.Tensor]:
        """Share of the policy's error that `kernels` leave, for each example of a sequence."""
        shard = self.shard(sequence)
        losses = []
        for index, decoded in enumerate(shard.decoded):
            decode = self.decodes[sequence, index]
            p = decode.keep.shape[-1]
            queries, target = decoded.queries[None], decoded.outputs[None].float()
            keys, values = (states[None, :, : p + queries.shape[2]] for states in (shard.keys, shard.values))
            with torch.no_grad():
                logits = attention_logits(queries, columns(keys, decode.order, p), decode.visible, shard.scaling, shard.softcap)
            constants = logits, shard.scaling, shard.softcap, shard.sinks
            with torch.no_grad():
                alone = self._projected(attend(decode, queries, keys, values, None, *constants) - target)
            error = self._projected(attend(decode, queries, keys, values, kernels, *constants) - target)
            losses.append(error.square().mean() / alone.square().mean().clamp_min(1e-12))
        return losses

    def _projected(self, error: torch.Tensor) -> torch.Tensor:
        """`[b, h, n, d]` through the output projection, without bias, in float32."""
        if self.projection is None:
            return error
        return (error.transpose(1, 2).flatten(2).to(self.projection.dtype) @ self.projection.T).float()

    @torch.no_grad()
    def error_left(self, kernels: TrainedMemory) -> float:
        """Share of the policy's error that `kernels` leave, mean over all examples."""
        losses = [loss.item() for sequence in self.sequences for loss in self.losses(kernels, sequence)]
        return sum(losses) / len(losses)


def train_layer(
    folder: Path,
    layer_idx: int,
    options: TrainingOptions,
    kernels: TrainedMemory,
    device: torch.device,
    advance: Callable[[int, float], object] = lambda done, loss: None,
) -> list[float]:
    """Fit `kernels`, in place, to the shards in `folder`; returns the losses. A function of the shards, the options,
    `layer_idx` and the weights that the kernels have.
    """
    kernels.to(device).requires_grad_(True)
    task = LayerTask(folder, options, range(options.held_out.start), device)
    optimizer = torch.optim.Adam(kernels.parameters())
    draw = random.Random(f"{options.seed}/layer/{layer_idx}")
    losses: list[float] = []
    epoch: list[int] = []
    for step in range(options.layerwise_steps):
        if not epoch:
            epoch = draw.sample(task.sequences, len(task.sequences))
        for group in optimizer.param_groups:
            group["lr"] = falling(options.layerwise_learning_rate, step / options.layerwise_steps)
        optimizer.zero_grad()
        loss = torch.stack(task.losses(kernels, epoch.pop())).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(kernels.parameters(), 1.0)
        if not torch.isfinite(loss + norm):
            raise LESSError(
                f"Layer {layer_idx}, step {step}: the loss is {loss.item()}, and it or a gradient is not finite. Finished "
                "layers are kept; a lower layerwise_learning_rate (--layerwise-learning-rate) needs another output folder."
            )
        optimizer.step()
        losses.append(loss.item())
        advance(len(losses), losses[-1])
    kernels.requires_grad_(False)
    return losses


def save_layer(path: Path, kernels: TrainedMemory, losses: list[float]) -> None:
    save_tensors(path, kernels.state_dict(), {"losses": plain_json.dump(losses)})


def load_layer(path: Path, kernels: TrainedMemory) -> list[float]:
    """Read a finished layer into `kernels`; returns its losses."""
    with readable(path):
        tensors, metadata = load_tensors(path)
        kernels.load_state_dict(tensors)
        return plain_json.parse(metadata["losses"])
