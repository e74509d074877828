"""The command line: options only; each command's work sits in its own module and is imported when it runs."""

from pathlib import Path
from typing import Annotated, Any

from less_cache.bench.options import CACHES, DEFAULTS, BenchOptions
from less_cache.errors import LESSError
from less_cache.models import DEFAULT_MODEL
from less_cache.policies import POLICIES
from less_cache.training.options import TrainingOptions
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


@app.command()
def demo(
    model: Annotated[str, typer.Option(metavar="NAME", help="Folder, .gguf file or Hub id.")] = DEFAULT_MODEL,
    kernels: Annotated[
        str | None, typer.Option(metavar="NAME", help="Folder or Hub id, or 'none'. Default: the catalogue's for this model.")
    ] = None,
    policy: Annotated[str, typer.Option(metavar="NAME", help=f"Which tokens stay: {', '.join(POLICIES)}.")] = "h2o",
    budget: Annotated[
        Any,
        typer.Option(parser=parse_budget, metavar="SIZE", help="Tokens that stay per KV head, or a share of the prompt."),
    ] = "0.05",
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text; its end is held out. Default: a chapter of a novel.")
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
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, .gguf file or Hub id.")],
    data: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE",
            help="Text file, folder of .txt files, Hub dataset id (configuration after a colon), or 'self': text that the "
            "model writes. Repeatable; each gets the same share.",
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the kernels. The same command line goes on there.")],
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


Name = Annotated[str, typer.Argument(metavar="NAME", help="Folder of kernels, or Hub id.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of kernels.")]
Revision = Annotated[str | None, typer.Option(metavar="REVISION", help="Branch, tag or commit of a repository.")]
License = Annotated[str | None, typer.Option(metavar="ID", help="Licence of the base model, such as apache-2.0.")]


@app.command()
def pull(
    name: Name,
    revision: Revision = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Copy them here.")] = None,
) -> None:
    """Download kernels from the Hub, check them, and print the folder that holds them."""
    from less_cache.hub.command import pull

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
    from less_cache.hub.command import push

    push(folder, repo_id, revision, private, license, dry_run)


@app.command()
def info(name: Name, revision: Revision = None) -> None:
    """Print what kernels say about themselves."""
    from less_cache.hub.command import info

    info(name, revision)


@app.command()
def verify(
    name: Name,
    revision: Revision = None,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="Check that they were trained for this model.")] = None,
) -> None:
    """Check kernels: digest, names, shapes, types and values of the tensors."""
    from less_cache.hub.command import verify

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
    from less_cache.hub.command import write_card

    write_card(folder, reports or [], base_model, license, plot)


evaluations = typer.Typer(no_args_is_help=True)
app.add_typer(evaluations, name="eval", help="Measure quality.")


@evaluations.callback()
def measure() -> None:
    """Measure quality."""


@evaluations.command()
def perplexity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, .gguf file or Hub id.")],
    data: Annotated[list[Path], typer.Option(metavar="FILE", help="UTF-8 text; several share the sequences.")],
    budgets: Annotated[
        list[str],
        typer.Option("--budget", metavar="SIZE", help="Tokens that stay per KV head, or a share of the prompt; repeatable."),
    ],
    kernels: Annotated[str | None, typer.Option(metavar="NAME", help="Folder or Hub id. Default: none are measured.")] = None,
    policy: Annotated[str, typer.Option(metavar="NAME", help=f"Which tokens stay: {', '.join(POLICIES)}.")] = "h2o",
    sequences: Annotated[int, typer.Option(min=1, help="Stretches of text, evenly spaced.")] = 16,
    prompt_length: Annotated[int, typer.Option(min=2, help="Tokens read at once at the start of each.")] = 512,
    decoded: Annotated[int, typer.Option(min=1, help="Tokens scored after the prompt, one by one.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of the model's weights: float32, bfloat16 or float16.")] = "float32",
    known: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Report on the same text: all but LESS is taken from it.")
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON line here too.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw perplexity over bytes, such as perplexity.png.")
    ] = None,
) -> None:
    """Perplexity of text decoded token by token: full cache, policy, policy with the state's bytes, untrained state, LESS."""
    from less_cache.evaluation.command import run

    sizes = [parse_budget(budget) for budget in budgets]
    run(model, kernels, policy, sizes, data, sequences, prompt_length, decoded, batch_size, dtype, known, output, plot)


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


@app.command(no_args_is_help=True)
def bench(
    benchmark: Annotated[str, typer.Argument(metavar="BENCHMARK", help=f"One of {', '.join(DEFAULTS)}.")],
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Folder, .gguf file or Hub id; with --random a model type too: llama is 7B-shaped."
        ),
    ],
    random: Annotated[bool, typer.Option("--random", help="Random weights of the model's shape.")] = False,
    kernels: Annotated[str | None, typer.Option(metavar="NAME", help="Folder or Hub id. Default: random ones.")] = None,
    policy: Annotated[str, typer.Option(metavar="NAME", help=f"Which tokens stay: {', '.join(POLICIES)}.")] = "h2o",
    budget: Annotated[
        Any,
        typer.Option(parser=parse_budget, metavar="SIZE", help="Tokens that stay per KV head, or a share of each context."),
    ] = "0.05",
    contexts: Annotated[
        list[int] | None, typer.Option("--context", min=2, metavar="TOKENS", help="Repeatable. Default: 512 and 2048.")
    ] = None,
    caches: Annotated[
        list[str] | None,
        typer.Option(
            "--cache",
            metavar="NAME",
            help=f"{', '.join(CACHES)}; repeatable. Default: all but policy_static and less_static, which need a policy "
            "with a budget; prefill leaves out static too.",
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences at once; not of the benchmark batch. Default: 1.")] = None,
    memory: Annotated[
        Any,
        typer.Option(
            parser=parse_memory,
            metavar="SIZE",
            help="Of the benchmark batch alone, which needs it: what weights and caches may take together, such as 16GiB.",
        ),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="TOKENS",
            help="Tokens that a LESSCache reads at once, in prefill any cache. Default: 512, in prefill all.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the processor. Default: torch's choice.")] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Measured runs of each, after one that warms up. Default: decode 7, prefill 5, batch 3."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens decoded in a run. Default: decode 16, batch 4.")] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile", help="In decode and batch: torch.compile where the cache is static.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random weights and tokens.")] = 0,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON line here too.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw a plot, such as decode.png.")] = None,
) -> None:
    """Measure speed and memory: DynamicCache, StaticCache, the policy alone and LESS, in turns.

    decode: milliseconds a token at each context.

    prefill: seconds and peak memory of reading a prompt.

    memory: bytes of the cache at each context, held and by formula.

    batch: the largest batch that fits into --memory, and its throughput.

    Nothing is compiled without --compile; on a GPU generate compiles around all static caches by itself.
    """
    given = {name: value for name, value in locals().items() if name not in ("benchmark", "output", "plot")}
    from less_cache.bench.command import run

    run(benchmark, BenchOptions.of(benchmark, **given), output, plot)
