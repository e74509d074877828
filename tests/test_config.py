"""LESSConfig: what goes to JSON comes back, and anything else is one LESSError."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from less_cache import LESSConfig, LESSError
from less_cache.kernels.config import FORMAT_VERSION

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
FIELDS = [field.name for field in dataclasses.fields(LESSConfig)]
EVERYTHING = {
    **SIZES,
    "rank": 4,
    "hidden_size": 16,
    "layers": [1],
    "model_type": "llama",
    "base_model": "someone/a-model",
    "base_model_fingerprint": "0123abcd",
    "policy": {"name": "h2o", "heavy": 0.1, "recent": 8},
    "training": {"data": "prose", "steps": 280, "nested": {"losses": [0.5, 1e-9]}},
    "metrics": {"perplexity": 21.062500000000004, "note": "φ und ψ"},
    "sha256": "0" * 64,
    "less_cache_version": "9.9.9",
    "format_version": 2,
    "memory": "soft_centroids",
}


def test_defaults():
    config = LESSConfig(**SIZES)
    assert (config.rank, config.hidden_size, config.layers) == (8, 512, [0, 1])
    assert config.policy is config.sha256 is config.base_model is None


def test_example_has_every_field():
    assert list(EVERYTHING) == FIELDS


@pytest.mark.parametrize("entries", [SIZES, EVERYTHING], ids=["sizes", "everything"])
def test_round_trip(entries):
    config = LESSConfig(**entries)
    assert LESSConfig.from_json(config.to_json()) == config
    assert LESSConfig.from_json(config.to_json()).to_json() == config.to_json()
    assert entries.items() <= json.loads(config.to_json()).items()


def test_sizes_by_layer():
    """One for each entry of `layers`, in their order; a version that knows one number alone must not read them."""
    config = LESSConfig(**SIZES, layers=[1, 0], rank=[4, 8], hidden_size=16)
    assert (config.ranks, config.hidden_sizes, config.format_version) == ([4, 8], [16, 16], 2)
    assert json.loads(config.to_json())["rank"] == [4, 8]
    assert LESSConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("name", ["rank", "hidden_size"])
def test_equal_sizes_are_one_number(name):
    """Files of one size for all are what they always were, to the byte."""
    listed, plain = LESSConfig(**{**SIZES, name: [6, 6]}), LESSConfig(**{**SIZES, name: 6})
    assert listed == plain and listed.to_json() == plain.to_json()
    assert plain.format_version == 1 and json.loads(plain.to_json())[name] == 6


WRONG = [
    *[(name, size) for name in SIZES for size in (0, -1, 1.0, True, "4", None, [4], 10**12)],
    *[(name, size) for name in ("rank", "hidden_size") for size in (0, -8, 8.0, False, "8", None, {}, 10**12)],
    *[(name, sizes) for name in ("rank", "hidden_size") for sizes in ([], [4, 8], [0], [8.0], [True], ["8"], [[8]])],  # 1 layer
    ("num_key_value_heads", 3),
    ("num_hidden_layers", 10_001),
    *[("layers", layers) for layers in ([2], [-1], [0, 0], [0.0], [True], ["0"], "01", {"0": 1}, 2)],
    *[("sha256", digest) for digest in ("", "0" * 63, "0" * 65, "g" * 64, "0" * 64 + "\n", 5, ["0"])],
    *[(name, value) for name in ("training", "metrics") for value in (None, [], "280 steps", 5)],
    *[("policy", policy) for policy in ("h2o", 5, ["h2o"], True)],
    *[(name, value) for name in ("model_type", "base_model", "base_model_fingerprint") for value in (5, ["llama"], {}, True)],
    *[("less_cache_version", version) for version in (None, 5, [1])],
    *[("format_version", version) for version in (FORMAT_VERSION + 1, 0, 1.0, True, "1", None, [1])],
]


@pytest.mark.parametrize("name, value", WRONG, ids=str)
def test_wrong_value(name, value):
    """The error names the key."""
    text = json.dumps({**EVERYTHING, name: value})
    with pytest.raises(LESSError, match=name):
        LESSConfig.from_json(text)


def test_unknown_keys_never_vanish():
    with pytest.raises(LESSError, match=r"unknown keys \['alpha', 'omega'\].*less-cache 9\.9\.9"):
        LESSConfig.from_json(json.dumps({**EVERYTHING, "omega": 1, "alpha": 2}))


def test_newer_format_says_who_wrote_it():
    """Before its unknown keys, which are no news."""
    with pytest.raises(
        LESSError, match=r"format_version 1 to 2, got 3, written by less-cache 9\.9\.9.*pip install -U 'less-cache>=9\.9\.9'"
    ):
        LESSConfig.from_json(json.dumps({**EVERYTHING, "format_version": 3, "new_key": 1}))


@pytest.mark.parametrize("version", ["0.2'; rm -rf ~ #", 5, None])
def test_no_stranger_writes_the_command_to_upgrade(version):
    with pytest.raises(LESSError, match=r"pip install -U less-cache$"):
        LESSConfig.from_json(json.dumps({**EVERYTHING, "format_version": FORMAT_VERSION + 1, "less_cache_version": version}))


@pytest.mark.parametrize("name", SIZES)
def test_missing_key(name):
    entries = {key: size for key, size in SIZES.items() if key != name}
    with pytest.raises(LESSError, match=name):
        LESSConfig.from_json(json.dumps(entries))


DEEP = 100_000
NOT_AN_OBJECT = {
    "empty": "",
    "cut": "{",
    "number": "5",
    "null": "null",
    "list": "[]",
    "string": '"x"',
    "not JSON": "less",
    "trailing text": "{} {}",
    "deep lists": "[" * DEEP,
    "deep objects": '{"a":' * DEEP,
    "long number": '{"rank": 1' + "0" * 5_000 + "}",
}


@pytest.mark.parametrize("text", NOT_AN_OBJECT.values(), ids=NOT_AN_OBJECT)
def test_not_a_config(text):
    with pytest.raises(LESSError, match=r"less_config\.json"):
        LESSConfig.from_json(text)


@pytest.mark.parametrize("depth", [60, 400])
@pytest.mark.parametrize("name", ["training", "metrics", "policy"])
def test_entries_nested_without_end(name, depth):
    """Less deep than the reader of JSON goes, deeper than what works with the config afterwards."""
    nested = {"name": "h2o"}
    for _ in range(depth):
        nested = {"name": [nested]}
    with pytest.raises(LESSError, match=r"less_config\.json: expected JSON of at most 100 levels"):
        LESSConfig.from_json(json.dumps({**SIZES, name: nested}))
    with pytest.raises(LESSError, match="expected JSON of at most 100 levels"):
        LESSConfig(**SIZES, **{name: nested}).to_json()


def test_a_few_levels_are_none_too_many():
    nested = {"value": 1}
    for _ in range(40):
        nested = {"deeper": [nested]}
    config = LESSConfig(**SIZES, metrics=nested)
    assert LESSConfig.from_json(config.to_json()).metrics == nested


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


NOT_NUMBERS = {"perplexity": float("nan"), "bytes": [float("inf"), 3.5], "gap": {"recovered": float("-inf")}}


def test_figures_that_are_no_number_are_null():
    """As JSON has it, which knows neither NaN nor infinity."""
    text = LESSConfig(**SIZES, metrics=NOT_NUMBERS, training=NOT_NUMBERS).to_json()
    entries = json.loads(text, parse_constant=refuse)
    assert entries["metrics"] == entries["training"] == {"perplexity": None, "bytes": [None, 3.5], "gap": {"recovered": None}}


def test_older_files_with_nan_are_read():
    """As older versions wrote them: figures are None, a size is an error."""
    metrics = '{"perplexity": NaN, "bytes": [Infinity, -Infinity, 1e999]}'
    config = LESSConfig.from_json(json.dumps({**SIZES, "metrics": {}})[:-3] + metrics + "}")
    assert config.metrics == {"perplexity": None, "bytes": [None, None, None]}
    with pytest.raises(LESSError, match="expected head_dim to be an int"):
        LESSConfig.from_json(json.dumps({**SIZES, "head_dim": float("nan")}))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(FIELDS)
VALUES = st.recursive(
    SCALARS,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=8), values, max_size=3),
    max_leaves=6,
)


def accepts(text: str) -> bool:
    """Whether `text` is a config; whatever it is, there is no error but LESSError."""
    try:
        config = LESSConfig.from_json(text)
    except LESSError as error:
        assert str(error)
        return False
    assert LESSConfig.from_json(config.to_json()).to_json() == config.to_json()
    json.loads(config.to_json(), parse_constant=refuse)
    return True


@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), VALUES, max_size=4))
def test_fuzzed_values(changes):
    accepts(json.dumps({**EVERYTHING, **changes}))


@given(st.integers(0, 2_000), st.text(max_size=6), st.integers(0, 20))
def test_fuzzed_text(start, inserted, removed):
    text = LESSConfig(**EVERYTHING).to_json()
    accepts(text[:start] + inserted + text[start + removed :])
