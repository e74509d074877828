"""A raw layer, fed as a model would: against the oracle, its invariants, its memory."""

import contextlib
import dataclasses
import weakref
from unittest import mock

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, Case, cases, partitions
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from less_cache import CORM, H2O, POLICIES, LESSError, SinkRecent
from less_cache.cache.layer import LESSLayer
from less_cache.testing.reference import reference_attention

STEP_POLICIES = [H2O(2, 3), SinkRecent(2, 3), CORM(3, 2)]


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Small inner blocks, so that a dozen tokens reach every path."""
    small = {
        "less_cache.backends.reading.QUERY_BLOCK": 3,
        "less_cache.slots.slots.SPARE_SLOTS": 2,
        "less_cache.slots.asked.PLACES": 2,
        "less_cache.slots.asked.STRIDE": 3,
        "less_cache.fitting.references.MOST": 5,
    }
    with contextlib.ExitStack() as stack:
        for name, number in small.items():
            stack.enter_context(mock.patch(name, number))
        yield


def feed_block_by_block(layer: LESSLayer, case: Case, **attention):
    """Feed the blocks of a case; yields the tokens seen, the last block's slice and its outputs after each."""
    start = 0
    for n in case.blocks:
        block = slice(start, start + n)
        output = tiny.feed(layer, *(states[:, :, block] for states in case.states), [n], case.real, **attention)
        start += n
        yield start, block, output


def feed(case: Case, layer: LESSLayer | None = None) -> tuple[LESSLayer, torch.Tensor]:
    """The layer after all blocks of a case, and its outputs `[b, h, T, d]`."""
    layer = layer or case.layer()
    return layer, tiny.feed(layer, *case.states, case.blocks, case.real)


def assert_same_state(layer: LESSLayer, other: LESSLayer) -> None:
    assert tiny.held_positions(layer) == tiny.held_positions(other)
    if layer.held.state is not None:
        assert_same_sums(layer.held.state.values_sum, other.held.state.values_sum, other.held.state.features_sum)
        torch.testing.assert_close(layer.held.state.features_sum, other.held.state.features_sum)


def assert_same_sums(sums: torch.Tensor, expected: torch.Tensor, weights: torch.Tensor) -> None:
    """Equal up to rounding, which goes with the terms, weights times numbers of order 1: those of both signs may cancel."""
    torch.testing.assert_close(sums, expected, rtol=1.3e-6, atol=1e-5 * max(1.0, weights.max().item()))


def assert_same_outputs(output: torch.Tensor, expected: torch.Tensor, real: torch.Tensor) -> None:
    """Equal `[b, h, T, d]` wherever a token is not padding, `real` `[b, T]`."""
    wanted = real[:, None, :, None].expand_as(output)
    torch.testing.assert_close(output[wanted], expected[wanted].to(output.dtype), rtol=1e-4, atol=1e-5)


# Against the oracle


def faded_features(case: Case, tokens: int, layer: LESSLayer) -> torch.Tensor:
    """What each of the first `tokens` would weigh in the layer's state, ψ(k) e^{−λ age}, `[b, g, tokens, r]`. The state knows
    nothing of the tokens since the last choice.
    """
    real = case.real_tokens()[:, :tokens]
    features, rates = case.kernels.key_features(case.states[1][:, :, :tokens]), case.kernels.fading_rates()
    if rates is None:
        return features
    ages = real.sum(-1, keepdim=True) + 1 - real.cumsum(-1)  # [b, tokens], 1 for the last real one
    if layer.held.newest is not None:
        ages = ages - (layer.held.newest.positions >= 0).sum(-1, keepdim=True)
    return features * torch.exp(-rates.unsqueeze(1) * ages[:, None, :, None])


