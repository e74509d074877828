"""`less-cache profile`: what adaptive heads get, averaged over texts; and the commands on folders that hold a profile."""

import json

import pytest
import tiny
import torch
from test_cli import model, run, text  # noqa: F401
from test_head_budgets import beside, profile
from test_hub_files import contents
from test_hub_publish import publishable

from less_cache import AttentionMatching, HeadBudgets, LESSCache, LESSError, LESSKernels, models
from less_cache.evaluation import profile as measuring
from less_cache.evaluation.perplexity import stretches
from less_cache.integration.families import fingerprint
from less_cache.kernels.head_budgets import BUDGETS_NAME

MODEL = tiny.tiny_llama()
SIZES = ("--budget", 12, "--sequences", 3, "--prompt-length", 60, "--batch-size", 2)


@torch.no_grad()
def test_shares_are_those_that_a_cache_allots():
    """Of each text what its own cache keeps, whatever is read beside it."""
    tokens = torch.randint(1, tiny.VOCAB, (3, 60))
    done = []
    measured = measuring.shares(MODEL, tokens, 12, batch_size=2, advance=done.append)
    assert measured.shape == (3, 2, 2) and done == [2, 1]
    torch.testing.assert_close(measured.mean((1, 2)), torch.ones(3, dtype=torch.double))
    for row, shares in zip(tokens, measured, strict=True):
        cache = LESSCache(MODEL, AttentionMatching(12), heads="adaptive")
        MODEL(row[None], past_key_values=cache)
        kept = torch.stack([(layer.held.slots.columns().positions >= 0).sum(-1)[0] for layer in cache.layers])
        torch.testing.assert_close(shares, kept.double() / 12)
        assert len(kept.unique()) > 1


def test_the_mean_over_texts():
    measured = torch.tensor([[[0.5, 1.5]], [[1.5, 0.5]], [[0.5, 1.5]], [[0.5, 1.5]]], dtype=torch.double)
    assert measuring.mean(measured).tolist() == [[0.75, 1.25]]
    assert measuring.explained(measured) == 0.25  # 0.25² between heads, of 0.5² in all
    assert measuring.explained(measured[:1]) == measuring.explained(torch.ones(2, 2, 2)) == 1
    rounded = measuring.mean(torch.tensor([[[0.3, 1.6]]]))
    assert rounded.mean().item() == pytest.approx(1, abs=1e-12)


def test_a_budget_that_keeps_everything():
    with pytest.raises(LESSError, match=r"budget below the prompt.* for 10 tokens, which keeps all of them\. Pass a smaller"):
        measuring.shares(MODEL, torch.ones(1, 10, dtype=torch.long), 0.9)


def test_profile_then_use(model, text, tmp_path):  # noqa: F811
    """Into a new folder, and beside kernels, whose base model's name it takes."""
    result = run("profile", model, "--data", text, *SIZES, "--output", tmp_path / "new" / "folder")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "new" / "folder" / BUDGETS_NAME)
    for said in ("layer", "share of the budget", "between texts", "is the same in every text. 3 texts in"):
        assert said in result.stderr
    budgets = HeadBudgets.from_pretrained(tmp_path / "new" / "folder")
    loaded, tokenizer = models.load(str(model))
    expected = measuring.mean(measuring.shares(loaded, stretches([text], tokenizer, 3, 60), 12))
    torch.testing.assert_close(torch.tensor(budgets.shares, dtype=torch.double), expected, rtol=0, atol=6e-5)
    assert (budgets.layers, budgets.model_type, budgets.base_model) == ([0, 1], "llama", "model")
    assert budgets.base_model_fingerprint == fingerprint(MODEL)
    described = AttentionMatching(12).to_dict()
    sizes = {"sequences": 3, "prompt_length": 60, "budget": 12, "policy": described, "dtype": "float32"}
    assert budgets.measured == {"data": ["text.txt"], **sizes}
    assert str(tmp_path) not in (tmp_path / "new" / "folder" / BUDGETS_NAME).read_text()

    publishable().save_pretrained(tmp_path / "kernels")
    beside_kernels = run("profile", model, "--data", text, *SIZES, "--output", tmp_path / "kernels")
    assert beside_kernels.exit_code == 0, beside_kernels.output
    kernels = LESSKernels.from_pretrained(tmp_path / "kernels")
    assert kernels.head_budgets.base_model == "org/tiny" and kernels.head_budgets.shares == budgets.shares
    assert LESSCache(loaded, kernels=kernels, heads="profile").options.heads == kernels.head_budgets


def test_measured_again(model, text, tmp_path):  # noqa: F811
    """In place of the earlier one, with the name that is given; a share of bytes, in another type."""
    words = ("profile", model, "--data", text, "--output", tmp_path / "out", "--prompt-length", 60, "--sequences", 2)
    assert run(*words, "--budget", 12).exit_code == 0
    again = run(*words, "--budget", 0.2, "--dtype", "bfloat16", "--base-model", "org/tiny")
    assert again.exit_code == 0, again.output
    budgets = HeadBudgets.from_pretrained(tmp_path / "out")
    assert budgets.base_model == "org/tiny" and budgets.measured["dtype"] == "bfloat16"
    assert budgets.measured["policy"] == LESSCache(MODEL.config, budget=0.2).policy.to_dict()


def something_else(folder) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")


def others_kernels(folder) -> None:
    publishable(base_model_fingerprint="0" * 64).save_pretrained(folder)


