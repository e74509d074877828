"""What `less-cache train` does: a model's name and texts in, a folder of kernels out."""

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from less_cache import models
from less_cache.training.data import TokenSampler, text_files
from less_cache.training.trainer import TrainingOptions, train


def run(model_name: str, data: list[Path], output: Path, options: TrainingOptions, dtype: torch.dtype) -> None:
    """Train, show how it goes, write `less_config.json` and `less_kernels.safetensors` into `output`."""
    console = Console(highlight=False)
    for source in data:
        text_files(source)  # a wrong path is reported before the model is loaded
    model, tokenizer = models.load(model_name, dtype=dtype)
    sampler = TokenSampler(data, tokenizer)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("layerwise", total=options.layerwise_steps + options.joint_steps, loss=float("nan"))

        def report(step: int, stage: str, loss: float) -> None:
            progress.update(task, completed=step, description=stage, loss=loss)

        kernels = train(model, sampler, options, output, report)
    kernels.config.base_model = model_name
    kernels.config.training |= {"data": [source.name for source in data], "dtype": str(dtype).removeprefix("torch.")}
    kernels.save_pretrained(output)
    console.print(f"Wrote {output}. Try it: less-cache demo --model {model_name} --kernels {output}")