@pytest.mark.parametrize("padding", ["none", "left", "anywhere"])
@pytest.mark.parametrize("name", POLICIES)
@given(st.data())
def test_layer_equals_the_reference(name, padding, data):
    case = data.draw(cases(name, padding=padding, fractions=True))
    h = case.states[0].shape[1]
    attention = {
        "scaling": data.draw(st.sampled_from([0.3, 1.0])),
        "softcap": data.draw(st.sampled_from([None, 3.0])),
        "s_aux": data.draw(st.sampled_from([None, torch.linspace(-1, 2, h)])),
    }
    options = {"scaling": attention["scaling"], "softcap": attention["softcap"], "sinks": attention["s_aux"]}
    expected, kept = reference_attention(
        *case.states, case.policy, case.blocks, case.kernels, case.real, **options, rotation=case.rotation
    )
    layer, real = case.layer(), case.real_tokens()
    fed = feed_block_by_block(layer, case, additive_mask=data.draw(st.booleans()), **attention)
    for (seen, block, output), kept_after in zip(fed, kept, strict=True):
        assert torch.equal(tiny.held_tokens(layer, real[:, :seen]), kept_after[..., :seen])
        assert_same_outputs(output, expected[:, :, block], real[:, block])


def give_bias(layer: LESSLayer, bias: torch.Tensor) -> None:
    """Give the kept tokens their biases, `[b, g, T]` by position."""
    slots = layer.held.slots
    positions = slots.columns().positions
    by_slot = bias.gather(-1, positions.clamp_min(0).long()).masked_fill(positions < 0, 0)
    slots.bias = by_slot if slots.starts is None else by_slot[torch.arange(positions.shape[-1]) < slots.sizes.unsqueeze(-1)]


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", POLICIES)
@given(st.data())
def test_heads_with_budgets_and_tokens_with_biases_equal_the_reference(name, padding, data):
    """Of the first block every token gets a bias; the layer is made anew from its tensors in between."""
    case = data.draw(cases(name, padding=padding, fractions=True, uneven=True))
    case.real = None if padding == "none" else case.real
    if case.real is not None:
        case.real[:, case.blocks[0] - 1] = True  # a step does not say how long a prompt of one token is
    b, g, length, _ = case.states[1].shape
    first = case.blocks[0]
    bias = torch.zeros(b, g, length)
    real = case.real_tokens()
    if data.draw(st.booleans()):
        bias[:, :, :first] = torch.linspace(-2, 2, b * g * first).half().view(b, g, first)  # stored in 16 bits
        bias *= real.unsqueeze(1)
    expected, kept = reference_attention(
        *case.states, case.policy, case.blocks, case.kernels, case.real, shares=case.shares, bias=bias, rotation=case.rotation
    )
    layer, by_position = case.layer(), bias.clone()
    for row in range(b):  # real tokens count from 0
        by_position[row, :, : real[row].sum()] = bias[row, :, real[row]]
    for (seen, block, output), kept_after in zip(feed_block_by_block(layer, case), kept, strict=True):
        assert torch.equal(tiny.held_tokens(layer, real[:, :seen]), kept_after[..., :seen])
        assert_same_outputs(output, expected[:, :, block], real[:, block])
        if seen == first:
            give_bias(layer, by_position)
            again = case.layer()
            again.load(layer.tensors(), layer.dtype, seen)
            layer.held.slots = again.held.slots
        layer.batch_select_indices(torch.arange(b))
        layer.map(torch.clone)
    if case.shares is not None and name != "corm":
        slots = layer.held.slots
        bound = [max(1, n) for n in slots.sizes.flatten().tolist()]
        assert slots.positions.numel() <= 1.25 * sum(bound), "bytes follow the sum over heads"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", POLICIES)
@given(st.data())
def test_half_precision_is_used_for_slots_and_outputs_alone(name, dtype, data):
    case = data.draw(cases(name, kernels=True))
    case.states = tuple(states.to(dtype) for states in case.states)
    expected, kept = reference_attention(*case.states, case.policy, case.blocks, case.kernels, rotation=case.rotation)
    layer, output = feed(case)
    assert torch.equal(tiny.held_tokens(layer, case.real_tokens()), kept[-1])
    assert layer.keys.dtype == layer.values.dtype == output.dtype == dtype
    resolution = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=resolution, atol=resolution)
    key_features = faded_features(case, sum(case.blocks), layer) * ~kept[-1].unsqueeze(-1)
    torch.testing.assert_close(layer.held.state.features_sum, key_features.sum(dim=2))
    pairs = case.kernels.remembered(*case.states[1:]).float()
    assert_same_sums(layer.held.state.values_sum, key_features.transpose(-1, -2) @ pairs, layer.held.state.features_sum)


