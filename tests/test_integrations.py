"""Libraries around `generate`: pipelines, adapters, quantised weights."""

import pytest
import torch
from tiny import tiny_kernels, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast, pipeline

from less_cache import CORM, H2O, LESSCache, SinkRecent

SMALL = H2O(heavy=4, recent=3)


def prompt() -> torch.Tensor:
    return torch.randint(1, 97, (2, 30))


def generate(model, cache, inputs: torch.Tensor) -> torch.Tensor:
    return model.generate(input_ids=inputs, past_key_values=cache, max_new_tokens=8, do_sample=False)


def assert_full_budget_is_the_full_cache(model: PreTrainedModel) -> None:
    inputs = prompt()
    full = generate(model, DynamicCache(config=model.config), inputs)
    assert torch.equal(generate(model, LESSCache(model, H2O(64, 64)), inputs), full)
    assert not torch.equal(generate(model, LESSCache(model, SMALL), inputs), full)


def test_text_generation_pipeline():
    words = {f"w{token}": token for token in range(97)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model, inputs = tiny_llama(), prompt()[:1]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0")
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    cache = LESSCache(model, SMALL, tiny_kernels(model))
    text = " ".join(f"w{token}" for token in inputs[0].tolist())
    [generated] = generator(text, past_key_values=cache, max_new_tokens=8, do_sample=False, return_tensors=True)
    expected = generate(model, LESSCache(model, SMALL, tiny_kernels(model)), inputs)
    assert generated["generated_token_ids"] == expected[0].tolist()
    assert cache.get_seq_length() == 30 + 8 - 1


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for an old name
def test_adapters():
    """A model with LoRA adapters, wrapped and merged; the kernels' base model is known in both."""
    peft = pytest.importorskip("peft", reason="peft is an extra of the tests")
    kernels, inputs = tiny_kernels(tiny_llama()), prompt()
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama(), lora).eval()
    wrapped = generate(model, LESSCache(model, SMALL, kernels), inputs)
    assert not torch.equal(wrapped, generate(tiny_llama(), LESSCache(tiny_llama(), SMALL, kernels), inputs))
    assert_full_budget_is_the_full_cache(model)
    merged = model.merge_and_unload()
    assert torch.equal(wrapped, generate(merged, LESSCache(merged, SMALL, kernels), inputs))


@pytest.mark.parametrize("policy", [SMALL, SinkRecent(2, 5), CORM(window=6, recent=4)])
@pytest.mark.parametrize("trained", [False, True])
def test_autocast(policy, trained):
    """The model computes in 16 bits (rotated keys in 32), scores and the state in float32."""
    model, inputs = tiny_llama(), prompt()
    with torch.autocast("cpu", torch.bfloat16):
        full = generate(model, DynamicCache(config=model.config), inputs)
        assert torch.equal(generate(model, LESSCache(model, H2O(64, 64)), inputs), full)
        cache = LESSCache(model, policy, tiny_kernels(model) if trained else None)
        generate(model, cache, inputs)
    for layer in cache.layers:
        assert layer.values.dtype == torch.bfloat16
        assert layer.held.slots.scores.dtype == torch.float32
        if trained:
            assert layer.held.state.values_sum.dtype == torch.float32
            assert layer.held.state.values_sum.isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch moves its quantisation to torchao
def test_quantised_weights():
    """int8 weights: the same kernels fit, and the cache is as exact as with float weights."""
    model, inputs = tiny_llama(), prompt()
    kernels = tiny_kernels(model)
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert not torch.equal(quantised(inputs).logits, model(inputs).logits)
    assert_full_budget_is_the_full_cache(quantised)
    generated = generate(quantised, LESSCache(quantised, SMALL, kernels), inputs)
    assert not torch.equal(generated, generate(quantised, LESSCache(quantised, SMALL), inputs))
