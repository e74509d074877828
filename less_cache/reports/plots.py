"""Figures as files, drawn without a window. Nothing else needs matplotlib."""

import io
from typing import Any

from less_cache.errors import LESSError


def figure(panels: int) -> tuple[Any, list[Any]]:
    """A figure with `panels` axes side by side. `LESSError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LESSError("A plot needs matplotlib: pip install 'less-cache[train]'.") from error
    made = Figure(figsize=(5 * panels, 3.7), layout="constrained")
    return made, list(made.subplots(1, panels, squeeze=False)[0])


def check_format(name: str) -> None:
    """Raise `LESSError` where `image` could not make it, or no plot at all."""
    formats = figure(1)[0].canvas.get_supported_filetypes()
    if name not in formats:
        raise LESSError(f"Expected a plot's file to end in one of .{', .'.join(sorted(formats))}, got .{name}.")


def image(figure: Any, format: str = "png") -> bytes:
    """The content of the figure's file."""
    content = io.BytesIO()
    versions = {"metadata": {"Software": None}} if format == "png" else {}  # a PNG names none: the same plot, the same bytes
    figure.savefig(content, format=format, dpi=120, **versions)
    return content.getvalue()
