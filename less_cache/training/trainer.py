"""The whole of a training run: capture, each layer on its own, then all of them on the model's output.

Both stages see the regime of use: a prompt with full attention, one selection, then decoding one token after another
under the policy, for several prompt lengths, budgets and policies.

A run keeps what it has finished in `work/` in its output folder: `capture/` (see `capture.py`), `layers/layer_05.safetensors`
for each layer that is done, `joint.pt`, and `run.json`, which says whose it is. The same call goes on there after any
interruption and ends with the same bytes. At the end each layer is measured on the held-out sequences.
"""

import copy
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from less_cache.errors import LESSError
from less_cache.files import plain_json
from less_cache.integration import hook
from less_cache.integration.families import check_supported, fingerprint, full_attention_layers, geometry
from less_cache.kernels.config import LESSConfig
from less_cache.kernels.kernels import LESSKernels
from less_cache.memory.base import TrainedMemory
from less_cache.policies import USUAL_BUDGET, policy_class
from less_cache.reports import machine
from less_cache.training.capture import capture, layer_folder
from less_cache.training.data import TokenSampler
from less_cache.training.joint import JointStage
from less_cache.training.layers import teacher_cache
from less_cache.training.layerwise import LayerRecord, LayerTask, load_layer, save_layer, train_layer
from less_cache.training.options import TrainingOptions
from less_cache.training.processes import Processes
from less_cache.training.work import (
    FORMAT,
    OF_JOINT,
    RUN_NAME,
    WORK_NAME,
    differences,
    identity,
    made_by_others,
    read_run,
    readable,
    write_whole,
)

LOG_NAME = "training_log.json"


class Report(Protocol):
    """Called as a run goes on: of a stage's `total` steps `done` are done.

    Stages: `own text`, `capture`, `layer 7` (one layer's steps), `layers` (finished ones), `joint`, `measure` (layers).
    """

    def __call__(self, stage: str, done: int, total: int, loss: float | None = None) -> None: ...


def silent(stage: str, done: int, total: int, loss: float | None = None) -> None:
    pass


def check(model: PreTrainedModel, options: TrainingOptions) -> None:
    """Raise `LESSError` for a model that cannot be trained so."""
    check_supported(model.config, model)
    limit = context(model)
    if limit is not None and options.longest > limit:
        raise LESSError(
            f"Expected sequences of at most {limit} tokens, the model's context, got {options.longest}: prompts of "
            f"{max(options.prompts)} and {options.decoded} decoded. Pass shorter prompts=(…) (--prompt-length, repeatable)."
        )
    if options.joint_steps:
        teacher_cache(model.config, full_attention_layers(model.config))


def context(model: PreTrainedModel) -> int | None:
    """Tokens of the longest sequence that the model was made for; None where its config names none."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def train(
    model: PreTrainedModel,
    sampler: TokenSampler,
    options: TrainingOptions,
    output: Path,
    report: Report = silent,
    described: Mapping[str, Any] | None = None,
) -> LESSKernels:
    """Train kernels for `model`; goes on where an interrupted run of the same options, texts and model stopped.

    The model stays as it is: its parameters get no gradients while training and their flags are restored after.
    Started by `accelerate launch`, the processes share sequences and layers; all return the same kernels.

    Args:
        described: What else the config's `training` shall say, such as the names of the texts.

    Returns:
        The kernels, with what they were trained on and with in their config. What each layer reached and the second
        stage's losses are in `output/training_log.json`.

    Raises:
        LESSError: The model cannot work with a LESSCache, the texts are too short, the loss is not finite, disk or memory
            are full, or the output folder holds another run. What was finished stays in the folder.
    """
    check(model, options)
    sampler.check(options.longest)
    hook.install()
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    model.requires_grad_(False).eval()
    try:
        return _Run(model, sampler, options, output, report, described or {}).go()
    except RuntimeError as error:
        if not machine.out_of_memory(error):
            raise
        raise LESSError(
            f"Training ran out of memory: {error} What was finished stays. Shorter prompts (--prompt-length) or a model in "
            "bfloat16 (--dtype) take less; without the joint stage (--layerwise-steps 200 --joint-steps 0) the activations of "
            "one layer are in memory at a time. --dry-run tells what each takes. Other options need another output folder."
        ) from error
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training


def described_training(options: TrainingOptions, described: Mapping[str, Any]) -> dict[str, Any]:
    """The config's `training`, as its JSON has it."""
    return plain_json.parse(plain_json.dump({**dataclasses.asdict(options), **described}))


