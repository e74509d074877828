"""The second stage: all kernels at once, on the model's output with LESS in every layer.

Loss of a block of decoded tokens, with x_l what layer l of L hands on to the next, the last one behind the model's last norm,
and o_l the layer's attention output, which õ_l would be if the same queries read a full cache of the same pairs:

    log(KL(full cache || LESS) + ε)  +  1/L Σ_l log( |x_l − x_l of the full cache|² / |x_l of the full cache|² + ε' )
                                     +  1/L Σ_l log( |o_l − õ_l|² / |õ_l|² + ε' )

ε and ε' are `LITTLE` and `LITTLE_APART`; the last sum's shares are those of every `layers.EVERY`-th token.
Logarithms, so that what counts is the share of the divergence that goes: small budgets, which lose ten times as much, would
drown the others. The output alone tells a layer little about its own part of the error; the second term tells more, and the
third what this layer's own state has lost, whatever the layers before it did.

Each sequence of a step is a unit of its own: one dense forward for all its prompts, then a block of decoded tokens a prompt.
Processes share the units out and the units' gradients are added in one order, so that any number of processes ends with the
same bytes.

Axes: `b` sequences, `n` decoded tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import kl_div
from transformers import Cache, PreTrainedModel

from less_cache.errors import LESSError
from less_cache.kernels.kernels import LESSKernels
from less_cache.training.data import TokenSampler
from less_cache.training.layers import StudentLayer, TeacherLayer, apart, roll_layers, student_cache, teacher_cache
from less_cache.training.muon import Muon
from less_cache.training.options import Example, TrainingOptions, draw_examples, falling
from less_cache.training.processes import Processes

STAGE = "joint"
WARM_UP = 10  # steps in which the learning rate rises
LITTLE = 1e-3  # nats a token: what is lost where it hardly matters any more
LITTLE_APART = 1e-4  # the same of a layer's share


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

    @property
    def step(self) -> int:
        return len(self.losses)

    def advance(self) -> float:
        """One step. Returns its divergence, mean over the sequences."""
        options = self.options
        sequences = range(self.step * options.batch_size, (self.step + 1) * options.batch_size)
        units = [self._unit(sequence) for sequence in self.processes.share(sequences)]
        total = self.processes.sum_in_order(units, options.batch_size, sum(self.sizes) + 1)
        loss = total[-1].item() / options.batch_size
        if not torch.isfinite(total).all():
            raise LESSError(
                f"Joint step {self.step}: the divergence is {loss}, and it or a gradient is not finite. The finished layers "
                "and the last checkpoint are kept in work/. Lower joint_learning_rate (--joint-learning-rate), for which "
                "joint.pt, where there is one, must be removed."
            )
        gradients = (total[:-1] / options.batch_size).split(self.sizes)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        rate = falling(options.joint_learning_rate, self.step / options.joint_steps) * min(1, (self.step + 1) / WARM_UP)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.losses.append(loss)
        return loss

    def _unit(self, sequence: int) -> torch.Tensor:
        """Gradient of the mean loss of one sequence, flat, and its mean divergence at the end."""
        examples = draw_examples(self.options, STAGE, sequence)
        generator = torch.Generator().manual_seed((self.options.seed + 1) * 1_000_003 + sequence)
        tokens = self.sampler.batch(1, examples[-1].prompt_length + self.options.decoded, generator).to(self.model.device)
        self.kernels.zero_grad()
        loss = self._backward(tokens, examples)
        return torch.cat([parameter.grad.flatten() for parameter in self.parameters] + [self.parameters[0].new_tensor([loss])])

    def _backward(self, tokens: torch.Tensor, examples: Sequence[Example]) -> float:
        n = self.options.decoded
        spans = [slice(example.prompt_length, example.prompt_length + n) for example in examples]
        with torch.no_grad():
            dense = teacher_cache(self.model.config, self.kernels.config.layers)
            decoded = torch.cat([torch.arange(span.start, span.stop) for span in spans]).to(tokens.device)
            full = self._forward(tokens, dense, decoded)
            targets = full.logits.split(n, dim=1)
            # The tokens are the last axis but one in every model; some have others before the batch.
            by_layer = [states.index_select(-2, decoded).split(n, dim=-2) for states in full.hidden_states]
            handed_on = list(zip(*by_layer, strict=True))  # for each example, what each layer hands on
            teachers = [layer for layer in dense.layers if isinstance(layer, TeacherLayer)]
            scores = zip(*(teacher.scores_after(examples) for teacher in teachers), strict=True)
            rolls = [roll_layers(teachers, example, each, n) for example, each in zip(examples, scores, strict=True)]
            del full  # with what layers hand on of the prompt
        total = 0.0
        for example, span, target, states, decodes in zip(examples, spans, targets, handed_on, rolls, strict=True):
            students = student_cache(dense, example, decodes, self.kernels)
            less = self._forward(tokens[:, span], students)
            log_target = target.float().log_softmax(-1)
            divergence = kl_div(less.logits.float().log_softmax(-1), log_target, reduction="sum", log_target=True) / n
            errors = torch.stack([layer.error for layer in students.layers if isinstance(layer, StudentLayer)])
            handed = distances(less.hidden_states, states)
            loss = torch.log(divergence + LITTLE) + log_mean(handed) + log_mean(errors)
            (loss / len(examples)).backward()
            total += divergence.item() / len(examples)
        return total

    def _forward(self, tokens: torch.Tensor, cache: Cache, logits_to_keep: torch.Tensor | int = 0) -> Any:
        """Logits, and what each layer hands on."""
        output = self.model(
            tokens, past_key_values=cache, use_cache=True, logits_to_keep=logits_to_keep, output_hidden_states=True
        )
        if output.hidden_states is None:
            raise LESSError(
                f"{type(self.model).__name__}: expected a model that returns its hidden states, which the second stage needs. "
                "Train with layerwise_steps=200, joint_steps=0 (--layerwise-steps 200 --joint-steps 0)."
            )
        return output

    def state_dict(self) -> dict:
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"kernels": self.kernels.state_dict(), "optimizers": optimizers, "losses": self.losses}

    def load_state_dict(self, state: dict) -> None:
        self.kernels.load_state_dict(state["kernels"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.losses = state["losses"]


def log_mean(shares: torch.Tensor) -> torch.Tensor:
    """Mean logarithm of the layers' shares; those far below `LITTLE_APART` hardly count."""
    return torch.log(shares + LITTLE_APART).mean()


def distances(hidden_states: Sequence[torch.Tensor], dense: Sequence[torch.Tensor]) -> torch.Tensor:
    """|x − x dense|² / |x dense|² of what each layer hands on, `[layers]`; each `[b, n, hidden]`, the embeddings first."""
    return torch.stack([apart(states, target) for states, target in zip(hidden_states[1:], dense[1:], strict=True)])
