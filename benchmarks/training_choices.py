"""What a choice of training is worth: small sets of kernels, trained alike but for one choice, on texts they never saw.

    python benchmarks/training_choices.py MODEL FOLDER --train-data books --text novel=novel.txt --text news=news.txt

Each set is trained jointly for a few steps, prompts of 512 tokens and 128 decoded, and kept in FOLDER: the same command
goes on there. Measured: KL(full cache || LESS) / KL(full cache || policy alone), means over the decoded tokens of all
stretches, for every policy at 5 % of the tokens and H2O at three more budgets; what is kept follows the full cache's queries,
as in training, all tokens at once. The first sets differ in the policies or the budget trained with, which with the columns
gives the transfer matrix; the others differ from `mixed` in one thing. Finished sets are measured beside them, or alone:

    python benchmarks/training_choices.py MODEL --finished hub=hub/smollm2-135m-instruct-h2o --text novel=novel.txt

One JSON line last.
"""

import contextlib
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import torch
import typer
from torch.nn.functional import kl_div

from less_cache import CORM, H2O, LESSKernels, SinkRecent, models
from less_cache.bench.command import without_folder
from less_cache.evaluation.perplexity import stretches
from less_cache.integration import hook
from less_cache.integration.families import fingerprint
from less_cache.kernels.folder import CONFIG_NAME
from less_cache.memory.soft_centroids import LayerSoftCentroids
from less_cache.reports import outputs
from less_cache.reports.machine import describe
from less_cache.training import TokenSampler, TrainingOptions, joint, layers, tokenize, train
from less_cache.training.layers import TeacherLayer, roll_layers, student_cache, teacher_cache
from less_cache.training.options import Example
from less_cache.training.trainer import FORMAT

PROMPT, DECODED = 512, 128
COMMON = TrainingOptions(prompts=(PROMPT,), decoded=DECODED)


