"""The scripts in benchmarks/ that measure kernels, on a tiny model: what must come out whatever the kernels are."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import tiny
from test_cli import model, run, text  # noqa: F401

from less_cache import LESSKernels
from less_cache.evaluation import perplexity
from less_cache.memory import MEMORIES
from less_cache.memory.state import LowRankState


def benchmark(script: str, words: list, monkeypatch, capsys) -> dict:
    """The report of a script in benchmarks/."""
    path = Path(__file__).parents[1] / "benchmarks" / script
    monkeypatch.setattr(sys, "argv", [str(word) for word in (path, *words)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_benchmark_of_lengths(model, text, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Every row says what it is of, and a policy that keeps everything is the full cache."""
    tiny.tiny_kernels(tiny.tiny_llama()).save_pretrained(tmp_path / "kernels")
    words = [model, tmp_path / "kernels", "--data", text, "--length", "40", "--sequences", "3", "--decoded", "4"]
    words += ["--batch-size", "2", "--policy", "h2o", "--budget", "0.2", "--budget", "1"]
    small, whole = benchmark("lengths.py", words, monkeypatch, capsys)["results"]
    assert [(row["length"], sum(map(int, list(row["policy"].values())[1:]))) for row in (small, whole)] == [(40, 8), (40, 40)]
    for name in ("less", "policy", "baseline+"):
        assert len(small["caches"][name]["loss"]) == len(small["caches"][name]["divergence"]) == 3
        assert min(small["caches"][name]["divergence"]) > 1e-4
        assert whole["caches"][name]["loss"] == pytest.approx(whole["caches"]["full"]["loss"], abs=1e-4)
        assert max(whole["caches"][name]["divergence"]) < 1e-5


