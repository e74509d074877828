"""Paths as users write them."""

import os
from pathlib import Path


def expanded(path: str | os.PathLike) -> Path:
    """The path, `~` at its start being the user's folder."""
    return Path(os.path.expanduser(path))
