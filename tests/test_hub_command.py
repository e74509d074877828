"""`less-cache pull`, `push`, `info`, `verify` and `card`, and the recipe that joins them with training and measuring."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import tiny
from hub_server import OWNER_TOKEN
from huggingface_hub import ModelCard
from test_cli import model, run, text  # noqa: F401
from test_hub_files import change_config, contents
from test_hub_publish import PUBLISHED, REPORT, publishable

from less_cache import LESSKernels
from less_cache.hub import card
from less_cache.kernels.folder import CONFIG_NAME, WEIGHTS_NAME

REPO = "owner/kernels"
RECIPE = Path(__file__).parents[1] / "hub" / "publish.py"


@pytest.fixture
def folder(tmp_path):
    publishable().save_pretrained(tmp_path / "kernels")
    return tmp_path / "kernels"


def test_push_then_pull(hub, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)
    pushed = run("push", folder, REPO, "--license", "mit")
    assert pushed.exit_code == 0 and pushed.stdout.startswith(f"{hub.endpoint}/{REPO}/commit/")
    pulled = run("pull", REPO)
    assert pulled.exit_code == 0 and WEIGHTS_NAME in contents(Path(pulled.stdout.strip()))
    copied = run("pull", REPO, "--output", tmp_path / "copy")
    assert copied.exit_code == 0 and contents(tmp_path / "copy") == contents(folder)


def test_a_pull_replaces_nothing_good(hub, folder, tmp_path):
    hub.create(REPO, {**contents(folder), WEIGHTS_NAME: b"bad"})
    result = run("pull", REPO, "--output", folder)
    assert result.exit_code == 1 and "expected sha256" in result.stderr
    LESSKernels.from_pretrained(folder)


def test_dry_run_sends_nothing(hub, folder):
    result = run("push", folder, REPO, "--dry-run")
    assert result.exit_code == 0 and not hub.log
    assert all(name in result.stdout for name in PUBLISHED)


def test_info(folder):
    change_config(folder, metrics={"prose": {"results": 5}, "\x1b[31m": "\x1b[2J"})  # a stranger's words
    result = run("info", folder)
    assert result.exit_code == 0, result.output
    for said in (
        'base_model: "org/tiny"',
        "rank: 2",
        "weights: float32, 0.0 MB",
        '"prose": {"results": 5}',
        f"folder: {folder}",
    ):
        assert said in result.stdout
    assert "\x1b" not in result.stdout


def test_verify(folder, model):  # noqa: F811
    assert run("verify", folder).exit_code == 0
    right = run("verify", folder, "--model", model)
    assert right.exit_code == 0 and f"trained for {model}" in right.stdout
    other = tiny.tiny_llama()
    other.model.norm.weight.data += 1
    other.save_pretrained(model)
    wrong = run("verify", folder, "--model", model)
    assert wrong.exit_code == 1 and "another base model" in wrong.stderr
    change_config(folder, sha256=None)
    unknown = run("verify", folder)
    assert unknown.exit_code == 1 and "names no sha256" in unknown.stderr


def write_report(folder: Path, **changes) -> Path:
    sha256 = json.loads((folder / CONFIG_NAME).read_text())["sha256"]
    path = folder.parent / "report.json"
    path.write_text(json.dumps({"model": "tiny", "kernels_sha256": sha256, **REPORT, **changes}))
    return path


def test_card(folder):
    change_config(folder, metrics={}, base_model="/somewhere/local")
    weights = (folder / WEIGHTS_NAME).read_bytes()
    options = ("--report", f"novel={write_report(folder)}", "--base-model", "org/tiny", "--license", "mit", "--no-plot")
    assert run("card", folder, *options).exit_code == 0
    written = contents_below(folder)
    assert set(written) == PUBLISHED and written[WEIGHTS_NAME] == weights
    assert LESSKernels.from_pretrained(folder).config.metrics == {"novel": REPORT}
    assert ModelCard.load(folder / "README.md").data.license == "mit"
    assert run("card", folder, "--no-plot").exit_code == 0
    assert contents_below(folder) == written


def contents_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_card_s_plot(folder):
    pytest.importorskip("matplotlib", reason="the plot needs the extra")
    assert run("card", folder).exit_code == 0
    assert (folder / card.PLOT_NAME).read_bytes().startswith(b"\x89PNG")
    assert card.PLOT_NAME in (folder / "README.md").read_text()


MALFORMED = {
    "no results": {"results": []},
    "results of another kind": {"results": 5},
    "rows of another kind": {"results": [[5]]},
    "no rows": {"results": [[]]},
    "no perplexity": {"results": [[{**REPORT["results"][0][0], "perplexity": "low"}]]},
    "no bytes": {"results": [[{key: value for key, value in row.items() if key != "bytes"} for row in REPORT["results"][0]]]},
    "policy without a name": {"results": [[{**row, "policy": {"heavy": 1}} for row in REPORT["results"][0]]]},
    "policy of words": {"results": [[{**row, "policy": {"name": "h2o", "heavy": "many"}} for row in REPORT["results"][0]]]},
    "no full cache": {"results": [REPORT["results"][0][1:]]},
    "full cache alone": {"results": [REPORT["results"][0][:1]]},
    "no number": {"results": [[*REPORT["results"][0][:-1], {**REPORT["results"][0][-1], "perplexity": float("nan")}]]},
    "gap in words": {"results": [[{**row, "gap_recovered": "half"} for row in REPORT["results"][0]]]},
    "data of another kind": {"data": "prose.txt"},
    "no sequences": {"sequences": None},
}


@pytest.mark.parametrize("changes", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("plot", ["--plot", "--no-plot"])
def test_malformed_metrics(folder, changes, plot):
    """In a config and in a report: one error that says which, and nothing is written."""
    said = "'novel': expected a report of less-cache eval perplexity"
    path = write_report(folder, **changes)
    before = contents_below(folder)
    result = run("card", folder, plot, "--report", f"novel={path}")
    assert result.exit_code == 1 and said in result.stderr and result.stderr.count("\n") == 1
    assert contents_below(folder) == before
    change_config(folder, metrics={"prose": REPORT, "novel": {**REPORT, **changes}})
    for command in (("card", folder, plot), ("push", folder, REPO, "--dry-run")):
        result = run(*command)
        assert result.exit_code == 1 and said in result.stderr and "Measure again" in result.stderr


BAD = {
    "no folder": (("card", "absent"), "Expected a folder of kernels"),
    "push no folder": (("push", "absent", REPO), "Expected a folder of kernels"),
    "pull into a file": (("pull", "KERNELS", "--output", __file__), "cannot be written"),
    "no report": (("card", "KERNELS", "--report", "prose=absent.json"), "Expected --report NAME=FILE"),
    "no name": (("card", "KERNELS", "--report", "absent.json"), "Expected --report NAME=FILE"),
    "other kernels": (("card", "KERNELS", "--report", "prose=OTHER"), "a report on other kernels"),
    "no kernels": (("verify", "absent-organisation/absent"), "HF_HUB_OFFLINE"),
    "no kernels to tell of": (("info", "./absent"), "not a valid Hub repository id"),
}


@pytest.mark.parametrize("arguments, said", BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line(folder, arguments, said):
    before = contents_below(folder)
    other = write_report(folder, kernels_sha256="0" * 64)
    result = run(*(word.replace("KERNELS", str(folder)).replace("OTHER", str(other)) for word in arguments))
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and said in result.stderr
    assert result.stderr.count("\n") == 1 and contents_below(folder) == before


@pytest.fixture
def recipe(model, text, tmp_path, monkeypatch):  # noqa: F811
    """The recipe on a tiny model: `recipe(*options)` is its exit code."""
    pytest.importorskip("matplotlib", reason="less-cache train needs the extra")
    steps = "--layerwise-steps 1 --joint-steps 1 --prompt-length 40 --sequences 2 --batch-size 1 --hidden-size 4"
    trained = ["--train-data", text, "--train-options", steps, "--license", "mit"]
    measured = ["--budget", "8", "--budget", "12", "--sequences", "2", "--prompt-length", "40", "--decoded", "8"]

    def run_recipe(*options) -> int:
        words = ["publish.py", model, tmp_path / "tiny-h2o", REPO, *trained, *measured, *options]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(RECIPE), run_name="__main__")
        return ended.value.code

    return run_recipe


def test_recipe(hub, recipe, text, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Train, store, measure, describe, verify: a folder that is ready to publish, and nothing was sent."""
    folder = tmp_path / "tiny-h2o"
    (tmp_path / "other.txt").write_text(text.read_text())
    reports = [word for name in ("austen=text.txt", "two=text.txt", "two=other.txt") for word in ("--report", name)]
    monkeypatch.chdir(tmp_path)
    assert recipe("--base-model", "org/tiny", *reports) == 0
    printed = capsys.readouterr().out
    steps = [line.split()[2] for line in printed.splitlines() if line.startswith("$ ")]
    assert steps == ["train", "eval", "eval", "card", "verify", "push"]
    assert set(contents_below(folder)) == PUBLISHED | {card.PLOT_NAME}
    kernels = LESSKernels.from_pretrained(folder)
    assert kernels.config.base_model == "org/tiny" and len(kernels.config.metrics["austen"]["results"]) == 2
    assert [kernels.config.metrics[name]["data"] for name in ("austen", "two")] == [["text.txt"], ["text.txt", "other.txt"]]
    assert f"less-cache push {folder} {REPO}" in printed and not hub.log


