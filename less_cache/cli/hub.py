"""What `less-cache pull`, `push`, `info`, `verify` and `card` do."""

import dataclasses
import json
from pathlib import Path

from transformers import PreTrainedModel

from less_cache import models
from less_cache.cache.cache import LESSCache
from less_cache.errors import LESSError
from less_cache.evaluation.plot import draw
from less_cache.files import atomic, plain_json
from less_cache.files.paths import expanded
from less_cache.hub import card, client, publish
from less_cache.integration.families import full_attention_layers
from less_cache.kernels import folder as files
from less_cache.kernels.check import check_head_budgets
from less_cache.kernels.config import LESSConfig
from less_cache.kernels.head_budgets import BUDGETS_NAME, HeadBudgets
from less_cache.kernels.kernels import LESSKernels
from less_cache.policies import H2O
from less_cache.reports import plots


def pull(name: str, revision: str | None, output: Path | None) -> None:
    """Download and check kernels; print the folder that holds them."""
    folder = client.find(name, revision)
    kernels = LESSKernels.from_pretrained(folder)
    if output is not None:
        if (beside := kernels.head_budgets or HeadBudgets.of(output)) is not None:
            beside.check_beside(kernels.config, str(output))
        parts = [files.WEIGHTS_NAME, files.CONFIG_NAME, *([] if kernels.head_budgets is None else [BUDGETS_NAME])]
        atomic.replace(output, {part: (folder / part).read_bytes() for part in parts})
        folder = output
    print(folder)


def push(folder: Path, repo_id: str, revision: str | None, private: bool, license: str | None, dry_run: bool) -> None:
    """Check kernels, then upload them with their card; or only say what an upload would send."""
    LESSKernels.from_pretrained(_existing(folder))
    if dry_run:
        sent = publish.contents(folder, repo_id, license=license)
        for name, content in sent.items():
            print(f"{len(content):>12,}  {name}")
        print(f"Nothing was sent: a dry run of a push to {repo_id}.")
        return
    print(publish.push(folder, repo_id, revision, private=private or None, license=license))


def info(name: str, revision: str | None) -> None:
    """Print what kernels say about themselves, as JSON: the words are those of whoever published them."""
    if _has_a_profile_alone(name):
        _print_profile(HeadBudgets.from_pretrained(name))
        return
    kernels = LESSKernels.from_pretrained(name, revision=revision)
    folder = Path(kernels.source or "")
    print(f"folder: {folder}")
    print(f"weights: {files.describe(folder)}")
    for key, value in dataclasses.asdict(kernels.config).items():
        print(f"{key}: {json.dumps(value)}")
    if kernels.head_budgets is not None:
        print()
        _print_profile(kernels.head_budgets)


def _print_profile(budgets: HeadBudgets) -> None:
    print(f"{BUDGETS_NAME}: {len(budgets.shares)} layers of {budgets.num_key_value_heads} KV heads")
    for key, value in budgets.to_dict().items():
        print(f"{key}: {json.dumps(value)}")


def verify(name: str, revision: str | None, model_name: str | None) -> None:
    """Check every byte of kernels, and of a profile beside them, and whether they belong to a model."""
    if _has_a_profile_alone(name):
        budgets = HeadBudgets.from_pretrained(name)
        if model_name is not None:
            _check(budgets, models.load(model_name)[0])
        print(f"{name}: a profile of head budgets" + (f", and measured for {model_name}." if model_name else "."))
        return
    kernels = LESSKernels.from_pretrained(name, revision=revision)
    if kernels.config.sha256 is None:
        raise LESSError(
            f"{name}: {files.CONFIG_NAME} names no sha256, so nothing tells whether the weights are the right ones."
        )
    if model_name is not None:
        model, _ = models.load(model_name)
        LESSCache(model, policy=H2O(1, 1), kernels=kernels, heads="equal")
        if kernels.head_budgets is not None:
            _check(kernels.head_budgets, model)
    print(f"{name}: as its config says" + (f", and trained for {model_name}." if model_name else "."))


def _has_a_profile_alone(name: str) -> bool:
    folder = expanded(name)
    return folder.is_dir() and (folder / BUDGETS_NAME).exists() and not (folder / files.CONFIG_NAME).exists()


def _check(budgets: HeadBudgets, model: PreTrainedModel) -> None:
    check_head_budgets(budgets, model.config, full_attention_layers(model.config), model)


def write_card(folder: Path, reports: list[str], base_model: str | None, license: str | None, plot: bool) -> None:
    """Put reports into the config, then write the card and `custom_generate/`; text of one's own in the card stays.

    `reports`: `NAME=FILE`, with what `less-cache eval perplexity --output FILE` wrote about these kernels.
    """
    LESSKernels.from_pretrained(_existing(folder))
    config = files.read_config(folder)
    config.base_model = base_model or config.base_model
    for entry in reports:
        label, _, path = entry.partition("=")
        config.metrics[label] = _report(label, expanded(path), config)
    image = {}
    if plot:
        if not card.reports(config):
            raise LESSError("The plot needs a report: pass --report NAME=FILE. Or pass --no-plot.")
        image = {card.PLOT_NAME: plots.image(draw(card.reports(config)))}
    name = folder.name if folder.is_absolute() else folder.as_posix()
    companions = publish.companions(folder, config, name, license=license, plot=plot)
    atomic.replace(folder, {**image, **companions, files.CONFIG_NAME: config.to_json().encode()})
    print(folder / publish.CARD_NAME)


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise LESSError(f"Expected a folder of kernels, got {folder}, which is none.")
    return folder


def _report(label: str, path: Path, config: LESSConfig) -> dict:
    """A report of `less-cache eval perplexity`, as it stands in the config."""
    try:
        report = plain_json.parse(path.read_text(encoding="utf-8"))
        measured = report.pop("kernels_sha256")
        del report["model"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise LESSError(
            f"Expected --report NAME=FILE with a report of less-cache eval perplexity, got {label}={path}: {error!r}."
        ) from error
    if measured != config.sha256:
        raise LESSError(f"{path}: a report on other kernels: expected sha256 {config.sha256}, got {measured}. Measure again.")
    return report
