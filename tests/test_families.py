"""What is known of model families: geometry, identity, refusals with their reason."""

import warnings

import pytest
import torch
import transformers
import zoo
from models_table import newest_transformers
from tiny import tiny_llama
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaForCausalLM

from less_cache import H2O, LESSCache, LESSError
from less_cache.integration.families import ALIBI, MLA, REFUSED, SUPPORTED, Geometry, fingerprint, geometry

REFUSALS = [
    (transformers.T5Config, {}, "encoder-decoder"),
    (transformers.BartConfig, {}, "encoder-decoder"),
    (transformers.BloomConfig, {}, ALIBI),
    (transformers.MptConfig, {}, ALIBI),
    (transformers.FalconConfig, {"alibi": True}, ALIBI),
    (transformers.DeepseekV2Config, {}, MLA),
    (transformers.DeepseekV3Config, {}, MLA),
    (transformers.Glm4MoeLiteConfig, {}, MLA),
    (transformers.DiffLlamaConfig, {}, "swaps the values"),
    (transformers.JetMoeConfig, {}, "repeats keys and values"),
    (transformers.DogeConfig, {}, "its mask differs by head"),
    (transformers.MiniMaxConfig, {}, "no cache but its own"),
    (transformers.BltConfig, {}, "each of its parts"),
    (transformers.Gemma3nTextConfig, {}, "the keys of another layer"),
    (transformers.LlamaConfig, {"attn_implementation": "paged|eager"}, "continuous batching"),
    (transformers.GPTJConfig, {}, "AttentionInterface"),
    (transformers.CodeGenConfig, {}, "AttentionInterface"),
    (transformers.XGLMConfig, {}, "AttentionInterface"),
    (transformers.MambaConfig, {}, "no full-attention layer"),
    (transformers.MistralConfig, {"sliding_window": 64}, "no full-attention layer"),
]


@pytest.mark.parametrize("config_class, options, reason", REFUSALS)
def test_refused_with_the_reason(config_class, options, reason):
    with pytest.raises(LESSError) as caught:
        LESSCache(config_class(**options), H2O(4, 4))
    message = str(caught.value)
    assert reason in message
    assert config_class.model_type in message.lower()
    assert "DynamicCache" in message or reason == "encoder-decoder"


def test_a_model_is_refused_like_its_config():
    config = transformers.GPTJConfig(vocab_size=16, n_layer=1, n_head=2, n_embd=32, rotary_dim=4)
    with pytest.raises(LESSError, match="'gptj': its attention does not go through"):
        LESSCache(AutoModelForCausalLM.from_config(config), H2O(4, 4))


@newest_transformers
def test_names_exist():
    """A misspelt name would refuse nothing, and support nothing."""
    assert {*REFUSED, *SUPPORTED} <= set(CONFIG_MAPPING)


def test_an_architecture_that_was_never_tried_warns_once():
    class NewConfig(transformers.LlamaConfig):
        model_type = "new"

    with pytest.warns(UserWarning, match="never tested with 'new'.*DynamicCache") as caught:
        LESSCache(NewConfig(), H2O(4, 4))
        LESSCache(NewConfig(), H2O(4, 4))
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_a_supported_architecture_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LESSCache(transformers.LlamaConfig(), H2O(4, 4))


DEPTH_3_HEADS_8 = {"num_hidden_layers": 3, "num_attention_heads": 8, "hidden_size": 64}
GEOMETRIES = [
    (transformers.LlamaConfig, DEPTH_3_HEADS_8, (3, 8, 8, 8)),
    (transformers.LlamaConfig, {**DEPTH_3_HEADS_8, "num_key_value_heads": 2}, (3, 8, 2, 8)),
    (transformers.LlamaConfig, {**DEPTH_3_HEADS_8, "head_dim": 16}, (3, 8, 8, 16)),
    (transformers.GPT2Config, {"n_layer": 3, "n_head": 4, "n_embd": 64}, (3, 4, 4, 16)),
    (transformers.GPTNeoXConfig, DEPTH_3_HEADS_8, (3, 8, 8, 8)),
    (transformers.FalconConfig, DEPTH_3_HEADS_8, (3, 8, 1, 8)),
    (transformers.FalconConfig, {**DEPTH_3_HEADS_8, "multi_query": False}, (3, 8, 8, 8)),
    (transformers.FalconConfig, {**DEPTH_3_HEADS_8, "new_decoder_architecture": True, "num_kv_heads": 2}, (3, 8, 8, 8)),
    (transformers.Gemma3Config, {}, (26, 8, 4, 256)),  # images and text: the text model's
]


@pytest.mark.parametrize("config_class, options, sizes", GEOMETRIES)
def test_geometry(config_class, options, sizes):
    assert geometry(config_class(**options)) == Geometry(*sizes)


def test_geometry_that_differs_by_layer():
    with pytest.raises(LESSError, match="gemma4"):
        geometry(transformers.Gemma4TextConfig())


@pytest.mark.parametrize("family", [*zoo.FAMILIES, "falcon multi-head", "falcon new"])
def test_geometry_is_what_the_cache_holds(family):
    model = zoo.build(family)
    sizes = geometry(model.config)
    cache = LESSCache(model, H2O(4, 4))
    with torch.no_grad():
        model(torch.arange(1, 20)[None], past_key_values=cache)
    assert len(cache.layers) == sizes.num_hidden_layers
    for layer in cache.layers:
        assert (layer.keys.shape[1], layer.keys.shape[3]) == (sizes.num_key_value_heads, sizes.head_dim)


# Identity


def distinct_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A model whose norms are not all ones, as in every trained model."""
    model = tiny_llama(**overrides)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    return model


def test_fingerprint_is_independent_of_path_and_format(tmp_path):
    model = distinct_llama()
    expected = fingerprint(model)
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "another name")
    assert model.config.name_or_path != str(tmp_path / "a")
    for folder in ("a", "another name"):
        assert fingerprint(LlamaForCausalLM.from_pretrained(tmp_path / folder)) == expected


def test_fingerprint_is_independent_of_precision():
    expected = fingerprint(distinct_llama())
    assert fingerprint(distinct_llama().to(torch.bfloat16)) == expected
    assert fingerprint(distinct_llama().to(torch.bfloat16).float()) == expected
    assert fingerprint(distinct_llama().to(torch.bfloat16).half()) == expected


def test_fingerprint_is_independent_of_quantised_matrices():
    model = distinct_llama()
    expected = fingerprint(model)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = (parameter.data * 8).round() / 8
    assert fingerprint(model) == expected


OTHERS = {
    "other norms": lambda: distinct_llama(seed=1),
    "other vocabulary": lambda: distinct_llama(vocab_size=98),
    "other KV heads": lambda: distinct_llama(num_key_value_heads=4),
    "other layers": lambda: distinct_llama(num_hidden_layers=3),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_fingerprint_differs_for_other_weights(other):
    assert fingerprint(other()) != fingerprint(distinct_llama())


def test_fingerprint_sees_one_changed_weight():
    model = distinct_llama()
    with torch.no_grad():
        model.model.norm.weight[-1] *= 1.1
    assert fingerprint(model) != fingerprint(distinct_llama())