def test_recipe_ends_where_a_step_fails(recipe, text, capsys):  # noqa: F811
    assert recipe("--base-model", "org/tiny", "--report", f"austen={text}", "--decoded", "9999") == 1
    printed = capsys.readouterr()
    assert "$ less-cache eval" in printed.out and "$ less-cache card" not in printed.out
    assert "got 680 tokens" in printed.err


BAD_RECIPES = {
    "no text": (("--base-model", "org/tiny", "--report", "austen=absent.txt"), "got 'austen=absent.txt'"),
    "no name": (("--base-model", "org/tiny", "--report", "absent.txt"), "got 'absent.txt'"),
    "no base model": (("--report", "austen=TEXT"), "expected a Hub id"),
    "no Hub id": (("--base-model", "tiny", "--report", "austen=TEXT"), "got 'tiny'"),
    "budget": (("--base-model", "org/tiny", "--report", "austen=TEXT", "--budget", "1.5"), "got 1.5"),
    "policy": (("--base-model", "org/tiny", "--report", "austen=TEXT", "--policy", "h3o"), "h3o"),
}


@pytest.mark.parametrize("options, said", BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_recipe_checks_before_it_trains(recipe, text, options, said, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "300")  # one line
    monkeypatch.chdir(text.parent)
    assert recipe(*(option.replace("TEXT", "text.txt") for option in options)) == 2
    printed = capsys.readouterr()
    assert "$ less-cache" not in printed.out and said in printed.err
