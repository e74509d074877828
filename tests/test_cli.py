"""The command line on a tiny model from disk: every command to its end, and bad input in one line."""

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import datasets
import pytest
import tiny
import zoo
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from less_cache import LESSKernels
from less_cache.cli import demo
from less_cache.cli.app import app
from less_cache.hub import catalogue
from less_cache.integration.families import fingerprint
from less_cache.training import TrainingOptions, command
from less_cache.training.cost import Cost

TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife. " * 8


@pytest.fixture
def model(tmp_path, request):
    """Folder of a tiny model whose tokens are characters: a Llama, or what the test names."""
    vocabulary = {chr(32 + index): index for index in range(tiny.VOCAB)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="?").save_pretrained(folder)
    built = zoo.build(request.param) if hasattr(request, "param") else tiny.tiny_llama()
    built.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_demo_compares_full_policy_rival_and_less(model, text, tmp_path):
    tiny.tiny_kernels(tiny.tiny_llama()).save_pretrained(tmp_path / "kernels")
    result = run("demo", "--model", model, "--kernels", tmp_path / "kernels", "--prompt-file", text, "--max-new-tokens", 3)
    assert result.exit_code == 0, result.output
    for label in ("full cache", "h2o alone", "h2o, equal bytes", "LESS on h2o", "fitted", "perplexity", "saved"):
        assert label in result.output


def test_demo_asks_the_catalogue(model, text, tmp_path, monkeypatch):
    """By the weights, whatever the folders are called; for the policy that is asked for, if there are any."""
    identity = fingerprint(tiny.tiny_llama())
    entries = []
    for name, policy in (("a", "h2o"), ("b", "sink_recent"), ("of-others", "h2o")):
        kernels = tiny.tiny_kernels(tiny.tiny_llama())
        kernels.config.policy = {"name": policy}
        kernels.save_pretrained(tmp_path / name)
        sha = identity if name != "of-others" else "0" * 64
        entries.insert(0, {"fingerprint": sha, "folder": name, "repo_id": "someone/never-asked"})
    (tmp_path / "catalogue.json").write_text(json.dumps({"org/tiny": entries}))
    monkeypatch.setattr(catalogue, "PATHS", (tmp_path / "catalogue.json",))
    monkeypatch.chdir(tmp_path)
    for policy, folder in (("h2o", "a"), ("sink_recent", "b"), ("corm", "b")):
        assert demo.find_kernels(tiny.tiny_llama(), policy).source == str(tmp_path / folder)
    assert demo.find_kernels(tiny.tiny_llama(vocab_size=98), "h2o").source == "untrained"
    result = run("demo", "--model", model, "--prompt-file", text, "--max-new-tokens", 1, "--budget", 12)
    assert result.exit_code == 0 and "\nkernels  a\n" in result.output, result.output


def test_demo_of_a_model_without_kernels_shows_the_untrained_state(model, text, monkeypatch):
    monkeypatch.setattr(catalogue, "PATHS", ())
    result = run("demo", "--model", model, "--prompt-file", text, "--max-new-tokens", 1, "--budget", 12)
    assert result.exit_code == 0, result.output
    assert "\nkernels  none for this model: the untrained state is shown\n" in result.output
    assert "untrained state on h2o" in result.output and "LESS" not in result.output


PERPLEXITIES = {  # full cache, policy alone, policy with equal bytes, the state, a fitted cache: what is said
    (10, 20, 18, 15, 12): "Of the perplexity that h2o loses, the untrained state wins back 50%, a fitted cache 80%.",
    (10, 20, 18, 15, 19): "Of the perplexity that h2o loses, the untrained state wins back 50%, a fitted cache 10%.",
    (10, 20, 14, 15, 16): "h2o, equal bytes wins here: perplexity 14.00, untrained state on h2o 15.00, fitted 16.00.",
    (10, 20, 25, 30, 21): "h2o alone wins here: perplexity 20.00, untrained state on h2o 30.00, fitted 21.00.",
    (10, 9, 9, 8, 9): "h2o loses nothing on this text: there is nothing to win back.",
    (10, 9, 8, 8, 9): "h2o, equal bytes wins here: perplexity 8.00, untrained state on h2o 8.00, fitted 9.00.",
}


