"""The rival of equal bytes, by the bytes that caches really hold; and what storing kernels in 16 bit costs."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_cli import model, run, text  # noqa: F401

from less_cache import H2O, LESSCache, LESSError
from less_cache.evaluation import perplexity
from less_cache.evaluation.perplexity import with_state_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 8, [1, 8], [16, 2]], ids=str)
def test_the_rival_has_the_bytes_of_the_state(rank, dtype):
    """As many tokens more as take them, and not one too many."""
    llama = tiny.tiny_llama().to(dtype)
    kernels = tiny.tiny_kernels(llama, rank=rank)

    def held(policy, kernels=None):
        cache = LESSCache(llama, policy, kernels)
        with torch.no_grad():
            llama(torch.arange(1, 90)[None], past_key_values=cache)
        return cache.memory_footprint()

    policy = H2O(4, 4)
    rival = with_state_bytes(policy, kernels, dtype.itemsize)
    wanted = held(policy).keys_values + held(policy, kernels).low_rank_state
    token = held(policy).keys_values // 9  # a slot is free for the next
    assert wanted <= held(rival).keys_values < wanted + token
    assert rival.heavy == 4 and with_state_bytes(policy, kernels, dtype.itemsize, "heavy").recent == 4


def test_fractions_have_no_bytes_yet():
    with pytest.raises(LESSError, match="Expected token counts"):
        with_state_bytes(H2O(0.1, 0.1), tiny.tiny_kernels(tiny.tiny_llama()), 4)


def test_a_report_spares_what_it_has_measured(model, text, tmp_path, monkeypatch):  # noqa: F811
    """The same report as without it, by one measurement instead of six; another protocol is refused."""
    tiny.tiny_kernels(tiny.tiny_llama()).save_pretrained(tmp_path / "kernels")
    words = ["eval", "perplexity", model, "--data", text, "--budget", 8]
    words += ["--sequences", 2, "--prompt-length", 40, "--decoded", 8]
    assert run(*words, "--output", tmp_path / "before.json").exit_code == 0
    words += ["--kernels", tmp_path / "kernels"]
    anew = json.loads(run(*words).stdout.splitlines()[-1])
    calls, measured = [], perplexity.perplexity
    monkeypatch.setattr(perplexity, "perplexity", lambda *given: calls.append(given) or measured(*given))
    spared = json.loads(run(*words, "--known", tmp_path / "before.json").stdout.splitlines()[-1])
    origin = {name: anew[name] for name in ("machine", "versions", "commit")}
    assert spared == {**anew, "known": origin} and anew["known"] is None and len(calls) == 1

    kept = text.read_text()
    text.write_text(kept[::-1])  # another text of the same name
    other = run(*words, "--known", tmp_path / "before.json")
    assert other.exit_code == 1 and "expected tokens_sha256" in " ".join(other.output.split())
    text.write_text(kept)
    longer = run(*words, "--decoded", 9, "--known", tmp_path / "before.json")
    assert longer.exit_code == 1 and "expected decoded 9, as in this measurement, got 8" in " ".join(longer.output.split())


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


def test_the_benchmark_of_types(model, text, tmp_path, monkeypatch, capsys):  # noqa: F811
    """As `less-cache eval perplexity` on the same kernels, and rounding changes little, but something."""
    tiny.tiny_kernels(tiny.tiny_llama()).save_pretrained(tmp_path / "kernels")
    lengths = ["--budget", "8", "--sequences", "3", "--prompt-length", "40", "--decoded", "8"]
    words = [model, tmp_path / "kernels", "--data", text, *lengths, "--batch-size", "2"]
    report = benchmark("dtypes.py", words, monkeypatch, capsys)

    evaluated = run("eval", "perplexity", model, "--kernels", tmp_path / "kernels", "--data", text, *lengths)
    full, alone, *_, less = json.loads(evaluated.stdout.splitlines()[-1])["results"][0]
    assert (report["full"], report["policy_alone"]) == pytest.approx((full["perplexity"], alone["perplexity"]), rel=1e-5)
    exact, *rounded = (report["dtypes"][name] for name in ("float32", "float16", "bfloat16"))
    assert exact["perplexity"] == pytest.approx(less["perplexity"], rel=1e-5)
    assert exact["weights_changed"] == exact["nats_lost"] == 0
    for row in rounded:
        assert row["file_bytes"] < exact["file_bytes"] and row["weights_changed"] > 0.9
        assert 0 < abs(row["nats_lost"]) < 0.1 and len(row["nats_lost_by_batch"]) == 2
        assert row["nats_lost"] == pytest.approx(math.log(row["perplexity"] / exact["perplexity"]), abs=1e-9)
