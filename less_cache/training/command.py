"""What `less-cache train` does: a model's name and texts in, a folder of kernels out."""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedModel

from less_cache import models
from less_cache.errors import LESSError
from less_cache.files import atomic, plain_json
from less_cache.kernels.folder import CONFIG_NAME, read_config
from less_cache.reports import plots
from less_cache.training import plot
from less_cache.training.cost import Cost, estimate
from less_cache.training.data import OWN, TokenSampler, hub_text, own_text, text_files, tokenize
from less_cache.training.options import TrainingOptions
from less_cache.training.processes import Processes
from less_cache.training.trainer import LOG_NAME, check, context, described_training, train
from less_cache.training.work import OWN_NAME, RUN_NAME, WORK_NAME, identity, read_run, remove

PLOT_NAME = "training.png"
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[loss]}"),
)


def run(
    model_name: str, data: Sequence[str], output: Path, options: TrainingOptions, dtype: torch.dtype, dry_run: bool
) -> None:
    """Train, show how it goes, write kernels, log and plot into `output`. `dry_run`: only print what it will take."""
    console = Console(highlight=False)
    if output.exists() and not output.is_dir():
        raise LESSError(f"Expected --output to be a folder, got {output}, which is a file. Choose another name.")
    if not dry_run:
        plots.figure(1)  # without matplotlib nothing is trained that could not be drawn
    data = [os.path.expanduser(source) if is_path(source) else source for source in data]
    for source in filter(is_path, data):
        text_files(Path(source))  # a wrong path is reported before the model is loaded
    described = {
        "data": [Path(source).name if is_path(source) else source for source in data],
        "dtype": str(dtype).removeprefix("torch."),
    }
    processes = Processes()
    finished = (output / CONFIG_NAME).exists()
    left_over = finished and not dry_run and is_left_over(output, model_name, options, described)
    processes.wait()  # until all have looked
    if left_over:
        if processes.is_first:
            clear(console, output, OWN in data)
            console.print(f"{output} is finished.")
        return
    if finished:
        raise LESSError(f"{output} already holds kernels. Choose another output folder, or remove it to train again.")
    if dry_run:
        skeleton = models.without_weights(model_name, dtype=dtype)
        options = fit(options, skeleton)
        check(skeleton, options)
        console.print(cost_table(estimate(skeleton, options, OWN in data)))
        return
    model, tokenizer = models.load(model_name, dtype=dtype, device=processes.device)
    options = fit(options, model)
    check(model, options)
    cost = estimate(model, options, OWN in data)
    with progress_rows(console, disable=not processes.is_first) as progress:
        report = ProgressReport(progress, cost)
        sampler = TokenSampler([texts(source, model, tokenizer, options, output, report) for source in data], data)
        processes.wait()  # training clears away what is half written: texts of the model's own too
        kernels = train(model, sampler, options, output, report, described)
    if not processes.is_first:
        return
    log = read_log(output)
    atomic.replace(output, {PLOT_NAME: plots.image(plot.draw(log))})
    kernels.config.base_model = model_name
    kernels.save_pretrained(output)  # last: from here on the folder holds kernels
    clear(console, output, OWN in data)
    console.print(layer_table(log))
    console.print(f"Wrote {output}. Try it: less-cache demo --model {model_name} --kernels {output}")


def is_left_over(output: Path, model_name: str, options: TrainingOptions, described: dict[str, Any]) -> bool:
    """Whether `output` holds the kernels of this very command, which was stopped while it removed its work."""
    work, config = output / WORK_NAME, read_config(output)
    if not work.is_dir() or config.base_model != model_name:
        return False
    training = described_training(fit(options, models.without_weights(model_name)), described)
    if config.training != training:
        return False
    if not any(work.iterdir()):
        return True
    if not (work / RUN_NAME).is_file():
        return False
    run = read_run(work)
    return run == identity(training, config.base_model_fingerprint, run.get("texts"))


def clear(console: Console, output: Path, own_texts: bool) -> None:
    """Remove the finished run's work, and say what else there is."""
    try:
        left = remove(output / WORK_NAME, own_texts)
    except OSError as error:
        console.print(f"{output / WORK_NAME} cannot be removed ({error}). It is not needed any more.")
        return
    if left:
        console.print(f"{output / WORK_NAME} stays: this run did not make {', '.join(left[:8])}.")


def read_log(output: Path) -> dict[str, Any]:
    """The run's log, with NaN where a layer's share is none and JSON has null."""
    log = plain_json.parse((output / LOG_NAME).read_text())
    for record in log["layers"]:
        record |= {key: math.nan for key in ("before", "after") if record[key] is None}
    return log


