"""Bad input: one LESSError that says what was expected, what came and what to do; and nothing is lost by it."""

import copy

import pytest
import torch
import zoo
from tiny import tiny_kernels, tiny_llama
from transformers import AttentionInterface, DynamicCache

from less_cache import CORM, H2O, LESSCache, LESSConfig, LESSError, LESSKernels, SinkRecent
from less_cache.integration.families import fingerprint

POLICY = H2O(4, 3)
SEEN = 49  # tokens in the cache of `used_cache`


def tokens(batch: int = 1, length: int = 40) -> torch.Tensor:
    return torch.randint(1, 97, (batch, length))


def used_cache(model, batch: int = 1) -> tuple[LESSCache, torch.Tensor]:
    """A cache after a turn, and the conversation so far: the `SEEN` tokens and the last generated one."""
    cache = LESSCache(model, POLICY, tiny_kernels(model))
    return cache, model.generate(tokens(batch), past_key_values=cache, max_new_tokens=10, do_sample=False)


def continuation(model, cache: LESSCache, history: torch.Tensor) -> torch.Tensor:
    """Logits of another turn, whose text is always the same."""
    text = torch.arange(1, 8).expand(history.shape[0], -1)
    output = model.generate(
        torch.cat([history, text], dim=1),
        past_key_values=cache,
        max_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(output.logits)


def dispatched(*args, **kwargs):
    """The attention function that a model calls."""
    return AttentionInterface().get_interface("sdpa", None)(*args, **kwargs)


# At construction


def kernels_of(**entries) -> LESSKernels:
    """Kernels of `tiny_llama`, with other entries in their config."""
    kernels = tiny_kernels(tiny_llama())
    for name, value in entries.items():
        setattr(kernels.config, name, value)
    return kernels


def sized(**sizes) -> LESSKernels:
    """Kernels that fit `tiny_llama`, but for `sizes`."""
    fitting = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return LESSKernels(LESSConfig(**{**fitting, **sizes}))


CONSTRUCTION = {
    "no policy": (lambda: LESSCache(tiny_llama(), static=True), "expected a policy such as H2O", "got None"),
    "policy by name": (lambda: LESSCache(tiny_llama(), "h2o"), "expected a policy such as H2O", "got 'h2o'"),
    "policy class": (lambda: LESSCache(tiny_llama(), H2O), "expected a policy such as H2O", "got <class"),
    "no model": (lambda: LESSCache(POLICY, POLICY), "expected a transformers model or its config", "got H2O"),
    "model name": (lambda: LESSCache("gpt2", POLICY), "expected a transformers model or its config", "got str"),
    "kernels by name": (
        lambda: LESSCache(tiny_llama(), POLICY, "hub/kernels"),
        "expected kernels to be LESSKernels",
        "got str",
        "LESSKernels.from_pretrained",
    ),
    "kernels of more layers": (
        lambda: LESSCache(tiny_llama(), POLICY, sized(num_hidden_layers=3)),
        "num_hidden_layers=2",
        "num_hidden_layers=3",
        "Use kernels that were trained for this model",
    ),
    "kernels of more heads": (
        lambda: LESSCache(tiny_llama(), POLICY, sized(num_attention_heads=8)),
        "num_attention_heads=4",
        "num_attention_heads=8",
        "Use kernels",
    ),
    "kernels of more KV heads": (
        lambda: LESSCache(tiny_llama(), POLICY, sized(num_key_value_heads=4)),
        "num_key_value_heads=2",
        "num_key_value_heads=4",
        "Use kernels",
    ),
    "kernels of wider heads": (
        lambda: LESSCache(tiny_llama().config, POLICY, sized(head_dim=16)),
        "head_dim=8",
        "head_dim=16",
        "Use kernels",
    ),
    "kernels of some layers": (
        lambda: LESSCache(tiny_llama(), POLICY, sized(layers=[1])),
        "full-attention layers are [0, 1]",
        "the kernels' layers [1]",
        "Use kernels",
    ),
    "kernels of all layers for a hybrid": (
        lambda: LESSCache(zoo.build("gemma3_text"), POLICY, sized()),
        "full-attention layers are [1]",
        "the kernels' layers [0, 1]",
        "Use kernels",
    ),
    "kernels of another family": (
        lambda: LESSCache(zoo.build("opt"), POLICY, sized(num_key_value_heads=4, model_type="llama")),
        "expected 'opt'",
        "got 'llama'",
        "Use kernels",
    ),
    "kernels of another base model": (
        lambda: LESSCache(tiny_llama(), POLICY, kernels_of(base_model="someone/other", base_model_fingerprint="f" * 64)),
        "'someone/other'",
        f"{'f' * 12}…",
        f"{fingerprint(tiny_llama())[:12]}…",
        "base_model_fingerprint = None",
    ),
    "unknown policy in the kernels": (
        lambda: LESSCache(tiny_llama(), kernels=kernels_of(policy={"name": "h3o"})),
        "['attention_matching', 'corm', 'h2o', 'sink_recent']",
        "got 'h3o'",
    ),
    "no policy name in the kernels": (
        lambda: LESSCache(tiny_llama(), kernels=kernels_of(policy={"name": ["h2o"]})),
        "['attention_matching', 'corm', 'h2o', 'sink_recent']",
        "got ['h2o']",
    ),
    "unknown count in the kernels": (
        lambda: LESSCache(tiny_llama(), kernels=kernels_of(policy={"name": "h2o", "heavy": 4, "recent": 4, "sinks": 4})),
        "'h2o'",
        "'sinks'",
    ),
    "no budget": (lambda: H2O(0, 4), "heavy to be an int >= 1", "got 0"),
    "negative budget": (lambda: SinkRecent(4, -1), "recent to be an int >= 1", "got -1"),
    "negative sinks": (lambda: SinkRecent(-1, 4), "sinks to be an int >= 0", "got -1"),
    "fraction of 1": (lambda: H2O(0.5, 1.0), "a float in (0, 1)", "got 1.0", "pass an int"),
    "fraction above 1": (lambda: CORM(1.5, 4), "a float in (0, 1)", "got 1.5", "pass an int"),
    "fraction of 0": (lambda: H2O(0.0, 4), "a float in (0, 1)", "got 0.0"),
    "no number": (lambda: H2O(float("nan"), 4), "a float in (0, 1)", "got nan"),
    "text": (lambda: H2O("64", 64), "an int >= 1", "got '64' of type str"),
    "truth": (lambda: CORM(True, 4), "an int >= 1", "got True of type bool"),
    "total of 0": (lambda: H2O.from_budget(0), "budget to be an int >= 2", "got 0"),
    "total that the sinks take": (lambda: SinkRecent.from_budget(4), "above its 4 sinks", "got 4", "Pass sinks and recent"),
}


@pytest.mark.parametrize("make, parts", [(make, parts) for make, *parts in CONSTRUCTION.values()], ids=CONSTRUCTION)
def test_wrong_construction(make, parts):
    with pytest.raises(LESSError) as caught:
        make()
    for part in parts:
        assert part in str(caught.value)


def test_a_derivative_can_be_allowed():
    """What the message about another base model says to do works."""
    model, kernels = tiny_llama(), kernels_of(base_model_fingerprint="f" * 64)
    kernels.config.base_model_fingerprint = None
    LESSCache(model, POLICY, kernels)


def test_a_config_alone_cannot_tell_the_base_model():
    LESSCache(tiny_llama().config, POLICY, kernels_of(base_model_fingerprint="f" * 64))


# In use: the cache goes on as if nothing had happened


def refused_turn(model, cache, history, **options):
    return model.generate(history, past_key_values=cache, max_new_tokens=3, do_sample=False, **options)


def a_shorter_prompt(length: int):
    def turn(model, cache, history):
        refused_turn(model, cache, history[:, :length])

    return turn


def in_training_mode(model, cache, history):
    try:
        model.train()
        model(history[:, -1:], past_key_values=cache)
    finally:
        model.eval()


def with_dropout(model, cache, history):
    attention = model.model.layers[0].self_attn
    keys, values = cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)
    dispatched(attention, torch.zeros(1, 4, 1, 8), keys, values, None, dropout=0.1)


