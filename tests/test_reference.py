"""The oracle itself, against PyTorch's attention and against one head written out in Python numbers."""

import math

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, cases
from torch.nn.functional import scaled_dot_product_attention

from less_cache import H2O, POLICIES, SinkRecent
from less_cache.testing.reference import reference_attention


@given(SEEDS, st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_reference_is_ordinary_attention_while_nothing_is_evicted(seed, blocks):
    query, key, value = tiny.random_states(b=2, h=4, g=2, length=sum(blocks), d=4, seed=seed)
    kernels = tiny.layer_kernels(4, 2, 4, seed=seed)
    output, kept = reference_attention(query, key, value, H2O(heavy=10, recent=10), blocks, kernels)
    expected = scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(output, expected)
    assert kept[-1].all()


def one_head(query, key, value, heavy, recent, prompt, kernels):
    """H2O and LESS for one head, token by token in Python numbers: outputs and the kept tokens after each block."""
    length, d = query.shape
    phi = kernels.query_features(query[None, None])[0, 0].tolist()
    psi = kernels.key_features(key[None, None])[0, 0].tolist()
    scores = [0.0] * length
    kept, evicted, outputs, history = [], [], [], []
    for t in range(length):
        kept.append(t)
        exponentials = {j: math.exp(float(query[t] @ key[j]) / math.sqrt(d)) for j in kept}
        masses = {**exponentials, **{j: sum(p * s for p, s in zip(phi[t], psi[j], strict=True)) for j in evicted}}
        total = sum(masses.values())
        outputs.append(sum(mass / total * value[j] for j, mass in masses.items()))
        for j, exponential in exponentials.items():
            scores[j] += exponential / sum(exponentials.values())
        if t + 1 >= prompt:
            older = [j for j in kept if j <= t - recent]
            for j in sorted(older, key=lambda j: scores[j])[: max(len(kept) - heavy - recent, 0)]:
                kept.remove(j)
                evicted.append(j)
            history.append(list(kept))
    return torch.stack(outputs), history


@given(SEEDS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 8), st.integers(0, 6))
def test_reference_equals_one_head_written_out(seed, heavy, recent, prompt, steps):
    query, key, value = tiny.random_states(b=1, h=1, g=1, length=prompt + steps, d=4, seed=seed)
    kernels = tiny.layer_kernels(1, 1, 4, seed=seed)
    output, kept = reference_attention(query, key, value, H2O(heavy, recent), [prompt] + [1] * steps, kernels)
    expected, history = one_head(query[0, 0].double(), key[0, 0].double(), value[0, 0].double(), heavy, recent, prompt, kernels)
    torch.testing.assert_close(output[0, 0], expected, rtol=1e-5, atol=1e-6)
    assert [after[0, 0].nonzero().flatten().tolist() for after in kept] == history


@pytest.mark.parametrize("name", POLICIES)
@given(st.data())
def test_padding_does_not_change_the_reference(name, data):
    case = data.draw(cases(name, padding="anywhere"))
    if case.policy.block_size is not None:  # its choices come after so many tokens, padding included, from the prompt on
        case.real[:, case.blocks[0] - 1 :] = True
    options = {"rotation": case.rotation}
    output, kept = reference_attention(*case.states, case.policy, case.blocks, case.kernels, case.real, **options)
    for row, real in enumerate(case.real):
        if not real.any():
            assert not kept[:, row].any()
            continue
        alone = [states[row : row + 1, :, real] for states in case.states]
        blocks = [int(block.sum()) for block in real.split(case.blocks)]
        blocks = [n for n in blocks if n]
        row_output, row_kept = reference_attention(*alone, case.policy, blocks, case.kernels, **options)
        torch.testing.assert_close(output[row : row + 1, :, real], row_output, rtol=1e-5, atol=1e-6)  # φ, ψ are float32
        assert torch.equal(kept[-1][row, :, real], row_kept[-1][0])


def test_reference_applies_scaling_soft_cap_and_sinks():
    query, key, value = tiny.random_states(b=1, h=2, g=1, length=5, d=4)
    sinks = torch.tensor([0.3, -1.0])
    output, _ = reference_attention(query, key, value, SinkRecent(1, 9), [5], scaling=0.7, softcap=2.0, sinks=sinks)
    expected, _ = tiny.plain_attention(None, query, key, value, None, scaling=0.7, softcap=2.0, s_aux=sinks)
    torch.testing.assert_close(output.transpose(1, 2), expected.double(), rtol=1e-5, atol=1e-6)


def test_reference_refuses_blocks_that_do_not_cover_the_tokens():
    states = tiny.random_states(b=1, h=2, g=1, length=5, d=4)
    with pytest.raises(AssertionError, match="blocks sum to 4, there are 5"):
        reference_attention(*states, SinkRecent(1, 2), [3, 1])
