"""The link between cache and attention: who is touched by it, and who is not."""

import gc
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import zoo
from tiny import tiny_kernels, tiny_llama
from transformers import AttentionInterface, DynamicCache, PreTrainedModel, StaticCache
from transformers.models.falcon.modeling_falcon import FalconAttention

from less_cache import CORM, H2O, LESSCache, LESSError, SinkRecent
from less_cache.integration import hook

BUILDS = {"llama": tiny_llama, "falcon": lambda attn_implementation="eager": zoo.build("falcon", attn_implementation)}
each_model = pytest.mark.parametrize("name", BUILDS)
each_base = pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])


@pytest.fixture
def pristine(monkeypatch):
    """transformers as it is before the first LESSCache of a process."""
    hook.install()
    monkeypatch.setattr(AttentionInterface, "get_interface", AttentionInterface.get_interface.__wrapped__)
    monkeypatch.setattr(FalconAttention, "forward", FalconAttention.forward.__wrapped__)
    monkeypatch.setattr(hook, "_installed", False)


def patched() -> tuple:
    return AttentionInterface.get_interface, FalconAttention.forward


def generate(model: PreTrainedModel, cache, prompt: torch.Tensor, new_tokens: int = 8) -> torch.Tensor:
    """Logits of every step of greedy generation, `[steps, b, vocabulary]`."""
    output = model.generate(
        prompt,
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(output.logits)


def prompts(count: int = 1) -> list[torch.Tensor]:
    return [torch.randint(1, 97, (2, 24 + index)) for index in range(count)]


# What it costs to import and install


def test_import_patches_nothing():
    script = """
from transformers import AttentionInterface
from transformers.models.falcon.modeling_falcon import FalconAttention

before = AttentionInterface.get_interface, FalconAttention.forward, dict(AttentionInterface().items())
import less_cache, less_cache.integration.hook
assert before == (AttentionInterface.get_interface, FalconAttention.forward, dict(AttentionInterface().items()))
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_first_cache_installs(pristine):
    before = patched()
    LESSCache(tiny_llama().config, H2O(4, 4))
    assert all(now is not then for now, then in zip(patched(), before, strict=True))


def test_a_refused_cache_installs_nothing(pristine):
    before = patched()
    with pytest.raises(LESSError):
        LESSCache(tiny_llama(), policy="h2o")
    assert patched() == before


def test_install_is_idempotent(pristine):
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: hook.install(), range(16)))
    installed = patched()
    LESSCache(tiny_llama(), H2O(4, 4))
    assert patched() == installed
    assert not hasattr(AttentionInterface.get_interface.__wrapped__, "__wrapped__")
    assert not hasattr(FalconAttention.forward.__wrapped__, "__wrapped__")


def test_dispatch_is_found_once():
    """The same function goes in and out: a compiled model does not see a new one in every forward."""
    hook.install()
    interface = AttentionInterface()
    assert interface.get_interface("sdpa", None) is interface.get_interface("sdpa", None)


# Other caches


def others(model: PreTrainedModel, prompt: torch.Tensor) -> list[torch.Tensor]:
    """Logits of the model without a LESSCache, in every way that it can be without."""
    with torch.no_grad():
        return [
            model(prompt, use_cache=False).logits,
            model(prompt).logits,
            model(prompt, past_key_values=DynamicCache()).logits,
            generate(model, None, prompt),
            generate(model, DynamicCache(config=model.config), prompt),
            generate(model, StaticCache(config=model.config, max_cache_len=64), prompt),
        ]


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]):
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@each_model
@each_base
def test_other_caches_before_after_and_meanwhile(name, attn_implementation, pristine):
    model, [prompt] = BUILDS[name](attn_implementation), prompts()
    before = others(model, prompt)
    cache = LESSCache(model, H2O(4, 4), tiny_kernels(model))
    generate(model, cache, prompt)
    assert_equal(others(model, prompt), before)

    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(lambda: [generate(model, LESSCache(model, H2O(4, 4)), prompt, 40) for _ in range(3)])
        meanwhile = [others(model, prompt)]
        while not running.done():
            meanwhile.append(others(model, prompt))
        running.result()
    for logits in meanwhile:
        assert_equal(logits, before)


@each_model
def test_training_without_a_cache(name, pristine):
    model, [prompt] = BUILDS[name](), prompts()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(prompt, labels=prompt).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    model.train()
    before = gradients()
    LESSCache(model, H2O(4, 4))
    assert_equal(gradients(), before)


def test_output_attentions_of_other_caches(pristine):
    model, [prompt] = tiny_llama("eager"), prompts()
    before = model(prompt, output_attentions=True).attentions
    LESSCache(model, H2O(4, 4))
    assert_equal(model(prompt, output_attentions=True).attentions, before)


# Many at once


def test_two_models_two_caches_interleaved():
    models = [tiny_llama(seed=1), zoo.build("falcon"), tiny_llama("eager", seed=2)]
    steps = [torch.randint(1, 97, (1, length)) for length in (20, 1, 1, 6, 1)]

    @torch.no_grad()
    def step(model, cache, block):
        return model(block, past_key_values=cache).logits

    def new_caches() -> list[LESSCache]:
        return [LESSCache(model, H2O(4, 4), tiny_kernels(model)) for model in models for _ in range(2)]

    owners = [model for model in models for _ in range(2)]
    alone = [[step(model, cache, block) for block in steps] for model, cache in zip(owners, new_caches(), strict=True)]
    together = new_caches()
    mixed = [[step(model, cache, block) for model, cache in zip(owners, together, strict=True)] for block in steps]
    for one, other in zip(alone, zip(*mixed, strict=True), strict=True):
        assert_equal(one, list(other))


def test_four_threads_equal_one_after_the_other():
    models = [tiny_llama(seed=1), zoo.build("falcon")]
    kernels = [tiny_kernels(model) for model in models]
    policies = [H2O(4, 4), SinkRecent(2, 6), CORM(4, 4), H2O(0.2, 0.2)]
    jobs = [
        (model, policy, shared, prompt)
        for model, shared in zip(models, kernels, strict=True)
        for policy, prompt in zip(policies, prompts(4), strict=True)
    ]

    def run(job: tuple) -> torch.Tensor:
        model, policy, shared, prompt = job
        return generate(model, LESSCache(model, policy, shared), prompt, 24)

    sequential = [run(job) for job in jobs]
    with ThreadPoolExecutor(4) as threads:
        assert_equal(list(threads.map(run, jobs)), sequential)


# What stays in memory


@each_model
@pytest.mark.parametrize("policy", [H2O(4, 4), CORM(4, 4)], ids=repr)
def test_deleting_the_cache_frees_it(name, policy):
    model, [prompt] = BUILDS[name](), prompts()
    gc.collect()
    gc.disable()  # a reference cycle would keep it alive until the collector runs
    try:
        cache = LESSCache(model, policy, tiny_kernels(model))
        generate(model, cache, prompt)
        layers = list(cache.layers)
        held = [cache, *layers, *(layer.keys for layer in layers), *(layer.held.state.values_sum for layer in layers)]
        references = [weakref.ref(one) for one in held]
        del cache, layers, held
        assert [reference() for reference in references] == [None] * len(references)
    finally:
        gc.enable()


def test_evicted_keys_are_freed():
    """Neither the prompt's keys nor what `update` returned outlive the forward that brought them."""
    model, [prompt] = tiny_llama(), prompts()
    cache = LESSCache(model, H2O(4, 4))
    returned = []
    update = cache.layers[0].update

    def recording(key_states, value_states, *args, **kwargs):
        keys, values = update(key_states, value_states, *args, **kwargs)
        returned.extend(map(weakref.ref, (key_states, value_states, keys)))
        return keys, values

    cache.layers[0].update = recording
    gc.collect()
    gc.disable()
    try:
        generate(model, cache, prompt)
        assert len(returned) == 3 * 8
        assert all(reference() is None for reference in returned)
    finally:
        gc.enable()


def test_the_tag_is_on_a_view_of_its_own():
    """The model's own tensor stays untagged, whatever else it is used for."""
    keys = torch.randn(1, 2, 3, 8)
    view = hook.tag(keys, layer := object())
    assert view._less_layer is layer
    assert view.data_ptr() == keys.data_ptr()
    assert not hasattr(keys, "_less_layer")