USE = {
    **{f"a prompt of {length}": (a_shorter_prompt(length), f"{SEEN}") for length in (1, 10, 24, 25, 26, 40, 48, 49)},
    "a larger batch": (
        lambda model, cache, history: refused_turn(model, cache, torch.cat([history, history[:, :3]], 1).repeat(2, 1)),
        "expected a batch of 1, as in the turns before, got 2. Call cache.reset()",
    ),
    "one token of a larger batch": (
        lambda model, cache, history: model(tokens(3, 1), past_key_values=cache),
        "expected a batch of 1, as in the turns before, got 3. Call cache.reset()",
    ),
    "no new tokens": (
        lambda model, cache, history: model(history[:, :0], past_key_values=cache),
        "expected new tokens, got none",
    ),
    "prompt embeddings that are shorter": (
        lambda model, cache, history: refused_turn(
            model, cache, None, inputs_embeds=model.get_input_embeddings()(history[:, :30]).detach()
        ),
        f"{SEEN}",
    ),
    "new text without the whole mask": (lambda model, cache, history: refused_turn(model, cache, tokens(1, 5)), f"{SEEN}"),
    "training mode": (in_training_mode, "the model is in training mode. A LESSCache is for inference: call model.eval()"),
    "dropout": (with_dropout, "expected no attention dropout, got 0.1"),
    "a mask that covers nothing new": (
        lambda model, cache, history: model(
            tokens(1, 5), attention_mask=torch.tensor([[1] * SEEN + [0] * 5]), past_key_values=cache
        ),
        f"the new tokens lie before the {SEEN} tokens that the cache has seen: .* cache.reset",
    ),
    "a mask of the prompt alone": (
        lambda model, cache, history: model(tokens(1, 5), attention_mask=torch.ones(1, 5), past_key_values=cache),
        f"the new tokens lie before the {SEEN} tokens that the cache has seen: .* cache.reset",
    ),
    "cropping what was not recorded": (
        lambda model, cache, history: cache.crop(-1),
        r"crop\(-1\) goes back further than the 0",
    ),
}


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("turn, message", USE.values(), ids=USE)
def test_refused_turn_loses_nothing(turn, message, base):
    model = tiny_llama(base)
    cache, history = used_cache(model)
    expected = continuation(model, copy.deepcopy(cache), history)
    with pytest.raises(LESSError, match=message):
        turn(model, cache, history)
    assert cache.get_seq_length() == SEEN
    assert torch.equal(continuation(model, cache, history), expected)


