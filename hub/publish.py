"""The recipe of a set of kernels: train, store in 16 bit, measure, write the card, and show what a push would send.

    python hub/publish.py org/model hub/model-h2o org/model-less-h2o --train-data books --train-data news.txt \
        --report prose=novel.txt --report prose=play.txt --budget 39 --license apache-2.0 --train-options="--joint-steps 200"
"""

import shlex
from pathlib import Path
from typing import Annotated

import torch
import typer

from less_cache import LESSError, LESSKernels
from less_cache.cli.app import app
from less_cache.cli.options import License, parse_budget
from less_cache.hub.client import is_repo_id
from less_cache.kernels.folder import CONFIG_NAME
from less_cache.policies import policy_class


def run(*arguments: object) -> None:
    """One command of less-cache, in this process; where it fails, the recipe ends."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ less-cache {shlex.join(words)}", flush=True)
    if failed := app(words, standalone_mode=False):
        raise typer.Exit(failed)


def main(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Base model: folder, .gguf file or Hub id.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of the set, such as hub/<model>-<policy>.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="Where it would be published: Hub id, org/name.")],
    train_data: Annotated[list[str], typer.Option(metavar="SOURCE", help="--data of less-cache train; repeatable.")],
    report: Annotated[
        list[str],
        typer.Option(metavar="NAME=FILE", help="Text to measure on; repeatable. Texts of one name share a measurement."),
    ],
    budget: Annotated[list[str], typer.Option(metavar="SIZE", help="Tokens kept in the measurement; repeatable.")],
    base_model: Annotated[
        str | None, typer.Option(metavar="ID", help="Hub id of the base model; needed where MODEL is a file or folder.")
    ] = None,
    policy: Annotated[str, typer.Option(metavar="NAME", help="Of the measurement; of the training: --train-options.")] = "h2o",
    sequences: int = 16,
    prompt_length: int = 512,
    decoded: int = 128,
    license: License = None,
    train_options: Annotated[str, typer.Option(metavar="OPTIONS", help="More of less-cache train, in one string.")] = "",
) -> None:
    """Train, store in 16 bit, measure, write the card, and show what a push would send.

    Each step is a command of less-cache and is printed before it runs. The same command line goes on where the training
    was interrupted. What later steps need is checked first. Nothing is sent: the last line says how.
    """
    texts: dict[str, list[str]] = {}
    for entry in report:
        name, _, text = entry.partition("=")
        if not name or not Path(text).is_file():
            raise typer.BadParameter(f"expected NAME=FILE with a text file, got {entry!r}", param_hint="--report")
        texts.setdefault(name, []).append(text)
    if not is_repo_id(base_model or model):
        wanted = "expected a Hub id such as org/name, here or as MODEL"
        raise typer.BadParameter(f"{wanted}, got {base_model or model!r}", param_hint="--base-model")
    try:
        for size in budget:
            policy_class(policy).from_budget(parse_budget(size))
    except LESSError as error:
        raise typer.BadParameter(str(error), param_hint="--policy and --budget") from error

    training = folder.with_name(f"{folder.name}.training")  # its log and plot are not published
    data = [word for path in train_data for word in ("--data", path)]
    if not (training / CONFIG_NAME).exists():
        run("train", model, *data, "--output", training, *shlex.split(train_options))

    kernels = LESSKernels.from_pretrained(training)
    kernels.config.base_model = base_model or kernels.config.base_model
    kernels.save_pretrained(folder, dtype=torch.float16)  # half the bytes; what is measured is what is published

    lengths = ("--sequences", sequences, "--prompt-length", prompt_length, "--decoded", decoded)
    budgets = [word for size in budget for word in ("--budget", size)]
    reports = []
    for name, files in texts.items():
        output = training / f"perplexity-{name}.json"
        measured = ("--kernels", folder, "--policy", policy, *(word for file in files for word in ("--data", file)))
        run("eval", "perplexity", model, *measured, *budgets, *lengths, "--output", output)
        reports += ["--report", f"{name}={output}"]

    run("card", folder, *reports, *(("--license", license) if license else ()))
    run("verify", folder, "--model", model)
    run("push", folder, repo_id, "--dry-run")
    print(f"\nTo publish: less-cache push {folder} {repo_id}")


if __name__ == "__main__":
    typer.run(main)
