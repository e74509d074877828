"""The model card of a set of kernels, from what its config says."""

import json
import math
import re

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from less_cache.errors import LESSError
from less_cache.hub.client import FINGERPRINT_TAG, LIBRARY_TAG, is_repo_id
from less_cache.kernels.config import LESSConfig
from less_cache.kernels.head_budgets import BUDGETS_NAME, HeadBudgets
from less_cache.memory import MEMORIES

PLOT_NAME = "perplexity.png"
MOST_NAMES = 3  # of texts that head budgets were measured on
BEGIN = "<!-- less-cache: generated; what stands outside these two lines is kept -->"
END = "<!-- less-cache: end -->"


def render(
    config: LESSConfig,
    name: str,
    weights: str,
    previous: str | None = None,
    license: str | None = None,
    plot: bool = False,
    budgets: HeadBudgets | None = None,
) -> str:
    """The card's text, metadata first.

    Args:
        config: Of the kernels.
        name: What `from_pretrained` is given to load them.
        weights: The weights file in words.
        previous: An older card: its own metadata, and its text outside the generated part, stay.
        license: Of the base model, as the Hub writes it, such as `apache-2.0`. Default: the older card's.
        plot: Whether `perplexity.png` stands beside the card.
        budgets: The head budgets beside the kernels.

    Raises:
        LESSError: The config names no Hub model as base model, its policy cannot be shown, or the older card's metadata
            cannot be read.
    """
    if config.base_model is None or not is_repo_id(config.base_model):
        raise LESSError(
            f"Card: expected the config's base_model to be a Hub id such as org/name, got {config.base_model!r}. "
            "Set it: less-cache card --base-model, or kernels.config.base_model."
        )
    counts = [count for key, count in (config.policy or {}).items() if key != "name"]
    if not all(type(count) in (int, float) for count in counts):
        raise LESSError(f"Card: expected the config's policy to be a name and its counts, got {config.policy!r}. Correct it.")
    try:
        older = ModelCard(previous or "---\n{}\n---\n")
    except Exception as error:  # whatever the YAML parser and the metadata's own checks raise
        raise LESSError(f"Card: expected metadata in YAML in the older card, got: {error}. Correct or remove it.") from error
    text = "\n".join([BEGIN, *_sections(config, name, weights, plot, budgets), END])
    if re.search(f"{re.escape(BEGIN)}.*{re.escape(END)}", older.text, re.DOTALL):
        text = re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: text, older.text, count=1, flags=re.DOTALL)
    elif older.text.strip():
        text = f"{text}\n\n{older.text.strip()}"
    metadata = {**older.data.to_dict(), **_metadata(config, name)}
    metadata.pop("model-index", None)  # of older measurements
    metadata["tags"] = _tags(config, metadata.get("tags") or [])
    if license is not None:
        metadata["license"] = license
    return f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n{text.strip()}\n"


def reports(config: LESSConfig) -> dict[str, dict]:
    """The metrics that are reports of `less-cache eval perplexity`, by name. `LESSError` for one that only looks like it."""
    found = {name: report for name, report in config.metrics.items() if isinstance(report, dict) and "results" in report}
    for name, report in found.items():
        if problem := _problem(report):
            raise LESSError(
                f"Card: metrics {name!r}: expected a report of less-cache eval perplexity, got {problem}. "
                "Measure again with --output, or remove it from the config."
            )
    return found


def _problem(report: dict) -> str | None:
    """What a report lacks of what the card shows."""
    for key in ("sequences", "prompt_length", "decoded"):
        if type(report.get(key)) is not int:
            return f"{key}={report.get(key)!r}"
    data, results = report.get("data"), report["results"]
    if not isinstance(data, list) or not all(isinstance(path, str) for path in data):
        return f"data={data!r}"
    if not isinstance(results, list) or not results or not all(isinstance(rows, list) and len(rows) > 1 for rows in results):
        return "results that are no lists of rows, full cache first, one for each budget"
    for rows in results:
        for index, row in enumerate(rows):
            if not isinstance(row, dict) or (row.get("cache") == "full") != (index == 0):
                return f"row {row!r}, where {'the full cache' if index == 0 else 'another cache'} stands"
            policy = row.get("policy") if index else {"name": "none"}
            numbers: list = [row.get("perplexity"), row.get("bytes")]
            numbers += [row["gap_recovered"]] if row.get("gap_recovered") is not None else []
            numbers += [count for key, count in policy.items() if key != "name"] if isinstance(policy, dict) else []
            if (
                not isinstance(row.get("cache"), str)
                or not isinstance(policy, dict)
                or not isinstance(policy.get("name"), str)
                or not all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
            ):
                return f"row {row!r}"
    return None


def _metadata(config: LESSConfig, name: str) -> dict:
    metadata = {"base_model": config.base_model, "library_name": LIBRARY_TAG}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=label,
            dataset_name=label,
            metric_type="perplexity",
            metric_name=f"perplexity, {row['policy']['name']} {_counts(row['policy'])}",
            metric_value=row["perplexity"],
        )
        for label, report in reports(config).items()
        for rows in report["results"]
        for row in rows
        if row["cache"] == "less"
    ]
    return {**metadata, "model_name": name.split("/")[-1], "eval_results": results} if results else metadata


def _tags(config: LESSConfig, older: list[str]) -> list[str]:
    ours = ["kv-cache"]
    if config.base_model_fingerprint is not None:
        ours.append(FINGERPRINT_TAG.format(config.base_model_fingerprint[:16]))
    prefix = FINGERPRINT_TAG.format("")
    return [tag for tag in older if tag not in ours and not tag.startswith(prefix)] + ours