def fit(options: TrainingOptions, model: PreTrainedModel) -> TrainingOptions:
    """The options; of the default's prompt lengths those that the model's context has room for."""
    limit = context(model)
    if limit is None or sorted(options.prompts) != sorted(TrainingOptions.prompts):
        return options
    fitting = tuple(prompt for prompt in options.prompts if prompt + options.decoded <= limit)
    return dataclasses.replace(options, prompts=fitting or options.prompts)


def is_path(source: str) -> bool:
    """A source of data that names a file or folder: neither `self` nor a Hub id, which is `name` or `owner/name`."""
    if source == OWN:
        return False
    path = Path(source)
    return path.exists() or path.suffix == ".txt" or source.startswith((".", "/", "~")) or source.count("/") > 1


def texts(
    source: str, model: Any, tokenizer: Any, options: TrainingOptions, output: Path, report: Callable
) -> list[torch.Tensor]:
    """The texts of one entry of `--data`, tokenized."""
    sequences = options.sequences + options.joint_steps * options.batch_size
    if source == OWN:
        return own_text(model, options.sequences, options.longest, options.seed, output / WORK_NAME / OWN_NAME, report)
    if is_path(source):
        return [tokenize(path.read_text("utf-8", "replace"), tokenizer) for path in text_files(Path(source))]
    return [hub_text(source, tokenizer, sequences * options.longest)]


def progress_rows(console: Console, disable: bool = False) -> Progress:
    """Rows that know the time left however slow a step is: rich forgets what is older than 30 seconds."""
    return Progress(*COLUMNS, console=console, disable=disable, speed_estimate_period=3600)


class ProgressReport:
    """Rows of progress: the stage or layer at work, the layers together, and the whole run, weighed by its cost."""

    def __init__(self, progress: Progress, cost: Cost):
        self.progress = progress
        parts = {"own text": cost.own_text, "capture": cost.capture, "layers": cost.layerwise, "joint": cost.joint}
        self.weights = {stage: part / sum(parts.values()) for stage, part in parts.items()}
        self.shares = dict.fromkeys(self.weights, 0.0)
        self.rows = {"all": progress.add_task("all, %", total=100, loss="")}

    def __call__(self, stage: str, done: int, total: int, loss: float | None = None) -> None:
        row = stage.split()[0]
        shown = "" if loss is None else f"loss {loss:.4f}"
        if row not in self.rows:
            self.rows[row] = self.progress.add_task(stage, total=total, loss=shown)
        elif done == 1:
            self.progress.reset(self.rows[row])
        self.progress.update(self.rows[row], description=stage, completed=done, total=total, loss=shown)
        if stage in self.shares:
            self.shares[stage] = max(self.shares[stage], done / total)  # the last capture goes over some again
            whole = sum(self.weights[name] * share for name, share in self.shares.items())
            self.progress.update(self.rows["all"], completed=100 * whole)


def cost_table(cost: Cost) -> Table:
    """What a run will take."""
    table = Table(title="What this run takes", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    stages = {"text of its own": cost.own_text} if cost.own_text else {}
    stages |= {"capture": cost.capture, "each layer on its own": cost.layerwise, "all layers jointly": cost.joint}
    for stage, flops in stages.items():
        table.add_row(stage, f"{flops / 1e12:,.1f} TFLOP")
    table.add_row("all", f"{sum(stages.values()) / 1e12:,.1f} TFLOP", style="bold")
    table.add_row("disk, at most", f"{cost.disk / 2**30:,.2f} GiB")
    table.add_row("memory of a process, about", f"{cost.memory / 2**30:,.2f} GiB")
    return table


def layer_table(log: dict) -> Table:
    """What training reached in each layer."""
    table = Table(title="Share of the policy's error left, stretches of the texts drawn anew", box=box.SIMPLE_HEAD)
    for name in ("layer", "before", "after", "explained"):
        table.add_column(name, justify="right")
    for record in log["layers"]:
        before, after = record["before"], record["after"]
        table.add_row(str(record["layer"]), f"{before:.3f}", f"{after:.3f}", f"{1 - after:.0%}")
    before, after = (sum(record[key] for record in log["layers"]) / len(log["layers"]) for key in ("before", "after"))
    table.add_section()
    table.add_row("mean", f"{before:.3f}", f"{after:.3f}", f"{1 - after:.0%}")
    return table