@given(SEEDS, partitions())
def test_a_budget_of_all_tokens_gives_ordinary_attention(seed, blocks):
    states = tiny.random_states(2, 4, 2, sum(blocks), 4, seed=seed)
    layer = LESSLayer(H2O(heavy=max(sum(blocks) - 1, 1), recent=1), tiny.layer_kernels(4, 2, 4, seed=seed), layer_idx=0)
    output = tiny.feed(layer, *states, blocks)
    expected, _ = tiny.plain_attention(None, *states, None, scaling=0.5)
    torch.testing.assert_close(output, expected.transpose(1, 2))
    assert layer.held.state.features_sum.eq(0).all()


# What is kept and what is folded


@pytest.mark.parametrize("name", POLICIES)
@given(st.data())
def test_every_token_seen_is_either_kept_or_folded_once(name, data):
    case = data.draw(cases(name, padding="anywhere", kernels=True, fractions=True))
    query, key, _ = case.states
    b, g, length, _ = key.shape
    # Token j has value e_j, so column j of H is ψ(k_j), faded by its age, as often as j was folded in.
    case.states = query, key, torch.eye(length).expand(b, g, length, length)
    real = case.real_tokens()
    layer = case.layer()
    for seen, _, _ in feed_block_by_block(layer, case):
        held = tiny.held_tokens(layer, real[:, :seen])  # [b, g, seen]
        folded = real[:, None, :seen] & ~held
        expected = (faded_features(case, seen, layer) * folded.unsqueeze(-1)).transpose(-1, -2)
        torch.testing.assert_close(layer.held.state.values_sum[..., :seen], expected)


@pytest.mark.parametrize("name", POLICIES)
@given(st.data())
def test_state_equals_the_closed_form_sum_over_the_evicted(name, data):
    case = data.draw(cases(name, padding="left", kernels=True))
    _, key, value = case.states
    _, kept = reference_attention(*case.states, case.policy, case.blocks, case.kernels, case.real, rotation=case.rotation)
    evicted = case.real_tokens().unsqueeze(1) & ~kept[-1]  # [b, g, T]
    layer, _ = feed(case)
    key_features = faded_features(case, key.shape[2], layer) * evicted.unsqueeze(-1)  # [b, g, T, r]
    expected = torch.einsum("bgtr,bgtd->bgrd", key_features, case.kernels.remembered(key, value))
    assert_same_sums(layer.held.state.values_sum, expected, layer.held.state.features_sum)
    torch.testing.assert_close(layer.held.state.features_sum, key_features.sum(dim=2))


