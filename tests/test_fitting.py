"""Choosing and fitting: reference queries, head budgets, biases and values, and the formats of slots."""

import dataclasses
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS
from transformers import DynamicCache

from less_cache import H2O, AttentionMatching, LESSCache, LESSError, SinkRecent
from less_cache.backends import choice, select
from less_cache.backends.cpu import build
from less_cache.fitting import References, Seen, allot, ask, fit
from less_cache.fitting.fit import MOST_BIAS
from less_cache.memory import LayerCentroids
from less_cache.ops.attention import attention_logits, group_heads, sparse_softmax
from less_cache.ops.call import AttentionCall
from less_cache.slots import FORMATS, Coding, Columns, Held, Setup, Slots, format_of
from less_cache.slots.formats import Int4Slots

MODEL = tiny.tiny_llama()
TEXT = torch.randint(2, tiny.VOCAB, (2, 90), generator=torch.Generator().manual_seed(0))


# Biases and values


def asked(b: int, g: int, s: int, k: int, c: int, seed: int, **attention):
    """Columns of `c` random tokens, `k` references that see them all, and the call they belong to."""
    query, key, value = tiny.random_states(b, g * s, g, max(k, c), 4, seed=seed)
    columns = Columns(key[:, :, :c], value[:, :, :c], torch.arange(c, dtype=torch.int32).expand(b, g, c))
    references = References(query[:, :, :k], torch.ones(b, s, k, dtype=torch.bool), torch.zeros(b, k))
    call = AttentionCall(query, key, value, None, None, 0.5, attention.get("softcap"), attention.get("sinks"))
    _, seen = ask(references, columns, AttentionMatching(2), call)
    return columns, seen, call


def first(columns: Columns, t: int) -> Columns:
    """The first `t` columns alone."""
    return Columns(columns.keys[:, :, :t], columns.values[:, :, :t], columns.positions[..., :t])


def attention(columns: Columns, seen: Seen, call: AttentionCall, bias=None, values=None) -> torch.Tensor:
    """Output `[b, g, s, k, w]` of the references' attention to the columns."""
    logits = attention_logits(seen.references.query_states, columns.keys, None, call.scaling, call.softcap, bias)
    weights, _ = sparse_softmax(logits, call.sinks)
    return weights @ (columns.values if values is None else values).unsqueeze(2)


shapes = st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 12), st.integers(1, 12))


@given(shapes, st.integers(1, 12), SEEDS, st.sampled_from([None, 3.0]), st.booleans())
def test_a_fit_is_never_worse_than_none_for_its_own_references(shape, t, seed, softcap, with_sinks):
    b, g, s, k, c = shape
    sinks = torch.linspace(-1, 2, g * s) if with_sinks else None
    columns, seen, call = asked(b, g, s, k, c, seed, softcap=softcap, sinks=sinks)
    kept = first(columns, min(t, c))
    bias, values, change = fit(seen, kept, call)
    assert change is None
    assert bias.isfinite().all() and values.isfinite().all()
    assert bias.abs().max() <= MOST_BIAS + 1e-4
    before = (attention(kept, seen, call) - seen.output).square().sum((2, 3, 4))
    after = (attention(kept, seen, call, bias, values) - seen.output).square().sum((2, 3, 4))
    assert (after <= before * (1 + 1e-4) + 1e-6).all()


@given(SEEDS, st.integers(1, 3))
def test_many_tokens_give_few_references_what_they_saw(seed, k):
    """More unknowns than equations: little is left of the error."""
    columns, seen, call = asked(1, 2, 1, k, 40, seed)
    kept = first(columns, 20)
    bias, values, _ = fit(seen, kept, call)
    before = (attention(kept, seen, call) - seen.output).square().sum()
    after = (attention(kept, seen, call, bias, values) - seen.output).square().sum()
    assert after <= 0.3 * before + 1e-6


