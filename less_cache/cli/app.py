"""The command line: options only; each command's work sits in its own module and is imported when it runs."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from less_cache.cli import kernels as kernel_commands
from less_cache.cli import measure as measure_commands
from less_cache.cli.options import parse_budget, parse_name, parse_path
from less_cache.errors import LESSError
from less_cache.models import DEFAULT_MODEL
from less_cache.policies import POLICIES
from less_cache.training.options import TrainingOptions
from less_cache.version import __version__


class OneLineErrors(TyperGroup):
    """Bad input ends in one line on standard error, not in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LESSError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error


LENGTHS = f"{min(TrainingOptions.prompts)} to {max(TrainingOptions.prompts)}"
app = typer.Typer(cls=OneLineErrors, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"less-cache {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """A sparse KV cache that keeps what it evicts in a small learned state."""


@app.command()
def demo(
    model: Annotated[
        str, typer.Option(parser=parse_name, metavar="NAME", help="Folder, .gguf file or Hub id.")
    ] = DEFAULT_MODEL,
    kernels: Annotated[
        str | None,
        typer.Option(
            parser=parse_name, metavar="NAME", help="Folder or Hub id, or 'none'. Default: the catalogue's for this model."
        ),
    ] = None,
    policy: Annotated[str, typer.Option(metavar="NAME", help=f"Which tokens stay: {', '.join(POLICIES)}.")] = "h2o",
    budget: Annotated[
        Any,
        typer.Option(parser=parse_budget, metavar="SIZE", help="Tokens that stay per KV head, or a share of the prompt."),
    ] = "0.05",
    prompt_file: Annotated[
        Path | None,
        typer.Option(parser=parse_path, metavar="FILE", help="UTF-8 text; its end is held out. Default: a chapter of a novel."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to write under each cache.")] = 48,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=64, metavar="N", help="Tokens of the text to read. Default: the longest prompt the kernels trained on."
        ),
    ] = None,
) -> None:
    """Continue a long text under the full cache, a sparse policy and LESS, and compare them."""
    from less_cache.cli.demo import run

    run(model, kernels, policy, budget, prompt_file, max_new_tokens, prompt_tokens)


@app.command()
def train(
    model: Annotated[str, typer.Argument(parser=parse_name, metavar="MODEL", help="Folder, .gguf file or Hub id.")],
    data: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE",
            help="Text file, folder of .txt files, Hub dataset id (configuration after a colon), or 'self': text that the "
            "model writes. Repeatable; each gets the same share.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(parser=parse_path, metavar="DIR", help="Folder for the kernels. The same command line goes on there."),
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Policy to train with; repeatable. Default: h2o twice, sink_recent and corm."),
    ] = None,
    budget: Annotated[
        str, typer.Option(metavar="SHARE[-SHARE]", help="Tokens kept, as a share of the tokens seen, or a range of it.")
    ] = "0.02-0.2",
    prompt_length: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="TOKENS", help=f"Repeatable. Default: {LENGTHS} as far as they fit the model."),
    ] = None,
    sequences: Annotated[
        int, typer.Option(min=2, help="Sequences captured for the layers' own steps and to measure them; texts of 'self'.")
    ] = TrainingOptions.sequences,
    layerwise_steps: Annotated[
        int, typer.Option(min=0, help="Steps of each layer on its own attention output.")
    ] = TrainingOptions.layerwise_steps,
    joint_steps: Annotated[
        int, typer.Option(min=0, help="Steps on the model's output, all layers under LESS.")
    ] = TrainingOptions.joint_steps,
    layerwise_learning_rate: Annotated[
        float, typer.Option(help="Of the layers' own steps, at the start; falls to 0.")
    ] = TrainingOptions.layerwise_learning_rate,
    joint_learning_rate: Annotated[
        float, typer.Option(help="Of the joint steps, at its highest; falls to 0.")
    ] = TrainingOptions.joint_learning_rate,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a joint step.")] = TrainingOptions.batch_size,
    memory: Annotated[str, typer.Option(help="soft_centroids, or low_rank: the paper's φ and ψ.")] = TrainingOptions.memory,
    hidden_size: Annotated[int, typer.Option(min=1, help="Hidden size of φ and ψ.")] = TrainingOptions.hidden_size,
    dtype: Annotated[str, typer.Option(help="Type of the model's weights: float32 or bfloat16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of the initial weights and of every draw.")] = TrainingOptions.seed,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what it will take.")] = False,
) -> None:
    """Train kernels for a model: a folder that `LESSKernels.from_pretrained` reads."""
    import torch

    from less_cache.training.command import run

    if dtype not in ("float32", "bfloat16"):
        raise LESSError(f"Expected --dtype to be float32 or bfloat16, got {dtype!r}.")
    least, _, most = budget.partition("-")
    try:
        shares = float(least), float(most or least)
    except ValueError as error:
        raise LESSError(
            f"Expected --budget to be a share such as 0.05, or a range such as 0.02-0.2, got {budget!r}."
        ) from error
    options = TrainingOptions(
        policies=tuple(policy or TrainingOptions.policies),
        least_budget=shares[0],
        most_budget=shares[1],
        prompts=tuple(sorted(prompt_length or TrainingOptions.prompts)),
        sequences=sequences,
        layerwise_steps=layerwise_steps,
        joint_steps=joint_steps,
        layerwise_learning_rate=layerwise_learning_rate,
        joint_learning_rate=joint_learning_rate,
        batch_size=batch_size,
        memory=memory,
        hidden_size=hidden_size,
        seed=seed,
    )
    run(model, data, output, options, getattr(torch, dtype), dry_run)


app.add_typer(kernel_commands.app)
app.add_typer(measure_commands.app)
