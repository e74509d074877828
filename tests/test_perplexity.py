"""The rival of equal bytes, by the bytes that caches really hold; and what is not measured twice."""

import json

import pytest
import tiny
import torch
from test_cli import model, run, text  # noqa: F401

from less_cache import H2O, LESSCache, LESSError
from less_cache.evaluation import command, perplexity
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


@torch.no_grad()
def test_every_cache_is_measured_against_the_full_one():
    """One that keeps all tokens does not differ from it, and fitted ones hold the bytes of the policy's tokens."""
    llama = tiny.tiny_llama(hidden_size=64, head_dim=16)
    tokens = torch.randint(2, tiny.VOCAB, (3, 120), generator=torch.Generator().manual_seed(0))
    kernels = tiny.tiny_kernels(llama)
    rows = perplexity.measure(llama, tokens, H2O(60, 60), kernels, prompt_length=80, batch_size=2)
    assert [row.cache for row in rows] == [
        "full",
        "policy",
        *["baseline+"] * 2,
        "untrained",
        "less",
        "fitted",
        "fitted, trained",
    ]
    assert rows[0].divergence == 0 and all(row.divergence < 1e-5 for row in rows[1:6])
    token = 2 * 2 * 16 * 2 * 2  # bytes: keys and values of a head in 16 bits, two KV heads, two layers
    assert rows[0].bytes == pytest.approx(2 * token * (80 + 119) / 2)  # in 32 bits
    for row in perplexity.measure(llama, tokens, H2O(20, 20), kernels, prompt_length=80, batch_size=2)[-2:]:
        assert 0 < row.divergence == pytest.approx(sum(row.quarters) / 4, rel=0.05)
        assert 0.9 * 40 * token < row.bytes < 1.15 * 40 * token


def test_a_report_spares_what_it_has_measured(model, text, tmp_path, monkeypatch):  # noqa: F811
    """The same report as without it, by three measurements instead of eight, which says where the others were made, also where
    they come from a report that had them from another; another protocol is refused.
    """
    tiny.tiny_kernels(tiny.tiny_llama()).save_pretrained(tmp_path / "kernels")
    words = ["eval", "perplexity", model, "--data", text, "--budget", 8]
    words += ["--sequences", 2, "--prompt-length", 40, "--decoded", 8]
    assert run(*words, "--output", tmp_path / "before.json").exit_code == 0
    before = json.loads((tmp_path / "before.json").read_text())
    (tmp_path / "before.json").write_text(json.dumps({**before, "commit": "the first"}))
    words += ["--kernels", tmp_path / "kernels"]
    anew = json.loads(run(*words).stdout.splitlines()[-1])
    calls, measured = [], perplexity.scored
    monkeypatch.setattr(perplexity, "scored", lambda *given: calls.append(type(given[2]).__name__) or measured(*given))
    spared = json.loads(run(*words, "--known", tmp_path / "before.json").stdout.splitlines()[-1])
    origin = {"commit": "the first", **{name: anew[name] for name in ("machine", "versions")}}
    rows = [row if row["cache"] in perplexity.WITH_KERNELS else {**row, "origin": origin} for row in anew["results"][0]]
    assert spared == {**anew, "results": [rows]} and calls == ["DynamicCache", "LESSCache", "LESSCache"]
    assert all(row["origin"] is None for row in anew["results"][0])
    (tmp_path / "between.json").write_text(json.dumps(spared))
    assert json.loads(run(*words, "--known", tmp_path / "between.json").stdout.splitlines()[-1]) == spared

    kept = text.read_text()
    text.write_text(kept[::-1])  # another text of the same name
    other = run(*words, "--known", tmp_path / "before.json")
    assert other.exit_code == 1 and "expected tokens_sha256" in " ".join(other.output.split())
    text.write_text(kept)
    longer = run(*words, "--decoded", 9, "--known", tmp_path / "before.json")
    assert longer.exit_code == 1 and "expected decoded 9, as in this measurement, got 8" in " ".join(longer.output.split())


@pytest.mark.parametrize(
    "row", [{"perplexity": None, "bytes": 1}, {"perplexity": 1.5, "bytes": "1"}, {"perplexity": True, "bytes": 1}]
)
def test_a_report_without_its_numbers_is_refused(row, tmp_path):
    """A perplexity that was no number stands there as null."""
    report = {"machine": "", "versions": {}, "commit": "", "results": [[{"cache": "full", "policy": None, **row}]]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(LESSError, match=r"Expected --known to be a report.*full has the perplexity"):
        command.read(tmp_path / "report.json", {})
