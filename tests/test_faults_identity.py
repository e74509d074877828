"""Whose cache, whose kernels: what was mistaken for another's, or refused though it belonged."""

import json
import logging
import types
from collections.abc import Iterator
from typing import Any

import accelerate
import peft
import pytest
import torch
import zoo
from accelerate.hooks import AlignDevicesHook, SequentialHook
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import VOCAB, tiny_kernels, tiny_llama
from torch.testing._internal.two_tensor import TwoTensor
from transformers import CONFIG_MAPPING, DynamicCache

from less_cache import H2O, LESSCache, LESSError
from less_cache.cache import snapshot
from less_cache.cache.layer import LESSLayer
from less_cache.integration import weights
from less_cache.integration.families import fingerprint
from less_cache.integration.weights import device_of_layer, digest_of_weights

PROMPT, NEXT = (torch.randint(1, VOCAB, (2, n), generator=torch.Generator().manual_seed(n)) for n in (20, 6))
LARGE = H2O(200, 200)
PROJECTIONS = ["q_proj", "k_proj", "v_proj"]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for an old name


@torch.no_grad()
def read(model, cache, tokens) -> torch.Tensor:
    return model(input_ids=tokens, past_key_values=cache).logits


def saved(model, path, policy=LARGE, kernels=None):
    cache = LESSCache(model, policy, kernels)
    read(model, cache, PROMPT)
    cache.save(path)
    return path


def distinct(model, seed: int = 0):
    """With norms and biases that are not all equal, as in every trained model."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    return model


def with_lora(model, **options):
    options = {"target_modules": PROJECTIONS, "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**options)).eval()


def rewritten(path, change) -> None:
    """The file with a header that `change` made of its own."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = change(json.loads(file.metadata()["less_cache"]))
    text = json.dumps(header)
    save_file(tensors, path, {"less_cache": text, "sha256": snapshot.digest(tensors, text)})


def without(*names: str):
    return lambda header: {name: entry for name, entry in header.items() if name not in names}


# A saved cache belongs to the weights that it was made with


def second_adapter():
    model = with_lora(tiny_llama())
    model.add_adapter("second", peft.LoraConfig(target_modules=PROJECTIONS, init_lora_weights=False))
    model.set_adapter("second")
    return model


def rescaled():
    model = with_lora(tiny_llama())
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)
    return model


@torch.no_grad()
def other_row():
    model = tiny_llama()
    model.model.embed_tokens.weight[40] += 0.1
    return model


@torch.no_grad()
def other_matrix():
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight *= 1.01
    return model


def new_token():
    model = peft.get_peft_model(tiny_llama(), peft.TrainableTokensConfig(token_indices=[40], target_modules=["embed_tokens"]))
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            torch.nn.init.ones_(parameter)
    return model.eval()


OTHERS = {
    "bare": tiny_llama,
    "LoRA": lambda: with_lora(tiny_llama()),
    "merged LoRA": lambda: with_lora(tiny_llama()).merge_and_unload(),
    "another of its adapters": second_adapter,
    "the adapter at half its scale": rescaled,
    "one row of the embedding": other_row,
    "one matrix": other_matrix,
    "a token of an adapter": new_token,
    "DoRA": lambda: with_lora(tiny_llama(), use_dora=True),
    "IA3": lambda: peft.get_peft_model(
        tiny_llama(), peft.IA3Config(target_modules=PROJECTIONS, feedforward_modules=[], init_ia3_weights=False)
    ).eval(),
}


@pytest.mark.parametrize("other", [name for name in OTHERS if name != "bare"])
def test_a_cache_is_not_loaded_for_other_matrices(other, tmp_path):
    torch.manual_seed(0)
    pair = tiny_llama(), OTHERS[other]()
    for model, wrong in (pair, pair[::-1]):
        path = saved(model, tmp_path / "cache")
        with pytest.raises(LESSError, match=r"for another model: expected .*fingerprint.*adapters included: load those"):
            LESSCache.load(path, wrong)
        continuation = read(model, LESSCache.load(path, model), NEXT)
        expected = read(model, DynamicCache(config=model.config), torch.cat([PROMPT, NEXT], dim=1))[:, -6:]
        torch.testing.assert_close(continuation, expected, rtol=1e-4, atol=1e-4)


