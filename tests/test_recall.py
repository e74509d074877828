"""Needles: numbers that a text mentions once, and whether a cache finds them."""

import json
from unittest import mock

import pytest
import tiny
import torch
from test_cli import model, run, text  # noqa: F401
from transformers import AutoTokenizer, DynamicCache

from less_cache import H2O, AttentionMatching, LESSCache, LESSError
from less_cache.evaluation import recall


def hidden(text, model, count=6, length=200, decoded=0, seed=0):  # noqa: F811
    return recall.needles([text], AutoTokenizer.from_pretrained(model), count, length, decoded, seed)


def test_a_number_is_in_its_prompt_once_and_nowhere_else(model, text):  # noqa: F811
    tokenizer, page = AutoTokenizer.from_pretrained(model), text.read_text()
    needles = hidden(text, model, decoded=7)
    assert [needle.depth for needle in needles] == [(index + 0.5) / 6 for index in range(6)]
    for needle in needles:
        prompt, question, following = (
            "".join(tokenizer.convert_ids_to_tokens(each)) for each in (needle.prompt, needle.question, needle.following)
        )
        assert len(needle.prompt) == 200 and prompt.count(needle.number) == 1 and needle.number not in question + following
        at = prompt.index(" One of the special")
        assert at == int(needle.depth * (200 - len(recall.NEEDLE.format(word=question_word(prompt), number=1234))))
        before, after = prompt[:at], prompt[prompt.index(needle.number) + 6 :]
        assert before + after + following in page


def question_word(prompt: str) -> str:
    return next(word for word in recall.WORDS if f"numbers for {word} is" in prompt)


def test_needles_are_those_of_their_seed(model, text):  # noqa: F811
    first, again, other = hidden(text, model), hidden(text, model), hidden(text, model, seed=1)
    assert all(torch.equal(one.prompt, two.prompt) for one, two in zip(first, again, strict=True))
    assert not any(torch.equal(one.prompt, two.prompt) for one, two in zip(first, other, strict=True))


def test_what_is_found_is_what_the_answer_says(model, text, monkeypatch):  # noqa: F811
    """Every cache is asked for every needle, the one that reads twice last."""
    asked = []

    def answer(model, tokenizer, cache, needle, twice):
        asked.append((type(cache), twice))
        return f"It is {needle.number}." if needle.depth < 0.5 else "1"

    monkeypatch.setattr(recall, "answer", answer)
    monkeypatch.setattr(recall, "share_of_bytes", lambda *_: 0.5)
    rows = recall.measure(tiny.tiny_llama(), None, hidden(text, model), [0.2])
    assert [row.cache for row in rows] == ["full", "h2o", "less", "less, read twice"]
    for row in rows:
        assert (row.found, row.bytes_share) == (3, 0.5) and row.depths == [7 / 12, 9 / 12, 11 / 12]
    assert [kind for kind, _ in asked] == [DynamicCache] * 6 + [LESSCache] * 18
    assert [twice for _, twice in asked] == [False] * 18 + [True] * 6


def test_a_full_cache_answers_as_generate_does_without_one(model, text):  # noqa: F811
    """After tokens that were decoded one by one as well."""
    llama, tokenizer = tiny.tiny_llama(), AutoTokenizer.from_pretrained(model)
    for decoded in (0, 5):
        needle = hidden(text, model, decoded=decoded)[2]
        whole = torch.cat([needle.prompt, needle.following, needle.question])[None]
        options = {"attention_mask": torch.ones_like(whole), "max_new_tokens": recall.ANSWER, "do_sample": False}
        expected = llama.generate(whole, **options)[0, whole.shape[1] :]
        full = DynamicCache(config=llama.config)
        assert recall.answer(llama, tokenizer, full, needle) == tokenizer.decode(expected)
        everything = LESSCache(llama, AttentionMatching(1000))
        with mock.patch.object(LESSCache, "read", autospec=True, side_effect=LESSCache.read) as read:
            assert recall.answer(llama, tokenizer, everything, needle, twice=True) == tokenizer.decode(expected)
        assert read.call_count == 1


def test_bytes_are_those_of_16_bit_numbers():
    """What a float32 model's H2O cache holds beside its counters is half as much there, as a full cache is."""
    llama = tiny.tiny_llama()
    cache, half = LESSCache(llama, H2O(5, 5)), LESSCache(llama.bfloat16(), H2O(5, 5))
    with torch.no_grad():
        for each in (half, cache):
            llama.to(torch.bfloat16 if each is half else torch.float32)(torch.arange(1, 90)[None], past_key_values=each)
    assert recall.share_of_bytes(cache, llama) == pytest.approx(recall.share_of_bytes(half, llama.bfloat16()), rel=1e-6)
    assert recall.share_of_bytes(DynamicCache(config=llama.config), llama) == 1


def test_the_command_reports_every_cache(model, text, tmp_path):  # noqa: F811
    words = ["eval", "recall", model, "--data", text, "--budget", 0.5, "--length", 200, "--needles", 2, "--decoded", 3]
    result = run(*words, "--output", tmp_path / "recall.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "recall.json").read_text())
    assert json.loads(result.stdout.splitlines()[-1]) == report
    assert [row["cache"] for row in report["results"]] == ["full", "h2o", "less", "less, read twice"]
    for row in report["results"]:
        assert row["found"] + len(row["depths"]) == 2 and 0 < row["bytes_share"] <= 1
    assert report["length"] == 200 and report["decoded"] == 3 and report["weights"]
    assert json.loads(run(*words).stdout.splitlines()[-1]) == report


def test_what_cannot_be_measured_is_said_first(model, text, tmp_path):  # noqa: F811
    words = ["eval", "recall", model, "--data", text]
    assert "share of a full cache's bytes" in run(*words, "--budget", 2).output
    assert "does not exist" in run("eval", "recall", model, "--data", tmp_path / "none", "--budget", 0.1).output
    with pytest.raises(LESSError, match="expected at least 100000 tokens"):
        hidden(text, model, length=100000)
    with pytest.raises(LESSError, match="needle, got 20"):
        hidden(text, model, length=20)
