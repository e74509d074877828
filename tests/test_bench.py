"""What the benchmarks measure with: turns, spreads, filled caches, the formula of their bytes, the largest batch."""

import dataclasses
import time
from unittest import mock

import pytest
import tiny
import torch

from less_cache import LESSCache, LESSError
from less_cache.bench import batch, decode, memory, plot, prefill
from less_cache.bench.contenders import Contest
from less_cache.bench.options import CACHES, DEFAULTS, USUAL, BenchOptions
from less_cache.bench.peak import PeakMemory
from less_cache.bench.table import shown, table
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
    subject = contest(folder, budget=8, caches=CACHES)
    for name in CACHES:
        with torch.no_grad():
            cache = subject.fill(name, 40, sequences, more=2)
            assert cache.get_seq_length() == 40
            logits = subject.model(input_ids=subject.tokens(sequences, 2), past_key_values=cache).logits
        assert logits.shape == (sequences, 2, tiny.VOCAB) and logits.isfinite().all()
        assert cache.get_seq_length() == 42
        if isinstance(cache, LESSCache):
            assert cache.layers[0].keys.shape[:3] == (sequences, 2, 9)
            assert cache.is_compileable == name.endswith("_static") and (cache.kernels is None) == name.startswith("policy")


def test_a_prompt_is_read_once_and_no_cache_sees_another(folder):
    subject = contest(folder, budget=8, caches=("less",))
    with torch.no_grad(), mock.patch.object(subject, "read", wraps=subject.read) as read:
        first = subject.fill("less", 40, 1)
        subject.model(input_ids=subject.tokens(1, 5), past_key_values=first)
        second, batch_of_three = subject.fill("less", 40, 1), subject.fill("less", 40, 3)
        other = subject.fill("less", 30, 1)
    assert read.call_count == 2  # 40 tokens and 30
    assert [each.get_seq_length() for each in (first, second, batch_of_three, other)] == [45, 40, 40, 30]
    assert torch.equal(second.layers[0].keys.expand(3, -1, -1, -1), batch_of_three.layers[0].keys)


@pytest.mark.parametrize("sequences", [1, 3])
def test_static_less_decodes_what_less_does(folder, sequences):
    """A batch that repeats one text is put into new buffers of the static layers."""
    logits = {}
    for name in ("less", "less_static"):
        subject = contest(folder, budget=8, caches=(name,))
        with torch.no_grad():
            cache = subject.fill(name, 40, sequences, more=3)
            steps = [subject.model(token, past_key_values=cache).logits for token in torch.arange(3 * sequences).view(3, -1, 1)]
        logits[name] = torch.cat(steps)
    torch.testing.assert_close(logits["less"], logits["less_static"])


@pytest.mark.parametrize("caches, wanted", [(("dynamic", "policy"), False), (("less",), True), (("less_static",), True)])
def test_kernels_are_loaded_where_less_is_measured(folder, tmp_path, caches, wanted):
    tiny.tiny_kernels(tiny.tiny_llama()).save_pretrained(tmp_path / "kernels")
    loaded = contest(folder, caches=caches, kernels=str(tmp_path / "kernels")).kernels
    assert (loaded is not None) == wanted
    if not wanted:
        assert contest(folder, caches=caches, kernels="./absent").kernels is None
    assert (contest(folder, caches=caches).kernels is not None) == wanted


def test_a_cache_that_cannot_be_made_is_known_before(folder):
    with pytest.raises(LESSError, match="a policy with a budget"):
        contest(folder, policy="corm", budget=8, caches=("dynamic", "less_static"))


def test_reading_takes_the_seconds_of_the_model(folder):
    subject = contest(folder)
    lengths = []

    def model(input_ids, past_key_values, logits_to_keep):
        lengths.append(input_ids.shape[1])
        time.sleep(0.02)

    subject.model.forward = model
    assert 0.06 <= subject.read(None, subject.tokens(2, 5), 2) < 10
    subject.read(None, subject.tokens(1, 5), None)
    assert lengths == [2, 2, 1, 5]