def test_lengths_are_not_measured_twice(model, text, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The report is the same, by the runs of the full cache and LESS alone, and says where the others were made; one on
    another text is refused.
    """
    tiny.tiny_kernels(tiny.tiny_llama()).save_pretrained(tmp_path / "kernels")
    words = [model, tmp_path / "kernels", "--data", text, "--length", "40", "--sequences", "3", "--decoded", "4"]
    words += ["--policy", "h2o", "--budget", "0.2", "--output", tmp_path / "report.json"]
    anew = benchmark("lengths.py", words, monkeypatch, capsys)
    words = words[:-2]
    (tmp_path / "report.json").write_text(json.dumps({**anew, "commit": "the first"}))
    caches, decode = [], perplexity.decode
    monkeypatch.setattr(perplexity, "decode", lambda *given: caches.append(type(given[2]).__name__) or decode(*given))
    spared = benchmark("lengths.py", [*words, "--known", tmp_path / "report.json"], monkeypatch, capsys)
    assert caches == ["DynamicCache", "LESSCache"]
    (tmp_path / "between.json").write_text(json.dumps(spared))
    assert benchmark("lengths.py", [*words, "--known", tmp_path / "between.json"], monkeypatch, capsys) == spared
    origin = {"commit": "the first", **{name: anew[name] for name in ("machine", "versions")}}
    for name in ("policy", "baseline+"):
        assert spared["results"][0]["caches"][name].pop("origin") == origin
    assert spared == anew

    text.write_text(text.read_text()[::-1])
    with pytest.raises(AssertionError):
        benchmark("lengths.py", [*words, "--known", tmp_path / "report.json"], monkeypatch, capsys)
    assert "the full cache had other losses" in capsys.readouterr().err.replace("\n", " ")

    report = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps({**report, "results": [{"length": 40}]}))
    with pytest.raises(AssertionError):
        benchmark("lengths.py", [*words, "--known", tmp_path / "report.json"], monkeypatch, capsys)
    assert "expected a report of benchmarks/lengths.py" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_the_benchmark_of_types(model, text, tmp_path, monkeypatch, capsys):  # noqa: F811
    """As `less-cache eval perplexity` on the same kernels, and rounding changes little, but something."""
    tiny.tiny_kernels(tiny.tiny_llama()).save_pretrained(tmp_path / "kernels")
    lengths = ["--budget", "8", "--sequences", "3", "--prompt-length", "40", "--decoded", "8"]
    words = [model, tmp_path / "kernels", "--data", text, *lengths, "--batch-size", "2"]
    report = benchmark("dtypes.py", words, monkeypatch, capsys)

    evaluated = run("eval", "perplexity", model, "--kernels", tmp_path / "kernels", "--data", text, *lengths)
    full, alone, *_, less = (
        row for row in json.loads(evaluated.stdout.splitlines()[-1])["results"][0] if not row["cache"].startswith("fitted")
    )
    assert (report["full"], report["policy_alone"]) == pytest.approx((full["perplexity"], alone["perplexity"]), rel=1e-5)
    exact, *rounded = (report["dtypes"][name] for name in ("float32", "float16", "bfloat16"))
    assert exact["perplexity"] == pytest.approx(less["perplexity"], rel=1e-5)
    assert exact["weights_changed"] == exact["nats_lost"] == 0
    for row in rounded:
        assert row["file_bytes"] < exact["file_bytes"] and row["weights_changed"] > 0.9
        assert 0 < abs(row["nats_lost"]) < 0.1 and len(row["nats_lost_by_batch"]) == 2
        assert row["nats_lost"] == pytest.approx(math.log(row["perplexity"] / exact["perplexity"]), abs=1e-9)


def test_the_benchmark_of_the_ceiling(model, text, monkeypatch, capsys):  # noqa: F811
    """A rank that any attention of so few queries has recovers everything, and a lower one something."""
    words = [model, text, "--rank", "1", "--rank", "16", "--sequences", "2", "--prompt-length", "40", "--decoded", "8"]
    report = benchmark("oracle.py", [*words, "--budget", "8"], monkeypatch, capsys)
    perplexity, recovered = report["perplexity"], report["gap_recovered"]
    assert perplexity["policy"] != perplexity["full"] == perplexity["rank 16"]
    assert recovered["rank 16"] == pytest.approx(1, abs=0.01) and recovered["policy"] == 0


def test_the_benchmark_of_a_step_after_long_texts(model, tmp_path, monkeypatch, capsys):  # noqa: F811
    tiny.tiny_kernels(tiny.tiny_llama()).save_pretrained(tmp_path / "kernels")
    words = [model, tmp_path / "kernels", "--context", "20", "--context", "40", "--budget", "8"]
    short, long = benchmark("constant_step.py", [*words, "--rounds", "2", "--tokens", "2"], monkeypatch, capsys)["results"]
    assert (short["context"], long["context"]) == (20, 40) and short["bytes"] == long["bytes"]
    assert short["ratio"] == 1 and long["ratio"] > 0


def test_the_benchmark_of_a_fitted_step(model, monkeypatch, capsys):  # noqa: F811
    words = [model, "--kept", "10", "--batch", "1", "--rounds", "2", "--tokens", "32"]
    *rows, choices = benchmark("fitted_step.py", words, monkeypatch, capsys)["results"]
    assert [row["cache"] for row in rows] == ["DynamicCache", "H2O", "float", "int8", "int4", "int4, adaptive", "choices"]
    held = {row["cache"]: row["bytes"] for row in rows}
    assert held["int4"] < held["int8"] < held["float"] < held["DynamicCache"]
    assert rows[1]["ratio"] == 1 and all(row["ratio"] > 0 for row in rows) and choices["choices_share"] < 1


def test_the_benchmark_of_choices(model, text, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Sets differ by their choice alone, and are not trained again by the same command."""
    text.write_text(text.read_text() * 10)
    words = [model, tmp_path / "sets", "--train-data", text, "--text", f"own={text}", "--steps", "1", "--stretches", "4"]
    words += ["--set", "mixed", "--set", "no fading", "--set", "attention not in the loss", "--dtype", "float32"]
    left = benchmark("training_choices.py", words, monkeypatch, capsys)["divergence_left"]["own"]
    assert all(0 < share < 10 for by_set in left.values() for share in by_set.values())
    names = ("mixed", "no-fading", "attention-not-in-the-loss")
    mixed, steady, unaware = (LESSKernels.from_pretrained(tmp_path / "sets" / name) for name in names)
    assert any((mixed.state_dict()[name] != other).any() for name, other in unaware.state_dict().items())
    assert all(memory.fading[:, 1:].min() > 0 for memory in mixed.layers.values())
    assert all(not memory.fading.any() for memory in steady.layers.values())
    written = (tmp_path / "sets" / "mixed" / "less_kernels.safetensors").stat().st_mtime_ns
    assert benchmark("training_choices.py", words, monkeypatch, capsys)["divergence_left"]["own"] == left
    assert (tmp_path / "sets" / "mixed" / "less_kernels.safetensors").stat().st_mtime_ns == written

    finished = ["--finished", f"done={tmp_path / 'sets' / 'mixed'}", "--text", f"own={text}", "--stretches", "4"]
    report = benchmark("training_choices.py", [model, *finished, "--dtype", "float32"], monkeypatch, capsys)
    assert report["divergence_left"]["own"] == {used: {"done": by_set["mixed"]} for used, by_set in left.items()}
    kernels = LESSKernels.from_pretrained(tmp_path / "sets" / "mixed")
    assert report["finished"] == {"done": kernels.config.sha256} and "steps" not in report

    tiny.tiny_llama(vocab_size=tiny.VOCAB + 1).save_pretrained(model)
    with pytest.raises(AssertionError):
        benchmark("training_choices.py", words, monkeypatch, capsys)
    assert "was trained for another model" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_the_benchmark_of_blocks(monkeypatch, capsys):
    """Every memory, with all tokens in one block and in several."""
    words = ["--tokens", 40, "--kv-heads", 2, "--head-dim", 4, "--hidden-size", 8, "--numbers", 100, "--rounds", 1]
    folded, fold_in = [], LowRankState.fold_in

    def noting(state, features, values):
        folded.append(features.shape[2])
        fold_in(state, features, values)

    monkeypatch.setattr(LowRankState, "fold_in", noting)
    report = benchmark("fold_blocks.py", words, monkeypatch, capsys)
    rows = [(row["memory"], row["numbers"], row["ratio"] == 1) for row in report["results"]]
    assert rows == [(memory, *form) for memory in (*MEMORIES, "untrained") for form in (("all at once", True), ("100", False))]
    assert set(folded) == {40, 6, 4} and sum(folded) == 2 * 2 * 2 * 40, "forms, rounds, trained memories"
