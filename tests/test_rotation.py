"""Queries turned to later positions are those that the model itself computes there."""

import copy
import functools
import logging

import peft
import pytest
import tiny
import torch
import zoo
from accelerate import cpu_offload
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from less_cache import H2O, LESSCache
from less_cache.cache.layer import LESSLayer
from less_cache.integration import Rotation, full_attention_layers, rotations
from less_cache.integration.families import SUPPORTED

STEPS = torch.tensor([0, 1, 7, 100])
START, LENGTH = 3, 12  # of the text that is shifted

# What has nothing to turn: its hidden states hold the position, or no full-attention layer of it has a rotation.
LEARNED = {
    "bert",
    "bert-generation",
    "biogpt",
    "camembert",
    "ctrl",
    "data2vec-text",
    "electra",
    "ernie",
    "gpt-sw3",
    "gpt2",
    "gpt_bigcode",
    "opt",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}
WITHOUT_POSITIONS = {
    "afmoe",
    "beam",
    "cohere2",
    "cohere2_moe",
    "exaone4",
    "exaone_moe",
    "flint",
    "granitemoehybrid",
    "jamba",
    "kolibri1",
    "nemotron_h",
}
UNKNOWN: set[str] = set()
WITH_TEMPERATURE = {"beam"}  # its queries grow with the position, which is left out
BY_SLOT = {"minimax_m3_vl_text"}  # its sparse layers take positions for places in the text, so no text can be shifted


@functools.cache
def model_of(name: str) -> PreTrainedModel:
    if name in SUPPORTED and name not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {name}")
    return zoo.build(name)


def asked_of(monkeypatch, model: PreTrainedModel, **inputs: torch.Tensor) -> dict[int, torch.Tensor]:
    """The queries `[b, h, n, d]` that the full-attention layers of a model read in a forward."""
    queries = {}
    attend = LESSLayer.attend

    def recording(layer, original, module, query_states, *args, **kwargs):
        queries[layer.layer_idx] = query_states
        return attend(layer, original, module, query_states, *args, **kwargs)

    monkeypatch.setattr(LESSLayer, "attend", recording)
    with torch.no_grad():
        model(**inputs, past_key_values=LESSCache(model, H2O(256, 256)))
    monkeypatch.undo()
    return queries


def shifted(monkeypatch, model: PreTrainedModel, num_tokens: int = 0) -> dict[int, torch.Tensor]:
    """The queries `[steps, h, n, d]` of one random text at positions `STEPS` later: its attention is the same everywhere.

    `num_tokens`: as the model computes them in a text of that length.
    """
    input_ids = torch.randint(2, 97, (1, LENGTH)).expand(len(STEPS), -1)
    position_ids = START + STEPS[:, None] + torch.arange(LENGTH)
    if num_tokens > 0:
        input_ids = torch.cat([input_ids, input_ids[:1]])
        position_ids = torch.cat([position_ids, torch.arange(num_tokens - LENGTH, num_tokens)[None]])
    queries = asked_of(monkeypatch, model, input_ids=input_ids, position_ids=position_ids)
    return {index: states[: len(STEPS)] for index, states in queries.items()}


def assert_turns(found: dict[int, Rotation | None], queries: dict[int, torch.Tensor], tolerance: float = 1e-3) -> None:
    """The first of `queries`, turned by `STEPS`, are all of them."""
    assert found.keys() == queries.keys()
    for index, states in queries.items():
        turned = found[index].turn(states[:1].expand_as(states), by=STEPS[:, None, None])
        assert turned.dtype == states.dtype
        torch.testing.assert_close(turned, states, atol=tolerance * states.abs().max().item(), rtol=0)


rotary = [name for name in zoo.ARCHITECTURES if name not in LEARNED | WITHOUT_POSITIONS | UNKNOWN]


@pytest.mark.parametrize("name", [name for name in rotary if name not in BY_SLOT])
def test_turned_queries_are_the_later_ones(name, monkeypatch):
    model = model_of(name)
    found = rotations(model)
    assert list(found) == full_attention_layers(model.config)
    assert any(rotation.turns for rotation in found.values())
    assert_turns(found, shifted(monkeypatch, model))