def _sections(config: LESSConfig, name: str, weights: str, plot: bool, budgets: HeadBudgets | None) -> list[str]:
    base = config.base_model or ""
    policy = config.policy or {}
    policies = config.training.get("policies")
    if not isinstance(policies, list) or not policies:
        policies = [policy.get("name", "no policy")]
    trained_with = " and ".join(dict.fromkeys(map(str, policies)))
    lines = [
        f"# LESS kernels for {base.split('/')[-1]}, trained with {trained_with}",
        "",
        f"φ and ψ that let a less-cache read what was evicted: {_state(config)}, "
        f"hidden size {_span(config.hidden_sizes)}, {len(config.layers or [])} layers, {weights}.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "from less_cache import LESSCache" if policy else "from less_cache import H2O, LESSCache",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{base}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")',
        *_cache(name, policy),
        'inputs = tokenizer("A long text …", return_tensors="pt")',
        "output = model.generate(**inputs, past_key_values=cache, max_new_tokens=256)",
        *_without_the_class(name, policy),
        "```",
        "",
        f"A derivative of [{base}](https://huggingface.co/{base}), whose licence applies.",
    ]
    if budgets is not None:
        lines += ["", *_profile(name, budgets)]
    if reports(config):
        lines += ["", "## Measured", ""]
        lines += [
            "Text decoded token by token through the real cache. Gap recovered = (policy − this) / (policy − full), in",
            "perplexity; *baseline+* is the policy with the bytes of the state as more tokens.",
        ]
        lines += ["", f"![Perplexity over the bytes of the cache]({PLOT_NAME})"] if plot else []
        for label, report in reports(config).items():
            lines += ["", *_table(label, report), "", *_command(base, name, report)]
    if config.training:
        lines += ["", "## Trained", "", "```yaml"]
        lines += [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in config.training.items()]
        lines += ["```"]
    lines += ["", f"Written by less-cache {config.less_cache_version}; sha256 of the weights: `{config.sha256}`."]
    return lines


def _state(config: LESSConfig) -> str:
    """What a KV head remembers evicted tokens with, in words."""
    memory = MEMORIES[config.memory]
    return memory.words.format(_span([rank // memory.rank_step for rank in config.ranks]))


def _cache(name: str, policy: dict) -> list[str]:
    if not policy:
        return [f'cache = LESSCache.from_pretrained("{name}", model, policy=H2O(heavy=64, recent=64))']
    return [
        f"# Keeps {_counts(policy)}, unless budget= says otherwise:",
        f'cache = LESSCache.from_pretrained("{name}", model)',
    ]


def _without_the_class(name: str, policy: dict) -> list[str]:
    if not policy:
        return []  # it takes no policy
    return [
        "",
        "# The same without the class, a budget in tokens:",
        f'output = model.generate(**inputs, custom_generate="{name}", trust_remote_code=True, less_budget=128)',
    ]


def _profile(name: str, budgets: HeadBudgets) -> list[str]:
    shares = [share for row in budgets.shares for share in row]
    texts = budgets.measured.get("data")
    measured = ""
    if isinstance(texts, list) and texts:
        measured = f", measured on {', '.join(map(str, texts)) if len(texts) <= MOST_NAMES else f'{len(texts)} texts'}"
    return [
        f"`{BUDGETS_NAME}`: what each KV head keeps, {min(shares):.2f} to {max(shares):.2f} of the mean{measured}.",
        f'With it: `LESSCache.from_pretrained("{name}", model, heads="profile")`.',
    ]


def _table(label: str, report: dict) -> list[str]:
    lines = [
        f"**{label}** ({', '.join(report['data'])}): {report['sequences']} sequences, {report['prompt_length']} tokens read at "
        f"once, then {report['decoded']} decoded.",
        "",
        "| cache | keeps | MB a sequence | perplexity | gap recovered |",
        "| --- | --- | --- | --- | --- |",
    ]
    for index, rows in enumerate(report["results"]):
        for row in rows:
            if row["cache"] == "full" and index > 0:
                continue  # the same for every budget
            keeps = _counts({} if row["cache"] == "full" else row["policy"])
            recovered = "" if row.get("gap_recovered") is None else f"{row['gap_recovered']:.0%}"
            lines.append(f"| {row['cache']} | {keeps} | {row['bytes'] / 1e6:.2f} | {row['perplexity']:.2f} | {recovered} |")
    return lines


def _command(base: str, name: str, report: dict) -> list[str]:
    budgets = [sum(count for key, count in rows[-1]["policy"].items() if key != "name") for rows in report["results"]]
    policy = report["results"][0][-1]["policy"]["name"]
    options = [f"--data {path}" for path in report["data"]] + [f"--budget {budget}" for budget in budgets]
    options += [f"--{key.replace('_', '-')} {report[key]}" for key in ("sequences", "prompt_length", "decoded")]
    if report.get("dtype", "float32") != "float32":  # reports before 0.2.0 do not say
        options.append(f"--dtype {report['dtype']}")
    command = [f"less-cache eval perplexity {base} --kernels {name} --policy {policy}", " ".join(options)]
    return ["```bash", " \\\n    ".join(command), "```"]


def _span(sizes: list[int]) -> str:
    """One number where all layers agree."""
    least, most = min(sizes, default=0), max(sizes, default=0)
    return f"{least}" if least == most else f"{least} to {most} by layer"


def _counts(policy: dict) -> str:
    """The sizes in a policy's JSON form, in words."""
    counts = {key: count for key, count in policy.items() if key != "name"}
    return ", ".join(f"{key} {count}" if isinstance(count, int) else f"{key} {count:.1%}" for key, count in counts.items())
