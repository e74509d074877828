"""Prints docs/models.md: python tests/models_table.py > docs/models.md"""

import warnings

import pytest
import transformers
import zoo
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from less_cache import H2O, LESSCache, LESSError
from less_cache.cache.layer import LESSLayer
from less_cache.integration.families import REFUSED, SUPPORTED

TRANSFORMERS = "5.23"
newest_transformers = pytest.mark.skipif(
    not transformers.__version__.startswith(f"{TRANSFORMERS}."), reason=f"lists the models of transformers {TRANSFORMERS}"
)
OWN_LAYERS = {
    "DynamicSlidingWindowLayer": "sliding-window",
    "LinearAttentionLayer": "linear",
    "MiniMaxM3VLSparseCacheLayer": "sparse",
}
HEAD = f"""\
# Models

Every causal language model of transformers {TRANSFORMERS}. For each supported one, a tiny random model shows in
`tests/test_models.py` that its output under a LESSCache equals the full cache's as long as the budget covers the text, that
under a small budget every layer equals the O(T²) reference with kernels, that a left-padded row equals its single run, and
that beam search follows its beams.

A model that is not in this table works with a warning, or fails with an error that says why. Continuous batching
(`generate_batch`, `cache_implementation="paged"`) brings a cache of its own and never looks at `past_key_values`.

Made by `python tests/models_table.py > docs/models.md`.
"""


def compressed(name: str) -> str:
    """Which layers of an architecture hold a LESSLayer."""
    layers = LESSCache(zoo.config(name), H2O(1, 1)).layers
    others = {OWN_LAYERS[type(layer).__name__] for layer in layers if not isinstance(layer, LESSLayer)}
    return f"all but {' and '.join(sorted(others))} layers" if others else "every layer"


def refusal(model_type: str) -> str | None:
    """Why a LESSCache refuses a type, or its default config; None: it does not."""
    if model_type in REFUSED:
        return REFUSED[model_type]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            LESSCache(CONFIG_MAPPING[model_type](), H2O(1, 1))
    except LESSError as error:
        reason = str(error).removesuffix(" Use a DynamicCache.").removesuffix(".")
        return reason.partition("': ")[2] or reason.partition("', ")[2]
    return None


def render() -> str:
    """The text of docs/models.md."""
    lines = [HEAD, "## Supported\n", "| model type | compressed | |", "| --- | --- | --- |"]
    for name in sorted(SUPPORTED):
        lines.append(f"| {name} | {compressed(name)} | {zoo.NOTES.get(name, '')} |".replace("|  |", "| |"))

    others = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *REFUSED} - SUPPORTED)
    refused = {model_type: reason for model_type in others if (reason := refusal(model_type))}
    lines += ["\n## Refused\n", "| model type | reason |", "| --- | --- |"]
    lines += [f"| {model_type} | {reason} |" for model_type, reason in refused.items()]
    lines.append("\n## Not tried\n")
    return "\n".join(lines) + "\n" + ", ".join(name for name in others if name not in refused) + "\n"


if __name__ == "__main__":
    print(render(), end="")
