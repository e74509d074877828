"""The untrained state: centroids of the evicted tokens, as virtual tokens."""

import dataclasses

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from less_cache import CORM, H2O, LESSCache, LESSError, LESSKernels, SinkRecent
from less_cache.cache.layer import LESSLayer
from less_cache.memory.centroids import MOST_SPREAD, SPREAD, CentroidState, LayerCentroids
from less_cache.ops.attention import attention_logits

B, H, G, D = 2, 4, 2, 8


def fold_in(memory, state, keys, values, leaves):
    """These centroids do not fade: where a pair was changes nothing."""
    memory.fold_in(state, keys, values, leaves, torch.zeros(leaves.shape), torch.tensor([[[1000]]]))


def folded(lengths, seed=0, num_centroids=4) -> tuple[CentroidState, torch.Tensor, torch.Tensor]:
    """A state that took in random pairs in blocks of `lengths`, and the pairs."""
    _, keys, values = tiny.random_states(B, H, G, sum(lengths), D, seed)
    memory = LayerCentroids(num_centroids)
    state = memory.empty_state(B, G, D, torch.device("cpu"))
    for key, value in zip(keys.split(lengths, dim=2), values.split(lengths, dim=2), strict=True):
        fold_in(memory, state, key, value, torch.ones(key.shape[:3], dtype=torch.bool))
    return state, keys, values


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_a_packed_state_says_the_same_and_does_not_wear_out(lengths, seed):
    """16 bits of means: what is read is near, and packing again what was unpacked changes nothing."""
    state, keys, _ = folded(lengths, seed)
    memory = LayerCentroids(4)
    packed = memory.packed(state)
    unpacked = memory.unpacked(packed)
    queries = torch.nn.functional.normalize(keys, dim=-1).repeat(1, 2, 1, 1)
    for read, exact in zip(*[memory.virtual_tokens(each, queries, 1.0) for each in (unpacked, state)], strict=True):
        torch.testing.assert_close(read, exact, rtol=1e-3, atol=2e-2)
    again = memory.packed(unpacked)
    assert torch.equal(again.mean_keys, packed.mean_keys) and torch.equal(again.mean_values, packed.mean_values)
    torch.testing.assert_close(again.variance, packed.variance, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.count, packed.count)
    half = sum(tensor.nbytes for tensor in vars(packed).values()) / sum(tensor.nbytes for tensor in vars(state).values())
    assert half < 0.6


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_every_token_is_in_one_centroid(lengths, seed):
    state, keys, values = folded(lengths, seed)
    torch.testing.assert_close(state.count.sum(-1), torch.full((B, G), float(sum(lengths))))
    torch.testing.assert_close(state.keys_sum.sum(2), keys.sum(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.values_sum.sum(2), values.sum(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.squares_sum.sum(-1), keys.square().sum((-1, -2)), rtol=1e-4, atol=1e-4)


def test_what_does_not_leave_is_not_folded():
    _, keys, values = tiny.random_states(B, H, G, 9, D)
    leaves = torch.arange(9) % 3 == 0
    memory = LayerCentroids(2)
    some, alone = (memory.empty_state(B, G, D, torch.device("cpu")) for _ in range(2))
    fold_in(memory, some, keys, values, leaves.expand(B, G, 9))
    fold_in(memory, alone, keys[:, :, leaves], values[:, :, leaves], torch.ones(B, G, 3, dtype=torch.bool))
    for name, tensor in vars(some).items():
        torch.testing.assert_close(tensor, vars(alone)[name])


def test_well_separated_clusters_are_found():
    """Three heaps of pairs far from one another, whatever their order."""
    generator = torch.Generator().manual_seed(0)
    heap = torch.randperm(30, generator=generator) % 3
    centers = torch.tensor([[8.0, 0.0], [-8.0, 0.0], [0.0, 8.0]])
    keys = centers[heap] + 0.1 * torch.randn(30, 2, generator=generator)
    values = heap[:, None].float().expand(30, 2)
    memory = LayerCentroids(3)
    state = memory.empty_state(1, 1, 2, torch.device("cpu"))
    fold_in(memory, state, keys[None, None], values[None, None], torch.ones(1, 1, 30, dtype=torch.bool))
    assert state.count.flatten().tolist() == [10.0] * 3
    means = (state.values_sum / state.count.unsqueeze(-1))[0, 0, :, 0]
    assert sorted(means.tolist()) == pytest.approx([0, 1, 2])


@given(seed=st.integers(0, 99), num_tokens=st.integers(1, 4))
def test_tokens_that_have_a_centroid_each_lose_nothing(seed, num_tokens):
    """As many centroids as tokens: attention over the virtual tokens is attention over the tokens."""
    state, keys, values = folded([1] * num_tokens, seed)
    queries = tiny.random_states(B, H, G, 3, D, seed)[0]
    logits, virtual = LayerCentroids(4).virtual_tokens(state, queries, 0.3)
    weights = attention_logits(queries, keys, None, 0.3).softmax(-1)
    torch.testing.assert_close(logits.softmax(-1) @ virtual[:, :, None], weights @ values[:, :, None], rtol=1e-4, atol=1e-4)


def test_the_logit_is_the_formula():
    state, *_ = folded([40])
    queries = tiny.random_states(B, H, G, 3, D)[0]
    logits, values = LayerCentroids(4).virtual_tokens(state, queries, 0.5)
    n = state.count[1, 1, 2]
    mean = state.keys_sum[1, 1, 2] / n
    variance = (state.squares_sum[1, 1, 2] / n - mean @ mean) / D
    q = 0.5 * queries[1, 3, 0]  # query head 3 is the second of KV head 1
    expected = q @ mean + n.log() + min(SPREAD * (q @ q) * variance, MOST_SPREAD)
    torch.testing.assert_close(logits[1, 1, 1, 0, 2], expected)
    torch.testing.assert_close(values[1, 1, 2], state.values_sum[1, 1, 2] / n)


def test_an_empty_state_has_no_weight():
    state = LayerCentroids(2).empty_state(1, 2, D, torch.device("cpu"))
    logits, values = LayerCentroids(2).virtual_tokens(state, torch.ones(1, H, 1, D), 1.0)
    assert (logits.logsumexp(-1).exp() == 0).all() and (values == 0).all()


@pytest.mark.parametrize("policy", [H2O(3, 3), SinkRecent(2, 4), CORM(3, 3)], ids=lambda policy: policy.name)
def test_a_cache_with_an_untrained_state_generates(policy):
    """The same bytes as rank 8 with kernels; rows do not mix, padding leaves no trace."""
    model = tiny.tiny_llama()
    kernels = LESSKernels.untrained(model)
    prompt = torch.arange(60).view(2, 30) % 97
    together = LESSCache(model, policy, kernels)
    written = model.generate(prompt, past_key_values=together, max_new_tokens=12, do_sample=False)
    padded = torch.nn.functional.pad(prompt[1:], (5, 0))
    mask = (torch.arange(35) >= 5).long()[None]
    alone = model.generate(
        padded, attention_mask=mask, past_key_values=LESSCache(model, policy, kernels), max_new_tokens=12, do_sample=False
    )
    assert torch.equal(written[1, 30:], alone[0, 35:])
    trained = LESSCache(model, policy, tiny.tiny_kernels(model))
    model.generate(prompt, past_key_values=trained, max_new_tokens=12, do_sample=False)
    assert together.memory_footprint().low_rank_state == trained.memory_footprint().low_rank_state


def test_a_budget_as_long_as_the_text_changes_nothing():
    model = tiny.tiny_llama()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        full = model(tokens).logits
        cache = LESSCache(model, H2O(32, 32), LESSKernels.untrained(model))
        pieces = [model(tokens[:, :20], past_key_values=cache).logits]
        pieces += [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(20, 40)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=1e-4, atol=1e-4)


def test_a_state_stays_finite_at_huge_keys():
    memory = LayerCentroids(2)
    state = memory.empty_state(1, 1, 2, torch.device("cpu"))
    keys = torch.tensor([[3e4, -3e4], [1e-4, 1e4]]).expand(1, 1, 2, 2)
    for _ in range(100):
        fold_in(memory, state, keys, keys, torch.ones(1, 1, 2, dtype=torch.bool))
    logits, values = memory.virtual_tokens(state, torch.full((1, 1, 1, 2), 1e4), 1.0)
    assert logits.isfinite().all() and values.isfinite().all()


def test_there_is_nothing_to_save(tmp_path):
    with pytest.raises(LESSError, match="nothing to save"):
        LESSKernels.untrained(tiny.tiny_llama()).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_odd_rank_is_refused():
    with pytest.raises(LESSError, match="even rank"):
        LESSKernels.untrained(tiny.tiny_llama(), rank=3)


def test_states_are_copied_and_put_back():
    model = tiny.tiny_llama()
    cache = LESSCache(model, H2O(3, 3), LESSKernels.untrained(model))
    model.generate(torch.arange(20)[None], past_key_values=cache, max_new_tokens=3, do_sample=False)
    fork = cache.fork()
    before = dataclasses.replace(cache.layers[0].held.state)
    model.generate(torch.arange(24)[None], past_key_values=fork, max_new_tokens=3, do_sample=False)
    assert all(torch.equal(tensor, vars(before)[name]) for name, tensor in vars(cache.layers[0].held.state).items())
    assert isinstance(cache.layers[0], LESSLayer)