@pytest.mark.parametrize("length", [25, 48, 49])
def test_a_shorter_batch_of_padded_prompts(length):
    model = tiny_llama()
    cache, history = used_cache(model, batch=2)
    expected = continuation(model, copy.deepcopy(cache), history)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :5] = 0
    with pytest.raises(LESSError, match=f"{SEEN}"):
        refused_turn(model, cache, history[:, :length], attention_mask=mask)
    assert torch.equal(continuation(model, cache, history), expected)


@pytest.mark.parametrize("family", zoo.FAMILIES)
@pytest.mark.parametrize("length", [25, 40, 49])
def test_a_shorter_prompt_for_every_family(family, length):
    model = zoo.build(family)
    cache = LESSCache(model, POLICY)
    history = model.generate(tokens(), past_key_values=cache, max_new_tokens=10, do_sample=False)
    with pytest.raises(LESSError, match=f"{SEEN}"):
        refused_turn(model, cache, history[:, :length])


def test_training_mode_before_anything_was_seen():
    model, prompt = tiny_llama(), tokens()
    cache, fresh = (LESSCache(model, POLICY, tiny_kernels(model)) for _ in range(2))
    model.train()
    with pytest.raises(LESSError, match=r"call model\.eval\(\)"):
        model.generate(prompt.repeat(2, 1), past_key_values=cache, max_new_tokens=3)
    model.eval()
    assert torch.equal(continuation(model, cache, prompt), continuation(model, fresh, prompt))


