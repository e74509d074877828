"""The two stages of training: every layer on its own, then all of them on the model's output.

Both stages see the regime of use: a prompt with full attention, one selection, then decoding one token after another
under the policy, for several prompt lengths and budgets at once.
"""

import dataclasses
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import kl_div
from transformers import Cache, PreTrainedModel

from less_cache import hook
from less_cache.attention import attention_logits
from less_cache.config import LESSConfig
from less_cache.errors import LESSError
from less_cache.families import check_supported, fingerprint, geometry
from less_cache.kernels import LESSKernels
from less_cache.policies import EvictionPolicy, policy_class
from less_cache.training.data import TokenSampler
from less_cache.training.layers import StudentLayer, TeacherLayer, roll_layers
from less_cache.training.simulate import Decode, attend, columns

CHECKPOINT_NAME = "checkpoint.pt"
LOG_NAME = "training_log.jsonl"
USUAL_BUDGET = 0.05  # of the prompt: what a cache with these kernels keeps unless told otherwise
OUTPUT_PROJECTIONS = ("o_proj", "dense", "out_proj", "c_proj")


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Args:
        policy: Name in `POLICIES`.
        least_budget, most_budget: Tokens kept, as a fraction of the tokens seen; drawn log-uniformly for each prompt.
        prompts: Prompt lengths.
        decoded: Tokens decoded after each prompt.
        batch_size: Sequences a step, each as long as the longest prompt of the step and its decoded tokens.
        layerwise_steps: Steps of the first stage: each layer matches its own dense attention output.
        joint_steps: Steps of the second stage: all layers run under LESS, the model's output distribution is matched.
        prompts_per_step: Prompt lengths drawn for one step.
        layerwise_learning_rate, joint_learning_rate: Adam's, at the start; falls to a tenth along a cosine.
        rank, hidden_size: Sizes of the kernels.
        seed: Of the initial weights and of every draw.
        checkpoint_every: Steps between checkpoints.
    """

    policy: str = "h2o"
    least_budget: float = 0.02
    most_budget: float = 0.2
    prompts: tuple[int, ...] = (256, 512, 1024, 2048)
    decoded: int = 128
    batch_size: int = 2
    layerwise_steps: int = 80
    joint_steps: int = 200
    prompts_per_step: int = 3
    layerwise_learning_rate: float = 2e-3
    joint_learning_rate: float = 1e-3
    rank: int = 8
    hidden_size: int = 64
    seed: int = 0
    checkpoint_every: int = 10


def train(
    model: PreTrainedModel,
    sampler: TokenSampler,
    options: TrainingOptions,
    output: Path,
    report: Callable[[int, str, float], None] = lambda step, stage, loss: None,
) -> LESSKernels:
    """Train kernels for `model`; resumes from `output` if it holds a checkpoint of the same options.

    The model stays as it is: its parameters get no gradients while training and their flags are restored after.
    `report` gets the number of steps done, the stage and the loss after each step.

    Raises:
        LESSError: The model cannot work with a LESSCache, the texts are too short, the loss is not finite, or the
            output folder holds a checkpoint of other options. What was reached stays in the folder.
    """
    policy_class(options.policy)  # an unknown name fails before anything is written
    check_supported(model.config, model)
    hook.install()
    output.mkdir(parents=True, exist_ok=True)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False).eval()
    try:
        run = _Run(model, sampler, options, output, report)
        run.resume()
        run.go()
        return run.finished()
    finally:
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)


class _Run:
    """One training run and all that a checkpoint holds."""

    def __init__(
        self,
        model: PreTrainedModel,
        sampler: TokenSampler,
        options: TrainingOptions,
        output: Path,
        report: Callable[[int, str, float], None],
    ):
        self.model, self.sampler, self.options, self.output, self.report = model, sampler, options, output, report
        sizes = geometry(model.config)
        config = LESSConfig(
            **dataclasses.asdict(sizes),
            rank=options.rank,
            hidden_size=options.hidden_size,
            model_type=model.config.get_text_config(decoder=True).model_type,
            base_model_fingerprint=fingerprint(model),
        )
        self.kernels = LESSKernels(config).to(model.device).requires_grad_(True)
        generator = torch.Generator().manual_seed(options.seed)
        for layer_idx in config.layers:
            self.kernels.for_layer(layer_idx).reset_parameters(generator)
        self.optimizer = torch.optim.Adam(self.kernels.parameters(), lr=options.layerwise_learning_rate)
        self.step = 0

    @property
    def total_steps(self) -> int:
        return self.options.layerwise_steps + self.options.joint_steps

    def go(self) -> None:
        started, first = time.monotonic(), self.step
        while self.step < self.total_steps:
            layerwise = self.step < self.options.layerwise_steps
            if self.step == self.options.layerwise_steps:
                self.optimizer = torch.optim.Adam(self.kernels.parameters())
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate()
            self.optimizer.zero_grad()
            loss = self.layerwise_step() if layerwise else self.joint_step()
            if not math.isfinite(loss):
                raise LESSError(f"Training step {self.step}: the loss is {loss}. Resume with a lower learning rate.")
            torch.nn.utils.clip_grad_norm_(self.kernels.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            seconds = (time.monotonic() - started) / (self.step - first)
            stage = "layerwise" if layerwise else "joint"
            with (self.output / LOG_NAME).open("a") as log:
                log.write(json.dumps({"step": self.step, "stage": stage, "loss": loss, "seconds": round(seconds, 3)}) + "\n")
            if self.step % self.options.checkpoint_every == 0 or self.step == self.total_steps:
                self.checkpoint()
            self.report(self.step, stage, loss)

    def finished(self) -> LESSKernels:
        """The kernels, with what they were trained on and with in their config."""
        config = self.kernels.config
        config.policy = policy_class(self.options.policy).from_budget(USUAL_BUDGET).to_dict()
        config.training = dataclasses.asdict(self.options)
        return self.kernels.requires_grad_(False)

    def learning_rate(self) -> float:
        """A cosine from the stage's rate to a tenth of it."""
        options = self.options
        if self.step < options.layerwise_steps:
            peak, done = options.layerwise_learning_rate, self.step / options.layerwise_steps
        else:
            peak, done = options.joint_learning_rate, (self.step - options.layerwise_steps) / options.joint_steps
        return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    def draws(self) -> tuple[torch.Tensor, list[tuple[int, EvictionPolicy]]]:
        """This step's token ids `[b, t]` and prompts with their policies; a function of the seed and the step alone."""
        options = self.options
        draw = random.Random(f"{options.seed}/{self.step}")
        generator = torch.Generator().manual_seed(draw.getrandbits(63))
        prompts = []
        for prompt_length in options.prompts:
            fraction = math.exp(draw.uniform(math.log(options.least_budget), math.log(options.most_budget)))
            budget = max(2, round(fraction * (prompt_length + options.decoded)))
            prompts.append((prompt_length, policy_class(options.policy).from_budget(budget)))
        chosen = sorted(draw.sample(range(len(prompts)), min(len(prompts), options.prompts_per_step)))
        prompts = [prompts[index] for index in chosen]
        tokens = self.sampler.batch(options.batch_size, prompts[-1][0] + options.decoded, generator)
        return tokens.to(self.model.device), prompts

    @torch.no_grad()
    def teach(self, tokens: torch.Tensor, logits_at: torch.Tensor) -> tuple[list[TeacherLayer], torch.Tensor]:
        """A dense forward: its layers' activations, and the logits at the positions `logits_at`."""
        layers = [TeacherLayer() for _ in self.kernels.config.layers]
        cache = Cache(layers=list(layers))
        logits = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=logits_at).logits
        return layers, logits

    @torch.no_grad()
    def roll(self, layers: list[TeacherLayer], prompts: list[tuple[int, EvictionPolicy]]) -> list[list[Decode]]:
        """For each prompt, every layer's kept sets while it decodes."""
        rolls: list[list[Decode]] = []
        earlier: list[torch.Tensor | None] = [None] * len(layers)
        for p, policy in prompts:
            counts = policy.resolve(torch.full((self.options.batch_size,), p)).T[:, :, None, None].to(self.model.device)
            scores = [layer.prompt_scores(policy, p, counts, before) for layer, before in zip(layers, earlier, strict=True)]
            rolls.append(roll_layers(layers, policy, scores, self.options.decoded))
            if policy.observed(counts, p) == p:
                earlier = list(scores)
        return rolls

    def layerwise_step(self) -> float:
        """Mean over layers and prompts of |LESS − dense|² / |sparse − dense|², after the output projection."""
        tokens, prompts = self.draws()
        n = self.options.decoded
        layers, _ = self.teach(tokens, torch.tensor([0], device=tokens.device))
        rolls = self.roll(layers, prompts)
        total = 0.0
        for (p, _), decodes in zip(prompts, rolls, strict=True):
            for layer_idx, teacher, decode in zip(self.kernels.config.layers, layers, decodes, strict=True):
                with torch.no_grad():
                    queries = teacher.queries[:, :, p : p + n]
                    keys, values = teacher.keys[:, :, : p + n], teacher.values[:, :, : p + n]
                    logits = attention_logits(
                        queries, columns(keys, decode.order, p), decode.visible, teacher.scaling, teacher.softcap
                    )
                    target = teacher.outputs[:, p : p + n].transpose(1, 2).float()
                    sparse_error = _projected(teacher.module, attend(decode, queries, keys, values, None, logits) - target)
                output = attend(decode, queries, keys, values, self.kernels.for_layer(layer_idx), logits)
                error = _projected(teacher.module, output - target)
                loss = error.square().mean() / sparse_error.square().mean().clamp_min(1e-12)
                loss = loss / (len(prompts) * len(layers))
                loss.backward()
                total += loss.item()
        return total

    def joint_step(self) -> float:
        """Mean over decoded tokens of KL(full cache || LESS in every layer), in nats."""
        tokens, prompts = self.draws()
        n = self.options.decoded
        logits_at = torch.cat([torch.arange(p, p + n) for p, _ in prompts]).to(tokens.device)
        layers, teacher_logits = self.teach(tokens, logits_at)
        rolls = self.roll(layers, prompts)
        total = 0.0
        for index, ((p, _), decodes) in enumerate(zip(prompts, rolls, strict=True)):
            students = [
                StudentLayer(teacher, decode, self.kernels.for_layer(layer_idx))
                for layer_idx, teacher, decode in zip(self.kernels.config.layers, layers, decodes, strict=True)
            ]
            cache = Cache(layers=list(students))
            logits = self.model(tokens[:, p : p + n], past_key_values=cache, use_cache=True).logits
            target = teacher_logits[:, index * n : (index + 1) * n].float().log_softmax(-1)
            loss = kl_div(logits.float().log_softmax(-1), target, reduction="sum", log_target=True)
            loss = loss / (target.shape[0] * n * len(prompts))
            loss.backward()
            total += loss.item()
        return total

    def checkpoint(self) -> None:
        """Write everything that a resumed run needs, in one atomic step."""
        state = {
            "options": _options_key(self.options),
            "step": self.step,
            "kernels": self.kernels.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.output / f".{CHECKPOINT_NAME}.partial"
        torch.save(state, partial)
        partial.replace(self.output / CHECKPOINT_NAME)

    def resume(self) -> None:
        """Go on from the checkpoint in the output folder, if there is one."""
        path = self.output / CHECKPOINT_NAME
        if not path.exists():
            return
        state = torch.load(path, map_location=self.model.device, weights_only=True)
        if state["options"] != _options_key(self.options):
            raise LESSError(
                f"{path} is a checkpoint of other options: expected {_options_key(self.options)}, got {state['options']}. "
                "Repeat the options to go on, or choose another output folder."
            )
        self.step = state["step"]
        self.kernels.load_state_dict(state["kernels"])
        self.optimizer.load_state_dict(state["optimizer"])


def _options_key(options: TrainingOptions) -> str:
    return json.dumps(dataclasses.asdict(options), sort_keys=True)


def _projected(attention: torch.nn.Module, error: torch.Tensor) -> torch.Tensor:
    """`[b, h, n, d]` through the layer's output projection, without bias, in float32."""
    error = error.transpose(1, 2).flatten(2)  # [b, n, h·d]
    for name in OUTPUT_PROJECTIONS:
        projection = getattr(attention, name, None)
        if isinstance(projection, torch.nn.Linear):
            return (error.to(projection.weight.dtype) @ projection.weight.T).float()
    return error
