"""Options that several commands share, and how they are read."""

import os
from pathlib import Path
from typing import Annotated

import typer

from less_cache.files.paths import expanded


def parse_path(text: str) -> Path:
    """A path; `~` is read here too, since a shell leaves it alone in `--output=~/kernels`."""
    return expanded(text)


def parse_name(text: str) -> str:
    """A path or a Hub id; `~` as in `parse_path`."""
    return os.path.expanduser(text)


Model = Annotated[str, typer.Argument(parser=parse_name, metavar="MODEL", help="Folder, .gguf file or Hub id.")]
Texts = Annotated[list[Path], typer.Option(parser=parse_path, metavar="FILE", help="UTF-8 text; several share the sequences.")]
Dtype = Annotated[str, typer.Option(help="Of the model's weights: float32, bfloat16 or float16.")]
Report = Annotated[Path | None, typer.Option(parser=parse_path, metavar="FILE", help="Write the JSON line here too.")]
Name = Annotated[str, typer.Argument(parser=parse_name, metavar="NAME", help="Folder of kernels, or Hub id.")]
Folder = Annotated[Path, typer.Argument(parser=parse_path, metavar="FOLDER", help="Folder of kernels.")]
Revision = Annotated[str | None, typer.Option(metavar="REVISION", help="Branch, tag or commit of a repository.")]
License = Annotated[str | None, typer.Option(metavar="ID", help="Licence of the base model, such as apache-2.0.")]


def parse_budget(text: str) -> int | float:
    """`"128"` is a number of tokens, `"0.05"` a fraction of the prompt. The policy checks the range."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"expected tokens such as 128, or a fraction such as 0.05, got {text!r}") from None


def parse_memory(text: str) -> int:
    """`"16GiB"` or `"512MiB"`."""
    units = {"MiB": 2**20, "GiB": 2**30}
    for unit, size in units.items():
        if text.endswith(unit):
            try:
                return int(float(text.removesuffix(unit)) * size)
            except ValueError:
                break
    raise typer.BadParameter(f"expected a size such as 16GiB or 512MiB, got {text!r}")
