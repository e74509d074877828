"""Giving tokens back: after `crop`, a layer is exactly as if they had never come."""

from unittest import mock

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases

from less_cache import CORM, H2O, POLICIES, LESSCache, LESSError, SinkRecent
from less_cache.cache.layer import LESSLayer

STEP_POLICIES = [H2O(2, 3), SinkRecent(2, 3), CORM(3, 2)]


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Small inner blocks, so that a dozen tokens reach every path."""
    with mock.patch("less_cache.backends.reading.QUERY_BLOCK", 3), mock.patch("less_cache.slots.slots.SPARE_SLOTS", 2):
        yield


def assert_equal_layers(layer: LESSLayer, other: LESSLayer) -> None:
    """Equal bit by bit, but for the keys and values of empty slots."""
    assert layer.cumulative_length == other.cumulative_length
    if layer.cumulative_length == 0:
        return
    for name in ("seen", "settled", "counts"):
        assert torch.equal(getattr(layer.held.rows, name), getattr(other.held.rows, name)), name
    columns, other_columns = layer.held.slots.columns(), other.held.slots.columns()
    for name in ("positions", "scores"):
        assert torch.equal(getattr(columns, name), getattr(other_columns, name)), name
    held = layer.positions >= 0
    assert torch.equal(layer.keys[held], other.keys[held]) and torch.equal(layer.values[held], other.values[held])
    if layer.held.state is not None:
        assert torch.equal(layer.held.state.values_sum, other.held.state.values_sum)
        assert torch.equal(layer.held.state.features_sum, other.held.state.features_sum)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", POLICIES)
@given(st.data())
def test_crop_leaves_no_trace_of_rejected_tokens(name, padding, data):
    """Blocks come, some of their tokens are given back; the rest are one first block and the steps after it."""
    case = data.draw(cases(name, padding=padding, fractions=True))
    real = case.real_tokens()
    layer, accepted, first, start = case.layer(), [], 0, 0
    layer.activate_past_recording()
    for n in case.blocks:
        block = list(range(start, start + n))
        states = (states[:, :, block] for states in case.states)
        tiny.feed(layer, *states, [n], real[:, accepted + block] if padding == "left" else None)
        first = first or n
        start += n
        accepted += block
        if recorded := data.draw(st.booleans()) and layer._recording.num_tokens:
            rejected = data.draw(st.integers(0, recorded))
            layer.crop(-rejected)
            accepted = accepted[: len(accepted) - rejected]
            first = min(first, len(accepted))
    fresh = case.layer()
    if accepted:
        states = (states[:, :, accepted] for states in case.states)
        blocks = [first] + [1] * (len(accepted) - first)
        tiny.feed(fresh, *states, blocks, real[:, accepted] if padding == "left" else None)
    assert_equal_layers(layer, fresh)


@pytest.mark.parametrize("policy", STEP_POLICIES)
def test_a_recorded_block_is_the_sequence_of_its_steps(policy):
    states = tiny.random_states(2, 4, 2, 20, 4)
    kernels = tiny.layer_kernels(4, 2, 4)
    recorded, stepwise = LESSLayer(policy, kernels, 0), LESSLayer(policy, kernels, 0)
    recorded.activate_past_recording()
    outputs = tiny.feed(recorded, *states, [8, 5, 1, 6]), tiny.feed(stepwise, *states, [8] + [1] * 12)
    assert torch.equal(*outputs)
    assert_equal_layers(recorded, stepwise)


def test_recording_costs_nothing_between_a_crop_and_the_next_block():
    layer = LESSLayer(STEP_POLICIES[0], None, 0)
    layer.activate_past_recording()
    tiny.feed(layer, *tiny.random_states(1, 2, 1, 8, 4), [8])
    states, seen, settled = 8 * 4 * 4 * (2 + 1 + 1), 8, 1  # queries, keys and values; what the layer before them has
    assert layer.recorded_bytes == states + seen + settled
    layer.crop(0)
    assert layer.recorded_bytes == 0


def test_recording_ends_where_nobody_crops(monkeypatch):
    monkeypatch.setattr("less_cache.cache.recording.REACH", 6)
    layer = LESSLayer(STEP_POLICIES[0], None, 0)
    layer.activate_past_recording()
    tiny.feed(layer, *tiny.random_states(1, 2, 1, 13, 4), [8, 1, 1, 3])
    layer.crop(-5)
    tiny.feed(layer, *tiny.random_states(1, 2, 1, 12, 4), [1] * 12)
    assert not layer.record_past
    with pytest.raises(LESSError, match="goes back further than the 0 tokens"):
        layer.crop(-1)


def test_recording_stops_when_the_flag_is_cleared():
    """As transformers does when it hands a cache back."""
    layer = LESSLayer(STEP_POLICIES[0], None, 0)
    layer.activate_past_recording()
    tiny.feed(layer, *tiny.random_states(1, 2, 1, 8, 4), [8])
    layer.record_past = False
    tiny.feed(layer, *tiny.random_states(1, 2, 1, 1, 4), [1])
    assert layer._recording is None


@pytest.mark.parametrize("policy", STEP_POLICIES)
def test_reordered_rows_cannot_be_cropped(policy):
    layer = LESSLayer(policy, None, 0)
    layer.activate_past_recording()
    tiny.feed(layer, *tiny.random_states(2, 2, 1, 8, 4), [8])
    layer.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(LESSError, match="the 0 tokens that are recorded"):
        layer.crop(-1)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (-4, r"crop\(-4\) goes back further than the 3 tokens that are recorded.*activate_past_recording"),
        (2, "expected 0 or minus the number of tokens to remove, got 2"),
    ],
)
def test_impossible_crops_change_nothing(tokens, message):
    layer, other = (LESSLayer(STEP_POLICIES[0], tiny.layer_kernels(2, 1, 4), 3) for _ in range(2))
    states = tiny.random_states(1, 2, 1, 11, 4)
    tiny.feed(layer, *(each[:, :, :8] for each in states), [8])
    layer.activate_past_recording()
    tiny.feed(layer, *(each[:, :, 8:] for each in states), [3])
    with pytest.raises(LESSError, match=message):
        layer.crop(tokens)
    layer.crop(-3)
    tiny.feed(other, *(each[:, :, :8] for each in states), [8])
    assert_equal_layers(layer, other)


# A long first block, of which only the end is recorded


def storage_of(layer: LESSLayer) -> int:
    """Bytes that a recording really holds, whatever its tensors show of them."""
    recording = layer._recording
    states = [each for call in recording.calls for each in vars(call).values() if isinstance(each, torch.Tensor)]
    return sum({each.data_ptr(): each.untyped_storage().nbytes() for each in states}.values())


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("rejected", [0, 1, 3, 6, 7])
@pytest.mark.parametrize("policy", [*STEP_POLICIES, H2O(0.2, 0.2)], ids=repr)
def test_the_end_of_a_long_first_block_is_a_block_of_its_own(policy, rejected, padding, monkeypatch):
    monkeypatch.setattr("less_cache.cache.recording.OF_PROMPT", 7)
    kernels, states = tiny.layer_kernels(4, 2, 4), tiny.random_states(2, 4, 2, 30, 4)
    real = torch.arange(30) >= torch.tensor([[0], [9]])
    layer, other = (LESSLayer(policy, kernels, 0) for _ in range(2))
    layer.activate_past_recording()
    tiny.feed(layer, *(each[:, :, :24] for each in states), [24], real if padding == "left" else None)
    with pytest.raises(LESSError, match=r"further than the 7 tokens that are recorded.*of a prompt, the last 7"):
        layer.crop(-8)
    layer.crop(-rejected)
    stay = 24 - rejected
    blocks = [17, stay - 17] if stay > 17 else [17]
    tiny.feed(other, *(each[:, :, :stay] for each in states), blocks, real if padding == "left" else None)
    assert_equal_layers(layer, other)
    for each in (layer, other):
        each.record_past = False
        tiny.feed(each, *(state[:, :, 24:] for state in states), [1] * 6)
    assert_equal_layers(layer, other)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("policy", STEP_POLICIES, ids=repr)
def test_all_of_a_long_first_block_attends_to_all_of_it(policy, mask, monkeypatch):
    monkeypatch.setattr("less_cache.cache.recording.OF_PROMPT", 7)
    states, real = tiny.random_states(2, 4, 2, 24, 4), torch.ones(2, 24, dtype=torch.bool) if mask else None
    layer, other = (LESSLayer(policy, None, 0) for _ in range(2))
    layer.activate_past_recording()
    outputs = [tiny.feed(each, *states, [24], real) for each in (layer, other)]
    torch.testing.assert_close(*outputs)
    assert layer._recording.num_tokens == 7


def test_documents_that_do_not_see_each_other_are_recorded_whole(monkeypatch):
    """The end of the block would see what is kept of them all."""
    monkeypatch.setattr("less_cache.cache.recording.OF_PROMPT", 7)
    states = tiny.random_states(1, 2, 1, 24, 4)
    mask = torch.block_diag(torch.ones(12, 12), torch.ones(12, 12)).bool().tril()[None, None]
    layer = LESSLayer(STEP_POLICIES[0], None, 0)
    layer.activate_past_recording()
    keys, values = layer.update(*states[1:])
    layer.attend(tiny.plain_attention, torch.nn.Identity().eval(), states[0], keys, values, mask, scaling=0.5)
    assert layer._recording.num_tokens == 24


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
@pytest.mark.parametrize("length", [400, 3_000])
def test_a_recorded_prompt_takes_no_more_than_its_end(how, length):
    """In a model's cache, before the first crop: as much for any prompt."""
    model = tiny.tiny_llama()
    cache, held = LESSCache(model, H2O(16, 16), tiny.tiny_kernels(model)), []
    prompt = torch.randint(1, tiny.VOCAB, (1, length))

    def measured(self, tokens):
        held.append((self.memory_footprint(), sum(storage_of(layer) for layer in self.layers)))
        return crop(self, tokens)

    crop = LESSCache.crop
    options = {"prompt_lookup_num_tokens": 4} if how == "prompt lookup" else {"assistant_model": tiny.tiny_llama(seed=1)}
    with mock.patch.object(LESSCache, "crop", measured):
        model.generate(prompt, past_key_values=cache, max_new_tokens=3, do_sample=False, **options)
    footprint, storage = held[0]
    token = 2 * 4 * 8 * (4 + 2 + 2)  # queries, keys and values in two layers of float32
    assert storage <= 128 * token
    assert footprint.bookkeeping < 128 * token + 2 * cache.memory_footprint().total


def test_a_conversation_that_is_passed_again_is_not_recorded_again():
    """Assisted decoding does so where its cache was filled before."""
    model = tiny.tiny_llama()
    cache = LESSCache(model, H2O(16, 16))
    prompt = torch.randint(1, tiny.VOCAB, (1, 600))
    with torch.no_grad():
        model(prompt[:, :-1], past_key_values=cache)
        cache.activate_past_recording()
        positions = torch.arange(600)[None]
        model(prompt, past_key_values=cache, position_ids=positions)
    assert all(storage_of(layer) <= 4 * 8 * (4 + 2 + 2) for layer in cache.layers)