def test_wrong_policy_in_the_kernels_can_be_overridden():
    model = tiny_llama()
    LESSCache(model, POLICY, kernels_of(policy={"name": "h3o"}))


# Attention that does not work with a LESSCache


class OwnAttention(torch.nn.Module):
    """Attention that calls no transformers function."""

    def forward(self, cache, states):
        keys, values = cache.update(states, states, 0)
        return torch.nn.functional.scaled_dot_product_attention(states.repeat(1, 2, 1, 1), keys, values, enable_gqa=True)


def test_attention_that_never_reaches_the_cache():
    cache = LESSCache(tiny_llama(), POLICY)
    attention = OwnAttention()
    attention(cache, torch.randn(1, 2, 20, 8))
    with pytest.raises(LESSError, match=r"attention never read the last tokens.*Use a DynamicCache.*cache\.reset\(\)"):
        attention(cache, torch.randn(1, 2, 1, 8))
    cache.reset()
    model, prompt = tiny_llama(), tokens()
    assert torch.equal(continuation(model, cache, prompt), continuation(model, LESSCache(model, POLICY), prompt))


@pytest.mark.parametrize("name", ["position_bias", "indices", "alibi"])
def test_unknown_arguments_of_attention(name):
    model = tiny_llama()
    cache = LESSCache(model, POLICY)
    keys, values = cache.update(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), 0)
    with pytest.raises(LESSError, match=f"Layer 0 .LlamaAttention.: attention argument '{name}' is not supported"):
        dispatched(model.model.layers[0].self_attn, torch.randn(1, 4, 5, 8), keys, values, None, **{name: torch.zeros(5)})


def test_keys_that_a_second_layer_reads():
    model = tiny_llama()
    cache = LESSCache(model, POLICY)
    keys, values = cache.update(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), 0)
    dispatched(model.model.layers[0].self_attn, torch.randn(1, 4, 5, 8), keys, values, None)
    with pytest.raises(LESSError, match=r"Layer 0 .LlamaAttention.: attention reads the same keys twice.*cache\.reset\(\)"):
        dispatched(model.model.layers[1].self_attn, torch.randn(1, 4, 5, 8), keys, values, None)
    assert cache.get_seq_length() == 5


def test_sliding_window_in_a_layer_that_should_have_none():
    """A config that hides its sliding window from the cache."""
    model = tiny_llama()
    cache = LESSCache(model, POLICY)
    keys, values = cache.update(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), 0)
    with pytest.raises(LESSError, match=r"expected full attention, got .*sliding.window.*Use a DynamicCache"):
        dispatched(model.model.layers[0].self_attn, torch.randn(1, 4, 5, 8), keys, values, None, sliding_window=4)


def test_interrupted_forward():
    """The layers before the interruption have taken the tokens in, those behind it have not: nothing may go on."""
    model = tiny_llama()
    cache, history = used_cache(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].self_attn.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(history[:, -1:], past_key_values=cache)
    handle.remove()
    with pytest.raises(LESSError, match=r"cache\.reset\(\)"), torch.no_grad():
        model(history[:, -1:], past_key_values=cache)
    cache.reset()
    fresh = LESSCache(model, POLICY, tiny_kernels(model))
    assert torch.equal(continuation(model, cache, history), continuation(model, fresh, history))


def test_other_caches_are_not_checked():
    """Nothing of the above reaches a DynamicCache: training mode and shorter prompts are its own business."""
    model = tiny_llama().train()
    model(tokens(), past_key_values=DynamicCache(config=model.config)).logits.sum().backward()