def ranks_by_error() -> tuple[int, ...]:
    """For SmolLM2-135M: 12 in the half of the layers where the set in hub/ leaves most of the policy's error, 4 elsewhere."""
    log = Path(__file__).parent / "results" / "training-smollm2-135m-instruct-h2o.json"
    left = [record["after"] for record in json.loads(log.read_text())["layers"]]
    hard = sorted(range(len(left)), key=lambda layer: -left[layer])[: len(left) // 2]
    return tuple(12 if layer in hard else 4 for layer in range(len(left)))


SETS: dict[str, dict] = {
    "mixed": {},
    "h2o": {"policies": ("h2o",)},
    "sink_recent": {"policies": ("sink_recent",)},
    "corm": {"policies": ("corm",)},
    "5 % alone": {"least_budget": 0.05, "most_budget": 0.05},
    "no fading": {},
    "later layers in the loss": {},
    "earlier layers in the loss": {},
    "attention not in the loss": {},
    "layers first": {"layerwise_steps": 200},
    "rank 16": {"rank": 16},
    "rank by layer": {"rank": ranks_by_error()},
    "hidden 128": {"hidden_size": 128},
    "half the rate": {"joint_learning_rate": TrainingOptions.joint_learning_rate / 2},
    "low_rank": {"memory": "low_rank", "joint_learning_rate": 1e-3},
}
USED = {
    "h2o": H2O(16, 16),
    "sink_recent": SinkRecent(4, 28),
    "corm": CORM(window=16, recent=16),
    "h2o, 2.5 %": H2O(8, 8),
    "h2o, 10 %": H2O(32, 32),
    "h2o, 20 %": H2O(64, 64),
}


def reset_without_fading(memory, generator=None, reset=LayerSoftCentroids.reset_parameters) -> None:
    """Rates of 0 stay 0: their gradient is."""
    reset(memory, generator)
    torch.nn.init.zeros_(memory.fading)


def later(hidden_states, dense, distances=joint.distances) -> torch.Tensor:
    """What the later half of the layers hand on."""
    return distances(hidden_states, dense)[(len(dense) - 1) // 2 :]


def earlier(hidden_states, dense, distances=joint.distances) -> torch.Tensor:
    """What the earlier half of the layers hand on."""
    return distances(hidden_states, dense)[: (len(dense) - 1) // 2]


def constant(states, target) -> torch.Tensor:
    """In the place of how far a layer's attention is from a full cache."""
    return torch.ones(())


# What these sets differ in is no option.
PATCHES = {
    "no fading": patch.object(LayerSoftCentroids, "reset_parameters", reset_without_fading),
    "later layers in the loss": patch.object(joint, "distances", later),
    "earlier layers in the loss": patch.object(joint, "distances", earlier),
    "attention not in the loss": patch.object(layers, "apart", constant),
}


def trained(name: str, model, sampler: TokenSampler, folder: Path, steps: int, dtype: str) -> LESSKernels:
    """The set of this name; read where FOLDER has it."""
    options = dataclasses.replace(COMMON, joint_steps=steps, **SETS[name])
    described = {"choice": name, "texts": sampler.digest(), "dtype": dtype, "format": FORMAT}
    if not (folder / CONFIG_NAME).exists():
        with tempfile.TemporaryDirectory() as work, PATCHES.get(name, contextlib.nullcontext()):
            train(model, sampler, options, Path(work), described=described).save_pretrained(folder)
    kernels = LESSKernels.from_pretrained(folder)
    if kernels.config.training != json.loads(json.dumps({**dataclasses.asdict(options), **described})):
        raise typer.BadParameter(f"{folder} was trained in another way: {kernels.config.training}. Choose another FOLDER.")
    if kernels.config.base_model_fingerprint != fingerprint(model):
        raise typer.BadParameter(f"{folder} was trained for another model. Choose another FOLDER.")
    return kernels


def named(values: list[str], option: str) -> dict[str, Path]:
    """`NAME=PATH`, each name once."""
    found = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or name in found:
            raise typer.BadParameter(f"expected {option} to be NAME=PATH, each NAME once, got {value!r}.")
        found[name] = Path(path)
    return found


@torch.no_grad()
def divergences(model, tokens: torch.Tensor, sets: dict[str, LESSKernels]) -> dict[str, dict[str, float]]:
    """KL of each policy alone and with each set to the full cache, in nats a token, on `tokens` `[b, p + n]`."""
    kernels = next(iter(sets.values()))  # which layers: the same in all
    dense, span = teacher_cache(model.config, kernels.config.layers), slice(PROMPT, PROMPT + DECODED)
    target = model(tokens, past_key_values=dense, use_cache=True, logits_to_keep=DECODED).logits.float().log_softmax(-1)
    teachers = [layer for layer in dense.layers if isinstance(layer, TeacherLayer)]
    result: dict[str, dict[str, float]] = {}
    for used, policy in USED.items():
        example = Example(PROMPT, policy)
        scores = [next(teacher.scores_after([example])) for teacher in teachers]
        decodes = roll_layers(teachers, example, scores, DECODED)
        result[used] = {}
        for name, state in {"alone": None, **sets}.items():
            cache = student_cache(dense, example, decodes, state)
            logits = model(tokens[:, span], past_key_values=cache, use_cache=True).logits.float().log_softmax(-1)
            kl = kl_div(logits, target, reduction="sum", log_target=True) / target.shape[:2].numel()
            result[used][name] = kl.item()
    return result


def main(
    model_name: Annotated[str, typer.Argument(metavar="MODEL")],
    text: Annotated[list[str], typer.Option(metavar="NAME=FILE", help="Text to measure on; repeatable.")],
    folder: Annotated[Path | None, typer.Argument(metavar="FOLDER", help="Of the sets trained here.")] = None,
    train_data: Annotated[
        list[Path] | None, typer.Option(metavar="TEXT", help="Text file or folder; repeatable, equal shares.")
    ] = None,
    steps: int = 60,
    stretch_count: Annotated[int, typer.Option("--stretches", help="Of each text, four at once.")] = 16,
    only: Annotated[list[str] | None, typer.Option("--set", metavar="NAME", help="To train; repeatable. Default: all.")] = None,
    finished: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="Kernels to measure; repeatable. No others unless --set.")
    ] = None,
    dtype: str = "bfloat16",
    output: Annotated[Path | None, typer.Option(metavar="FILE")] = None,
) -> None:
    """Train small sets that differ in one choice, and print what share of each policy's divergence they leave."""
    names = only or ([] if finished else list(SETS))
    if names and (folder is None or not train_data):
        raise typer.BadParameter("expected FOLDER and --train-data for the sets to train, or --finished and no --set.")
    texts = named(text, "--text")
    model, tokenizer = models.load(model_name, dtype=models.weights_type(dtype))
    hook.install()
    sets = {name: LESSKernels.from_pretrained(path).float() for name, path in named(finished or [], "--finished").items()}
    if others := [name for name, kernels in sets.items() if kernels.config.base_model_fingerprint != fingerprint(model)]:
        raise typer.BadParameter(f"expected kernels for {model_name}, got {', '.join(others)}, trained for another model.")
    if taken := sets.keys() & {"alone", *names}:
        raise typer.BadParameter(f"expected other names in --finished than {', '.join(sorted(taken))}.")
    sha256 = {name: kernels.config.sha256 for name, kernels in sets.items()}
    if names:
        sources = [sorted(path.glob("*.txt")) if path.is_dir() else [path] for path in train_data]
        sampler = TokenSampler([[tokenize(file.read_text("utf-8"), tokenizer) for file in source] for source in sources])
    for name in names:
        sets[name] = trained(name, model, sampler, folder / name.replace(" ", "-"), steps, dtype)
        typer.echo(f"trained: {name}", err=True)
    left: dict[str, dict[str, dict[str, float]]] = {}
    for title, path in texts.items():
        batches = stretches([path], tokenizer, stretch_count, PROMPT + DECODED).split(4)
        measured = [divergences(model, batch, sets) for batch in batches]
        left[title] = {
            used: {
                name: round(sum(each[used][name] for each in measured) / sum(each[used]["alone"] for each in measured), 3)
                for name in sets
            }
            for used in USED
        }
    options = {"stretches": stretch_count, "prompt": PROMPT, "decoded": DECODED, "dtype": dtype}
    if names:
        options |= {"steps": steps, "train_data": [path.name for path in train_data]}
    report = {
        "benchmark": "training_choices",
        "model": without_folder(model_name),
        "text": [path.name for path in texts.values()],
        **options,
        "finished": sha256,
        **describe(torch.device("cpu")),
        "divergence_left": left,
    }
    outputs.finish(report, output)


if __name__ == "__main__":
    typer.run(main)