@pytest.mark.parametrize("name", BY_SLOT)
def test_where_no_text_can_be_shifted(name, monkeypatch):
    """One token repeated has the same hidden states everywhere."""
    model = model_of(name)
    input_ids = torch.randint(2, 97, (3, 1)).expand(-1, START + int(STEPS[-1]) + 1)
    queries = asked_of(monkeypatch, model, input_ids=input_ids)
    assert_turns(
        rotations(model), {index: states[:, :, START + STEPS].permute(2, 1, 0, 3) for index, states in queries.items()}
    )


@pytest.mark.parametrize("name", sorted(WITHOUT_POSITIONS))
def test_no_rotation(name, monkeypatch):
    model = model_of(name)
    found = rotations(model)
    assert not any(rotation.turns for rotation in found.values())
    queries = shifted(monkeypatch, model)
    if name in WITH_TEMPERATURE:
        queries = {index: nn.functional.normalize(states, dim=-1) for index, states in queries.items()}
    assert_turns(found, queries)


@pytest.mark.parametrize("name", sorted(LEARNED))
def test_learned_positions_leave_nothing_to_turn(name, monkeypatch):
    model = model_of(name)
    found = rotations(model)
    assert not any(rotation.turns for rotation in found.values())
    for states in shifted(monkeypatch, model).values():
        assert not torch.allclose(states[0], states[-1], rtol=0.01)


@pytest.mark.parametrize(
    "name", ["llama", "cohere", "falcon", "gpt_neox", "gpt_oss", "glm4", "hunyuan_v1_dense", "llama4_text"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(name, dtype, monkeypatch):
    model = copy.deepcopy(model_of(name)).to(dtype)
    assert_turns(rotations(model), shifted(monkeypatch, model), tolerance=3e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)])
def test_norm_after_the_rotation(dtype, tolerance, monkeypatch):
    model = copy.deepcopy(model_of("hunyuan_v1_dense"))
    for layer in model.model.layers:
        weight, of_keys = layer.self_attn.query_layernorm.weight.data, layer.self_attn.key_layernorm.weight.data
        weight.uniform_(0.3, 2.0)
        weight[2] *= -1
        of_keys.copy_(1 / weight)  # so that scores, and hidden states, are those of a text anywhere
    model = model.to(dtype)
    found = rotations(model)
    assert_turns(found, shifted(monkeypatch, model), tolerance)
    weight = model.model.layers[0].self_attn.query_layernorm.weight.detach().float()
    expected = weight / weight[found[0].partner]
    torch.testing.assert_close(found[0].gains.abs(), expected.abs(), rtol=4 * tolerance, atol=0)


# Angles that depend on the length of the text

TRAINED = 128
FACTORS = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 2.0, 4.0, 8.0]}
SCALED = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": TRAINED},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
    "dynamic": {"factor": 2.0},
    "longrope": {**FACTORS, "factor": 4.0, "original_max_position_embeddings": TRAINED},
}


def scaled_llama(kind: str) -> PreTrainedModel:
    positions = TRAINED if kind == "dynamic" else 4 * TRAINED
    rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, **SCALED[kind]}
    return tiny.tiny_llama(max_position_embeddings=positions, rope_parameters=rope_parameters)


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("num_tokens", [0, TRAINED, TRAINED + 1, 300, 400])
def test_scaled_angles(kind, num_tokens, monkeypatch):
    model = scaled_llama(kind)
    assert_turns(rotations(model, num_tokens), shifted(monkeypatch, model, num_tokens))


@pytest.mark.parametrize(("kind", "num_tables"), [("linear", 1), ("yarn", 1), ("dynamic", 3), ("longrope", 2)])
def test_a_table_for_each_length_that_has_one(kind, num_tables):
    model = scaled_llama(kind)
    found = [rotations(model, num_tokens) for num_tokens in (0, 100, TRAINED, 300, 400)]
    assert len({id(each) for each in found}) == num_tables
    assert len({tuple(each[0].angles.tolist()) for each in found}) == num_tables


def test_few_tables_are_kept():
    model = scaled_llama("dynamic")
    first = rotations(model, 200)
    assert rotations(model, 200) is first
    for num_tokens in range(201, 220):
        rotations(model, num_tokens)
    assert rotations(model, 200) is not first
    assert torch.equal(rotations(model, 200)[0].angles, first[0].angles)


# The model is left as it was


def state_of(model: nn.Module) -> list:
    """All that a module holds but its parameters: attributes, hooks, and buffers with their values."""
    return [
        {name: str(value) if name != "_modules" else None for name, value in vars(module).items() if name != "_parameters"}
        for module in model.modules()
    ]


