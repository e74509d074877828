"""Every supported architecture, as a tiny random model: what docs/models.md says of it is proved here."""

import functools
from collections.abc import Iterator
from pathlib import Path

import models_table
import pytest
import torch
import transformers
import zoo
from models_table import newest_transformers
from tiny import tiny_kernels
from transformers import DynamicCache, PreTrainedModel

from less_cache import H2O, LESSCache, LESSError, LESSKernels
from less_cache.cache.layer import LESSLayer
from less_cache.integration.families import full_attention_layers
from less_cache.policies import EvictionPolicy
from less_cache.testing.reference import reference_attention

NEW = 3
PADDING = 5
SMALL = H2O(heavy=3, recent=2)

each_architecture = pytest.mark.parametrize("name", zoo.ARCHITECTURES)


@functools.cache
def model_of(name: str) -> PreTrainedModel:
    return zoo.build(name)


def prompt() -> dict[str, torch.Tensor]:
    """Two rows of 12 tokens, the second with padding on its left."""
    ids = torch.randint(2, 97, (2, 12))
    ids[1, :PADDING] = 0
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def generate(model: PreTrainedModel, cache, inputs: dict[str, torch.Tensor], **options) -> torch.Tensor:
    """Logits of every step of greedy generation, `[b, steps, vocabulary]`."""
    output = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(output.logits, dim=1)


def assert_close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


@each_architecture
def test_budget_above_length_is_the_full_cache(name):
    model, inputs = model_of(name), prompt()
    assert_close(
        generate(model, LESSCache(model, H2O(64, 64)), inputs), generate(model, DynamicCache(config=model.config), inputs)
    )


def recorded_attention(monkeypatch) -> dict[int, list[tuple]]:
    """From now on every call of attention under LESS: its states, output and arguments, by layer."""
    calls: dict[int, list[tuple]] = {}
    attend = LESSLayer.attend

    def recording(layer, original, module, query, key, value, mask, dropout=0.0, scaling=None, **kwargs):
        output = attend(layer, original, module, query, key, value, mask, dropout, scaling, **kwargs)
        calls.setdefault(layer.layer_idx, []).append((query, key, value, output[0].transpose(1, 2), scaling, kwargs))
        return output

    monkeypatch.setattr(LESSLayer, "attend", recording)
    return calls


def beside_the_reference(
    calls: dict[int, list[tuple]], policy: EvictionPolicy, kernels: LESSKernels, real: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """By layer: what attention gave at real tokens, and the plain O(T²) formula over the states the model has computed."""
    for index, blocks in calls.items():
        query, key, value, output = (torch.cat(states, dim=2) for states in list(zip(*blocks, strict=True))[:4])
        *_, scaling, kwargs = blocks[0]
        expected, _ = reference_attention(
            query,
            key,
            value,
            policy,
            [block[0].shape[2] for block in blocks],
            kernels.for_layer(index),
            real,
            scaling,
            kwargs.get("softcap"),
            kwargs.get("s_aux"),
        )
        attended = real[:, None, :, None].expand_as(expected)
        yield output[attended], expected.to(output.dtype)[attended]


@each_architecture
def test_small_budget_is_the_reference(name, monkeypatch):
    model, inputs = model_of(name), prompt()
    kernels = tiny_kernels(model)
    calls = recorded_attention(monkeypatch)
    cache = LESSCache(model, SMALL, kernels)
    generate(model, cache, inputs)
    assert calls.keys() == {index for index, layer in enumerate(cache.layers) if isinstance(layer, LESSLayer)}
    real = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW - 1), value=1).bool()
    for output, expected in beside_the_reference(calls, SMALL, kernels, real):
        assert_close(output, expected)


@pytest.mark.parametrize("name", [name for name in zoo.ARCHITECTURES if name not in zoo.WITHOUT_LEFT_PADDING])
def test_left_padded_row_equals_its_single_run(name):
    model, inputs = model_of(name), prompt()
    single = {key: tensor[1:, PADDING:] for key, tensor in inputs.items()}
    batch = generate(model, LESSCache(model, SMALL), inputs)[1:]
    assert_close(batch, generate(model, LESSCache(model, SMALL), single))


@each_architecture
def test_beams(name):
    model, inputs = model_of(name), prompt()
    options = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True, "return_dict_in_generate": True}
    full, less = (
        model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW, **options)
        for cache in (DynamicCache(config=model.config), LESSCache(model, H2O(64, 64)))
    )
    assert torch.equal(less.sequences, full.sequences)
    assert_close(less.sequences_scores, full.sequences_scores)


def has_own_layers(name: str) -> bool:
    """Whether an architecture has layers beside those under LESS."""
    config = zoo.config(name)
    try:
        return len(full_attention_layers(config)) < len(DynamicCache(config=config).layers)
    except KeyError:  # a kind that comes with the model's class
        return True


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", [name for name in zoo.ARCHITECTURES if has_own_layers(name)])
def test_after_reset_any_batch_may_come(name, static):
    """Also where transformers' layers keep the batch that they had, and record on: windows, convolutions, recurrences."""
    if static and name in zoo.WITHOUT_STATIC:
        pytest.skip("a layer of its own grows with the text")
    if static and name == "llama4_text" and transformers.__version__.startswith("5.17."):
        pytest.skip("generate of transformers 5.17 makes no masks for its StaticCache either")
    model = model_of(name)
    inputs = {"input_ids": prompt()["input_ids"].clamp_min(1)}
    one = {"input_ids": inputs["input_ids"][:1]}
    cache = LESSCache(model, SMALL, static=static)
    for text in (inputs, one, inputs):
        other = LESSCache(model, SMALL, static=static)
        assert_close(generate(model, cache, text), generate(model, other, text))
        assert cache.memory_footprint() == other.memory_footprint()
        if not static:
            cache.activate_past_recording()
        cache.reset()


@torch.no_grad()
def test_a_model_that_counts_from_0_without_positions_is_refused():
    """Bamba's logits are wrong with a DynamicCache then, and nobody is told."""
    model, text = model_of("bamba"), prompt()["input_ids"]
    expected, full, cache = model(text).logits[:, 9:], DynamicCache(config=model.config), LESSCache(model, H2O(64, 64))
    for each in (full, cache):
        model(text[:, :9], past_key_values=each)
    assert not torch.allclose(model(text[:, 9:], past_key_values=full).logits, expected, atol=0.1)
    before = cache.fork()
    with pytest.raises(LESSError, match="position_ids in forwards of your own"):
        model(text[:, 9:], past_key_values=cache)
    positions = torch.arange(9, 12).unsqueeze(0)
    assert_close(model(text[:, 9:], past_key_values=before, position_ids=positions).logits, expected)


TABLE = Path(__file__).parent.parent / "docs" / "models.md"


@newest_transformers
def test_the_table_in_the_docs_is_up_to_date():
    """Else: python tests/models_table.py > docs/models.md"""
    assert TABLE.read_text(encoding="utf-8") == models_table.render()
