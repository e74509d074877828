"""Commands that measure: eval, profile and bench."""

from pathlib import Path
from typing import Annotated, Any

import typer

from less_cache.bench.options import CACHES, DEFAULTS, BenchOptions
from less_cache.cli.options import Dtype, Model, Report, Texts, parse_budget, parse_memory, parse_name, parse_path
from less_cache.policies import POLICIES

app = typer.Typer()
evaluations = typer.Typer(no_args_is_help=True)
app.add_typer(evaluations, name="eval", help="Measure quality.")


@evaluations.callback()
def measure() -> None:
    """Measure quality."""


@evaluations.command()
def perplexity(
    model: Model,
    data: Texts,
    budgets: Annotated[
        list[str],
        typer.Option("--budget", metavar="SIZE", help="Tokens that stay per KV head, or a share of the prompt; repeatable."),
    ],
    kernels: Annotated[
        str | None, typer.Option(parser=parse_name, metavar="NAME", help="Folder or Hub id. Default: none are measured.")
    ] = None,
    policy: Annotated[str, typer.Option(metavar="NAME", help=f"Which tokens stay: {', '.join(POLICIES)}.")] = "h2o",
    sequences: Annotated[int, typer.Option(min=1, help="Stretches of text, evenly spaced.")] = 16,
    prompt_length: Annotated[int, typer.Option(min=2, help="Tokens read at once at the start of each.")] = 512,
    decoded: Annotated[int, typer.Option(min=1, help="Tokens scored after the prompt, one by one.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 8,
    dtype: Dtype = "float32",
    known: Annotated[
        Path | None,
        typer.Option(parser=parse_path, metavar="FILE", help="Report on the same text: all but LESS is taken from it."),
    ] = None,
    output: Report = None,
    plot: Annotated[
        Path | None, typer.Option(parser=parse_path, metavar="FILE", help="Draw perplexity over bytes, such as perplexity.png.")
    ] = None,
) -> None:
    """Perplexity of text decoded token by token, and divergence from the full cache.

    Of the full cache, the policy, the policy with the state's bytes, the untrained state, LESS, and fitted caches in the bytes
    of the policy's tokens in 16 bits.
    """
    from less_cache.evaluation.command import run

    sizes = [parse_budget(budget) for budget in budgets]
    run(model, kernels, policy, sizes, data, sequences, prompt_length, decoded, batch_size, dtype, known, output, plot)


@app.command()
def profile(
    model: Model,
    data: Texts,
    output: Annotated[
        Path, typer.Option(parser=parse_path, metavar="DIR", help="Folder for head_budgets.json: a new one, or of kernels.")
    ],
    budget: Annotated[
        Any,
        typer.Option(
            parser=parse_budget, metavar="SIZE", help="Tokens that stay per KV head, or a share of the full cache's bytes."
        ),
    ] = "0.05",
    sequences: Annotated[int, typer.Option(min=1, help="Stretches of text, evenly spaced.")] = 64,
    prompt_length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 4,
    dtype: Dtype = "float32",
    base_model: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Hub id of the model. Default: that of the kernels in the folder, or MODEL."),
    ] = None,
) -> None:
    """Measure how much of a budget each KV head of a model gets, on average over texts: a profile for heads="profile"."""
    from less_cache.cli.profile import run

    run(model, data, output, budget, sequences, prompt_length, batch_size, dtype, base_model)


@evaluations.command()
def recall(
    model: Model,
    data: Annotated[list[Path], typer.Option(parser=parse_path, metavar="FILE", help="UTF-8 text; several take turns.")],
    budgets: Annotated[
        list[float], typer.Option("--budget", metavar="SHARE", help="Of a 16-bit full cache's bytes, such as 0.1; repeatable.")
    ],
    length: Annotated[int, typer.Option(min=64, metavar="TOKENS", help="Of each text, the number included.")] = 1024,
    needles: Annotated[int, typer.Option(min=1, help="Numbers, each in a stretch of its own, at all depths.")] = 20,
    decoded: Annotated[int, typer.Option(min=0, metavar="TOKENS", help="Of the text, one by one, before the question.")] = 0,
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(help="Of stretches, words and numbers.")] = 0,
    output: Report = None,
) -> None:
    """Numbers found that a text mentions once: full cache, H2O, LESS, and LESS that has read the text twice."""
    from less_cache.evaluation.recall_command import run

    run(model, data, budgets, length, needles, decoded, dtype, seed, output)


@app.command(no_args_is_help=True)
def bench(
    benchmark: Annotated[str, typer.Argument(metavar="BENCHMARK", help=f"One of {', '.join(DEFAULTS)}.")],
    model: Annotated[
        str,
        typer.Argument(
            parser=parse_name,
            metavar="MODEL",
            help="Folder, .gguf file or Hub id; with --random a model type too: llama is 7B-shaped.",
        ),
    ],
    random: Annotated[bool, typer.Option("--random", help="Random weights of the model's shape.")] = False,
    kernels: Annotated[
        str | None, typer.Option(parser=parse_name, metavar="NAME", help="Folder or Hub id. Default: random ones.")
    ] = None,
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
    padding: Annotated[
        int | None, typer.Option(min=0, metavar="TOKENS", help="Of the first sequence, in prefill, beside none.")
    ] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile", help="In decode and batch: torch.compile where the cache is static.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random weights and tokens.")] = 0,
    output: Report = None,
    plot: Annotated[
        Path | None, typer.Option(parser=parse_path, metavar="FILE", help="Draw a plot, such as decode.png.")
    ] = None,
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
