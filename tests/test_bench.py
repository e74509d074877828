"""What the benchmarks measure with: turns, spreads, filled caches, the formula of their bytes, the largest batch."""

from unittest import mock

import pytest
import tiny
import torch

from less_cache import LESSCache
from less_cache.bench import batch, memory
from less_cache.bench.contenders import Contest
from less_cache.bench.options import CACHES, BenchOptions
from less_cache.bench.peak import PeakMemory
from less_cache.bench.timing import Spread, alternate, ratios
from less_cache.evaluation.perplexity import cache_bytes


@pytest.fixture
def folder(tmp_path):
    """Folder with nothing but the config of a tiny model."""
    tiny.tiny_llama().config.save_pretrained(tmp_path)
    return str(tmp_path)


def contest(folder: str, **options) -> Contest:
    return Contest(BenchOptions(folder, random=True, chunk=16, **options))


def test_all_take_turns_and_the_first_round_does_not_count():
    calls, clock = [], iter(range(100))

    def named(name):
        return lambda: calls.append(name) or next(clock)

    results = alternate({name: named(name) for name in "abc"}, rounds=2)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert results == {"a": [5, 7], "b": [3, 8], "c": [4, 6]}


def test_ratios_are_taken_within_a_round():
    results = {"dynamic": [1.0, 10.0, 2.0], "less": [2.0, 10.0, 8.0]}
    assert ratios(results, "dynamic") == {"dynamic": 1, "less": 2}
    assert ratios({"less": [1.0]}, "dynamic") == {"less": None}


def test_a_spread_is_the_median_and_the_quartiles():
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(median=3, lower=2, upper=4)
    assert Spread.of([7.0]) == Spread(7, 7, 7)


@pytest.mark.parametrize("sequences", [1, 3])
def test_every_cache_is_filled_to_the_context_and_goes_on(folder, sequences):
    subject = contest(folder, budget=8)
    for contender in subject.contenders:
        with torch.no_grad():
            cache = subject.fill(contender, 40, sequences, more=2)
            assert cache.get_seq_length() == 40
            logits = contender.forward(input_ids=subject.tokens(sequences, 2), past_key_values=cache).logits
        assert logits.shape == (sequences, 2, tiny.VOCAB) and logits.isfinite().all()
        assert cache.get_seq_length() == 42
        if isinstance(cache, LESSCache):
            assert cache.layers[0].keys.shape[:3] == (sequences, 2, 9)


def test_the_same_seed_gives_the_same_model_tokens_and_caches(folder):
    first, second = contest(folder), contest(folder)
    for one, other in zip(first.contenders, second.contenders, strict=True):
        with torch.no_grad():
            filled, again = (each.fill(who, 20, 1) for each, who in ((first, one), (second, other)))
        assert torch.equal(filled.layers[1].keys, again.layers[1].keys), one.name
    assert not torch.equal(first.tokens(1, 20), contest(folder, seed=1).tokens(1, 20))


@pytest.mark.parametrize("policy", ["h2o", "sink_recent"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_formula_gives_the_bytes_that_are_held(folder, policy, dtype):
    subject = contest(folder, policy=policy, dtype=dtype, budget=0.25, batch=3, contexts=(32, 48))
    rows = memory.measure(subject, lambda: None)
    assert [(row.context, row.cache) for row in rows] == [(context, name) for context in (32, 48) for name in CACHES]
    for row in rows:
        assert row.bytes == row.formula, row
    assert rows[3].ratio == rows[3].bytes / rows[0].bytes < 1


def test_a_policy_without_a_budget_has_no_formula(folder):
    rows = memory.measure(contest(folder, policy="corm", budget=8, contexts=(32,)), lambda: None)
    assert [row.formula is None for row in rows] == [False, False, True, True]


class FakePeak:
    """10,000 bytes a sequence, cache and working memory."""

    def __init__(self, device):
        pass

    def start(self):
        FakePeak.batch = None

    def stop(self):
        return FakePeak.batch * 10_000


@pytest.mark.parametrize(("has", "expected"), [(10**7, 50), (None, None), (600_000, None)])
def test_the_largest_batch_is_one_that_was_seen_to_fit(folder, has, expected):
    """Room for 100 by the cache's bytes, for 50 with working memory; `has`: the machine's memory."""
    subject = contest(folder, memory=600_000)

    def decoding(contest, contender, context, count):
        return lambda: setattr(FakePeak, "batch", count)

    with mock.patch.multiple(batch, PeakMemory=FakePeak, memory=lambda device: has, _decoding=decoding):
        largest, peak = batch._largest(subject, subject.contenders[0], 32, computed=100, weights=100_000)
    assert largest == expected
    assert peak == (None if expected is None else 600_000)


def test_batches_go_up_to_the_largest():
    assert batch._sizes(20) == [1, 4, 16, 20]
    assert batch._sizes(1) == [1]
    assert batch._sizes(None) == []


def test_a_peak_is_what_was_held_at_once():
    peak = PeakMemory(torch.device("cpu"))
    peak.start()
    if peak.before is None:
        pytest.skip("this system does not tell")
    for _ in range(3):
        torch.ones(2**24)  # 64 MiB, freed at once
    assert 60 * 2**20 < peak.stop() < 128 * 2**20


def test_the_bytes_of_a_cache_are_those_of_its_tensors(folder):
    subject = contest(folder)
    with torch.no_grad():
        full = subject.fill(subject.contenders[0], 10, 1)
    assert cache_bytes(full) == 2 * 2 * 2 * 10 * 8 * 4  # layers, keys and values, KV heads, tokens, head dim, float32
