"""The second stage: all kernels at once, on the model's output with LESS in every layer.

Loss of a block of decoded tokens, with x_l what layer l of L hands on to the next, the last one behind the model's last norm:

    log KL(full cache || LESS)  +  1/L Σ_l log( |x_l − x_l of the full cache|² / |x_l of the full cache|² )

Logarithms, so that what counts is the share of the divergence that goes: small budgets, which lose ten times as much, would
drown the others. The output alone tells a layer little about its own part of the error; the second term does.

Each sequence of a step is a unit of its own: one dense forward for all its prompts, which a few steps share, then a block of
decoded tokens a prompt. Processes share the units out and the units' gradients are added in one order, so that any number of
processes ends with the same bytes.

Axes: `b` sequences, `t` tokens of a sequence, `n` decoded tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import kl_div
from transformers import Cache, PreTrainedModel

from less_cache.errors import LESSError
from less_cache.kernels import LESSKernels
from less_cache.training.data import TokenSampler
from less_cache.training.layers import TeacherLayer, roll_layers, student_cache, teacher_cache
from less_cache.training.muon import Muon
from less_cache.training.options import Example, TrainingOptions, cosine, draw_examples
from less_cache.training.processes import Processes

STAGE = "joint"
WARM_UP = 10  # steps in which the learning rate rises
LITTLE = 1e-3  # nats a token: what is lost where it hardly matters any more
LITTLE_APART = 1e-4  # the same of a layer's share


@dataclasses.dataclass
class Dense:
    """A sequence as the model sees it with its full cache."""

    tokens: torch.Tensor  # [1, t]
    cache: Cache
    # Of the tokens decoded after each prompt
    logits: Sequence[torch.Tensor]  # [1, n, vocab]
    hidden_states: Sequence[Sequence[torch.Tensor]]  # [1, n, hidden], the embeddings first, then what each layer hands on


class JointStage:
    """Kernels, optimizers and the number of steps done: all that a checkpoint holds."""

    def __init__(
        self,
        model: PreTrainedModel,
        kernels: LESSKernels,
        sampler: TokenSampler,
        options: TrainingOptions,
        processes: Processes,
    ):
        self.model, self.kernels, self.sampler, self.options, self.processes = model, kernels, sampler, options, processes
        kernels.requires_grad_(True)
        self.parameters = list(kernels.parameters())
        self.sizes = [parameter.numel() for parameter in self.parameters]
        matrices = [parameter for parameter in self.parameters if parameter.dim() == 3]  # a matrix for each head
        others = [parameter for parameter in self.parameters if parameter.dim() != 3]
        rate, betas = options.joint_learning_rate, (0.9, 0.98)  # few steps: the usual 0.999 adapts too late
        self.optimizers = [Muon(matrices, rate), torch.optim.Adam(others, rate, betas=betas)]
        self.losses: list[float] = []
        self._held: dict[int, Dense] = {}  # sequences that later steps use again

    @property
    def step(self) -> int:
        return len(self.losses)

    def advance(self) -> float:
        """One step. Returns its divergence, mean over the sequences."""
        options = self.options
        group, turn = divmod(self.step, options.steps_per_sequence)
        sequences = range(group * options.batch_size, (group + 1) * options.batch_size)
        units = [self._unit(sequence, turn) for sequence in self.processes.share(sequences)]
        total = self.processes.sum_in_order(units, options.batch_size, sum(self.sizes) + 1)
        loss = total[-1].item() / options.batch_size
        if not torch.isfinite(total).all():
            raise LESSError(
                f"Joint step {self.step}: the loss is {loss}, and it or a gradient is not finite. The last checkpoint and the "
                "finished layers are kept; choose another output folder and a lower TrainingOptions.joint_learning_rate."
            )
        gradients = (total[:-1] / options.batch_size).split(self.sizes)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        rate = cosine(options.joint_learning_rate, self.step / options.joint_steps) * min(1, (self.step + 1) / WARM_UP)
        for optimizer in self.optimizers:
            for parameters in optimizer.param_groups:
                parameters["lr"] = rate
            optimizer.step()
        self.losses.append(loss)
        return loss

    def _unit(self, sequence: int, turn: int) -> torch.Tensor:
        """Gradient of the mean loss of one sequence, flat, and its mean divergence at the end."""
        dense = self._held.pop(sequence, None) or self._dense(sequence)
        if turn + 1 < self.options.steps_per_sequence:
            self._held[sequence] = dense
        self.kernels.zero_grad()
        loss = self._backward(dense, draw_examples(self.options, STAGE, sequence, turn))
        return torch.cat([parameter.grad.flatten() for parameter in self.parameters] + [self.parameters[0].new_tensor([loss])])

    @torch.no_grad()
    def _dense(self, sequence: int) -> Dense:
        options = self.options
        lengths = [example.prompt_length for example in draw_examples(options, STAGE, sequence)]
        generator = torch.Generator().manual_seed((options.seed + 1) * 1_000_003 + sequence)
        tokens = self.sampler.batch(1, lengths[-1] + options.decoded, generator).to(self.model.device)
        cache = teacher_cache(self.model.config, self.kernels.config.layers)
        decoded = torch.cat([torch.arange(length, length + options.decoded) for length in lengths]).to(tokens.device)
        output = self._forward(tokens, cache, decoded)
        if output.hidden_states is None:
            raise LESSError(
                f"{type(self.model).__name__}: expected a model that returns its hidden states, which the second stage needs. "
                "Train with layerwise_steps=200, joint_steps=0."
            )
        # The tokens are the last axis but one in every model; some have others before the batch.
        by_layer = [states.index_select(-2, decoded).split(options.decoded, dim=-2) for states in output.hidden_states]
        return Dense(tokens, cache, output.logits.split(options.decoded, dim=1), list(zip(*by_layer, strict=True)))

    def _backward(self, dense: Dense, examples: Sequence[Example]) -> float:
        n = self.options.decoded
        teachers = [layer for layer in dense.cache.layers if isinstance(layer, TeacherLayer)]
        with torch.no_grad():
            scores = zip(*(teacher.scores_after(examples) for teacher in teachers), strict=True)
            rolls = [roll_layers(teachers, example, each, n) for example, each in zip(examples, scores, strict=True)]
        total = 0.0
        for example, target, states, decodes in zip(examples, dense.logits, dense.hidden_states, rolls, strict=True):
            span = slice(example.prompt_length, example.prompt_length + n)
            less = self._forward(dense.tokens[:, span], student_cache(dense.cache, example, decodes, self.kernels))
            log_target = target.float().log_softmax(-1)
            divergence = kl_div(less.logits.float().log_softmax(-1), log_target, reduction="sum", log_target=True) / n
            apart = distances(less.hidden_states, states)
            loss = torch.log(divergence + LITTLE) + torch.log(apart + LITTLE_APART).mean()
            (loss / len(examples)).backward()
            total += divergence.item() / len(examples)
        return total

    def _forward(self, tokens: torch.Tensor, cache: Cache, logits_to_keep: torch.Tensor | int = 0) -> Any:
        """Logits, and what each layer hands on."""
        return self.model(
            tokens, past_key_values=cache, use_cache=True, logits_to_keep=logits_to_keep, output_hidden_states=True
        )

    def state_dict(self) -> dict:
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"kernels": self.kernels.state_dict(), "optimizers": optimizers, "losses": self.losses}

    def load_state_dict(self, state: dict) -> None:
        self.kernels.load_state_dict(state["kernels"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.losses = state["losses"]


def distances(hidden_states: Sequence[torch.Tensor], dense: Sequence[torch.Tensor]) -> torch.Tensor:
    """|x − x dense|² / |x dense|² of what each layer hands on, `[layers]`; each `[b, n, hidden]`, the embeddings first."""
    pairs = [(states.float(), target.float()) for states, target in zip(hidden_states[1:], dense[1:], strict=True)]
    return torch.stack([(states - target).square().mean() / target.square().mean() for states, target in pairs])