def others_profile(folder) -> None:
    profile(base_model_fingerprint="0" * 64).save_pretrained(folder)


def damaged_profile(folder) -> None:
    folder.mkdir()
    (folder / BUDGETS_NAME).write_text("{}")


BAD = {  # words, what is said, what the output folder holds before
    "no text": (("--data", "absent.txt"), "absent.txt, which does not exist", None),
    "a folder of text": (("--data", "."), "got ., which is no file", None),
    "budget of nothing": (("--budget", 0), "got 0", None),
    "budget of all": (("--budget", 1.5), "got 1.5", None),
    "budget of the prompt": (("--budget", 60, "--prompt-length", 60), "below the prompt of 60 tokens, got 60", None),
    "dtype": (("--dtype", "int8"), "got 'int8'", None),
    "fewer sequences than texts": (("--data", "TEXT", "--sequences", 1), "at least one sequence for each of 2 texts", None),
    "a file": (("--output", "TEXT"), "which is a file", None),
    "something else": ((), "which holds thesis.txt. Choose another folder", something_else),
    "a damaged profile": ((), "an entry is missing", damaged_profile),
}
BAD_OF_THE_MODEL = {
    "too little text": (("--prompt-length", 60, "--sequences", 99), "got 680 tokens", None),
    "everything kept": (("--budget", 0.9, *SIZES[2:]), "which keeps all", None),
    "kernels of another model": (SIZES, "different models: base_model_fingerprint", others_kernels),
    "a profile of another model": (SIZES, "found those of another (org/tiny)", others_profile),
}


@pytest.mark.parametrize("name", [*BAD, *BAD_OF_THE_MODEL])
def test_bad_input_ends_in_one_line(name, model, text, tmp_path, monkeypatch):  # noqa: F811
    """Nothing is written; what can be known before is said before the model is loaded."""
    options, said, prepare = {**BAD, **BAD_OF_THE_MODEL}[name]
    if prepare is not None:
        prepare(tmp_path / "out")
    before = contents(tmp_path / "out") if prepare is not None else None
    if name in BAD:
        monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("the model is loaded"))
    words = ("profile", model, "--data", text, "--output", tmp_path / "out", *options)
    result = run(*(text if word == "TEXT" else word for word in words))
    assert result.exit_code == 1
    *others, last = result.stderr.strip().splitlines()
    assert last.startswith("error: ") and said in last
    assert not [line for line in others if line and "Loading" not in line], "a traceback, or a second line"
    assert (contents(tmp_path / "out") if (tmp_path / "out").exists() else {}) == (before or {})


# The commands on folders


def test_pull_info_and_verify_know_a_profile(model, tmp_path):  # noqa: F811
    beside(publishable()).save_pretrained(tmp_path / "both")
    profile().save_pretrained(tmp_path / "alone")
    assert run("pull", tmp_path / "both", "--output", tmp_path / "copy").exit_code == 0
    assert contents(tmp_path / "copy") == contents(tmp_path / "both")
    for folder in ("both", "alone"):
        shown = run("info", tmp_path / folder)
        assert shown.exit_code == 0 and "shares: [[0.5, 1.5], [0.75, 1.25]]" in shown.stdout, shown.output
        assert ("rank: 2" in shown.stdout) == (folder == "both")
        right = run("verify", tmp_path / folder, "--model", model)
        assert right.exit_code == 0 and f"for {model}" in right.stdout, right.output
        assert run("verify", tmp_path / folder).exit_code == 0
    other = tiny.tiny_llama()
    other.model.norm.weight.data += 1
    other.save_pretrained(model)
    wrong = run("verify", tmp_path / "alone", "--model", model)
    assert wrong.exit_code == 1 and "head budgets are for another base model" in wrong.stderr


def test_verify_checks_a_profile_beside_kernels_that_name_no_weights(model, tmp_path):  # noqa: F811
    beside(publishable(base_model_fingerprint=None), profile(base_model_fingerprint="0" * 64)).save_pretrained(
        tmp_path / "both"
    )
    wrong = run("verify", tmp_path / "both", "--model", model)
    assert wrong.exit_code == 1 and "head budgets are for another base model" in wrong.stderr


def test_push_and_pull_refuse_a_damaged_profile(tmp_path):
    beside(publishable()).save_pretrained(tmp_path / "both")
    entries = json.loads((tmp_path / "both" / BUDGETS_NAME).read_text())
    assert BUDGETS_NAME in run("push", tmp_path / "both", "owner/kernels", "--dry-run").stdout
    (tmp_path / "both" / BUDGETS_NAME).write_text(json.dumps({**entries, "shares": [[9.0, 9.0], [9.0, 9.0]]}))
    for words in (
        ("push", tmp_path / "both", "owner/kernels", "--dry-run"),
        ("pull", tmp_path / "both"),
        ("info", tmp_path / "both"),
    ):
        result = run(*words)
        assert result.exit_code == 1 and "1 on average, got 9" in result.stderr and result.stderr.count("\n") == 1


def test_pull_into_a_folder_with_another_models_profile(tmp_path):
    publishable().save_pretrained(tmp_path / "kernels")
    others_profile(tmp_path / "out")
    before = contents(tmp_path / "out")
    result = run("pull", tmp_path / "kernels", "--output", tmp_path / "out")
    assert result.exit_code == 1 and "different models" in result.stderr and contents(tmp_path / "out") == before
