"""What keys, values and queries become where they are quantised: relative to their position, their mean, the first token."""

import dataclasses

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

from less_cache import H2O, AttentionMatching, LESSCache, LESSError
from less_cache.integration.probing import rotations
from less_cache.slots import Asked, Coding, Columns, Slots, asked, format_of
from less_cache.slots.formats import QueryCodes

MODEL = tiny.tiny_llama()
ROTATION = rotations(MODEL)[0]
TEXT = torch.randint(2, tiny.VOCAB, (2, 90), generator=torch.Generator().manual_seed(0))
QUANTIZED = pytest.mark.parametrize("name", ["int8", "int4"])


def turned(seed: int, spread: float = 0.02) -> tuple[Columns, torch.Tensor]:
    """Keys that are nearly alike at position 0, at theirs, `[1, 2, 40, d]`; and their mean, `[1, 2, 1, d]`."""
    _, noise, values = tiny.random_states(1, 2, 2, 40, 8, seed=seed)
    positions = torch.arange(40, dtype=torch.int32).expand(1, 2, 40)
    mean = tiny.random_states(1, 2, 2, 1, 8, seed=seed + 1)[1]
    keys = ROTATION.turn(mean + spread * noise, positions)
    return Columns(keys, values, positions, torch.zeros(1, 2, 40)), mean


@QUANTIZED
@given(SEEDS)
def test_keys_turned_back_are_stored_more_exactly(name, seed):
    """What is alike at position 0 is not alike at others, so that a mean says little there."""
    columns, mean = turned(seed)
    errors = []
    for coding in (
        Coding(format_of(name), mean, ROTATION),
        Coding(format_of(name), columns.keys.mean(2, keepdim=True)),
    ):
        keys = coding.keys(coding.encode_keys(columns.keys, columns.positions), columns.positions, torch.float32)
        errors.append((keys - columns.keys).square().mean())
    assert errors[0] < errors[1] / 4


@QUANTIZED
@given(st.lists(st.integers(1, 40), min_size=2, max_size=2), SEEDS)
def test_keys_stay_where_positions_count_anew(name, sizes, seed):
    """A mask that hides tokens moves the others' positions, not their keys; heads of one size or of two."""
    columns, mean = turned(seed)
    kept = torch.rand(1, 2, 40, generator=torch.Generator().manual_seed(seed)).argsort(-1).argsort(-1)
    kept = kept < torch.tensor(sizes).view(1, 2, 1)
    slots = Slots.chosen(columns, kept, Coding(format_of(name), mean, ROTATION).meeting(*columns_of(columns)))
    before = dataclasses.replace(slots.columns(), positions=slots.columns().positions.clone())
    moved = torch.where(torch.arange(40) < 7, -1, torch.arange(40) - 7).view(1, 40)  # the first seven leave
    slots.renumber(AttentionMatching(4), moved)
    after = slots.columns()
    stay = before.positions >= 7
    assert torch.equal(after.positions[stay], before.positions[stay] - 7) and (after.positions[~stay] == -1).all()
    for got, wanted in ((after.keys, before.keys), (after.values, before.values)):
        lost = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert (lost[stay] < (0.02 if name == "int8" else 0.3)).all()


def columns_of(columns: Columns) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return columns.keys, columns.values, columns.positions


@pytest.mark.parametrize("policy", [AttentionMatching(6, every=4), H2O(3, 3)], ids=str)
@pytest.mark.parametrize("padding", [0, 30, 33])
@torch.no_grad()
def test_the_first_token_is_exact(policy, padding):
    """To 16 bits, as long as it is kept; also of a row that begins after the first block, or after the prompt."""
    cache = LESSCache(MODEL, policy, slots="int4", fit=False)
    full = LESSCache(MODEL, H2O(100, 100))  # nothing leaves
    mask = (torch.arange(60) >= padding).long().repeat(2, 1)
    mask[0] = 1
    first = {}
    for start, stop in [(0, 30), (30, 32), *((token, token + 1) for token in range(32, 60))]:
        options = {"attention_mask": mask[:, :stop], "position_ids": (mask[:, :stop].cumsum(-1) - 1).clamp_min(0)[:, start:]}
        for each in (full, cache):
            MODEL(TEXT[:, start:stop], past_key_values=each, **options)
        for layer, exact in zip(cache.layers, full.layers, strict=True):
            at = (exact.positions == 0) & (layer.positions == 0).any(-1, keepdim=True)
            if exact is full.layers[0]:  # deeper ones see what is lost
                got, wanted = layer.keys[layer.positions == 0], exact.keys[at]
                torch.testing.assert_close(got, wanted, rtol=2**-10, atol=1e-6)
                first[start] = len(got)
    assert first[0] == (4 if padding < 30 else 2) and (policy.block_size is None or first[59] == 4)


@torch.no_grad()
def test_a_saved_cache_whose_keys_are_turned_needs_the_model(tmp_path):
    cache = LESSCache(MODEL, budget=12)
    MODEL(TEXT, past_key_values=cache)
    cache.save(tmp_path / "cache")
    again = LESSCache.load(tmp_path / "cache", MODEL)
    assert torch.equal(again.layers[0].keys, cache.layers[0].keys)
    with pytest.raises(LESSError, match="Load the cache with the model itself"):
        LESSCache.load(tmp_path / "cache", MODEL.config)


# Queries


@given(st.sampled_from([2, 6, 8, 64, 80]), SEEDS, st.sampled_from([1e-3, 1.0, 1e3]))
def test_queries_are_near_in_two_bits(d, seed, size):
    """Twelve hundredths of the square are lost of normal numbers, and never half of it."""
    states = tiny.random_states(4, 4, 2, 8, d, seed=seed)[0] * size
    codes, scales = QueryCodes.encode(states)
    assert codes.shape[-1] == -(-d // 4) and codes.dtype == torch.uint8 and scales.shape[-1] == 1
    lost = (QueryCodes.decode(codes, scales, d, torch.float32) - states).square().sum() / states.square().sum()
    assert lost < (0.15 if d >= 64 else 0.5)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=4), st.sampled_from([1, 2, 3, 4]))
def test_query_heads_take_turns(blocks, s):
    """Every head holds the newest of its positions, as many as there are places, and no two heads the same ones."""
    total = sum(blocks)
    positions = torch.arange(total, dtype=torch.int32).view(1, total)
    queries = positions.float().view(1, 1, total, 1) + 1 + torch.zeros(1, 2 * s, 1, 2)
    held = Asked.empty(queries, 2)
    for start, n in zip([sum(blocks[:i]) for i in range(len(blocks))], blocks, strict=True):
        held.put(queries[:, :, start : start + n], positions[:, start : start + n])
    for turn in range(s):
        newest_possible = range(max(0, total - asked.PLACES * asked.STRIDE), total)
        own = [p for p in newest_possible if p % asked.STRIDE == turn * asked.STRIDE // s]
        there = held.positions[0, turn]
        newest = {int(p) for p in there if p >= 0}
        assert newest >= set(own) and len(newest) <= asked.PLACES
        for head in (turn, s + turn):
            for place in (there >= 0).nonzero().flatten().tolist():
                query = held.queries()[0, head, place]  # its size is that of the position's, to two bits
                assert 0.4 < query.norm() / (2**0.5 * (there[place] + 1)) < 1.6
