"""Files that measurements leave: refused before the work where they could not be written, whole or absent after it."""

import math
import sys
from pathlib import Path

import pytest

from less_cache import LESSError
from less_cache.bench import plot as bench_plot
from less_cache.evaluation import plot as evaluation_plot
from less_cache.reports import outputs, plots
from less_cache.training import plot as training_plot

PNG = b"\x89PNG"


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_a_line_a_file_and_a_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the plot needs the extra")
    drawn = []

    def draw(report):
        drawn.append(report)
        return plots.figure(2)[0]

    outputs.finish({"a": (1, 2)}, tmp_path / "new" / "report.json", tmp_path / "plot.png", draw)
    assert capsys.readouterr().out == '{"a": [1, 2]}\n' == (tmp_path / "new" / "report.json").read_text()
    assert drawn == [{"a": [1, 2]}]  # as it stands in the file
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)
    assert contents(tmp_path) == ["new", "plot.png", "report.json"]


def test_a_figure_that_is_no_number_is_null_in_the_file_and_as_it_is_in_the_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the plot needs the extra")
    drawn = []
    report = {"perplexity": float("nan"), "rows": [(float("inf"), 2)]}
    outputs.finish(report, tmp_path / "report.json", tmp_path / "p.png", lambda it: drawn.append(it) or plots.figure(1)[0])
    line = '{"perplexity": null, "rows": [[null, 2]]}\n'
    assert capsys.readouterr().out == line == (tmp_path / "report.json").read_text()
    assert math.isnan(drawn[0]["perplexity"]) and drawn[0]["rows"] == [[math.inf, 2]]


@pytest.mark.parametrize("name, start", [("plot.svg", b"<?xml"), ("plot.PDF", b"%PDF"), ("plot", PNG)])
def test_the_suffix_is_the_format(tmp_path, name, start):
    pytest.importorskip("matplotlib", reason="the plot needs the extra")
    outputs.check(None, tmp_path / name)
    outputs.finish({}, None, tmp_path / name, lambda report: plots.figure(1)[0])
    assert (tmp_path / name).read_bytes().startswith(start)


def test_a_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "there" / "report.json")
    outputs.finish({}, tmp_path / "link.json", None, lambda report: None)
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "there" / "report.json").read_text() == "{}\n"


UNWRITABLE = {
    "folder": (".", "which is a folder"),
    "device": ("/dev/null", "which is a folder or a device"),
    "below a file": ("file/report.json", "cannot be written"),
}


@pytest.mark.parametrize("option", ["output", "plot"])
@pytest.mark.parametrize("name, said", UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_cannot_be_written_is_known_before(tmp_path, name, said, option):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LESSError, match=said) as caught:
        outputs.check(**{"output": None, "plot": None, option: tmp_path / name})
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == ["file"] and not Path("/dev/null").is_file()


def test_a_format_that_cannot_be_drawn_is_known_before(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs the extra")
    with pytest.raises(LESSError, match=r"end in one of .*\.png.*, got \.txt"):
        outputs.check(None, tmp_path / "plot.txt")


def test_without_matplotlib_one_error_before(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    outputs.check(tmp_path / "report.json", None)
    with pytest.raises(LESSError, match=r"needs matplotlib: pip install 'less-cache\[train\]'"):
        outputs.check(None, tmp_path / "plot.png")


def test_a_plot_that_fails_leaves_the_older_one(tmp_path):
    (tmp_path / "plot.png").write_bytes(b"older")
    with pytest.raises(ZeroDivisionError):
        outputs.finish({}, None, tmp_path / "plot.png", lambda report: 1 / 0)
    assert contents(tmp_path) == ["plot.png"] and (tmp_path / "plot.png").read_bytes() == b"older"


ROWS = [{"cache": "full", "bytes": 4e6, "perplexity": 20.0}, {"cache": "less", "bytes": 1e6, "perplexity": 25.0}]
BENCHED = {"model": "tiny", "dtype": "float32", "machine": {"cpu": "some"}, "budget": 8, "batch": 1, "labels": {"less": "LESS"}}
SPREAD = {"median": 2.0, "lower": 1.0, "upper": 4.0}
POINTS = [{"batch": batch, "tokens_per_second": SPREAD} for batch in (1, 4)]
DRAWN = {
    "evaluation": (lambda: evaluation_plot.draw({"a": {"results": [ROWS]}, "b": {"results": [ROWS]}}), ["a", "b"]),
    "training": (
        lambda: training_plot.draw({"layers": [{"layer": 0, "after": 0.5}], "joint": [0.3, 0.2]}),
        ["Each layer's own error, stretches drawn anew", "All layers on the model's output"],
    ),
    "decode": (
        lambda: bench_plot.draw(
            {
                **BENCHED,
                "benchmark": "decode",
                "results": [{"context": 8, "cache": "less", "ms_per_token": SPREAD, "bytes": 2**20}],
            }
        ),
        ["", ""],
    ),
    "batch": (
        lambda: bench_plot.draw(
            {
                **BENCHED,
                "benchmark": "batch",
                "results": [{"context": context, "cache": "less", "points": POINTS} for context in (8, 16)],
            }
        ),
        ["8 tokens each", "16 tokens each"],
    ),
}


@pytest.mark.parametrize("draw, titles", DRAWN.values(), ids=DRAWN)
def test_every_plot_has_its_panels(draw, titles):
    pytest.importorskip("matplotlib", reason="the plot needs the extra")
    figure = draw()
    assert [axes.get_title() for axes in figure.axes] == titles
    assert all(axes.has_data() for axes in figure.axes) and plots.image(figure).startswith(PNG)
