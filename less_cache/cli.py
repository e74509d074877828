"""The command line: options only; each command's work sits in its own module and is imported when it runs."""

from pathlib import Path
from typing import Annotated, Any

from less_cache.errors import LESSError
from less_cache.models import DEFAULT_MODEL
from less_cache.version import __version__

try:
    import typer
    from typer.core import TyperGroup
except ImportError as error:
    raise SystemExit("The command line needs more packages: pip install 'less-cache[demo]'") from error


class OneLineErrors(TyperGroup):
    """Bad input ends in one line on standard error, not in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LESSError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(cls=OneLineErrors, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"less-cache {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """A sparse KV cache that keeps what it evicts in a small learned state."""


def parse_budget(text: str) -> int | float:
    """`"128"` is a number of tokens, `"0.05"` a fraction of the prompt."""
    try:
        budget: int | float = float(text) if "." in text else int(text)
    except ValueError:
        budget = 0
    if not (budget >= 1 if isinstance(budget, int) else 0 < budget < 1):
        raise typer.BadParameter(f"expected a number of tokens such as 128, or a fraction of the prompt such as 0.05, got {text!r}")
    return budget


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="Folder, .gguf file or Hub id.")] = DEFAULT_MODEL,
    kernels: Annotated[
        str | None, typer.Option(help="Folder or Hub id; 'none' for none. Default: those in hub/ for this model.", show_default=False)
    ] = None,
    policy: Annotated[str, typer.Option(help="Which tokens stay: h2o, sink_recent or corm.")] = "h2o",
    budget: Annotated[
        Any, typer.Option(parser=parse_budget, metavar="TOKENS", help="Tokens that stay per KV head, or a fraction of the prompt.")
    ] = "0.05",
    prompt_file: Annotated[
        Path | None, typer.Option(help="UTF-8 text; its end is held out to score. Default: a chapter of a novel.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write under each cache.")] = 48,
) -> None:
    """Continue a long text under the full cache, a sparse policy and LESS, and compare them."""
    from less_cache.demo import run

    run(model, kernels, policy, budget, prompt_file, max_new_tokens)