@pytest.mark.parametrize("t, k", [(3, 20), (20, 3)], ids=["more queries", "more tokens"])
def test_both_systems_give_the_ridge_regression(t, k):
    """Values are those of an ordinary least-squares solver on the stacked system, whichever of the two was solved."""
    columns, seen, call = asked(1, 1, 2, k, 30, seed=3)
    kept = first(columns, t)
    bias, values, _ = fit(seen, kept, call)
    logits = attention_logits(seen.references.query_states, kept.keys, None, call.scaling, None, bias)
    weights = logits.softmax(-1).flatten(2, 3)[0, 0].double()  # [n, t]
    missing = seen.output.flatten(2, 3)[0, 0].double() - weights @ kept.values[0, 0].double()
    ridge = (1e-3 * weights.shape[0] / t) ** 0.5 * torch.eye(t, dtype=torch.float64)
    expected = torch.linalg.lstsq(
        torch.cat([weights, ridge]), torch.cat([missing, missing.new_zeros(t, missing.shape[1])])
    ).solution
    torch.testing.assert_close((values - kept.values)[0, 0].double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e4, 1e18])
@pytest.mark.parametrize("t", [1, 5])
def test_a_fit_of_anything_is_finite(scale, t):
    """Equal keys, one token, logits beyond all bounds."""
    query, key, value = tiny.random_states(1, 2, 1, 8, 4)
    columns = Columns(key * 0 + scale, value, torch.arange(8, dtype=torch.int32).expand(1, 1, 8))
    references = References(query * scale, torch.ones(1, 2, 8, dtype=torch.bool), torch.zeros(1, 8))
    call = AttentionCall(query, key, value, None, None, 0.5, None, None)
    _, seen = ask(references, columns, AttentionMatching(2), call)
    bias, values, _ = fit(seen, first(columns, t), call)
    assert bias.isfinite().all() and values.isfinite().all()


def test_the_state_takes_part_in_the_fit():
    """With virtual tokens for what is not kept, a fit changes their values too, and gives the references what they saw."""
    columns, seen, call = asked(1, 2, 2, 20, 30, seed=5)
    kept, memory = first(columns, 6), LayerCentroids(3)
    state = memory.empty_state(1, 2, 4, columns.keys.device)
    leaves = torch.arange(30).ge(6).expand(1, 2, 30)
    memory.fold_in(state, columns.keys, columns.values, leaves, columns.positions, torch.full((1, 1, 1), 30))

    def error(bias, values) -> torch.Tensor:
        virtual = memory.virtual_tokens(state, seen.references.query_states, call.scaling)
        logits = attention_logits(seen.references.query_states, kept.keys, None, call.scaling, None, bias)
        weights = torch.cat([logits, virtual[0]], dim=-1).softmax(-1)
        return (weights @ torch.cat([values, virtual[1]], dim=2).unsqueeze(2) - seen.output).square().sum()

    before = error(None, kept.values)
    bias, values, change = fit(seen, kept, call, memory.virtual_tokens(state, seen.references.query_states, call.scaling))
    half = error(bias, values)
    memory.change_values(state, change)
    assert error(bias, values) < 0.5 * before and error(bias, values) < half


# Head budgets


@st.composite
def scored(draw):
    """Scores of some layers, what is protected, and a mean budget for each row."""
    b, g, c, layers = (draw(st.integers(1, n)) for n in (2, 3, 12, 3))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    scores = [torch.rand(b, g, c, generator=generator).pow(4) for _ in range(layers)]
    protected = [(torch.arange(c) >= c - 1).expand(b, g, c) for _ in range(layers)]
    return scores, protected, torch.tensor([draw(st.integers(1, c)) for _ in range(b)])


@given(scored())
def test_budgets_add_up_and_every_head_has_its_floor(case):
    scores, protected, means = case
    budgets = torch.cat(allot(scores, protected, means), dim=1)  # [b, L·g]
    assert torch.equal(budgets.sum(-1), means * budgets.shape[1])
    assert (budgets >= 1).all() and (budgets <= scores[0].shape[-1]).all()
    assert (budgets >= (0.3 * means).round().unsqueeze(-1)).all()


