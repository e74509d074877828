"""The table that a benchmark prints."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table


def table(rows: Sequence[Any], labels: Mapping[str, str], columns: Mapping[str, Callable[[Any], str]], note: str) -> Table:
    """A line for each row, a section for each context. `columns`: what they are called, and what they say of a row."""
    result = Table(box=box.SIMPLE_HEAD, caption=note, pad_edge=False)
    result.add_column("context", justify="right")
    result.add_column("cache", no_wrap=True)
    for name in columns:
        result.add_column(name, justify="right")
    for context, section in itertools.groupby(rows, key=lambda row: row.context):
        first = f"{context:,}"
        for row in section:
            result.add_row(first, labels[row.cache], *(text(row) for text in columns.values()))
            first = ""
        result.add_section()
    return result


def shown(value: float | None, form: str) -> str:
    """A number in the form that `format` is given; nothing for None."""
    return "" if value is None else format(value, form)
