"""What a measurement leaves: one line of JSON, and where it is wanted a file and a plot of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from less_cache.errors import LESSError
from less_cache.files import atomic, plain_json
from less_cache.reports import plots


def check(output: Path | None, plot: Path | None) -> None:
    """Raise `LESSError` for a file that `finish` could not write: before the measurement, not after it."""
    for path in (output, plot):
        if path is None:
            continue
        if path.exists() and not path.is_file():
            raise LESSError(f"Expected a file to write, got {path}, which is a folder or a device. Choose another name.")
        atomic.replace(path.resolve().parent, {})
    if plot is not None:
        plots.check_format(_format(plot))


def finish(
    report: dict[str, Any],
    output: Path | None,
    plot: Path | None = None,
    draw: Callable[[dict[str, Any]], Any] = lambda report: None,
) -> None:
    """Print the line, write it to `output`, and write what `draw` makes of it to `plot`.

    In the line `null` stands for NaN and infinity; `draw` gets the numbers as they are.
    """
    line = plain_json.dump(report)
    print(line)
    if output is not None:
        _write(output, f"{line}\n".encode())
    if plot is not None:
        _write(plot, plots.image(draw(json.loads(json.dumps(report))), _format(plot)))


def _format(plot: Path) -> str:
    return plot.suffix[1:].lower() or "png"


def _write(path: Path, content: bytes) -> None:
    target = path.resolve()  # a link stays one
    atomic.replace(target.parent, {target.name: content})