class _Run:
    def __init__(
        self,
        model: PreTrainedModel,
        sampler: TokenSampler,
        options: TrainingOptions,
        output: Path,
        report: Report,
        described: Mapping[str, Any],
    ):
        self.model, self.sampler, self.options, self.output = model, sampler, options, output
        self.processes = Processes(model.device)
        if options.joint_steps and self.processes.count > options.batch_size:
            raise LESSError(
                f"Expected at least as many sequences a joint step as processes, got {options.batch_size} for "
                f"{self.processes.count} processes. Pass batch_size={self.processes.count} (--batch-size) or start fewer."
            )
        self.report = report if self.processes.is_first else silent
        self.work = output / WORK_NAME
        config = LESSConfig(
            **dataclasses.asdict(geometry(model.config)),
            memory=options.memory,
            rank=options.rank if isinstance(options.rank, int) else list(options.rank),
            hidden_size=options.hidden_size,
            layers=full_attention_layers(model.config),
            model_type=model.config.get_text_config(decoder=True).model_type,
            base_model_fingerprint=fingerprint(model),
            policy=policy_class(options.policies[0]).from_budget(USUAL_BUDGET).to_dict(),
            training=described_training(options, described),
        )
        with torch.random.fork_rng(devices=[]):  # weights that the stages draw anew: the user's generator stays where it is
            self.kernels = LESSKernels(config)

    def go(self) -> LESSKernels:
        self.claim_folder()
        layer_losses = self.layerwise()
        losses = self.joint()
        self.capture(self.options.held_out)
        kernels = self.kernels.requires_grad_(False)
        kernels.zero_grad()
        if self.processes.is_first:
            records = []
            for done, (layer_idx, each) in enumerate(layer_losses.items(), start=1):
                records.append(self.measure(layer_idx, each))
                self.report("measure", done, len(layer_losses))
            log = {
                "options": dataclasses.asdict(self.options),
                "layers": [dataclasses.asdict(record) for record in records],
                "joint": losses,
                **machine.describe(self.model.device),
            }
            write_whole(self.output / LOG_NAME, (plain_json.dump(log) + "\n").encode())
        self.processes.wait()
        return kernels

    def claim_folder(self) -> None:
        """A folder belongs to one model, one set of options and the same texts. Nothing in it is removed."""
        path = self.work / RUN_NAME
        run = identity(self.kernels.config.training, self.kernels.config.base_model_fingerprint, self.sampler.digest())
        if not path.exists() and (names := made_by_others(self.work)):
            raise LESSError(
                f"{self.work}: expected no folder, or one that a training run began, got one with {', '.join(names[:8])} and "
                f"without {RUN_NAME}. Choose another output folder."
            )
        if self.processes.is_first and not path.exists():
            write_whole(path, plain_json.dump(run).encode())
        self.processes.wait()
        found = read_run(self.work)
        if found.get("format") != FORMAT:  # the oldest had none
            raise LESSError(
                f"{self.output} holds a run that another version of less-cache began. Choose another output folder."
            )
        if found != run:
            raise LESSError(
                f"{self.output} holds a run of other options, texts or another model. {differences(found, run)}. Repeat what "
                "it has to go on, or choose another output folder."
            )

    def layerwise(self) -> dict[int, list[float]]:
        """Capture, then every layer on its own; finished layers are read back. Returns the losses of each."""
        options, layers = self.options, self.kernels.config.layers
        finished = {layer_idx: self.work / "layers" / f"layer_{layer_idx:02d}.safetensors" for layer_idx in layers}
        if options.layerwise_steps:
            if not all(path.exists() for path in finished.values()):
                self.capture(range(options.sequences))
            mine = self.processes.share(layers)
            for done, layer_idx in enumerate(mine, start=1):
                if not finished[layer_idx].exists():
                    self.train_layer(layer_idx, finished[layer_idx])
                self.report("layers", done, len(mine))
            self.processes.wait()
            return {layer_idx: load_layer(finished[layer_idx], self.kernels.for_layer(layer_idx)) for layer_idx in layers}
        for layer_idx in layers:
            self.reset(self.kernels.for_layer(layer_idx), layer_idx)
        return {layer_idx: [] for layer_idx in layers}

    def reset(self, kernels: TrainedMemory, layer_idx: int) -> None:
        """The weights that training starts from."""
        kernels.reset_parameters(torch.Generator().manual_seed(self.options.seed + layer_idx))

    def measure(self, layer_idx: int, losses: list[float]) -> LayerRecord:
        """What a layer's kernels leave of the policy's error on the held-out sequences, before training and now."""
        kernels = self.kernels.for_layer(layer_idx)
        start = copy.deepcopy(kernels)
        self.reset(start, layer_idx)
        folder = layer_folder(self.work / "capture", layer_idx)
        task = LayerTask(folder, self.options, self.options.held_out, self.model.device)
        return LayerRecord(layer_idx, task.error_left(start), task.error_left(kernels), losses)

    def capture(self, sequences: Sequence[int]) -> None:
        mine = self.processes.share(sequences)
        capture(
            self.model,
            self.sampler,
            self.options,
            self.work / "capture",
            self.kernels.config.layers,
            mine,
            lambda done: self.report("capture", done, len(mine)),
        )
        self.processes.wait()

    def train_layer(self, layer_idx: int, path: Path) -> None:
        kernels = self.kernels.for_layer(layer_idx)
        self.reset(kernels, layer_idx)
        losses = train_layer(
            layer_folder(self.work / "capture", layer_idx),
            layer_idx,
            self.options,
            kernels,
            self.model.device,
            lambda done, loss: self.report(f"layer {layer_idx}", done, self.options.layerwise_steps, loss),
        )
        save_layer(path, kernels, losses)

    def joint(self) -> list[float]:
        path = self.work / "joint.pt"
        self.kernels.to(device=self.model.device)
        stage = JointStage(self.model, self.kernels, self.sampler, self.options, self.processes)
        options = {name: getattr(self.options, name) for name in OF_JOINT}
        if path.exists():
            remedy = "Remove it: the same command begins the joint stage anew."
            with readable(path, remedy):
                checkpoint = torch.load(path, map_location=self.model.device, weights_only=True)
                found = checkpoint.pop("options")
            if found != options:
                raise LESSError(
                    f"{path} is of a joint stage with other options: expected {options}, got {found}. Repeat the options to go "
                    "on, or remove the file to begin that stage anew."
                )
            with readable(path, remedy):
                stage.load_state_dict(checkpoint)
        while stage.step < self.options.joint_steps:
            loss = stage.advance()
            self.report("joint", stage.step, self.options.joint_steps, loss)
            if self.processes.is_first and (
                stage.step % self.options.checkpoint_every == 0 or stage.step == self.options.joint_steps
            ):
                content = io.BytesIO()
                torch.save({"options": options, **stage.state_dict()}, content)
                write_whole(path, content.getvalue())
        return stage.losses
