"""Attention over columns and virtual tokens, against the formula in float64."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS

from less_cache.memory.state import LowRankState
from less_cache.ops.attention import causal_blocks, group_heads, less_attention

many_examples = settings(max_examples=5 * settings.default.max_examples)  # one call each, and many kinds of input

# Factors of the queries, of φ and of ψ: logits from nearly equal to one-hot at 10,000, features from 0 to huge.
QUERY_SIZES = st.sampled_from([2**-20, 0.125, 1, 32, 8192])
FEATURE_SIZES = st.sampled_from([0.0, 1e-12, 1.0, 1e12])


@st.composite
def columns(draw):
    """Queries, keys, values, a visible mask in which every query sees something, φ(q), and a state."""
    b, g, s, n = (draw(st.integers(1, most)) for most in (2, 2, 3, 3))
    c = draw(st.integers(2, 5) | st.just(1))
    d, r = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(SEEDS))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    # Quarters: q·k is exact in float32, so that large logits differ by what they should.
    query_states = (4 * random(b, g * s, n, d)).round() / 4 * draw(QUERY_SIZES)
    key_states, value_states = (4 * random(b, g, c, d)).round() / 4, random(b, g, c, d)
    if draw(st.booleans()):  # identical keys
        key_states = key_states[:, :, :1].expand(b, g, c, d)
    visible = random(b, g, n, c) > 0
    visible[..., 0] = True
    query_features = random(b, g * s, n, r).relu() * draw(FEATURE_SIZES)
    state = LowRankState(torch.zeros(b, g, r, d), torch.zeros(b, g, r))
    state.fold_in(random(b, g, 4, r).relu() * draw(FEATURE_SIZES), random(b, g, 4, d))
    return query_states, key_states, value_states, visible, query_features, state


def virtual_tokens(state, query_features):
    """What a memory whose φ gives `query_features` `[b, h, n, r]` makes of the state."""
    memory = tiny.layer_kernels(1, 1, 2)
    memory.log_query_features = lambda *_: group_heads(query_features, state.features_sum.shape[1]).log()
    return memory.virtual_tokens(state, query_features, scaling=1.0)


def formula(query_states, key_states, value_states, visible, scaling, softcap, sinks, query_features, state):
    """( φ(q) H + Σ e^l v ) / ( φ(q) z + Σ e^l ), above and below multiplied by e^{-top} so that float64 holds it."""
    s = query_states.shape[1] // key_states.shape[1]
    keys, values, visible, H, z = (
        each.double().repeat_interleave(s, dim=1)  # [b, h, …]
        for each in (key_states, value_states, visible, state.values_sum, state.features_sum)
    )
    logits = query_states.double() @ keys.transpose(-1, -2) * scaling  # [b, h, n, c]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(visible == 0, -torch.inf)
    features = query_features.double()  # [b, h, n, r]
    low_rank = features @ z.unsqueeze(-1)  # [b, h, n, 1]
    top = torch.maximum(logits.amax(dim=-1, keepdim=True), low_rank.log())
    exponentials, shrink = (logits - top).exp(), (-top).clamp(max=700).exp()  # above 700 only where φ(q) z is 0
    total = exponentials.sum(-1, keepdim=True) + low_rank * shrink
    if sinks is not None:
        total = total + (sinks.double().view(1, -1, 1, 1) - top).exp()
    return (exponentials @ values + features @ H * shrink) / total


@many_examples
@given(columns(), st.sampled_from([None, 1.0, 30.0]), st.booleans(), st.sampled_from([0.125, 1.0]))
def test_virtual_tokens_equal_the_formula(drawn, softcap, with_sinks, scaling):
    query_states, key_states, value_states, visible, query_features, state = drawn
    sinks = torch.linspace(-2, 3, query_states.shape[1]) if with_sinks else None
    virtual = virtual_tokens(state, query_features)
    output, _ = less_attention(query_states, key_states, value_states, visible, scaling, softcap, sinks, virtual)
    expected = formula(query_states, key_states, value_states, visible, scaling, softcap, sinks, query_features, state)
    torch.testing.assert_close(output.double(), expected, rtol=2e-5, atol=2e-5)


@many_examples
@given(columns())
def test_weights_are_the_softmax_over_the_kept_tokens_alone(drawn):
    query_states, key_states, value_states, visible, query_features, state = drawn
    shared = query_states, key_states, value_states, visible, 0.5
    _, weights = less_attention(*shared, virtual_tokens=virtual_tokens(state, query_features))  # [b, g, s, n, c]
    _, without_state = less_attention(*shared)
    assert torch.equal(weights, without_state)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
    assert (weights >= 0).all()
    assert weights.masked_select(~visible.unsqueeze(2)).eq(0).all()


@pytest.mark.parametrize("magnitude", [1e3, 1e5, 1e8])
def test_identical_huge_keys_share_the_weight(magnitude):
    """Rounding log Σ e^l at large l would give every one of them a weight near 1."""
    ones, values = torch.ones(1, 1, 3, 1), torch.tensor([1.0, 2.0, 6.0]).view(1, 1, 3, 1)
    output, weights = less_attention(magnitude * ones[:, :, :1], ones, values, torch.ones(1, 1, 1, 3).bool(), scaling=1.0)
    torch.testing.assert_close(weights.flatten(), torch.full((3,), 1 / 3))
    torch.testing.assert_close(output.flatten(), torch.tensor([3.0]))


@pytest.mark.parametrize(
    ("query_features", "features_sum"),
    [([0.0, 0.0], [1.0, 1.0]), ([1.0, 1.0], [0.0, 0.0]), ([0.0, 1.0], [1.0, 0.0]), ([0.0, 0.0], [0.0, 0.0])],
)
def test_a_state_without_mass_changes_nothing(query_features, features_sum):
    query, key, value = tiny.random_states(b=1, h=1, g=1, length=3, d=2)
    z = torch.tensor(features_sum).view(1, 1, 2)
    state = LowRankState(values_sum=z.unsqueeze(-1) * 1e6, features_sum=z)
    shared = query, key, value, torch.ones(3, 3).tril().bool().view(1, 1, 3, 3), 1.0
    output, _ = less_attention(*shared, virtual_tokens=virtual_tokens(state, torch.tensor(query_features).expand(1, 1, 3, 2)))
    plain, _ = less_attention(*shared)
    assert torch.equal(output, plain)


def test_a_query_that_sees_only_weak_keys_reads_the_state():
    state = LowRankState(values_sum=torch.full((1, 1, 1, 2), 6.0), features_sum=torch.full((1, 1, 1), 2.0))
    query, key, value = torch.full((1, 1, 1, 2), -50.0), torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    output, _ = less_attention(
        query, key, value, torch.ones(1, 1, 1, 1).bool(), 1.0, virtual_tokens=virtual_tokens(state, torch.ones(1, 1, 1, 1))
    )
    torch.testing.assert_close(output, torch.full((1, 1, 1, 2), 3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_has_the_dtype_of_the_values(dtype):
    query, key, value = (states.to(dtype) for states in tiny.random_states(b=2, h=4, g=2, length=3, d=4))
    output, weights = less_attention(query, key, value, torch.ones(1, 1, 3, 3).bool(), 0.5)
    assert output.dtype == dtype and output.shape == (2, 4, 3, 4)
    assert weights.dtype == torch.float32 and weights.shape == (2, 2, 2, 3, 3)


@pytest.mark.parametrize("softcap", [None, 1.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("tile", [(1, 4), (2, 5), (4, 50)], ids=str)
@pytest.mark.parametrize("start", [0, 3])
def test_causal_blocks_are_masked_attention(softcap, with_sinks, tile, start):
    b, g, s, n, d = 2, 2, 2, 13, 8
    queries, keys, values = tiny.random_states(b, g * s, g, n, d)
    sinks = torch.linspace(-1, 1, g * s) if with_sinks else None
    visible = torch.ones(n, n, dtype=torch.bool).tril().expand(b, g, n, n)
    expected, expected_weights = less_attention(queries, keys, values, visible, 0.3, softcap, sinks)
    output, weights = torch.full((b * g, s, n, d), torch.nan), torch.zeros(b * g, s, n, n)
    blocks = causal_blocks(queries, keys, values, 0.3, softcap, sinks, start, *tile)
    for heads, rows, columns, block_weights, block_output in blocks:
        weights[heads, :, rows, columns] = block_weights
        output[heads, :, rows] = block_output
    torch.testing.assert_close(output.view(b, g * s, n, d)[:, :, start:], expected[:, :, start:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights.view(b, g, s, n, n)[:, :, :, start:], expected_weights[:, :, :, start:])


def test_causal_blocks_at_large_logits():
    queries, keys, values = (40 * states for states in tiny.random_states(1, 2, 1, 20, 8))
    visible = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    expected, _ = less_attention(queries, keys, values, visible, 0.5)
    outputs = [output for *_, output in causal_blocks(queries, keys, values, 0.5, queries_at_once=8)]
    torch.testing.assert_close(torch.cat(outputs, dim=2), expected)