@pytest.mark.parametrize("name", POLICIES)
@given(st.data())
def test_slots_hold_the_protected_and_no_more_than_the_budget(name, data):
    case = data.draw(cases(name, padding="left"))
    policy, layer, real = case.policy, case.layer(), case.real_tokens()
    for tokens, _, _ in feed_block_by_block(layer, case):
        seen = real[:, :tokens].sum(dim=-1).tolist()
        assert layer.get_seq_length() == tokens
        for row, heads in enumerate(tiny.held_positions(layer)):
            for positions in heads:
                assert len(set(positions)) == len(positions)
                assert all(0 <= position < seen[row] for position in positions)
                recent = policy.budget // 10 if name == "attention_matching" else policy.recent
                assert set(range(max(seen[row] - recent, 0), seen[row])) <= set(positions)
                if name == "attention_matching":
                    assert min(seen[row], policy.budget) <= len(positions) < policy.budget + policy.every
                    assert seen[row] == 0 or policy.budget == 1 or 0 in positions
                    continue
                if isinstance(policy, SinkRecent):
                    assert set(range(min(policy.sinks, seen[row]))) <= set(positions)
                if name != "corm":
                    budget = sum(getattr(policy, field.name) for field in dataclasses.fields(policy))
                    assert len(positions) == min(seen[row], budget)
                    assert layer.keys.shape[2] <= min(budget, tokens + max(2, tokens // 4)) + 1  # slots grow with the text


@pytest.mark.parametrize("name", POLICIES)
@given(st.data())
def test_slots_hold_the_keys_and_values_of_their_tokens(name, data):
    case = data.draw(cases(name))
    _, key, value = case.states
    layer = case.layer()
    for _ in feed_block_by_block(layer, case):
        positions = layer.positions
        alive = positions >= 0
        at = positions.clamp_min(0).long().unsqueeze(-1)  # [b, g, c, 1]
        for slots, states in ((layer.keys, key), (layer.values, value)):
            expected = states.gather(2, at.expand(*at.shape[:3], states.shape[-1]))
            assert torch.equal(slots[alive], expected[alive])


@pytest.mark.parametrize("name", POLICIES)
@given(st.data())
def test_kernels_never_change_what_is_kept(name, data):
    case = data.draw(cases(name, padding="left", kernels=True, fractions=True))
    layer, _ = feed(case)
    without_kernels, _ = feed(dataclasses.replace(case, kernels=None))
    assert torch.equal(layer.held.slots.positions, without_kernels.held.slots.positions)
    if layer.held.slots.scores is not None:
        assert torch.equal(layer.held.slots.scores, without_kernels.held.slots.scores)


# How tokens are fed


class BlockLayer(LESSLayer):
    """A layer that takes single tokens through the path for blocks."""

    def _step(self, call):
        return self._block(call)


@pytest.mark.parametrize("name", POLICIES)
@given(st.data())
def test_a_step_equals_a_block_of_one(name, data):
    blocks = st.builds(lambda prompt, steps: [prompt] + [1] * steps, st.integers(1, 8), st.integers(1, 12))
    case = data.draw(cases(name, blocks=blocks, padding="anywhere"))
    layer, output = feed(case)
    block_layer, expected = feed(case, BlockLayer(case.policy, case.kernels, layer_idx=0, rotation=case.rotation))
    assert_same_outputs(output, expected, case.real_tokens())
    assert_same_state(layer, block_layer)


@given(cases("sink_recent", padding="left"), partitions())
def test_sinks_and_recent_are_the_same_however_they_are_fed(case, other_blocks):
    length = sum(case.blocks)
    layer, _ = feed(case)
    rest = max(length - sum(other_blocks), 0)
    partition = [n for n in torch.arange(length).split([*other_blocks, rest]) if len(n)] if rest else [range(length)]
    for blocks in ([length], [1] * length, [len(block) for block in partition]):
        other, _ = feed(dataclasses.replace(case, blocks=blocks))
        assert_same_state(layer, other)


@pytest.mark.parametrize("policy", [H2O(2, 2), CORM(2, 2)])
def test_feeding_matters_where_the_docstring_says_so(policy):
    states = tiny.random_states(1, 2, 1, 24, 4, seed=3)
    layers = [LESSLayer(policy, None, layer_idx=0) for _ in range(3)]
    for layer, blocks in zip(layers, ([24], [12, 12], [1] * 24), strict=True):
        tiny.feed(layer, *states, blocks)
    assert len({str(tiny.held_positions(layer)) for layer in layers}) == 3


# Batches and padding


def row_alone(case: Case, row: int) -> tuple[LESSLayer, torch.Tensor]:
    """A row of a case on its own, without its padding."""
    real = case.real_tokens()[row]
    blocks = [int(block.sum()) for block in real.split(case.blocks)]
    states = tuple(each[row : row + 1, :, real] for each in case.states)
    return feed(dataclasses.replace(case, blocks=[n for n in blocks if n], real=None, states=states))


@pytest.mark.parametrize("padding", ["left", "anywhere"])
@pytest.mark.parametrize("name", POLICIES)
@given(st.data())
def test_padding_changes_nothing(name, padding, data):
    case = data.draw(cases(name, padding=padding, fractions=True))
    if case.policy.block_size is not None:  # its choices come after so many tokens, padding included, from the prompt on
        case.real[:, case.blocks[0] - 1 :] = True
    layer, output = feed(case)
    for row, real in enumerate(case.real_tokens()):
        if not real.any():
            assert tiny.held_positions(layer)[row] == [[]] * layer.held.slots.sizes.shape[1]
            continue
        alone, expected = row_alone(case, row)
        torch.testing.assert_close(output[row : row + 1, :, real], expected, rtol=1e-4, atol=1e-5)
        assert tiny.held_positions(layer)[row] == tiny.held_positions(alone)[0]
        if layer.held.state is not None:
            assert_same_sums(layer.held.state.values_sum[row], alone.held.state.values_sum[0], alone.held.state.features_sum)
            torch.testing.assert_close(layer.held.state.features_sum[row], alone.held.state.features_sum[0])


@pytest.mark.parametrize("name", POLICIES)
@given(st.data())
def test_permuting_the_batch_permutes_the_result(name, data):
    case = data.draw(cases(name, padding="left", fractions=True))
    b = len(case.real)
    order = torch.tensor(data.draw(st.permutations(range(b))))
    permuted = dataclasses.replace(case, real=case.real[order], states=tuple(states[order] for states in case.states))
    layer, output = feed(case)
    permuted_layer, permuted_output = feed(permuted)
    assert_same_outputs(permuted_output, output[order], permuted.real)
    layer.batch_select_indices(order)
    assert_same_state(permuted_layer, layer)


@pytest.mark.parametrize("policy", STEP_POLICIES)
def test_rows_can_be_reordered_and_repeated_between_steps(policy):
    states = tiny.random_states(3, 4, 2, 20, 4)
    beams = torch.tensor([2, 0, 0])
    kernels = tiny.layer_kernels(4, 2, 4)
    reordered = [states[:, :, :14] for states in states], [states[:, :, 14:] for states in states]
    layer, expected_layer = LESSLayer(policy, kernels, 0), LESSLayer(policy, kernels, 0)
    tiny.feed(layer, *reordered[0], [12, 1, 1])
    layer.reorder_cache(beams)
    layer.batch_repeat_interleave(2)
    twice = beams.repeat_interleave(2)
    output = tiny.feed(layer, *(states[twice] for states in reordered[1]), [1] * 6)
    tiny.feed(expected_layer, *(states[twice] for states in reordered[0]), [12, 1, 1])
    expected = tiny.feed(expected_layer, *(states[twice] for states in reordered[1]), [1] * 6)
    torch.testing.assert_close(output, expected)
    assert_same_state(layer, expected_layer)


# Fractions of the prompt


def test_fractions_grow_with_the_chunks_of_a_prompt_and_freeze_at_the_first_step():
    states = tiny.random_states(2, 2, 1, 40, 4)
    real = torch.ones(2, 40, dtype=torch.bool)
    real[1, :8] = False
    layer = LESSLayer(H2O(heavy=0.25, recent=0.5), None, layer_idx=0)
    history = []
    start = 0
    for n in (12, 8, 1, 1, 10, 1, 7):
        tiny.feed(layer, *(each[:, :, start : start + n] for each in states), [n], real)
        start += n
        history.append(layer.held.rows.counts.tolist())
    frozen = [[5, 10], [3, 6]]
    assert history == [[[3, 6], [1, 2]], *[frozen] * 6]
    assert [len(heads[0]) for heads in tiny.held_positions(layer)] == [15, 9]


# CORM


def test_corm_heads_differ_in_length():
    query, key, value = tiny.random_states(1, 2, 2, 30, 4)
    key[:, 1] = 0  # every token of head 1 gets the mean weight
    layer = LESSLayer(CORM(window=4, recent=2), tiny.layer_kernels(2, 2, 4), layer_idx=0)
    tiny.feed(layer, query, key, value, [10] + [1] * 20)
    first, second = tiny.held_positions(layer)[0]
    assert len(first) < len(second)
    assert layer.held.state.features_sum[0, 0].sum() > 0


def test_corm_slots_grow_and_shrink_with_what_is_held():
    """Uniform attention keeps all; then every query wants the newest token alone, and the older ones go."""
    length = 40
    query, key, value = torch.ones(1, 1, length, 2), torch.zeros(1, 1, length, 2), torch.randn(1, 1, length, 2)
    key[:, :, 20:] = 9 * torch.arange(1, 21).view(-1, 1)  # each key is far above all before
    layer = LESSLayer(CORM(window=3, recent=2), None, layer_idx=0)
    slots, held = [], []
    for _ in feed_block_by_block(layer, Case(layer.setup.policy, None, [4] + [1] * 36, None, (query, key, value))):
        slots.append(layer.held.slots.positions.shape[-1])
        positions = layer.held.slots.positions[0, 0]
        alive = positions >= 0
        held.append(int(alive.sum()))
        assert torch.equal(layer.values[0, 0, alive], value[0, 0, positions[alive].long()])
    assert max(held[:17]) >= 19 and held[-1] <= 5
    assert max(slots) >= 20 and slots[-1] <= 2 * (held[-1] + 2)


# Memory


def tensors_of(layer: LESSLayer) -> list[torch.Tensor]:
    """Every tensor that a layer refers to, kernels apart."""
    held = [each for each in vars(layer).values() if isinstance(each, torch.Tensor)]
    return held + ([layer.held.state.values_sum, layer.held.state.features_sum] if layer.held.state is not None else [])


def storage_bytes(layer: LESSLayer) -> int:
    return sum(each.untyped_storage().nbytes() for each in tensors_of(layer))


MODULE = torch.nn.Identity().eval()


def attend(layer: LESSLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One block, with nothing around the layer's own operations."""
    key, value = layer.update(key, value)
    return layer.attend(tiny.plain_attention, MODULE, query, key, value, None, scaling=0.5)[0]


@pytest.mark.parametrize(
    ("policy", "dtype", "second", "called"),
    [
        (H2O(4, 5), torch.float32, None, False),
        (H2O(4, 5), torch.bfloat16, None, True),  # the model's own attention is faster
        (H2O(4, 5), torch.float32, 0, False),
        (H2O(4, 5), torch.float32, 10, True),  # two documents
        (CORM(4, 5), torch.float32, None, True),  # looks at the last queries alone
        (SinkRecent(4, 5), torch.float32, None, True),
    ],
)
def test_a_prompt_goes_through_the_models_attention_unless_all_of_its_weights_are_needed(policy, dtype, second, called):
    """`second`: where the mask says that a second text begins; None: there is no mask."""
    layer = LESSLayer(policy, None, layer_idx=0)
    query, key, value = (states.to(dtype) for states in tiny.random_states(2, 4, 2, 20, 4))
    mask = None
    if second is not None:
        mask = torch.ones(20, 20, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
        mask[:, :, second:, :second] = False
    original = mock.Mock(side_effect=tiny.plain_attention)
    output, _ = layer.attend(original, MODULE, query, *layer.update(key, value), mask, scaling=0.5)
    assert original.called == called
    expected, _ = tiny.plain_attention(MODULE, query, key, value, mask, scaling=0.5)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("block", [3, 7])  # CORM observes four queries
@pytest.mark.parametrize("policy", [H2O(4, 5), CORM(4, 5)])
def test_a_prompt_is_scored_the_same_in_blocks_of_any_size(policy, block, monkeypatch):
    monkeypatch.setattr("less_cache.backends.select.BACKENDS", {})
    states = tiny.random_states(2, 4, 2, 20, 4)
    layers = [LESSLayer(policy, None, layer_idx=0) for _ in range(2)]
    tiny.feed(layers[0], *states, [20])
    with mock.patch.multiple("less_cache.ops.prompt", SCORE_BLOCK=block):
        tiny.feed(layers[1], *states, [20])
    torch.testing.assert_close(layers[0].held.slots.scores, layers[1].held.slots.scores, rtol=1e-5, atol=0)
    assert_same_state(*layers)


class ShapeLimit(TorchDispatchMode):
    """Fails where an operation gives a tensor with a dimension above `most`, or concatenates though it must not."""

    def __init__(self, most: int, may_concatenate: bool = False):
        super().__init__()
        self.most = most
        self.may_concatenate = may_concatenate

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not self.may_concatenate:
            assert function.name().split(".")[0] not in ("aten::cat", "aten::stack"), f"{function} in a step"
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor):
                assert max(each.shape, default=0) <= self.most, f"{function} gave shape {list(each.shape)}"
        return result


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("policy", [H2O(4, 5), SinkRecent(4, 5)])
def test_memory_stays_the_same_from_10_to_2000_steps(policy, fused, monkeypatch):
    if not fused:
        monkeypatch.setattr("less_cache.backends.select.BACKENDS", {})
    budget, limit = 9, 10
    layer = LESSLayer(policy, tiny.layer_kernels(2, 2, 4), layer_idx=0)
    tiny.feed(layer, *tiny.random_states(1, 2, 2, 30, 4), [30])
    held = []
    for steps in (10, 1990):
        for each in range(steps):
            states = tiny.random_states(1, 2, 2, 1, 4, seed=each)
            with ShapeLimit(limit) if each < 50 else contextlib.nullcontext():
                attend(layer, *states)
        pointers = [
            each.data_ptr() for each in (layer.keys, layer.values, layer.held.slots.positions, layer.held.state.values_sum)
        ]
        held.append((pointers, storage_bytes(layer), [each.shape for each in tensors_of(layer)]))
    assert held[0] == held[1]
    assert layer.keys.shape[2] == budget + 1
    assert layer.get_seq_length() == 2030


class NoSquares(TorchDispatchMode):
    """Fails where an operation gives a tensor with two dimensions of `n` or more."""

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor):
                assert sum(size >= self.n for size in each.shape) < 2, f"{function} gave shape {list(each.shape)}"
        return result


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kernels", [None, tiny.layer_kernels(2, 2, 64)], ids=["sparse", "less"])
@pytest.mark.parametrize("policy", STEP_POLICIES)
def test_a_prompt_takes_no_square_of_its_length(policy, kernels, fused, monkeypatch):
    n = 130
    if not fused:
        monkeypatch.setattr("less_cache.backends.select.BACKENDS", {})
    layer = LESSLayer(policy, kernels, layer_idx=0)
    query, key, value = tiny.random_states(1, 2, 2, n, 64)
    with torch.no_grad(), NoSquares(n):
        layer.attend(sdpa_attention_forward, MODULE, query, *layer.update(key, value), None, scaling=0.125)


@pytest.mark.parametrize("policy", STEP_POLICIES)
def test_nothing_of_a_block_stays_referenced(policy):
    layer = LESSLayer(policy, tiny.layer_kernels(2, 2, 4), layer_idx=0)
    for n in (40, 1, 16, 1):
        states = tiny.random_states(1, 2, 2, n, 4)
        storages = {each.untyped_storage().data_ptr() for each in states}
        references = [weakref.ref(each) for each in states]
        query, key, value = states
        key, value = layer.update(key, value)
        references += [weakref.ref(key), weakref.ref(value)]
        layer.attend(tiny.plain_attention, MODULE, query, key, value, None, scaling=0.5)
        assert storages.isdisjoint(each.untyped_storage().data_ptr() for each in tensors_of(layer))
        for each in tensors_of(layer):
            assert each.untyped_storage().nbytes() == each.numel() * each.element_size()
        del states, query, key, value
        assert all(reference() is None for reference in references)


@pytest.mark.parametrize("policy", [H2O(4, 5), SinkRecent(4, 5)])
def test_chunks_hold_at_most_the_budget_and_one_chunk(policy):
    budget, chunk = 9, 16
    layer = LESSLayer(policy, tiny.layer_kernels(2, 2, 4), layer_idx=0)
    states = tiny.random_states(1, 2, 2, 20 * chunk, 4)
    for query, key, value in zip(*(each.split(chunk, dim=2) for each in states), strict=True):
        with ShapeLimit(budget + 1 + chunk, may_concatenate=True):
            attend(layer, query, key, value)
        assert layer.keys.shape[2] == layer.values.shape[2] == budget + 1
    assert layer.get_seq_length() == 20 * chunk


# Numbers at the end of their range


@pytest.mark.parametrize("dtype, rows", [(torch.float32, 1), (torch.bfloat16, 1), (torch.float16, 10)], ids=str)
def test_everything_stays_finite_over_20000_adversarial_steps(dtype, rows):
    """Keys and values up to the largest whose product is finite, identical, zero, tiny, or all in turn; of several rows at once
    where the step is PyTorch's, which takes longer.
    """
    steps, d = 20_000 // rows, 4
    largest = min(torch.finfo(dtype).max, 1e15)
    sizes = torch.tensor([largest, largest, 1.0, 0.0, 1e-7]).to(dtype)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        (torch.randint(-1, 2, (steps, rows, 1, 1, d), generator=generator).to(dtype))
        * sizes[torch.randint(0, len(sizes), (steps, rows), generator=generator)].view(steps, rows, 1, 1, 1)
        for _ in range(3)
    )
    alike, same = steps // 4, 2 * steps // 5
    key[alike:same] = key[alike - 1]  # identical keys, then also identical values
    for states in (query, key, value):
        states[same : 3 * steps // 5] = largest
    layer = LESSLayer(H2O(heavy=2, recent=2), tiny.layer_kernels(1, 1, d), layer_idx=0)
    outputs = [attend(layer, query[step], key[step], value[step]) for step in range(steps)]
    assert torch.cat(outputs).isfinite().all()
    assert layer.held.state.values_sum.isfinite().all() and layer.held.state.features_sum.isfinite().all()
    assert layer.held.slots.scores.isfinite().all()
    assert all(positions[2:] == [steps - 2, steps - 1] for [positions] in tiny.held_positions(layer))


# Errors


def used_layer(policy=STEP_POLICIES[0]) -> LESSLayer:
    layer = LESSLayer(policy, None, layer_idx=3)
    tiny.feed(layer, *tiny.random_states(2, 2, 1, 6, 4), [6])
    return layer


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"dropout": 0.1}, r"Layer 3 \(Identity\): expected no attention dropout, got 0.1"),
        ({"sliding_window": 4}, r"expected full attention, got"),
        ({"position_bias": torch.zeros(1)}, r"argument 'position_bias' is not supported"),
    ],
)
def test_attention_that_would_compute_something_else_is_refused(attention, message):
    with pytest.raises(LESSError, match=message):
        tiny.feed(used_layer(), *tiny.random_states(2, 2, 1, 1, 4), [1], **attention)


