"""Commands on kernels: pull, push, info, verify and card."""

from pathlib import Path
from typing import Annotated

import typer

from less_cache.cli.options import Folder, License, Name, Revision, parse_name, parse_path

app = typer.Typer()


@app.command()
def pull(
    name: Name,
    revision: Revision = None,
    output: Annotated[Path | None, typer.Option(parser=parse_path, metavar="DIR", help="Copy them here.")] = None,
) -> None:
    """Download kernels from the Hub, check them, and print the folder that holds them."""
    from less_cache.cli.hub import pull

    pull(name, revision, output)


@app.command()
def push(
    folder: Folder,
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="Hub id, org/name; made where it does not exist.")],
    revision: Revision = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    license: License = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be sent.")] = False,
) -> None:
    """Check kernels, write their card, and upload both to the Hub in one commit."""
    from less_cache.cli.hub import push

    push(folder, repo_id, revision, private, license, dry_run)


@app.command()
def info(name: Name, revision: Revision = None) -> None:
    """Print what kernels say about themselves."""
    from less_cache.cli.hub import info

    info(name, revision)


@app.command()
def verify(
    name: Name,
    revision: Revision = None,
    model: Annotated[
        str | None, typer.Option(parser=parse_name, metavar="MODEL", help="Check that they were trained for this model.")
    ] = None,
) -> None:
    """Check kernels: digest, names, shapes, types and values of the tensors."""
    from less_cache.cli.hub import verify

    verify(name, revision, model)


@app.command()
def card(
    folder: Folder,
    reports: Annotated[
        list[str] | None,
        typer.Option("--report", metavar="NAME=FILE", help="Output of eval perplexity on these kernels; repeatable."),
    ] = None,
    base_model: Annotated[str | None, typer.Option(metavar="ID", help="Hub id of the base model; corrects the config.")] = None,
    license: License = None,
    plot: Annotated[bool, typer.Option(help="Draw perplexity.png from the reports.")] = True,
) -> None:
    """Write the model card and custom_generate/ of a folder of kernels. Text of your own in the card is kept."""
    from less_cache.cli.hub import write_card

    write_card(folder, reports or [], base_model, license, plot)