def test_all_those_models_have_another_digest():
    torch.manual_seed(0)
    assert len({digest_of_weights(make()) for make in OTHERS.values()}) == len(OTHERS)


def turned_off():
    model = with_lora(tiny_llama())
    model.base_model.disable_adapter_layers()
    return model


def injected():
    model = tiny_llama()
    model.add_adapter(peft.LoraConfig(target_modules=PROJECTIONS, init_lora_weights=False))
    return model.eval()


@pytest.mark.filterwarnings("default::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize(
    "one, other",
    [
        (tiny_llama, tiny_llama),
        (tiny_llama, turned_off),
        (tiny_llama, lambda: torch.compile(tiny_llama(), backend="eager")),
        (lambda: with_lora(tiny_llama()), lambda: with_lora(tiny_llama()).get_base_model()),
        (lambda: with_lora(tiny_llama()), injected),
    ],
    ids=["twin", "adapter turned off", "compiled", "inside of PEFT's wrapper", "adapter without the wrapper"],
)
def test_models_that_compute_the_same_have_one_digest(one, other):
    digests = []
    for make in (one, other):
        torch.manual_seed(0)
        digests.append(digest_of_weights(make()))
    assert digests[0] == digests[1] is not None


def test_inactive_adapters_do_not_count():
    model = with_lora(tiny_llama())
    before = digest_of_weights(model)
    model.add_adapter("second", peft.LoraConfig(target_modules=PROJECTIONS, init_lora_weights=False))
    assert digest_of_weights(model) == before


def test_soft_prompts_count():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    one, other = (peft.get_peft_model(tiny_llama(), config) for _ in range(2))
    torch.nn.init.ones_(other.prompt_encoder["default"].embedding.weight)
    assert len({digest_of_weights(model) for model in (one, other, tiny_llama())}) == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch moves its quantisation to torchao
def test_quantised_weights_count():
    def quantised(seed):
        model = tiny_llama()
        torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight, generator=torch.Generator().manual_seed(seed))
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)

    assert digest_of_weights(quantised(0)) == digest_of_weights(quantised(0)) != digest_of_weights(quantised(1))


def test_tensors_that_are_made_of_others_count():
    def model(scale: float):
        codes = torch.arange(6.0).view(2, 3)
        layer = torch.nn.Linear(3, 2, bias=False)
        layer.weight = torch.nn.Parameter(TwoTensor(codes, scale * codes), requires_grad=False)
        return layer

    assert digest_of_weights(model(1)) == digest_of_weights(model(1)) != digest_of_weights(model(2))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), (2, 3, 4), (0, 4)])