@given(scored(), SEEDS)
def test_permuting_heads_permutes_budgets_and_rows_are_their_own(case, seed):
    scores, protected, means = case
    order = torch.randperm(scores[0].shape[1], generator=torch.Generator().manual_seed(seed))
    budgets = allot(scores, protected, means)
    for permuted, budget in zip(allot([each[:, order] for each in scores], protected, means), budgets, strict=True):
        assert torch.equal(permuted, budget[:, order])
    for row in range(len(means)):
        one = slice(row, row + 1)
        alone = allot([each[one] for each in scores], [each[one] for each in protected], means[one])
        assert all(torch.equal(each, budget[one]) for each, budget in zip(alone, budgets, strict=True))


def test_heads_that_are_asked_for_more_get_more():
    few, many = torch.tensor([[[1.0] + [0.0] * 9]]), torch.tensor([[[0.5] * 10]])
    nothing = torch.zeros(1, 1, 10, dtype=torch.bool)
    first_budget, second_budget = allot([few, many], [nothing, nothing], torch.tensor([5]))
    assert second_budget.item() == 8 and first_budget.item() == 2


# Formats


@pytest.mark.parametrize("name", ["int8", "int4"])
@given(st.sampled_from([2, 6, 8, 36, 64, 80, 96, 128]), SEEDS, st.sampled_from([0.1, 1.0, 1e2]))
def test_codes_are_within_half_a_step(name, d, seed, size):
    """Of two levels; the lowest one is as far from what is below it."""
    states = tiny.random_states(1, 2, 2, 5, d, seed=seed)[1] * size
    stored = format_of(name).encode(states)
    assert stored["codes"].shape[-1] == (d if name == "int8" else d // 2) and stored["codes"].dtype == torch.uint8
    decoded = format_of(name).decode(stored, states.dtype)
    half = max(1 + float(format_of(name).levels[0]), float(format_of(name).levels.diff().max()) / 2)
    # The rotation keeps lengths: each of d numbers is off by half a step at most, but scales are rounded to 16 bits.
    bound = d**0.5 * (stored["scales"].float().abs().amax(-1, keepdim=True) * (half + 2**-9) + 2**-22)
    assert ((decoded - states).norm(dim=-1, keepdim=True) <= bound).all()


@pytest.mark.parametrize("name", list(FORMATS))
@given(st.sampled_from([8, 36, 64, 96]), SEEDS)
def test_storing_again_what_was_stored_changes_nothing(name, d, seed):
    """Tokens are read and written at every choice; they must not wear out."""
    given = format_of(name)
    once = given.encode(tiny.random_states(1, 2, 2, 5, d, seed=seed)[1])
    again = given.encode(given.decode(once, torch.float32))
    for part in once:
        assert torch.equal(once[part], again[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "int4"])
@given(seed=SEEDS)
def test_codes_stay_from_choice_to_choice(name, dtype, seed):
    """What is stored is not stored again: in 16 bits, what is read is not what was coded."""
    _, keys, values = (states.to(dtype) for states in tiny.random_states(2, 2, 2, 9, 8, seed=seed))
    columns = Columns(keys, values, torch.arange(9, dtype=torch.int32).expand(2, 2, 9), torch.zeros(2, 2, 9))
    centers = keys.mean(2, keepdim=True)
    slots = Slots.chosen(columns, torch.ones(2, 2, 9, dtype=torch.bool), Coding(format_of(name), centers))
    kept = torch.rand(2, 2, 9, generator=torch.Generator().manual_seed(seed)) < 0.7
    later = Slots.chosen(slots.columns(), kept, slots.coding, slots)
    for part in format_of(name).names():
        codes, left = slots.stored[part], later._padded(later.stored[part], 0)
        for row, head in np.ndindex(2, 2):
            stay = codes[row, head, kept[row, head]]
            assert torch.equal(left[row, head, : len(stay)], stay)


@given(SEEDS)
def test_keys_are_stored_less_their_mean(seed):
    """Which most of them share: what is left is smaller, and so is the error."""
    keys, _, values = tiny.random_states(2, 2, 2, 20, 16, seed=seed)  # no key is much longer than the others
    keys = keys + 5
    columns = Columns(keys, values, torch.arange(20, dtype=torch.int32).expand(2, 2, 20), torch.zeros(2, 2, 20))
    kept = torch.ones(2, 2, 20, dtype=torch.bool)
    errors = [
        (Slots.chosen(columns, kept, Coding(format_of("int4"), centers)).keys - keys).square().mean()
        for centers in (keys.mean(2, keepdim=True), None)
    ]
    assert errors[0] < errors[1] / 2


def test_centers_take_16_bits_and_stay_finite():
    keys = torch.full((1, 2, 9, 8), 1e6)
    columns = Columns(keys, keys, torch.arange(9, dtype=torch.int32).expand(1, 2, 9), torch.zeros(1, 2, 9))
    setup = Setup(AttentionMatching(4), None, format_of("int4"))
    coding = choice._coding(setup, Held.empty(setup, 1, 2, 8, keys.device), columns)
    assert coding.centers.dtype == torch.float16 and coding.centers.isfinite().all()
    assert Slots.chosen(columns, torch.ones(1, 2, 9, dtype=torch.bool), coding).keys.isfinite().all()


@torch.no_grad()
def test_what_a_key_loses_by_its_codes_its_bias_makes_up_for():
    """For the references' mean query: what it is off by, it was before."""
    cache = LESSCache(MODEL, AttentionMatching(12, every=8), slots="int4")
    MODEL(TEXT[:, :40], past_key_values=cache)
    layer, seen = cache.layers[-1], {}  # the last one to choose
    real = choice._with_equal_logits

    def noting(setup, draft, centers, stored):
        seen.update(
            columns=dataclasses.replace(draft.columns), references=draft.references, stored=stored, scaling=draft.call.scaling
        )
        seen["bias"] = real(setup, draft, centers, stored)
        return seen["bias"]

    with mock.patch.object(choice, "_with_equal_logits", noting):
        for token in range(40, 48):
            MODEL(TEXT[:, token : token + 1], past_key_values=cache)
            if layer.held.newest.count == 0:
                break
    columns, slots = seen["columns"], layer.held.slots.columns()
    queries, there = group_heads(seen["references"].query_states, columns.keys.shape[1]), seen["references"].there
    mean = torch.stack([queries[row, :, there[row]].mean(1) for row in range(2)])  # [b, g, d]
    before = torch.zeros(columns.positions.shape) if columns.bias is None else columns.bias.float()
    wanted = (columns.keys @ mean.unsqueeze(-1)).squeeze(-1) * seen["scaling"] + before
    got = (slots.keys @ mean.unsqueeze(-1)).squeeze(-1) * seen["scaling"] + slots.bias.float()
    is_same = (slots.positions.unsqueeze(-1) == columns.positions.unsqueeze(-2)) & (slots.positions >= 0).unsqueeze(-1)
    assert is_same.any() and seen["bias"].abs().max() > 0
    torch.testing.assert_close(
        (is_same * (got.unsqueeze(-1) - wanted.unsqueeze(-2))).abs().max(), torch.tensor(0.0), rtol=0, atol=5e-3
    )


def test_an_odd_head_cannot_be_packed():
    with pytest.raises(LESSError, match="even head dim"):
        format_of("int4").encode(torch.randn(1, 1, 1, 7))


# Scores from choice to choice


def test_a_score_is_remembered():
    """What is kept stays for what it was worth to many queries, even if a few later ones do not ask for it."""
    policy = AttentionMatching(4)
    before, scores = torch.tensor([0.5, 0.1]), torch.tensor([0.0, 0.3])
    expected = (0.8 * before.square() + 0.2 * scores.square()).sqrt()
    torch.testing.assert_close(policy.remember(before, scores), expected)
    assert policy.remember(before, scores)[0] > policy.remember(before, scores)[1]


# The cache


def budgets(cache: LESSCache) -> torch.Tensor:
    """Tokens in the slots of every head, `[b, L·g]`."""
    return torch.cat([(layer.held.slots.columns().positions >= 0).sum(-1) for layer in cache.layers], dim=1)


@pytest.mark.parametrize("slots", list(FORMATS))
@pytest.mark.parametrize("policy", [AttentionMatching(12, every=4), H2O(6, 6)], ids=["attention matching", "h2o"])
@torch.no_grad()
def test_adaptive_heads_share_the_budget_of_all_layers(policy, slots):
    cache = LESSCache(MODEL, policy, heads="adaptive", slots=slots, fit=True)
    MODEL(TEXT[:, :60], past_key_values=cache)
    after_prompt = budgets(cache)
    assert torch.equal(after_prompt.sum(-1), torch.full((2,), 12 * after_prompt.shape[1]))
    assert after_prompt.unique().numel() > 1
    for token in range(60, 90):
        MODEL(TEXT[:, token : token + 1], past_key_values=cache)
    assert torch.equal(budgets(cache), after_prompt)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_below_the_budget_the_logits_are_a_dynamic_caches_to_the_bit(implementation):
    model = tiny.tiny_llama(implementation)
    cache, full = (
        LESSCache(model, AttentionMatching(200, every=7), heads="adaptive", fit=True),
        DynamicCache(config=model.config),
    )
    for start, stop in [(0, 50), *((token, token + 1) for token in range(50, 90))]:
        block = TEXT[:, start:stop]
        assert torch.equal(model(block, past_key_values=cache).logits, model(block, past_key_values=full).logits)


@torch.no_grad()
def test_blocks_of_tokens_count_as_the_steps_they_stand_for():
    """Between two choices it does not matter how tokens come."""
    caches = [LESSCache(MODEL, AttentionMatching(12, every=8), heads="adaptive", fit=True) for _ in range(2)]
    for cache in caches:
        MODEL(TEXT[:, :40], past_key_values=cache)
    steps = [MODEL(TEXT[:, token : token + 1], past_key_values=caches[0]).logits for token in range(40, 88)]
    blocks = [MODEL(TEXT[:, start : start + size], past_key_values=caches[1]).logits for start, size in block_sizes(40, 88)]
    torch.testing.assert_close(torch.cat(steps, 1), torch.cat(blocks, 1), rtol=1e-3, atol=1e-3)
    assert torch.equal(budgets(caches[0]), budgets(caches[1]))


def block_sizes(start: int, stop: int) -> list[tuple[int, int]]:
    """A token, then blocks that end with a choice: after 8 tokens each."""
    sizes = [(start, 1), (start + 1, 3), (start + 4, 4)]
    return sizes + [(token, 8) for token in range(start + 8, stop, 8)]


@pytest.mark.parametrize("slots", ["int8", "int4"])
@torch.no_grad()
def test_quantised_slots_are_near_float_ones(slots):
    def logits(slots: str) -> torch.Tensor:
        cache = LESSCache(MODEL, AttentionMatching(80, every=8), slots=slots)
        return torch.cat([MODEL(TEXT[:, a:b], past_key_values=cache).logits for a, b in [(0, 60), (60, 61), (61, 90)]], 1)

    off = (logits(slots) - logits("float")).abs().mean().item()
    assert 0 < off < {"int8": 0.05, "int4": 0.6}[slots]


@torch.no_grad()
def test_quantised_slots_take_the_bytes_that_they_say():
    model, sizes = tiny.tiny_llama(hidden_size=256), {}
    for slots in FORMATS:
        cache = LESSCache(model, AttentionMatching(40, every=1), slots=slots)
        model(TEXT[:, :60], past_key_values=cache)
        sizes[slots] = sum(
            layer.held.slots.stored[name].nbytes for layer in cache.layers for name in layer.setup.format.names()
        )
    d = 64
    assert sizes["int8"] / sizes["float"] == (d + 2) / (4 * d)
    assert sizes["int4"] / sizes["float"] == (d / 2 + 2) / (4 * d)


def mean_share(model, cache: LESSCache) -> float:
    """Bytes held, of a full cache's of the prompt, mean from one choice to the next."""
    full = cache.memory_footprint().full_cache
    held = []
    for token in torch.arange(cache.policy.every):
        model(token.view(1, 1) % tiny.VOCAB, past_key_values=cache)
        held.append(cache.memory_footprint().total)
    return sum(held) / len(held) / full


@torch.no_grad()
def test_a_model_alone_gives_a_fitted_cache(caplog):
    """No kernels, no policy: five per cent of the bytes of a 16-bit full cache, all that is held counted."""
    model = tiny.tiny_llama(hidden_size=256, num_attention_heads=4, num_key_value_heads=2).to(torch.bfloat16)
    with caplog.at_level("INFO", "less_cache"):
        cache = LESSCache(model)
    assert isinstance(cache.policy, AttentionMatching) and "AttentionMatching" in caplog.text and "int4" in caplog.text
    text = torch.randint(2, tiny.VOCAB, (1, 2000), generator=torch.Generator().manual_seed(0))
    model(text, past_key_values=cache)
    assert 0.045 <= mean_share(model, cache) <= 0.055
    assert budgets(cache).unique().numel() > 1
    assert all(layer.held.slots.bias is not None and layer.setup.format.name == "int4" for layer in cache.layers)


@pytest.mark.parametrize("share", [0.1, 0.25])
@torch.no_grad()
def test_a_share_of_the_bytes_is_held(share):
    model = tiny.tiny_llama(hidden_size=256, num_attention_heads=8, num_key_value_heads=2).to(torch.bfloat16)
    cache = LESSCache(model, budget=share, slots="int8")
    model(torch.randint(2, tiny.VOCAB, (1, 600), generator=torch.Generator().manual_seed(0)), past_key_values=cache)
    assert 0.9 * share <= mean_share(model, cache) <= 1.1 * share


def test_a_budget_of_tokens():
    assert LESSCache(MODEL, budget=7).policy == AttentionMatching(7)


@torch.no_grad()
def test_all_bytes_keep_everything():
    cache = LESSCache(MODEL, budget=1.0)
    MODEL(TEXT, past_key_values=cache)
    assert (budgets(cache) == TEXT.shape[1]).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": 1.5}, "share of a full cache's bytes"),
        ({"budget": 0}, "int >= 1"),
        ({"budget": True}, "share of a full cache's bytes"),
        ({"budget": 8, "policy": H2O(2, 2)}, "expected a budget or a policy"),
        ({"heads": "some"}, "'equal', 'adaptive', 'profile', HeadBudgets or"),
        ({"slots": "int3"}, "one of float, int8, int4"),
        ({"policy": AttentionMatching(8), "static": True}, "chooses in blocks"),
        ({"policy": H2O(2, 2), "heads": "adaptive", "static": True}, "shapes that no prompt changes"),
        ({"policy": SinkRecent(1, 2), "heads": "adaptive"}, "has none to compare"),
        ({"static": True}, "expected a policy"),
    ],
    ids=str,
)
def test_what_cannot_be(options, message):
    with pytest.raises(LESSError, match=message):
        LESSCache(MODEL, **options)