@pytest.mark.parametrize("perplexities", PERPLEXITIES)
def test_demo_says_who_wins(perplexities):
    labels = ("full cache", "h2o alone", "h2o, equal bytes", "untrained state on h2o", "fitted")
    rows = [demo.Measurement(label, 1, 1.0, float(each)) for label, each in zip(labels, perplexities, strict=True)]
    assert demo.verdict("h2o", "the untrained state", rows) == PERPLEXITIES[perplexities]


@pytest.mark.parametrize("perplexities", [(10, 20, 14, 15, 16), (10, 20, 18, 15, 14)])
@pytest.mark.parametrize("trained", [False, True])
def test_demo_claims_no_share_where_equal_bytes_win(model, text, tmp_path, monkeypatch, perplexities, trained):
    """Whichever state it is: the last line is about the one that wins."""
    monkeypatch.setattr(catalogue, "PATHS", ())
    tiny.tiny_kernels(tiny.tiny_llama()).save_pretrained(tmp_path / "kernels")
    measured = iter(perplexities)
    monkeypatch.setattr(demo, "score", lambda *given: (float(next(measured)), 1.0))
    kernels = ("--kernels", tmp_path / "kernels") if trained else ()
    result = run("demo", "--model", model, "--prompt-file", text, "--max-new-tokens", 1, "--budget", 12, *kernels)
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1]
    if perplexities[2] < perplexities[3]:
        state = "LESS" if trained else "untrained state"
        assert last == f"h2o, equal bytes wins here: perplexity 14.00, {state} on h2o 15.00, fitted 16.00."
    else:
        state = "LESS" if trained else "the untrained state"
        assert last == f"Of the perplexity that h2o loses, {state} wins back 50%, a fitted cache 60%."


@pytest.mark.parametrize("prompts", ["512", [], ["512"], [512, True], {"longest": 512}, 512, [0]], ids=repr)
def test_demo_of_kernels_that_say_something_else_of_prompts(model, text, tmp_path, prompts):
    kernels = tiny.tiny_kernels(tiny.tiny_llama())
    kernels.config.training = {"prompts": prompts}
    kernels.save_pretrained(tmp_path / "kernels")
    words = ("demo", "--model", model, "--kernels", tmp_path / "kernels", "--prompt-file", text, "--max-new-tokens", 1)
    result = run(*words)
    assert result.exit_code == 1 and "expected training.prompts to be a list of prompt lengths, got" in result.stderr
    assert "Pass --prompt-tokens" in result.stderr and "Traceback" not in result.stderr
    assert run(*words, "--prompt-tokens", 100).exit_code == 0


def test_demo_without_kernels_says_so(model, text):
    result = run("demo", "--model", model, "--kernels", "none", "--prompt-file", text, "--max-new-tokens", 2, "--budget", 12)
    assert result.exit_code == 0, result.output
    assert "only the full cache and the policy" in result.output


@pytest.mark.parametrize("model", ["llama", "gpt_oss", "falcon"], indirect=True)
def test_train_then_evaluate(model, text, tmp_path):
    steps = ("--layerwise-steps", 1, "--joint-steps", 1, "--prompt-length", 40, "--sequences", 2, "--hidden-size", 4)
    steps += ("--layerwise-learning-rate", 0.125, "--joint-learning-rate", 0.25)
    trained = run("train", model, "--data", text, "--output", tmp_path / "kernels", *steps)
    assert trained.exit_code == 0, trained.output
    training = LESSKernels.from_pretrained(tmp_path / "kernels").config.training
    assert training["data"] == ["text.txt"]
    assert (training["layerwise_learning_rate"], training["joint_learning_rate"]) == (0.125, 0.25)

    lengths = ("--sequences", 2, "--prompt-length", 40, "--decoded", 8, "--dtype", "bfloat16")
    budgets = ("--budget", 8, "--budget", 0.3)  # 30 % of 40
    measured = ("--data", text, "--kernels", tmp_path / "kernels", *budgets, *lengths, "--plot", tmp_path / "plot.png")
    result = run("eval", "perplexity", model, *measured)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["dtype"] == "bfloat16" and report["machine"]["threads"] and report["versions"]["torch"]
    assert report["results"][1][1]["tokens"] == 12 and report["results"][1][0]["tokens"] == 47  # the last is not fed back
    assert report["results"][0][0] == report["results"][1][0]  # the full cache is the same, and measured once
    rows = ["full", "policy", "baseline+", "baseline+", "untrained", "less", "fitted", "fitted, trained"]
    assert [row["cache"] for row in report["results"][0]] == rows
    assert report["results"][1][1]["policy"] == {"name": "h2o", "heavy": 6, "recent": 6}


