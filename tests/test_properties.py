"""A whole tiny model through its own forward: what a LESSCache must not change, and the oracle layer by layer."""

from unittest import mock

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, partitions, policies

from less_cache import CORM, H2O, POLICIES, LESSCache, SinkRecent
from less_cache.cache.layer import LESSLayer
from less_cache.testing.reference import reference_attention

fewer_examples = settings(max_examples=max(settings.default.max_examples // 3, 1))  # a model costs more than a layer

MODELS = {
    (implementation, kv_heads): tiny.tiny_llama(implementation, num_key_value_heads=kv_heads)
    for implementation in ("sdpa", "eager")
    for kv_heads in (1, 2, 4)
}
MODEL = MODELS["sdpa", 2]
models = st.sampled_from(list(MODELS.values()))


def random_tokens(b: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(2, tiny.VOCAB, (b, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, cache: LESSCache, tokens: torch.Tensor, blocks: list[int], real: torch.Tensor | None = None) -> torch.Tensor:
    """Logits `[b, T, vocabulary]` of tokens `[b, T]` that the cache is fed in `blocks`. `real`: bool `[b, T]`."""
    outputs = []
    start = 0
    for n in blocks:
        block = slice(start, start + n)
        padding = {}
        if real is not None:
            positions = (real.cumsum(-1) - 1).clamp_min(0)[:, block]
            padding = {"attention_mask": real[:, : start + n].long(), "position_ids": positions}
        outputs.append(model(tokens[:, block], past_key_values=cache, **padding).logits)
        start += n
    return torch.cat(outputs, dim=1)


@fewer_examples
@given(models, partitions(), st.integers(1, 2), st.booleans(), SEEDS)
def test_a_budget_of_all_tokens_gives_the_full_caches_logits(model, blocks, b, with_kernels, seed):
    length = sum(blocks)
    tokens = random_tokens(b, length, seed)
    kernels = tiny.tiny_kernels(model) if with_kernels else None
    with torch.no_grad():
        expected = model(tokens).logits
    for policy in (H2O(max(length - 1, 1), 1), SinkRecent(length - 1, 1), CORM(window=1, recent=length)):
        cache = LESSCache(model, policy=policy, kernels=kernels)
        torch.testing.assert_close(logits(model, cache, tokens, blocks), expected, rtol=1e-5, atol=2e-5)
        assert all((layer.held.slots.positions >= 0).sum(dim=-1).eq(length).all() for layer in cache.layers)


@pytest.mark.parametrize("name", POLICIES)
@fewer_examples
@given(st.data())
def test_every_layer_of_a_model_equals_the_reference(name, data):
    model, blocks = data.draw(models), data.draw(partitions())
    length = sum(blocks)
    cache = LESSCache(model, policy=data.draw(policies(name, fractions=True)), kernels=tiny.tiny_kernels(model), fit=False)
    real = torch.arange(length) >= torch.tensor([[0], [data.draw(st.integers(0, length - 1))]])
    taken = [([], [], [], []) for _ in cache.layers]  # queries, keys, values, outputs of each block
    attend = LESSLayer.attend

    def recorded(self, original, module, *states_and_mask, **attention):
        output, weights = attend(self, original, module, *states_and_mask, **attention)
        for each, states in zip(taken[self.layer_idx], (*states_and_mask[:3], output.transpose(1, 2)), strict=True):
            each.append(states.clone())
        return output, weights

    with mock.patch.object(LESSLayer, "attend", recorded):
        logits(model, cache, random_tokens(2, length, data.draw(SEEDS)), blocks, real)
    for layer, recordings in zip(cache.layers, taken, strict=True):
        *states, output = (torch.cat(each, dim=2) for each in recordings)  # [b, h or g, T, d]
        options = {"rotation": layer.setup.rotation}
        expected, kept = reference_attention(*states, cache.policy, blocks, layer.setup.memory, real, **options)
        assert torch.equal(tiny.held_tokens(layer, real), kept[-1])
        wanted = real[:, None, :, None].expand_as(output)
        torch.testing.assert_close(output[wanted], expected[wanted].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fractions", [False, True])
@pytest.mark.parametrize("name", POLICIES)
@fewer_examples
@given(st.data())
def test_a_left_padded_row_equals_its_unpadded_single_run(name, fractions, data):
    model = data.draw(models)
    prompt, later = data.draw(st.integers(1, 12)), data.draw(partitions())
    starts = data.draw(st.lists(st.integers(0, prompt - 1), min_size=1, max_size=2))
    length = prompt + sum(later)
    tokens = random_tokens(len(starts) + 1, length, data.draw(SEEDS))
    policy, kernels = data.draw(policies(name, fractions=fractions)), tiny.tiny_kernels(model)
    real = torch.arange(length) >= torch.tensor([0, *starts]).unsqueeze(-1)
    batched = logits(model, LESSCache(model, policy=policy, kernels=kernels, fit=False), tokens, [prompt, *later], real)
    for row, start in enumerate([0, *starts]):
        cache = LESSCache(model, policy=policy, kernels=kernels, fit=False)
        alone = logits(model, cache, tokens[row : row + 1, start:], [prompt - start, *later])
        torch.testing.assert_close(batched[row : row + 1, start:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", POLICIES)
@fewer_examples
@given(st.data())
def test_permuting_the_batch_permutes_the_logits(name, data):
    model, blocks, b = data.draw(models), data.draw(partitions()), 3
    tokens = random_tokens(b, sum(blocks), data.draw(SEEDS))
    order = torch.tensor(data.draw(st.permutations(range(b))))
    policy, kernels = data.draw(policies(name)), tiny.tiny_kernels(model)
    expected = logits(model, LESSCache(model, policy=policy, kernels=kernels), tokens, blocks)[order]
    permuted = logits(model, LESSCache(model, policy=policy, kernels=kernels), tokens[order], blocks)
    torch.testing.assert_close(permuted, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", POLICIES)
@fewer_examples
@given(st.data())
def test_kernels_never_change_what_the_first_layer_keeps(name, data):
    """Deeper layers see other queries and keys, because the kernels change the outputs before them."""
    blocks, policy = data.draw(partitions()), data.draw(policies(name))
    tokens = random_tokens(2, sum(blocks), data.draw(SEEDS))
    caches = [LESSCache(MODEL, policy=policy, kernels=kernels, fit=False) for kernels in (None, tiny.tiny_kernels(MODEL))]
    for cache in caches:
        logits(MODEL, cache, tokens, blocks)
    assert torch.equal(caches[0].layers[0].held.slots.positions, caches[1].layers[0].held.slots.positions)


@pytest.mark.parametrize("policy", [H2O(4, 4), SinkRecent(2, 6), CORM(4, 4)])
def test_the_tests_kernels_matter(policy):
    """Otherwise every test here would pass with a state that is next to nothing."""
    tokens, blocks = random_tokens(2, 40, seed=1), [20] + [1] * 20
    sparse = logits(MODEL, LESSCache(MODEL, policy=policy), tokens, blocks)
    less = logits(MODEL, LESSCache(MODEL, policy=policy, kernels=tiny.tiny_kernels(MODEL)), tokens, blocks)
    assert torch.equal(less[:, :20], sparse[:, :20])
    assert (less - sparse)[:, 21:].abs().mean() > 0.05 * sparse.abs().mean()


@pytest.mark.parametrize("policy", [H2O(3, 5), SinkRecent(2, 6)])
def test_chunked_prefill_holds_no_more_than_the_budget(policy):
    cache = LESSCache(MODEL, policy=policy, kernels=tiny.tiny_kernels(MODEL))
    tokens = random_tokens(1, 64, seed=2)
    MODEL.generate(tokens, past_key_values=cache, max_new_tokens=3, do_sample=False, prefill_chunk_size=16)
    assert cache.get_seq_length() == 66
    for layer in cache.layers:
        assert layer.keys.shape[2] == layer.values.shape[2] == 8 + 1
        assert [len(head) for head in tiny.held_positions(layer)[0]] == [8, 8]