@pytest.mark.parametrize("every", [0.5, 0, True, "8"])
def test_every_is_a_number_of_tokens(every):
    with pytest.raises(LESSError, match=r"AttentionMatching: expected every to be an int >= 1 \(tokens\), got"):
        AttentionMatching(8, every=every)


@torch.no_grad()
def test_a_config_alone_does_not_say_how_queries_turn(caplog):
    """Then they are not turned, and nothing is fitted; the log says so."""
    with caplog.at_level("INFO", "less_cache"):
        cache = LESSCache(MODEL.config, budget=12)
    assert "not known" in caplog.text
    MODEL(TEXT, past_key_values=cache)
    assert all(layer.held.slots.bias is None for layer in cache.layers)


@torch.no_grad()
def test_a_fitted_cache_is_nearer_than_h2o():
    """On a random model too, at an eighth of the bytes that H2O has."""
    full, text = DynamicCache(config=MODEL.config), TEXT[:1]
    expected = MODEL(text[:, :60], past_key_values=full).logits, MODEL(text[:, 60:], past_key_values=full).logits

    def off(cache: LESSCache) -> float:
        MODEL(text[:, :60], past_key_values=cache)
        difference = MODEL(text[:, 60:], past_key_values=cache).logits.log_softmax(-1) - expected[1].log_softmax(-1)
        return (expected[1].softmax(-1) * -difference).sum(-1).mean().item()

    assert off(LESSCache(MODEL, AttentionMatching(16), heads="adaptive")) < 0.7 * off(LESSCache(MODEL, H2O(8, 8)))