@pytest.mark.parametrize("kind", ["linear", "dynamic", "longrope"])
@pytest.mark.parametrize("seen", [0, 20, 200])
def test_the_model_is_left_as_it_was(kind, seen):
    model = scaled_llama(kind)
    if seen > 0:
        with torch.no_grad():
            model(torch.ones(1, seen, dtype=torch.long))
    model.train()
    model.model.layers[1].eval()
    before, rng, addresses = state_of(model), torch.get_rng_state(), [buffer.data_ptr() for buffer in model.buffers()]
    config = model.config.to_dict()
    rotations(model)
    rotations(model, 300)
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert [buffer.data_ptr() for buffer in model.buffers()] == addresses
    assert model.config.to_dict() == config
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_dropout_of_a_model_in_training_is_off():
    model = tiny.tiny_llama()
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, nn.Dropout(0.5))
    assert_turns_as_llama(rotations(model.train()))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for an old name
def test_one_forward_for_a_model_wrapped_or_not(monkeypatch):
    model = tiny.tiny_llama()
    found = rotations(peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)))
    monkeypatch.setattr(model, "forward", None)
    assert rotations(model) is found
    assert_turns_as_llama(found)


def test_offloaded_weights():
    model = cpu_offload(tiny.tiny_llama(), execution_device=torch.device("cpu"))
    assert_turns_as_llama(rotations(model))
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_in_any_mode(mode):
    with mode():
        found = rotations(tiny.tiny_llama())
    assert_turns_as_llama(found)
    assert not any(rotation.angles.is_inference() or rotation.angles.requires_grad for rotation in found.values())


def assert_turns_as_llama(found: dict[int, Rotation | None]) -> None:
    for rotation in found.values():
        torch.testing.assert_close(rotation.angles, torch.tensor([1.0, 0.1, 0.01, 0.001]).repeat(2), rtol=1e-4, atol=0)


# What is not known


def log_of(caplog, model: PreTrainedModel) -> list[str]:
    """What is logged where no layer of a model is known."""
    with caplog.at_level(logging.INFO, logger="less_cache"):
        assert rotations(model) == {0: None, 1: None}
        rotations(model)
    return [record.getMessage() for record in caplog.records]


def test_a_model_that_fails(caplog, monkeypatch):
    model = tiny.tiny_llama()

    def fail(*args, **kwargs):
        raise ValueError("no such\nthing")

    monkeypatch.setattr(model, "forward", fail)
    assert log_of(caplog, model) == ["LlamaForCausalLM: how its queries turn is not known (ValueError: no such)"]
    assert not model.training


def test_attention_that_is_not_seen(caplog, monkeypatch):
    model = tiny.tiny_llama()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda past_key_values, **inputs: forward(**inputs))
    assert log_of(caplog, model) == ["LlamaForCausalLM: how the queries of layers [0, 1] turn is not known"]


@pytest.mark.parametrize(
    "change", [lambda q, p: q + p * 0.01, lambda q, p: q.roll(1, -1) * p + q, lambda q, p: q * (1 + p * q)]
)
def test_positions_that_are_no_rotation(caplog, monkeypatch, change):
    """Queries alone change, so it is nothing that the hidden states hold."""
    model = tiny.tiny_llama()

    def apply_rotary_pos_emb(q, k, cos, sin):
        return change(q, torch.atan2(sin, cos)[:, None, :, :1]), k

    monkeypatch.setattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", apply_rotary_pos_emb)
    assert log_of(caplog, model) == ["LlamaForCausalLM: how the queries of layers [0, 1] turn is not known"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_weights_that_say_nothing(value, caplog):
    model = tiny.tiny_llama()
    nn.init.constant_(model.model.embed_tokens.weight, value)
    assert log_of(caplog, model) == ["LlamaForCausalLM: how the queries of layers [0, 1] turn is not known"]


def test_a_model_without_weights(caplog):
    [line] = log_of(caplog, tiny.tiny_llama().to("meta"))
    assert "is not known" in line


def without_positions(monkeypatch, model: PreTrainedModel) -> PreTrainedModel:
    """As somebody's own code may be: it swallows what it does not know."""
    forward = model.forward

    def own_forward(input_ids, past_key_values, **kwargs):
        return forward(input_ids, past_key_values=past_key_values)

    monkeypatch.setattr(model, "forward", own_forward)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "mixtral"])