@pytest.mark.parametrize("compile", [False, True])
def test_single_tokens_of_static_caches_are_compiled(folder, monkeypatch, compile):
    compiled, calls = mock.Mock(), []
    monkeypatch.setattr(torch, "compile", lambda model, mode: compiled)
    subject = contest(folder, budget=8, caches=CACHES, compile=compile)
    for name in CACHES:
        with torch.no_grad():
            cache = subject.fill(name, 20, 1, more=2)
            assert not compiled.called
            subject.read(cache, subject.tokens(1, 2), 1)
        calls += [name] * compiled.call_count
        compiled.reset_mock()
    assert calls == ([name for name in CACHES if "static" in name for _ in range(2)] if compile else [])


def test_the_limit_is_the_time_in_which_weights_and_cache_would_move(folder, monkeypatch):
    """Both move 1,000 bytes a second here; a token takes 3 seconds."""
    subject = contest(folder, rounds=3, tokens=2, contexts=(8,), caches=("dynamic",))
    monkeypatch.setattr(subject, "copy", lambda: subject.copied / 1000)
    monkeypatch.setattr(subject, "read", lambda *_: 6.0)
    monkeypatch.setattr(decode, "cache_bytes", lambda cache: 500)
    monkeypatch.setattr(subject, "fill", lambda *_, **__: None)
    (row,) = decode.measure(subject, lambda: None)
    assert row.times_the_limit == pytest.approx(3 / ((subject.read_weights + 500) / 1000))


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_the_weights_but_not_a_table_of_embeddings(tied, tmp_path):
    model = tiny.tiny_llama(tie_word_embeddings=tied)
    model.config.save_pretrained(tmp_path)
    subject = contest(str(tmp_path))
    table = model.get_input_embeddings().weight.nbytes
    assert subject.weights - subject.read_weights == (0 if tied else table)


def test_a_copy_takes_time(folder):
    assert contest(folder).copy() > 0


@pytest.mark.parametrize("benchmark", [decode, prefill])
def test_progress_ends_at_the_number_of_runs(folder, benchmark):
    subject = contest(folder, rounds=2, tokens=2, contexts=(8, 12), caches=CACHES)
    calls = []
    rows = benchmark.measure(subject, lambda: calls.append(1))
    assert len(calls) == benchmark.runs(subject.options)
    assert [(row.context, row.cache) for row in rows] == [(context, name) for context in (8, 12) for name in CACHES]


def test_defaults_are_each_benchmark_s():
    prefill, decode = BenchOptions.of("prefill", model="m"), BenchOptions.of("decode", model="m", rounds=2, contexts=[])
    assert (prefill.rounds, prefill.chunk, prefill.caches) == (5, None, ("dynamic", "policy", "less"))
    assert (decode.rounds, decode.tokens, decode.chunk, decode.caches) == (2, 16, 512, USUAL)
    given = BenchOptions.of("batch", model="m", memory=2**30, caches=["less", "static", "less"], contexts=[9, 8, 9])
    assert (given.rounds, given.tokens, given.memory) == (3, 4, 2**30)
    assert (given.caches, given.contexts) == (("static", "less"), (8, 9))


@pytest.mark.parametrize("chunk", [None, 7])
def test_a_prompt_with_padding(folder, chunk):
    options = {"caches": ("dynamic", "less"), "contexts": (20,), "rounds": 1, "batch": 2}
    subject, seen, calls = Contest(BenchOptions(folder, random=True, chunk=chunk, padding=9, **options)), [], []

    def reading(cache, *args):
        seconds = Contest.read(subject, cache, *args)
        seen.append(cache.layers[0].held.rows.seen.tolist() if isinstance(cache, LESSCache) else None)
        return seconds

    with mock.patch.object(subject, "read", reading):
        rows = prefill.measure(subject, lambda: calls.append(1))
    assert seen.count([11, 20]) == seen.count([20, 20]) == 2 and seen.count(None) == 4
    assert len(calls) == prefill.runs(subject.options) == 8
    assert [(row.padding, row.cache) for row in rows] == [(n, name) for n in (0, 9) for name in ("dynamic", "less")]
    assert [row.ratio for row in rows if row.cache == "dynamic"] == [1, 1], "each beside a DynamicCache with as much padding"