def test_weights_of_any_type_and_shape_have_a_digest(dtype, shape):
    module = torch.nn.Module()
    module.register_buffer("codes", torch.ones(shape).to(dtype))
    assert len(digest_of_weights(module)) == 64


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (5, 5), (2, 3, 4), (1000, 3)])
def test_a_sample_has_every_row_and_every_column(shape, monkeypatch):
    tensor = torch.arange(torch.tensor(shape).prod()).view(shape)
    sample = weights._sample(tensor)
    assert len(sample) == max(tensor.numel() // shape[-1], shape[-1])
    assert set((sample // shape[-1]).tolist()) == set(range(tensor.numel() // shape[-1]))
    assert set((sample % shape[-1]).tolist()) == set(range(shape[-1]))
    monkeypatch.setattr(weights, "MOST_ELEMENTS", 4)
    assert len(weights._sample(tensor)) == 4


# Files of earlier versions, which know one-dimensional parameters alone


@pytest.mark.parametrize("make", [lambda: distinct(tiny_llama()), lambda: with_lora(tiny_llama(), use_dora=True)])
def test_an_earlier_file_is_loaded_for_its_model(make, tmp_path):
    model = make()
    path = saved(model, tmp_path / "cache")
    expected = read(model, LESSCache.load(path, model), NEXT)
    rewritten(path, without("weights", "dtype"))
    assert torch.equal(read(model, LESSCache.load(path, model), NEXT), expected)
    with pytest.raises(LESSError, match="another model"):
        LESSCache.load(path, distinct(tiny_llama(), seed=1))


def test_a_file_says_what_earlier_versions_look_for(tmp_path):
    model = distinct(tiny_llama())
    path = saved(model, tmp_path / "cache")
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["less_cache"])
    assert set(header["model"]) == {
        *("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "fingerprint")
    }
    assert header["format_version"] == 1
    # What version 0.1 took for the fingerprint; published kernels carry such ones too.
    assert (
        fingerprint(model)
        == header["model"]["fingerprint"]
        == "f455c8b34c5a0935c0e5abde162690a18b303d068409cb57826f3d0f06c2b19d"
    )


# Kernels of a model without one-dimensional parameters


@pytest.mark.parametrize("family", ["olmo", "nanochat"])
def test_models_without_norm_weights_are_told_apart(family):
    model, other = zoo.build(family), zoo.build(family, seed=1)
    kernels = tiny_kernels(model)
    LESSCache(zoo.build(family), LARGE, kernels)
    with pytest.raises(LESSError, match="for another base model"):
        LESSCache(other, LARGE, kernels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_without_norm_weights_is_known_in_16_bits(dtype):
    kernels = tiny_kernels(zoo.build("olmo"))
    LESSCache(zoo.build("olmo").to(dtype), LARGE, kernels)
    LESSCache(with_lora(zoo.build("olmo").to(dtype)), LARGE, kernels)


def test_a_cache_of_one_olmo_is_not_loaded_for_another(tmp_path):
    path = saved(zoo.build("olmo"), tmp_path / "cache")
    with pytest.raises(LESSError, match="another model"):
        LESSCache.load(path, zoo.build("olmo", seed=1))


# Kernels on adapters, and on copies in other types


ADAPTERS = {
    "LoRA": lambda model: with_lora(model),
    "LoRA with bias": lambda model: with_lora(model, lora_bias=True),
    "DoRA": lambda model: with_lora(model, use_dora=True),
    "VeRA": lambda model: peft.get_peft_model(model, peft.VeraConfig(target_modules=["q_proj"], r=4)),
    "norms": lambda model: with_lora(model, modules_to_save=["norm", "input_layernorm"]),
    "LN tuning": lambda model: peft.get_peft_model(model, peft.LNTuningConfig(target_modules=["input_layernorm", "norm"])),
    "FourierFT": lambda model: peft.get_peft_model(model, peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=10)),
    "tokens": lambda model: peft.get_peft_model(
        model, peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"])
    ),
    "soft prompt": lambda model: peft.get_peft_model(
        model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("base", [lambda: distinct(tiny_llama()), lambda: zoo.build("olmo")], ids=["llama", "olmo"])
def test_kernels_fit_their_base_model_under_any_adapter(adapter, base):
    if base().config.model_type == "olmo" and adapter in ("norms", "LN tuning"):
        pytest.skip("its norms have no weights")
    model = base()
    kernels = tiny_kernels(model)
    adapted = ADAPTERS[adapter](model)
    for name, parameter in adapted.named_parameters():  # as training would change them
        if "base_model.model" in name and parameter.requires_grad:
            torch.nn.init.uniform_(parameter, -0.1, 0.1)
    LESSCache(adapted.eval(), LARGE, kernels)
    assert fingerprint(adapted) == kernels.config.base_model_fingerprint == fingerprint(base())


def test_kernels_of_another_base_model_are_refused_under_an_adapter():
    kernels = tiny_kernels(distinct(tiny_llama(), seed=1))
    for adapter in ("LoRA", "DoRA", "norms"):
        with pytest.raises(LESSError, match="for another base model"):
            LESSCache(ADAPTERS[adapter](distinct(tiny_llama())).eval(), LARGE, kernels)


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("used", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_fit_a_copy_in_another_type(trained, used):
    if (trained, used) == (torch.float16, torch.bfloat16):
        pytest.skip("what float16 rounded is not in the bfloat16 copy: the fingerprint's limit")
    kernels = tiny_kernels(distinct(tiny_llama()).to(trained))
    LESSCache(distinct(tiny_llama()).to(used), LARGE, kernels)


def test_a_float16_model_that_may_be_a_copy_is_accepted_with_one_line_in_the_log(caplog):
    kernels = tiny_kernels(distinct(tiny_llama()))
    with caplog.at_level(logging.WARNING):
        LESSCache(distinct(tiny_llama()).half(), LARGE, kernels)
    assert [record.getMessage()[:32] for record in caplog.records] == ["The kernels were trained for tin"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_model_is_refused_in_every_type_that_can_tell(dtype):
    kernels = tiny_kernels(distinct(tiny_llama()))
    other = distinct(tiny_llama(), seed=1).to(dtype)
    for copy in (other, other.to(torch.bfloat16).half()):  # what was in bfloat16 is whole in float16
        with pytest.raises(LESSError, match="for another base model"):
            LESSCache(copy, LARGE, kernels)


# Offloaded weights


def tied():
    return distinct(tiny_llama(tie_word_embeddings=True))


def on_cpu(model, folder):
    return accelerate.cpu_offload(model, execution_device="cpu")


def on_disk(model, folder):
    accelerate.disk_offload(model, folder / "offloaded", execution_device="cpu")
    return model


def one_layer_on_disk(model, folder):
    parts = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    return accelerate.dispatch_model(
        model, {**parts, "model.layers.1": "disk"}, main_device="cpu", offload_dir=folder / "offloaded"
    )


OFFLOADS = [on_cpu, on_disk, one_layer_on_disk]


@pytest.mark.parametrize(
    "make", [lambda: distinct(tiny_llama()), tied, lambda: zoo.build("olmo")], ids=["llama", "tied", "olmo"]
)
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_weights_are_the_same_model(offload, make, tmp_path):
    model, offloaded = make(), offload(make(), tmp_path)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    kernels, policy = tiny_kernels(model), H2O(4, 4)
    paths = [saved(each, tmp_path / name, policy, kernels) for name, each in (("one", model), ("two", offloaded))]
    expected = read(model, LESSCache.load(paths[0], model, kernels), NEXT)
    for path in paths:
        for each in (model, offloaded):
            assert torch.equal(read(each, LESSCache.load(path, each, kernels), NEXT), expected)
    assert fingerprint(offloaded) == fingerprint(model)
    assert digest_of_weights(offloaded) == digest_of_weights(model)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_other_offloaded_weights_are_refused(offload, tmp_path):
    kernels = tiny_kernels(distinct(tiny_llama()))
    path = saved(distinct(tiny_llama()), tmp_path / "cache")
    with pytest.raises(LESSError, match="for another base model"):
        LESSCache(offload(distinct(tiny_llama(), seed=1), tmp_path), LARGE, kernels)
    with pytest.raises(LESSError, match="for another model"):
        LESSCache.load(path, offload(distinct(other_matrix()), tmp_path))


@pytest.mark.parametrize("offload", OFFLOADS)
def test_for_model_finds_the_kernels_of_an_offloaded_model(offload, monkeypatch, tmp_path):
    kernels = tiny_kernels(distinct(tiny_llama()))
    kernels.config.policy = H2O(4, 4).to_dict()
    kernels.save_pretrained(tmp_path / "kernels")
    found = {kernels.config.base_model_fingerprint: [str(tmp_path / "kernels")]}
    monkeypatch.setattr("less_cache.hub.catalogue.find", lambda base, fingerprint: found.get(fingerprint, []))
    cache = LESSCache.for_model(offload(distinct(tiny_llama()), tmp_path))
    assert cache.kernels.source == str(tmp_path / "kernels")


def test_weights_that_are_nowhere_are_not_compared(tmp_path):
    """On the meta device, and nothing says where they are."""
    kernels = tiny_kernels(distinct(tiny_llama()))
    path = saved(distinct(tiny_llama()), tmp_path / "cache", H2O(4, 4), kernels)
    nowhere = tiny_llama(seed=1).to("meta")
    assert fingerprint(nowhere) is None is digest_of_weights(nowhere)
    cache = LESSCache.load(path, nowhere, kernels)
    assert cache.layers[0].keys.device.type == "cpu"
    cache.save(path)
    LESSCache.load(path, distinct(tiny_llama()), kernels)


# Loading: modes, types, devices


@pytest.mark.parametrize("policy", [LARGE, H2O(4, 4)])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_cache_loaded_under_inference_mode_goes_on_outside(family, policy, trained, tmp_path):
    model = zoo.build(family)
    kernels = tiny_kernels(model) if trained else None
    path = saved(model, tmp_path / "cache", policy, kernels)
    expected = [read(model, cache, NEXT) for cache in [LESSCache.load(path, model, kernels)] for _ in range(2)]
    with torch.inference_mode():
        cache = LESSCache.load(path, model, kernels)
    assert not any(tensor.is_inference() for layer in cache.layers for tensor in reachable(layer) if tensor.dim() > 0)
    for tokens, logits in zip((NEXT, NEXT), expected, strict=True):
        assert torch.equal(read(model, cache, tokens), logits)
    with torch.inference_mode():
        cache = LESSCache.load(path, model, kernels)
        read(model, cache, NEXT[:, :1])
    step = LESSCache.load(path, model, kernels)
    read(model, step, NEXT[:, :1])
    assert torch.equal(read(model, cache, NEXT[:, 1:]), read(model, step, NEXT[:, 1:]))


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")])
def test_a_cache_of_a_model_in_another_type_is_refused(dtypes, tmp_path):
    of_file, of_model = (tiny_llama().to(getattr(torch, dtype)) for dtype in dtypes)
    path = saved(of_file, tmp_path / "cache")
    message = f"model in another type: expected {dtypes[0]}, got {dtypes[1]}.*Load the model with dtype='{dtypes[0]}'"
    with pytest.raises(LESSError, match=message):
        LESSCache.load(path, of_model)
    read(of_file, LESSCache.load(path, of_file), NEXT)


def test_a_cache_filled_under_autocast_is_loaded_for_its_model(tmp_path):
    model = zoo.build("gpt2")  # without rotary positions: its keys are in 16 bits there
    with torch.autocast("cpu", torch.bfloat16):
        path = saved(model, tmp_path / "cache")
        cache = LESSCache.load(path, model)
        assert cache.layers[0].keys.dtype == torch.bfloat16
        read(model, cache, NEXT)


def test_the_device_of_a_layer_is_that_of_its_attention():
    """Whatever `model.device` says, which is the first parameter's."""

    def at(device: str) -> Any:
        return types.SimpleNamespace(is_meta=False, device=torch.device(device))

    model = tiny_llama()
    model.model.layers[1].self_attn.q_proj._parameters["weight"] = at("cuda:1")
    assert [device_of_layer(model, index) for index in (0, 1)] == [torch.device("cpu"), torch.device("cuda:1")]
    model.model.layers[1].layer_idx = 1  # some blocks have the number too
    model.model.layers[1].register_parameter("first", None)
    assert device_of_layer(model, 1) == torch.device("cuda:1")

    offloaded = tiny_llama().to("meta")
    assert device_of_layer(offloaded, 0) == torch.device("cpu")
    hook = AlignDevicesHook(execution_device="cuda:1", offload=True, weights_map={})
    offloaded.model.layers[0].self_attn.q_proj._hf_hook = SequentialHook(hook)
    assert device_of_layer(offloaded, 0) == torch.device("cuda:1")


def test_each_layer_is_loaded_to_its_device(monkeypatch, tmp_path):
    model = tiny_llama()
    path, asked = saved(model, tmp_path / "cache"), []
    monkeypatch.setattr(type(model), "device", torch.device("meta"))

    def device(of, layer_idx):
        assert of is model
        asked.append(layer_idx)
        return torch.device("cpu")

    monkeypatch.setattr(snapshot, "device_of_layer", device)
    cache = LESSCache.load(path, model)
    assert asked == [0, 1]
    assert {tensor.device.type for layer in cache.layers for tensor in layer.tensors().values()} == {"cpu"}


@pytest.mark.parametrize("length", [3, 5, 6, 7, 20])  # the window is 6
def test_a_hybrids_cache_is_loaded_with_fixed_shapes(length, tmp_path):
    model, prompt = zoo.build("gemma3_text"), PROMPT[:, :length]
    cache = LESSCache(model, LARGE)
    read(model, cache, prompt)
    cache.save(tmp_path / "cache")
    loaded = LESSCache.load(tmp_path / "cache", model, static=True)
    full = DynamicCache(config=model.config)
    read(model, full, prompt)
    for tokens in (NEXT[:, :1], NEXT[:, 1:2], NEXT[:, 2:3], NEXT):
        torch.testing.assert_close(read(model, loaded, tokens), read(model, full, tokens), rtol=1e-4, atol=1e-4)


# Headers


HEADERS = {
    "no policy": (without("policy"), "expected an entry 'policy'"),
    "no model": (without("model"), "expected an entry 'model'"),
    "no kernels": (without("kernels"), "expected an entry 'kernels'"),
    "no layers": (without("layers"), "expected an entry 'layers'"),
    "policy null": (lambda header: header | {"policy": None}, "'policy' to be a JSON object, got None"),
    "policy a list": (lambda header: header | {"policy": ["h2o"]}, "'policy' to be a JSON object"),
    "policy empty": (lambda header: header | {"policy": {}}, "Expected a policy name"),
    "policy's name": (lambda header: header | {"policy": {"name": ["h2o"]}}, "Expected a policy name"),
    "policy's counts": (lambda header: header | {"policy": {"name": "h2o", "heavy": "4", "recent": 4}}, "heavy"),
    "model a text": (lambda header: header | {"model": "llama"}, "'model' to be a JSON object, got 'llama'"),
    "model empty": (lambda header: header | {"model": {}}, "a fingerprint, got {}"),
    "kernels a number": (lambda header: header | {"kernels": 5}, "'kernels' to be a text or null, got 5"),
    "layers an object": (lambda header: header | {"layers": {}}, "'layers' to be a list"),
    "layers missing": (lambda header: header | {"layers": header["layers"][:1]}, "has 1 layers, the model 2"),
    "a layer's type": (lambda header: header | {"layers": [1, 2]}, "layer 0 to have a cumulative_length, got 1"),
    "a layer's length": (
        lambda header: header | {"layers": [layer | {"cumulative_length": "20"} for layer in header["layers"]]},
        "layer 0 to have a cumulative_length",
    ),
    "a layer's dtype": (
        lambda header: header | {"layers": [layer | {"dtype": "load"} for layer in header["layers"]]},
        "layer 0 to have a dtype of torch, got 'load'",
    ),
    "weights a list": (lambda header: header | {"weights": []}, r"'weights' to be a text or null, got \[\]"),
    "a list": (lambda header: [header], "list indices must be integers"),
    "format a text": (lambda header: header | {"format_version": "1"}, "expected format_version 1 to 2, got '1'"),
    "format a list": (lambda header: header | {"format_version": [1]}, "expected format_version 1 to 2"),
}


@pytest.mark.parametrize("change", HEADERS)
def test_a_header_that_is_not_one(change, tmp_path):
    model = tiny_llama()
    path = saved(model, tmp_path / "cache")
    rewritten(path, HEADERS[change][0])
    with pytest.raises(LESSError, match=HEADERS[change][1]):
        LESSCache.load(path, model)


def test_a_header_nested_without_end(tmp_path):
    path, text = saved(tiny_llama(), tmp_path / "cache"), "[" * 100_000
    save_file({}, path, {"less_cache": text, "sha256": snapshot.digest({}, text)})
    with pytest.raises(LESSError, match="the header of the saved cache is damaged"):
        LESSCache.load(path, tiny_llama())


@pytest.mark.parametrize("missing", ["keys", "positions", "seen", "counts", "values_sum", ""])
def test_tensors_that_are_not_a_layers(missing, tmp_path):
    model = tiny_llama()
    kernels = tiny_kernels(model)
    path = saved(model, tmp_path / "cache", H2O(4, 4), kernels)
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if not name.startswith(f"layers.1.{missing}")]  # noqa: SIM118
        tensors = {name: file.get_tensor(name) for name in names}
        text = file.metadata()["less_cache"]
    save_file(tensors, path, {"less_cache": text, "sha256": snapshot.digest(tensors, text)})
    with pytest.raises(LESSError, match="layer 1 does not have what a LESSLayer holds"):
        LESSCache.load(path, model, kernels)


# Memory


def reachable(held: Any) -> Iterator[torch.Tensor]:
    """Every tensor that a layer holds of its sequences, once."""
    seen: dict[int, Any] = {}

    def walk(each: Any) -> Iterator[torch.Tensor]:
        if id(each) in seen:
            return
        seen[id(each)] = each
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, dict | list | tuple):
            for inner in each.values() if isinstance(each, dict) else each:
                yield from walk(inner)
        elif type(each).__module__.startswith(
            ("less_cache.slots", "less_cache.memory.state", "less_cache.memory.soft", "less_cache.cache.rec")
        ):
            yield from walk(vars(each))

    yield from walk({name: each for name, each in vars(held).items() if name != "setup"})  # policy and kernels


HYBRIDS = [
    "qwen3_next",
    "lfm2",
    "lfm3",
    "jamba",
    "nemotron_h",
    "granitemoehybrid",
    "olmo_hybrid",
    "minimax_m3_vl_text",
]


@pytest.mark.parametrize("family", [*HYBRIDS, "gemma3_text", "gpt_oss", "llama4_text", "llama"])
def test_the_footprint_is_every_byte_that_layers_hold(family):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    model = zoo.build(family)
    cache = LESSCache(model, H2O(4, 3), tiny_kernels(model))
    prompt = torch.cat([PROMPT, PROMPT[:, :4]], dim=1)
    for _ in range(2):
        read(model, cache, prompt)
        footprint = cache.memory_footprint()
        assert footprint.total == sum(
            tensor.nbytes for layer in cache.layers for tensor in reachable(layer) if tensor.dim() > 0
        )
        assert any(not isinstance(layer, LESSLayer) for layer in cache.layers) or family == "llama"
        prompt = NEXT[:, :1]


def test_the_footprint_of_a_static_cache_is_every_byte_that_layers_hold():
    model = tiny_llama()
    cache = LESSCache(model, H2O(4, 3), tiny_kernels(model), static=True)
    read(model, cache, PROMPT)
    held = sum(tensor.nbytes for layer in cache.layers for tensor in reachable(layer) if tensor.dim() > 0)
    assert cache.memory_footprint().total == held
