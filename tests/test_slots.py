"""Slots alone: what they hold, in heads of one size and of different sizes, and how many bytes that takes."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS
from tiny import tiny_llama
from transformers import DynamicCache

from less_cache import CORM, H2O, LESSCache, LESSError, SinkRecent
from less_cache.cache.layer import LESSLayer
from less_cache.slots import Coding, Columns, Slots, format_of
from less_cache.slots.slots import SLACK, SPARE_SLOTS

FLOAT = Coding(format_of("float"))


def columns(b: int, g: int, c: int, with_bias: bool = True, seed: int = 0) -> Columns:
    """Random tokens at positions 0 … c − 1."""
    generator = torch.Generator().manual_seed(seed)
    return Columns(
        torch.randn(b, g, c, 3, generator=generator),
        torch.randn(b, g, c, 2, generator=generator),
        torch.arange(c, dtype=torch.int32).expand(b, g, c).clone(),
        torch.rand(b, g, c, generator=generator),
        torch.randn(b, g, c, generator=generator) if with_bias else None,
    )


def by_token(slots: Slots) -> list[dict[int, tuple]]:
    """What each head holds, by position."""
    read = slots.columns()
    heads = zip(*(each.flatten(0, 1) for each in (read.keys, read.values, read.positions, read.scores)), strict=True)
    biases = [None] * slots.sizes.numel() if read.bias is None else read.bias.flatten(0, 1)
    held = []
    for (keys, values, positions, scores), bias in zip(heads, biases, strict=True):
        tokens = {}
        for slot in (positions >= 0).nonzero().flatten().tolist():
            own_bias = None if bias is None else bias[slot].item()
            tokens[int(positions[slot])] = (keys[slot].tolist(), values[slot].tolist(), scores[slot].item(), own_bias)
        assert len(tokens) == int((positions >= 0).sum())
        held.append(tokens)
    return held


def of_sizes(sizes: list[list[int]], seed: int = 0) -> tuple[Slots, list[list[int]]]:
    """Full slots of heads with these capacities, `[b][g]`, and the positions that they hold."""
    capacity = torch.tensor(sizes)
    b, g = capacity.shape
    given = columns(b, g, 40, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(b, g, 40, generator=generator).argsort(-1)
    kept = order.argsort(-1) < capacity.unsqueeze(-1)
    slots = Slots.keep(given, kept, capacity.unsqueeze(-1), 40, FLOAT)
    expected = [head.nonzero().flatten().tolist() for head in kept.flatten(0, 1)]
    held = by_token(slots)
    for index, (tokens, positions) in enumerate(zip(held, expected, strict=True)):
        row, head = divmod(index, g)
        assert sorted(tokens) == positions
        for position in positions:
            assert tokens[position][0] == given.keys[row, head, position].tolist()
            assert tokens[position][1] == given.values[row, head, position].tolist()
            assert tokens[position][2:] == (given.scores[row, head, position], given.bias[row, head, position])
    return slots, expected


some_sizes = st.lists(st.lists(st.integers(1, 30), min_size=2, max_size=2), min_size=1, max_size=3)


@given(some_sizes, SEEDS)
def test_bytes_follow_the_sum_over_heads(sizes, seed):
    slots, _ = of_sizes(sizes, seed)
    total = sum(size + 1 for row in sizes for size in row)
    longest = max(size + 1 for row in sizes for size in row)
    equal = longest * len(sizes) * 2 <= SLACK * total
    assert (slots.starts is None) == equal
    assert slots.positions.numel() == (longest * len(sizes) * 2 if equal else total) <= SLACK * total
    for name, tensor in slots.tensors().items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


@given(some_sizes, SEEDS, st.data())
def test_putting_dropping_and_gathering(sizes, seed, data):
    """The same in heads of different sizes as one would do by hand, token by token."""
    slots, _ = of_sizes(sizes, seed)
    held = by_token(slots)
    b, g = slots.sizes.shape
    for step in range(40, 46):
        keys, values = torch.randn(b, g, 1, 3), torch.randn(b, g, 1, 2)
        at = torch.full((b, g, 1), step, dtype=torch.int32)
        slot = slots.put(keys, values, at, at.float())
        gathered = slots.pairs(slot)
        assert torch.equal(gathered[0], keys) and torch.equal(gathered[1], values)
        for index, tokens in enumerate(held):
            row, head = divmod(index, g)
            tokens[step] = (keys[row, head, 0].tolist(), values[row, head, 0].tolist(), float(step), 0.0)
        assert by_token(slots) == held
        positions = slots.columns().positions
        if data.draw(st.booleans()):  # one a head leaves
            leaving = torch.tensor([data.draw(st.sampled_from(sorted(tokens))) for tokens in held]).view(b, g, 1)
            slots.set_positions((positions == leaving).int().argmax(-1, keepdim=True), torch.full_like(at, -1))
        else:
            leaving = torch.tensor([sorted(tokens)[0] for tokens in held]).view(b, g, 1)
            slots.drop(positions == leaving)
        for tokens, position in zip(held, leaving.flatten().tolist(), strict=True):
            del tokens[position]
        assert by_token(slots) == held
    read = slots.columns()
    slots.set_scores(read.scores + 1)
    later = [{p: (k, v, pytest.approx(s + 1), bias) for p, (k, v, s, bias) in tokens.items()} for tokens in held]
    assert by_token(slots) == later


@given(some_sizes, SEEDS, st.data())
def test_rows_are_selected_and_repeated(sizes, seed, data):
    slots, _ = of_sizes(sizes, seed)
    held, g = by_token(slots), slots.sizes.shape[1]
    chosen = data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=5))
    selected = slots.select(torch.tensor(chosen))
    assert by_token(selected) == [held[row * g + head] for row in chosen for head in range(g)]
    assert torch.equal(selected.sizes, slots.sizes[chosen])
    new = torch.zeros(len(chosen), g, 1)
    selected.put(torch.zeros(len(chosen), g, 1, 3), torch.zeros(len(chosen), g, 1, 2), new.int(), new)
    assert by_token(slots) == held, "they share nothing"


@given(some_sizes, SEEDS)
def test_tensors_are_all_that_there_is(sizes, seed):
    slots, _ = of_sizes(sizes, seed)
    capacity = torch.tensor(sizes).unsqueeze(-1)
    again = Slots.from_tensors(
        {name: each.clone() for name, each in slots.tensors().items()}, FLOAT, slots.dtype, len(sizes), capacity
    )
    assert by_token(again) == by_token(slots) and torch.equal(again.sizes, slots.sizes)
    assert again.room is None
    doubled = slots.map(lambda name, tensor: tensor if name in ("positions", "starts") else 2 * tensor)
    assert by_token(doubled) == [
        {p: ([2 * x for x in k], [2 * x for x in v], 2 * s, 2 * bias) for p, (k, v, s, bias) in tokens.items()}
        for tokens in by_token(slots)
    ]


def test_an_unknown_format():
    with pytest.raises(LESSError, match="Expected slots to be one of float, int8, int4, got 'int3'"):
        format_of("int3")


# They grow with the text


@pytest.mark.parametrize("policy", [H2O(2**15, 2**15), SinkRecent(4, 2**31 - 2), CORM(2**20, 2**20)], ids=lambda p: p.name)
def test_a_budget_far_above_the_text_takes_the_texts_bytes(policy):
    model, prompt, steps = tiny_llama(), torch.randint(1, 97, (2, 20)), 2 * SPARE_SLOTS + 10
    cache, full = LESSCache(model, policy), DynamicCache(config=model.config)
    options = {"max_new_tokens": steps, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(prompt, past_key_values=cache, **options)
    expected = model.generate(prompt, past_key_values=full, **options)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), rtol=1e-4, atol=5e-5)
    seen = 20 + steps - 1
    for layer in cache.layers:
        assert tiny.held_positions(layer) == [[list(range(seen))] * 2] * 2
        assert seen < layer.keys.shape[2] <= seen + SPARE_SLOTS + seen // 4


def test_slots_grow_to_the_budget_and_no_further():
    layer = LESSLayer(H2O(100, 100), tiny.layer_kernels(2, 2, 4), layer_idx=0)
    sizes = []
    for each in tiny.random_states(1, 2, 2, 400, 4)[0].split(1, dim=2):
        tiny.feed(layer, each, each, each, [1])
        sizes.append(layer.keys.shape[2])
    assert sizes[0] < 80 and sizes[-1] == 201
    assert sizes == sorted(sizes) and len(set(sizes)) < 8


def test_a_forked_and_a_loaded_cache_grow_as_well(tmp_path):
    model, prompt = tiny_llama(), torch.randint(1, 97, (1, 12))
    cache = LESSCache(model, H2O(500, 500))
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        cache.save(tmp_path / "cache")
        others = [
            cache.fork(),
            LESSCache.load(tmp_path / "cache", model),
            LESSCache.load(tmp_path / "cache", model, static=True),
        ]
        for token in torch.randint(1, 97, (SPARE_SLOTS + 20, 1, 1)):
            expected = model(token, past_key_values=cache).logits
            for other in others:
                torch.testing.assert_close(model(token, past_key_values=other).logits, expected, rtol=1e-4, atol=1e-5)
    assert others[2].layers[0].keys.shape[2] == 1001, "a static one has all slots at once"


@pytest.mark.parametrize("count", [2**31 - 1, 10**12, 2**62, 2**64])
def test_counts_beyond_what_positions_hold(count):
    with pytest.raises(LESSError, match=r"expected heavy to be an int >= 1 .*, at most 2,147,483,646, got \d+"):
        H2O(count, 1)


def test_all_slots_at_once_of_a_budget_beyond_memory():
    model = tiny_llama()
    cache = LESSCache(model, H2O(2**31 - 2, 2**31 - 2), static=True)
    with pytest.raises(LESSError, match=r"No memory for 4,294,967,293 slots .* static=False"):
        model(torch.arange(1, 9)[None], past_key_values=cache)