@pytest.mark.parametrize("heads", ["equal", "adaptive"])
@torch.no_grad()
def test_a_padded_row_is_fitted_as_alone(heads):
    """Padding on the left is nothing to choose from, to ask by or to fit."""
    real = torch.arange(60) >= torch.tensor([[0], [17]])
    options = {"heads": heads, "kernels": tiny.tiny_kernels(MODEL)}
    cache, alone = (LESSCache(MODEL, AttentionMatching(12, every=4), **options) for _ in range(2))
    MODEL(TEXT[:, :60], attention_mask=real.long(), position_ids=(real.cumsum(-1) - 1).clamp_min(0), past_key_values=cache)
    MODEL(TEXT[1:, 17:60], past_key_values=alone)
    for padded, unpadded in zip(cache.layers, alone.layers, strict=True):
        assert tiny.held_positions(padded)[1] == tiny.held_positions(unpadded)[0]
        held, wanted = padded.held.slots.columns(), unpadded.held.slots.columns()
        there = wanted.positions[0] >= 0
        for name in ("keys", "values", "bias"):
            given = getattr(held, name)[1, :, : there.shape[1]]
            torch.testing.assert_close(given[there], getattr(wanted, name)[0][there], rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_a_row_that_loses_nothing_is_not_fitted():
    """A fit would make up for what its slots round, but only where another row is over its budget."""
    real = torch.arange(60) >= torch.tensor([[0], [54]])
    options = {"slots": "int8", "kernels": tiny.tiny_kernels(MODEL)}
    cache, alone = (LESSCache(MODEL, AttentionMatching(12, every=4), **options) for _ in range(2))
    MODEL(TEXT[:, :60], attention_mask=real.long(), position_ids=(real.cumsum(-1) - 1).clamp_min(0), past_key_values=cache)
    MODEL(TEXT[1:, 54:60], past_key_values=alone)
    for padded, unpadded in zip(cache.layers, alone.layers, strict=True):
        held, wanted = padded.held.slots.columns(), unpadded.held.slots.columns()
        order = held.positions[1].argsort(dim=-1)[:, -6:]  # [g, 6], empty slots come first
        assert (held.bias[0] != 0).any() and (held.bias[1] == 0).all()
        values = held.values[1].gather(1, order.unsqueeze(-1).expand(-1, -1, held.values.shape[-1]))
        torch.testing.assert_close(values, wanted.values[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("slots", list(FORMATS))
@torch.no_grad()
def test_all_of_it_is_saved_and_forked(slots, tmp_path):
    """Codes, biases, scores, budgets, the newest tokens and the queries: what goes on from a file or a fork is the same."""
    cache = LESSCache(MODEL, AttentionMatching(12, every=8), heads="adaptive", slots=slots)
    MODEL(TEXT[:, :45], past_key_values=cache)
    for token in range(45, 50):
        MODEL(TEXT[:, token : token + 1], past_key_values=cache)
    cache.save(tmp_path / "saved.safetensors")
    others = [cache.fork(), LESSCache.load(tmp_path / "saved.safetensors", MODEL)]
    expected = [MODEL(TEXT[:, token : token + 1], past_key_values=cache).logits for token in range(50, 80)]
    for other in others:
        logits = [MODEL(TEXT[:, token : token + 1], past_key_values=other).logits for token in range(50, 80)]
        assert torch.equal(torch.cat(logits), torch.cat(expected))


@pytest.mark.parametrize("heads", ["equal", "adaptive"])
@torch.no_grad()
def test_a_long_prompt_that_is_recorded_loses_nothing(heads):
    """Adaptive heads wait for all layers, with all of the prompt; what is given back later is the end of the text alone."""
    text = torch.randint(2, tiny.VOCAB, (1, 310), generator=torch.Generator().manual_seed(0))
    caches = [LESSCache(MODEL, AttentionMatching(400, every=8), heads=heads) for _ in range(2)]
    caches[1].activate_past_recording()
    for cache in caches:
        MODEL(text[:, :300], past_key_values=cache)
    for layer in caches[1].layers:
        assert tiny.held_positions(layer) == [[list(range(300))] * 2]
    MODEL(text[:, 300:304], past_key_values=caches[1])
    caches[1].crop(-4)
    logits = [MODEL(text[:, 300:], past_key_values=cache).logits for cache in caches]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_recorded_prompt_is_chosen_from_as_one():
    cache, recorded = (LESSCache(MODEL, AttentionMatching(20, every=8), heads="adaptive") for _ in range(2))
    text = torch.randint(2, tiny.VOCAB, (1, 300), generator=torch.Generator().manual_seed(0))
    recorded.activate_past_recording()
    for each in (cache, recorded):
        MODEL(text, past_key_values=each)
    for layer, other in zip(cache.layers, recorded.layers, strict=True):
        assert tiny.held_positions(layer) == tiny.held_positions(other)


@torch.no_grad()
def test_a_recorded_block_that_is_the_first_over_budget_counts_as_its_steps():
    """The choice falls between two tokens of the block, where no layer can wait for the others."""
    block, steps = (LESSCache(MODEL, AttentionMatching(8, every=4), heads="adaptive") for _ in range(2))
    for cache in (block, steps):
        cache.activate_past_recording()
        MODEL(TEXT[:, :6], past_key_values=cache)
    logits = MODEL(TEXT[:, 6:13], past_key_values=block).logits
    expected = [MODEL(TEXT[:, token : token + 1], past_key_values=steps).logits for token in range(6, 13)]
    torch.testing.assert_close(logits, torch.cat(expected, dim=1), rtol=1e-3, atol=1e-3)
    for layer, other in zip(block.layers, steps.layers, strict=True):
        assert tiny.held_positions(layer) == tiny.held_positions(other)
        assert all(set(range(10, 13)) <= set(head) for heads in tiny.held_positions(layer) for head in heads)


@torch.no_grad()
def test_an_interrupted_prompt_is_not_held():
    """What layers had read and not chosen from is let go with `reset`, and nothing of it is in the next text."""
    cache, fresh = (LESSCache(MODEL, AttentionMatching(12), heads="adaptive") for _ in range(2))
    interrupted = mock.patch.object(cache.layers[1], "attend", side_effect=RuntimeError("stop"))
    with interrupted, pytest.raises(RuntimeError, match="stop"):
        MODEL(TEXT[:, :60], past_key_values=cache)
    assert len(cache.layers[0].allotment.waiting) == 1
    with pytest.raises(LESSError, match="reset"):
        MODEL(TEXT[:, :60], past_key_values=cache)
    cache.reset()
    assert not cache.layers[0].allotment.waiting
    logits = [MODEL(TEXT[:, :60], past_key_values=each).logits for each in (cache, fresh)]
    assert torch.equal(*logits) and torch.equal(budgets(cache), budgets(fresh))


@torch.no_grad()
def test_a_step_decodes_its_slots_once():
    """What a step reads of the slots is decoded once for keys and once for values, unless it ends with a choice; C++ reads
    codes.
    """
    cache = LESSCache(MODEL, AttentionMatching(12, every=8), slots="int4")
    MODEL(TEXT[:, :40], past_key_values=cache)
    decoded = []
    decode = Int4Slots.decode
    with mock.patch.object(Int4Slots, "decode", lambda self, stored, dtype: decoded.append(1) or decode(self, stored, dtype)):
        with mock.patch.dict(select.BACKENDS, clear=True):
            MODEL(TEXT[:, 40:41], past_key_values=cache)
        assert len(decoded) == 2 * len(cache.layers)
        MODEL(TEXT[:, 41:42], past_key_values=cache)
    assert len(decoded) == (2 if build.library() is not None and select.BACKENDS else 4) * len(cache.layers)