def test_training_mode_is_refused():
    layer = used_layer()
    query, key, value = tiny.random_states(2, 2, 1, 1, 4)
    key, value = layer.update(key, value)
    with pytest.raises(LESSError, match=r"training mode.*call model.eval\(\)"):
        layer.attend(tiny.plain_attention, torch.nn.Identity().train(), query, key, value, None)


def test_keys_that_attention_never_read_are_reported():
    layer = used_layer()
    _, key, value = tiny.random_states(2, 2, 1, 1, 4)
    layer.update(key, value)
    with pytest.raises(LESSError, match="Layer 3: attention never read the last tokens"):
        layer.update(key, value)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 1, 0, 4), r"expected new tokens, got none"), ((3, 1, 1, 4), r"expected a batch of 2.*got 3")],
)
def test_a_block_that_does_not_follow_is_refused_and_nothing_is_lost(shape, message):
    layer = used_layer()
    before = tiny.held_positions(layer)
    with pytest.raises(LESSError, match=message):
        layer.update(torch.zeros(shape), torch.zeros(shape))
    tiny.feed(layer, *tiny.random_states(2, 2, 1, 1, 4), [1])
    assert layer.get_seq_length() == 7 and before != tiny.held_positions(layer)


def test_a_mask_without_new_tokens_is_refused():
    layer = used_layer()
    with pytest.raises(LESSError, match=r"the 6 tokens that the cache has seen.*cache.reset\(\)"):
        tiny.feed(layer, *tiny.random_states(2, 2, 1, 2, 4), [2], real=torch.zeros(2, 8, dtype=torch.bool))


def test_reset_forgets_everything():
    layer, fresh = (LESSLayer(H2O(0.25, 0.25), tiny.layer_kernels(2, 1, 4), layer_idx=3) for _ in range(2))
    tiny.feed(layer, *tiny.random_states(2, 2, 1, 12, 4), [8, 1, 3])
    layer.reset()
    assert layer.get_seq_length() == 0
    states = tiny.random_states(1, 2, 1, 29, 4, seed=5)  # another batch size
    torch.testing.assert_close(tiny.feed(layer, *states, [7, 20, 1, 1]), tiny.feed(fresh, *states, [7, 20, 1, 1]))
    assert_same_state(layer, fresh)