def test_a_model_that_takes_no_positions(name, monkeypatch):
    model = copy.deepcopy(model_of(name))
    expected = rotations(model_of(name))
    for index, rotation in rotations(without_positions(monkeypatch, model)).items():
        torch.testing.assert_close(rotation.angles, expected[index].angles, rtol=1e-3, atol=1e-7)


def test_learned_positions_that_nobody_may_choose(monkeypatch):
    model = copy.deepcopy(model_of("gpt2"))
    assert not any(rotation.turns for rotation in rotations(without_positions(monkeypatch, model)).values())


@pytest.mark.parametrize("name", ["bamba", "qwen3_next"])
def test_behind_a_recurrence_that_reads_a_text(name, monkeypatch):
    model = copy.deepcopy(model_of(name))
    assert rotations(without_positions(monkeypatch, model)) == {1: None}


def test_angles_by_length_of_a_model_that_takes_no_positions(monkeypatch, caplog):
    model = without_positions(monkeypatch, scaled_llama("longrope"))
    with caplog.at_level(logging.INFO, logger="less_cache"):
        assert rotations(model, 300) == {0: None, 1: None}
    assert "length of the text" in caplog.text
    assert all(rotation.turns for rotation in rotations(model).values())


def test_some_layers_are_known(monkeypatch, caplog):
    model = tiny.tiny_llama()
    attention = model.model.layers[1].self_attn
    monkeypatch.setattr(attention, "layer_idx", 0)  # the last call of a layer counts
    with caplog.at_level(logging.INFO, logger="less_cache"):
        found = rotations(model)
    assert found[0].turns
    assert found[1] is None
    assert "layers [1]" in caplog.text


# Turning itself


@pytest.mark.parametrize("rotary_dim", [4, 8])
@pytest.mark.parametrize("layout", ["halves", "neighbours"])
@pytest.mark.parametrize("last", [False, True])
def test_every_layout(rotary_dim, layout, last, monkeypatch):
    """A rotation of the test's own, in a model."""
    dims = torch.arange(8)
    part = dims[8 - rotary_dim :] if last else dims[:rotary_dim]
    first, second = part.chunk(2) if layout == "halves" else (part[::2], part[1::2])
    angles = torch.tensor([0.7, -1e-3, 1e-5, 2.0])[: rotary_dim // 2]

    def apply_rotary_pos_emb(q, k, positions, _):
        by = positions[:, None, :, None] * angles
        out = q.clone()
        out[..., first] = q[..., first] * by.cos() - q[..., second] * by.sin()
        out[..., second] = q[..., second] * by.cos() + q[..., first] * by.sin()
        return out, k

    model = tiny.tiny_llama()
    monkeypatch.setattr(model.model.rotary_emb, "forward", lambda x, position_ids: (position_ids.float(), None))
    monkeypatch.setattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", apply_rotary_pos_emb)
    rotation = rotations(model)[0]
    assert torch.equal(rotation.partner[first], second)
    torch.testing.assert_close(rotation.angles[first], angles, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(rotation.gains[first], -torch.ones(rotary_dim // 2))
    torch.testing.assert_close(rotation.gains[second], torch.ones(rotary_dim // 2))


def test_turns_compose_and_go_back():
    rotation = rotations(model_of("llama"))[0]
    queries = torch.randn(2, 4, 5, 8)
    by = torch.arange(5)
    turned = rotation.turn(rotation.turn(queries, by), torch.tensor(30) - by)
    torch.testing.assert_close(turned, rotation.turn(queries, torch.tensor(30)))
    torch.testing.assert_close(rotation.turn(turned, torch.tensor(-30)), queries)


def test_nothing_is_computed_where_nothing_turns():
    queries = torch.randn(2, 5, 8)
    assert Rotation.none(8).turn(queries, torch.arange(5)) is queries


def test_to_another_device():
    rotation = rotations(model_of("llama"))[0].to("meta")
    assert rotation.turn(torch.empty(2, 5, 8, device="meta"), torch.arange(5, device="meta")).shape == (2, 5, 8)


def test_a_temperature_by_position_is_left_out(monkeypatch):
    """llama4's queries without RoPE grow with the position; so may those with it."""
    model = tiny.tiny_llama()
    original = model.model.rotary_emb.forward

    def forward(x, position_ids):
        factor = 1 + torch.log1p(position_ids.float() / 64).unsqueeze(-1)
        return tuple(each * factor for each in original(x, position_ids))

    monkeypatch.setattr(model.model.rotary_emb, "forward", forward)
    assert_turns_as_llama(rotations(model))
