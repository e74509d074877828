"""Every supported architecture, as a tiny random model: what docs/models.md says of it is proved here."""

import functools
from collections.abc import Iterator
from pathlib import Path

import models_table
import pytest
import torch
import zoo
from models_table import newest_transformers
from tiny import tiny_kernels
from transformers import DynamicCache, PreTrainedModel

from less_cache import H2O, LESSCache, LESSKernels
from less_cache.cache.layer import LESSLayer
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


TABLE = Path(__file__).parent.parent / "docs" / "models.md"


@newest_transformers
def test_the_table_in_the_docs_is_up_to_date():
    """Else: python tests/models_table.py > docs/models.md"""
    assert TABLE.read_text(encoding="utf-8") == models_table.render()