def test_train_on_a_dataset_of_the_hub(model, tmp_path, monkeypatch):
    """Streamed, by its id and configuration, as far as the steps need."""
    asked, read = [], []

    def rows():
        for row in itertools.count():
            read.append(row)
            yield {"text": TEXT}

    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: asked.append((given, options)) or rows())
    steps = ("--joint-steps", 1, "--prompt-length", 40, "--sequences", 2, "--hidden-size", 4)
    trained = run("train", model, "--data", "org/books:en", "--output", tmp_path / "kernels", *steps)
    assert trained.exit_code == 0, trained.output
    assert asked == [(("org/books", "en"), {"split": "train", "streaming": True})] and len(read) < 50
    assert LESSKernels.from_pretrained(tmp_path / "kernels").config.training["data"] == ["org/books:en"]


TWICE = """
from pathlib import Path
from sys import argv
from less_cache.cli import app
from less_cache.training.processes import Processes

app(standalone_mode=False)
processes = Processes()
if processes.is_first:
    (Path(argv[argv.index("--output") + 1]) / "work").mkdir()  # as if stopped after the last file
processes.wait()
app(standalone_mode=False)
"""


def test_two_processes_train_one_set(model, text, tmp_path):
    """The bytes of one process, written once."""
    script = tmp_path / "script.py"  # not the module: -m would run it with the arguments of another torchrun
    script.write_text(TWICE)
    sizes = ("--joint-steps", 2, "--prompt-length", 40, "--hidden-size", 4, "--sequences", 2)
    train = ("train", model, "--data", text, *sizes, "--output")
    launch = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--standalone", script)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as here: another number may add in another order
    two = subprocess.run(list(map(str, (*launch, *train, tmp_path / "two"))), env=environment, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("Wrote ") == 1 and two.stdout.count("finished.") == 1
    one = run(*train, tmp_path / "one")
    assert one.exit_code == 0, one.output
    for name in ("less_kernels.safetensors", "training_log.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_slow_training_shows_the_time_left():
    seconds = itertools.count(step=40)
    rows = command.progress_rows(Console(file=io.StringIO()))
    rows.get_time = lambda: next(seconds)
    report = command.ProgressReport(rows, Cost(own_text=0, capture=1, layerwise=0, joint=9999, disk=0, memory=0, backward=0))
    for done in range(1, 5):
        report("joint", done, 600, 1.0)
    left = [task.time_remaining for task in rows.tasks]
    assert len(left) == 2 and None not in left


@pytest.mark.parametrize("stages", [(1, 0), (0, 1)])
def test_train_on_own_text(model, tmp_path, stages):
    steps = (
        "--layerwise-steps",
        stages[0],
        "--joint-steps",
        stages[1],
        "--prompt-length",
        8,
        "--sequences",
        2,
        "--hidden-size",
        4,
    )
    trained = run("train", model, "--data", "self", "--policy", "corm", "--output", tmp_path / "kernels", *steps)
    assert trained.exit_code == 0, trained.output
    assert "explained" in trained.output
    assert {path.name for path in (tmp_path / "kernels").iterdir()} == {
        "less_config.json",
        "less_kernels.safetensors",
        "training.png",
        "training_log.json",
    }
    again = run("train", model, "--data", "self", "--policy", "corm", "--output", tmp_path / "kernels", *steps)
    assert again.exit_code == 1 and "already holds kernels" in again.stderr


STEPS = ("--prompt-length", 8, "--joint-steps", 1, "--layerwise-steps", 1, "--sequences", 2, "--hidden-size", 4)


@pytest.fixture
def stopped(model, text, tmp_path, monkeypatch):
    """Words of a training command that was stopped with its last file written, before it removed anything."""
    words = ("train", model, "--data", text, "--output", tmp_path / "out", *STEPS)
    with monkeypatch.context() as patched:
        patched.setattr(command, "remove", mock.Mock(side_effect=KeyboardInterrupt))
        assert run(*words).exit_code != 0
    assert (tmp_path / "out" / "less_config.json").exists() and (tmp_path / "out" / "work" / "run.json").exists()
    return words


@pytest.mark.parametrize("at", range(5))
def test_a_run_stopped_after_its_last_file_is_finished(stopped, tmp_path, monkeypatch, at):
    """At whichever part of its work it was removing, the folder itself included."""
    work, done = tmp_path / "out" / "work", []

    def stopping(remove):
        def removing(path, **options):
            if Path(path).is_relative_to(work) and (Path(path) == work or Path(path).parent == work):
                if len(done) == at:
                    raise KeyboardInterrupt
                done.append(path)
            return remove(path, **options)

        return removing

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", stopping(shutil.rmtree))
        patched.setattr(Path, "unlink", stopping(Path.unlink))
        patched.setattr(Path, "rmdir", stopping(Path.rmdir))
        assert run(*stopped).exit_code != 0
    assert work.exists() and len(done) == at
    again = run(*stopped)
    assert again.exit_code == 0 and "is finished" in " ".join(again.output.split()), again.output
    assert not work.exists() and LESSKernels.from_pretrained(tmp_path / "out")


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OTHERS = {
    "a dry run": lambda words, folder: (*words, "--dry-run"),
    "another model": lambda words, folder: ("train", folder / "another", *words[2:]),
    "no model at all": lambda words, folder: ("train", folder / "absent", *words[2:]),
    "other options": lambda words, folder: (*words, "--seed", 1),
    "other steps of the joint stage": lambda words, folder: (*words, "--joint-steps", 2),
    "other texts": lambda words, folder: (*words, "--data", "self"),
    "another type": lambda words, folder: (*words, "--dtype", "bfloat16"),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_another_command_removes_nothing(stopped, tmp_path, change):
    """Neither of a finished set's work nor of anything else."""
    tiny.tiny_llama(seed=1).save_pretrained(tmp_path / "another")
    before = files_below(tmp_path / "out")
    result = run(*change(stopped, tmp_path))
    assert result.exit_code == 1 and "already holds kernels. Choose another output folder" in result.stderr, result.output
    assert files_below(tmp_path / "out") == before


def say_another_model(work: Path) -> None:
    described = json.loads((work / "run.json").read_text())
    (work / "run.json").write_text(json.dumps({**described, "model": "0" * 64}))


STRANGERS = {
    "no run's": lambda work: (work / "run.json").unlink(),
    "another model's run": say_another_model,
    "unreadable": lambda work: (work / "run.json").write_text("{"),
}


@pytest.mark.parametrize("change", STRANGERS.values(), ids=STRANGERS)
def test_work_of_another_run_beside_finished_kernels_stays(stopped, tmp_path, change):
    change(tmp_path / "out" / "work")
    before = files_below(tmp_path / "out")
    result = run(*stopped)
    assert result.exit_code == 1 and "Choose another output folder" in result.stderr and "Traceback" not in result.output
    assert files_below(tmp_path / "out") == before


def test_a_finished_folder_with_a_folder_work_of_the_user(model, text, tmp_path):
    """Kernels from somewhere else, and notes beside them."""
    out = tmp_path / "out"
    tiny.tiny_kernels(tiny.tiny_llama()).save_pretrained(out)
    (out / "work").mkdir()
    (out / "work" / "notes.txt").write_text("mine")
    before = files_below(out)
    for more in ((), ("--dry-run",)):
        result = run("train", model, "--data", text, "--output", out, *STEPS, *more)
        assert result.exit_code == 1 and "already holds kernels" in result.stderr
    assert files_below(out) == before


def test_a_folder_work_that_no_run_began_is_not_taken(model, text, tmp_path):
    work = tmp_path / "out" / "work"
    for name in ("notes.txt", "layers/mine.txt"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("mine")
    result = run("train", model, "--data", text, "--output", tmp_path / "out", *STEPS)
    assert result.exit_code == 1 and "got one with layers, notes.txt and without run.json" in result.stderr, result.output
    assert files_below(tmp_path / "out") == {"work/notes.txt": b"mine", "work/layers/mine.txt": b"mine"}


def test_a_run_removes_what_it_made_and_nothing_else(model, text, tmp_path, monkeypatch):
    """Files put into `work/`, another run below the folder, and drafts of both; what its own killed process left goes."""
    out, others = tmp_path / "out", {}
    train = command.train

    def meanwhile(*given):
        kernels = train(*given)
        (out / "work" / "layers" / ".saving-of-a-killed-process").mkdir()
        for name in ("work/notes.txt", "other/run.json", "other/.saving-x/half", ".saving-y/half"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(name)
            others[name] = name.encode()
        return kernels

    monkeypatch.setattr(command, "train", meanwhile)
    result = run("train", model, "--data", text, "--output", out, *STEPS)
    assert result.exit_code == 0, result.output
    printed = "".join(result.output.split())  # a long path is broken wherever the line ends
    assert "work stays: this run did not make notes.txt.".replace(" ", "") in printed
    made = {"less_config.json", "less_kernels.safetensors", "training.png", "training_log.json"}
    assert {name: content for name, content in files_below(out).items() if name not in made} == others


@pytest.mark.parametrize("place", ["", "work", "work/layers", "below/work"])
def test_a_draft_that_a_living_process_writes_stays(model, text, tmp_path, monkeypatch, place):
    """A second run begins while the first saves: it takes nothing away."""
    out, train, seen = tmp_path / "out", command.train, []
    words = ("train", model, "--data", text, "--output", out, *STEPS)
    draft = out / place / ".saving-living"

    def stopping(*given):
        train(*given)
        seen.append(draft.exists())
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train", stopping)
    assert run(*words).exit_code != 0
    draft.mkdir(parents=True)
    assert run(*words).exit_code != 0
    assert seen == [False, True]


def test_a_share_that_is_no_number_is_null_in_the_log_and_shown(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr("less_cache.training.layerwise.LayerTask.error_left", lambda *given: float("nan"))
    result = run("train", model, "--data", text, "--output", tmp_path / "out", *STEPS)
    assert result.exit_code == 0 and "nan" in result.output, result.output
    log = (tmp_path / "out" / "training_log.json").read_text()
    assert '"before": null, "after": null' in log and "NaN" not in log


def test_a_dry_run_says_what_it_takes_and_writes_nothing(model, text, tmp_path):
    words = ("train", model, "--data", text, "--output", tmp_path / "kernels", "--dry-run")
    (model / "model.safetensors").unlink()  # no weights are read
    result = run(*words)
    assert result.exit_code == 0, result.output
    for word in ("TFLOP", "disk", "memory"):
        assert word in result.output
    assert "own" not in result.output.replace("its own", "") and "text of its own" in run(*words, "--data", "self").output
    assert not (tmp_path / "kernels").exists()


@pytest.mark.parametrize(("context", "longest"), [(2**20, 4096), (4096, 2048), (640, 512), (100, 4096)])
def test_prompts_of_the_default_fit_the_model(context, longest):
    """Where one does; what was asked for is left as it is."""
    short = tiny.tiny_llama(max_position_embeddings=context)
    assert max(command.fit(TrainingOptions(), short).prompts) == longest
    assert command.fit(TrainingOptions(prompts=(4096,)), short).prompts == (4096,)


@pytest.mark.parametrize("benchmark", ["decode", "prefill", "memory", "batch"])
def test_bench_ends_in_a_report_and_a_picture(benchmark, model, tmp_path):
    options = {
        "decode": ("--rounds", 1, "--tokens", 2, "--batch", 2),
        "prefill": ("--rounds", 2, "--chunk", 16, "--batch", 2, "--padding", 3),
        "memory": ("--batch", 2),
        "batch": ("--rounds", 1, "--tokens", 1, "--memory", "1MiB", "--cache", "less", "--cache", "less_static"),
    }[benchmark]
    report_file, picture = tmp_path / "report.json", tmp_path / "picture.png"
    files = ("--output", report_file, "--plot", picture)
    contexts = (24,) if benchmark == "batch" else (24, 48)
    lengths = [option for context in contexts for option in ("--context", context)]
    result = run("bench", benchmark, model, "--random", *lengths, "--budget", 0.25, *options, *files)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert json.loads(report_file.read_text()) == report
    assert report["benchmark"] == benchmark and report["machine"]["cpu"] and report["versions"]["torch"]
    caches = {
        "decode": ["dynamic", "static", "policy", "less"],
        "prefill": ["dynamic", "policy", "less"],
        "memory": ["dynamic", "static", "policy", "less"],
        "batch": ["less", "less_static"],
    }[benchmark]
    caches = caches * 2 if benchmark == "prefill" else caches  # without padding, then with
    assert [(row["context"], row["cache"]) for row in report["results"]] == [(c, name) for c in contexts for name in caches]
    assert set(report["labels"]) == set(caches) == set(report["caches"])
    for label in report["labels"].values():
        assert label in result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bench_describes_each_benchmark():
    result = run("bench", "--help")
    assert result.exit_code == 0
    for words in ("decode: milliseconds a token", "prefill: seconds", "memory: bytes of the cache", "batch: the largest batch"):
        assert words in result.output


def test_a_report_names_no_folders(model, tmp_path):
    tiny.tiny_kernels(tiny.tiny_llama()).save_pretrained(tmp_path / "kernels")
    result = run("bench", "memory", model, "--kernels", tmp_path / "kernels", "--context", 8, "--cache", "less")
    report = json.loads(result.stdout)
    assert (report["model"], report["kernels"]) == ("model", "kernels") and str(tmp_path) not in result.stdout
    assert report["kernels_sha256"] == LESSKernels.from_pretrained(tmp_path / "kernels").config.sha256


def test_paths_in_the_user_s_folder(model, text, tmp_path, monkeypatch):
    """`~` where a shell leaves it alone: after `--output=`, and in a program's list of arguments."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    lengths = ("--sequences", 2, "--prompt-length", 40, "--decoded", 8)
    files = ("--output=~/report.json", "--plot=~/plot.png")
    commands = (
        ("train", "~/model", "--data", "~/text.txt", "--output", "~/kernels", *STEPS),
        ("eval", "perplexity", "~/model", "--data", "~/text.txt", "--kernels", "~/kernels", "--budget", 8, *lengths, *files),
        ("eval", "perplexity", "~/model", "--data=~/text.txt", "--budget", 8, *lengths, "--known", "~/report.json"),
        ("bench", "memory", "~/model", "--kernels", "~/kernels", "--context", 8, "--output", "~/bench.json"),
        ("profile", "~/model", "--data=~/text.txt", "--budget", 8, *lengths[:4], "--output", "~/kernels"),
        ("demo", "--model", "~/model", "--kernels", "~/kernels", "--prompt-file", "~/text.txt", "--max-new-tokens", 1),
        ("info", "~/kernels"),
        ("verify", "~/kernels", "--model", "~/model"),
        ("pull", "~/kernels", "--output", "~/copy"),
        ("card", "~/copy", "--report", "prose=~/report.json", "--base-model", "org/tiny"),
        ("push", "~/copy", "org/kernels", "--dry-run"),
    )
    for words in commands:
        result = run(*words)
        assert result.exit_code == 0, (words, result.output)
    assert not (tmp_path / "~").exists()
    written = ("report.json", "plot.png", "bench.json", "kernels/less_config.json", "copy/README.md")
    assert all((tmp_path / name).exists() for name in written)


BAD = {
    "policy": (("demo", "--policy", "h3o"), "h3o"),
    "budget": (("demo", "--budget", "0"), "got 0"),
    "prompt file": (("demo", "--kernels", "none", "--prompt-file", "absent.txt"), "absent.txt"),
    "kernels": (("demo", "--kernels", "./absent"), "absent"),
    "training dtype": (("train", "MODEL", "--data", "TEXT", "--output", "OUT", "--dtype", "int8"), "int8"),
    "training budget": (("train", "MODEL", "--data", "TEXT", "--output", "OUT", "--budget", "some"), "some"),
    "training dataset": (("train", "MODEL", "--data", "./absent", "--output", "OUT"), "absent"),
    "training text": (("train", "MODEL", "--data", "absent.txt", "--output", "OUT"), "absent.txt"),
    "training output": (("train", "MODEL", "--data", "TEXT", "--output", "TEXT"), "which is a file"),
    "evaluated policy": (("eval", "perplexity", "MODEL", "--data", "TEXT", "--budget", "8", "--policy", "h3o"), "h3o"),
    "evaluated budget": (("eval", "perplexity", "MODEL", "--data", "TEXT", "--budget", "1.5"), "got 1.5"),
    "evaluated type": (("eval", "perplexity", "MODEL", "--data", "TEXT", "--budget", "8", "--dtype", "int8"), "got 'int8'"),
    "evaluated text": (("eval", "perplexity", "MODEL", "--data", "absent.txt", "--budget", "8"), "absent.txt"),
    "evaluated folder": (("eval", "perplexity", "MODEL", "--data", ".", "--budget", "8"), "got ., which is no file"),
    "benched cache": (("bench", "decode", "MODEL", "--cache", "paged"), "paged"),
    "benched dtype": (("bench", "memory", "MODEL", "--dtype", "int8"), "int8"),
    "benched policy": (("bench", "prefill", "MODEL", "--policy", "h3o"), "h3o"),
    "benched memory": (("bench", "batch", "MODEL", "--memory", "0.01MiB"), "the weights"),
    "benched model": (("bench", "memory", "./absent", "--random"), "absent"),
    "benchmark": (("bench", "speed", "MODEL"), "one of decode, prefill, memory, batch, got 'speed'"),
    "batch without memory": (("bench", "batch", "MODEL"), "Expected --memory"),
    "memory without batch": (("bench", "decode", "MODEL", "--memory", "1GiB"), "Expected --memory with bench batch alone"),
    "benched device": (("bench", "decode", "MODEL", "--random", "--device", "abacus"), "'abacus'"),
    "benched kind": (("bench", "memory", "vit", "--random"), "Expected a causal language model"),
    "benched output": (("bench", "decode", "./absent", "--output", "TEXT/x.json"), "cannot be written"),
    "benched plot": (("bench", "decode", "./absent", "--plot", "."), "which is a folder"),
    "report that is none": (
        ("eval", "perplexity", "./absent", "--data", "TEXT", "--budget", "8", "--known", "TEXT"),
        "Expected --known to be a report of eval perplexity",
    ),
    "evaluated output": (
        ("eval", "perplexity", "./absent", "--data", "TEXT", "--budget", "8", "--output", "TEXT/x.json"),
        "cannot be written",
    ),
    "evaluated plot": (
        ("eval", "perplexity", "./absent", "--data", "TEXT", "--budget", "8", "--plot", "."),
        "which is a folder",
    ),
    "too much text": (("eval", "perplexity", "MODEL", "--data", "TEXT", "--budget", "8"), "got 680 tokens"),
}


def test_text_in_another_encoding_is_an_error(model, text):
    text.write_bytes("né".encode("latin-1") * 100)
    result = run("eval", "perplexity", model, "--data", text, "--budget", 8, "--prompt-length", 40, "--decoded", 8)
    assert result.exit_code == 1 and "expected text in UTF-8" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_line(name, model, text, tmp_path):
    arguments, said = BAD[name]
    folders = {"MODEL": model, "TEXT": text, "OUT": tmp_path / "out"}
    result = run(*(folders.get(argument, argument.replace("TEXT/", f"{text}/")) for argument in arguments))
    assert result.exit_code == 1
    *before, last = result.stderr.strip().splitlines()
    assert last.startswith("error: ") and said in last
    assert not [line for line in before if "Loading" not in line], "a traceback, or a second line"
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