def test_a_plot_shows_the_padded_prompts(folder):
    options = BenchOptions(folder, random=True, padding=3, caches=("dynamic", "less"), contexts=(20, 30), rounds=1, batch=2)
    rows = prefill.measure(Contest(options), lambda: None)
    report = {"benchmark": "prefill", **dataclasses.asdict(options), "machine": {"cpu": "one"}, "labels": {"less": "LESS"}}
    figure = plot.draw({**report, "results": [dataclasses.asdict(row) for row in rows]})
    seconds = figure.axes[0].get_lines()[0].get_ydata()
    assert list(seconds) == [row.seconds.median for row in rows if row.cache == "less" and row.padding == 3]


def test_no_row_is_padding_alone():
    with pytest.raises(LESSError, match="Expected --padding to be less than the context of 30, got 30"):
        BenchOptions.of("prefill", model="m", contexts=[30, 50], padding=30)


TAKEN = {"batch": 2, "chunk": 8, "rounds": 1, "tokens": 1, "memory": 2**30, "compile": True, "padding": 3}


@pytest.mark.parametrize("benchmark", DEFAULTS)
@pytest.mark.parametrize("option", TAKEN)
def test_an_option_of_another_benchmark_is_refused(benchmark, option):
    given = {"model": "m", option: TAKEN[option], **({"memory": 2**30} if benchmark == "batch" else {})}
    if option in DEFAULTS[benchmark]:
        assert getattr(BenchOptions.of(benchmark, **given), option) == TAKEN[option]
        return
    with pytest.raises(LESSError, match=rf"Expected --{option} with bench .* alone, got {TAKEN[option]} with {benchmark}"):
        BenchOptions.of(benchmark, **given)


def test_a_table_has_a_section_for_each_context():
    @dataclasses.dataclass
    class Row:
        context: int
        cache: str
        size: float | None

    rows = [Row(8, "dynamic", 1.25), Row(8, "less", None), Row(1024, "less", 3.0)]
    made = table(rows, {"dynamic": "Full", "less": "LESS"}, {"size": lambda row: shown(row.size, ".1f")}, "Note.")
    assert [list(column.cells) for column in made.columns] == [["8", "", "1,024"], ["Full", "LESS", "LESS"], ["1.2", "", "3.0"]]
    assert [row.end_section for row in made.rows] == [False, True, True]
    assert made.caption == "Note."


def test_the_same_seed_gives_the_same_model_tokens_and_caches(folder):
    first, second = contest(folder), contest(folder)
    for name in first.options.caches:
        with torch.no_grad():
            filled, again = (each.fill(name, 20, 1) for each in (first, second))
        assert torch.equal(filled.layers[1].keys, again.layers[1].keys), name
    assert not torch.equal(first.tokens(1, 20), contest(folder, seed=1).tokens(1, 20))


@pytest.mark.parametrize("policy", ["h2o", "sink_recent"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_formula_gives_the_bytes_that_are_held(folder, policy, dtype):
    subject = contest(folder, policy=policy, dtype=dtype, budget=0.25, batch=3, contexts=(32, 48), caches=CACHES)
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
    subject.weights = 100_000

    def decoding(contest, name, context, count):
        return lambda: setattr(FakePeak, "batch", count)

    with mock.patch.multiple(batch, PeakMemory=FakePeak, memory=lambda device: has, _decoding=decoding):
        largest, peak = batch._largest(subject, "dynamic", 32, computed=100)
    assert largest == expected
    assert peak == (None if expected is None else 600_000)


def test_a_batch_that_finds_no_memory_is_one_too_many(folder):
    """As a GPU says it and as a processor does; any other error is one."""
    subject, tried = contest(folder, memory=10**9), []

    def decoding(contest, name, context, count):
        def run():
            tried.append(count)
            FakePeak.batch = 1
            if count == 100:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            if count == 90:
                torch.empty(2**56)

        return run

    with mock.patch.multiple(batch, PeakMemory=FakePeak, memory=lambda device: 10**10, _decoding=decoding):
        assert batch._largest(subject, "dynamic", 32, computed=100)[0] == 81 and tried == [100, 90, 81]
        with mock.patch.object(torch, "empty", side_effect=RuntimeError("shapes")), pytest.raises(RuntimeError, match="shapes"):
            batch._largest(subject, "dynamic", 32, computed=90)


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
        full = subject.fill("dynamic", 10, 1)
    assert cache_bytes(full) == 2 * 2 * 2 * 10 * 8 * 4  # layers, keys and values, KV heads, tokens, head dim, float32
