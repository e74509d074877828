"""The second stage: all kernels at once, on the model's output with LESS in every layer.

Loss: the logarithm of the mean over decoded tokens of KL(full cache || LESS), so that what counts is the share of the
divergence that goes: small budgets, which lose ten times as much, would drown the others. Each sequence of a step is a unit
of its own: one dense forward for all its prompts, then a block of decoded tokens a prompt. Processes share the units out and
the units' gradients are added in one order, so that any number of processes ends with the same bytes.

Axes: `n` decoded tokens.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from less_cache.errors import LESSError
from less_cache.kernels import LESSKernels
from less_cache.training.data import TokenSampler
from less_cache.training.layers import TeacherLayer, roll_layers, student_cache, teacher_cache
from less_cache.training.options import Example, TrainingOptions, cosine, draw_examples
from less_cache.training.processes import Processes

STAGE = "joint"
WARM_UP = 10  # steps in which the learning rate rises
LITTLE = 1e-3  # nats a token: what is lost where it hardly matters any more


class JointStage:
    """Kernels, optimizer and the number of steps done: all that a checkpoint holds."""

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
        self.optimizer = torch.optim.Adam(self.parameters, betas=(0.9, 0.98))  # few steps: the usual 0.999 adapts too late
        self.losses: list[float] = []

    @property
    def step(self) -> int:
        return len(self.losses)

    def advance(self) -> float:
        """One step. Returns its divergence, mean over the sequences."""
        options = self.options
        first = self.step * options.batch_size
        units = [self._unit(first + index) for index in self.processes.share(range(options.batch_size))]
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
        for group in self.optimizer.param_groups:
            group["lr"] = cosine(options.joint_learning_rate, self.step / options.joint_steps)
            group["lr"] *= min(1, (self.step + 1) / WARM_UP)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.losses.append(loss)
        return loss

    def _unit(self, index: int) -> torch.Tensor:
        """Gradient of the mean loss of one sequence, flat, and its mean divergence at the end."""
        examples = draw_examples(self.options, STAGE, index)
        generator = torch.Generator().manual_seed((self.options.seed + 1) * 1_000_003 + index)
        tokens = self.sampler.batch(1, examples[-1].prompt_length + self.options.decoded, generator).to(self.model.device)
        self.optimizer.zero_grad()
        loss = self._backward(tokens, examples)
        return torch.cat([parameter.grad.flatten() for parameter in self.parameters] + [self.parameters[0].new_tensor([loss])])

    def _backward(self, tokens: torch.Tensor, examples: Sequence[Example]) -> float:
        n = self.options.decoded
        spans = [slice(example.prompt_length, example.prompt_length + n) for example in examples]
        with torch.no_grad():
            dense = teacher_cache(self.model.config, self.kernels.config.layers)
            logits_at = torch.cat([torch.arange(span.start, span.stop) for span in spans]).to(tokens.device)
            targets = self.model(tokens, past_key_values=dense, use_cache=True, logits_to_keep=logits_at).logits.split(n, dim=1)
            teachers = [layer for layer in dense.layers if isinstance(layer, TeacherLayer)]
            scores = zip(*(teacher.scores_after(examples) for teacher in teachers), strict=True)
            rolls = [roll_layers(teachers, example, each, n) for example, each in zip(examples, scores, strict=True)]
        total = 0.0
        for example, span, target, decodes in zip(examples, spans, targets, rolls, strict=True):
            cache = student_cache(dense, example, decodes, self.kernels)
            logits = self.model(tokens[:, span], past_key_values=cache, use_cache=True).logits
            log_target = target.float().log_softmax(-1)
            divergence = kl_div(logits.float().log_softmax(-1), log_target, reduction="sum", log_target=True) / n
            (torch.log(divergence + LITTLE) / len(examples)).backward()
            total += divergence.item() / len(examples)
        return total

    def state_dict(self) -> dict:
        return {"kernels": self.kernels.state_dict(), "optimizer": self.optimizer.state_dict(), "losses": self.losses}

    def load_state_dict(self, state: dict) -> None:
        self.kernels.load_state_dict(state["kernels"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = state["losses"]
