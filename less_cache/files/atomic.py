"""Files that are written whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from less_cache.errors import LESSError

DRAFT = ".saving-"  # start of a folder's name in which files are made whole


def replace(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files into `folder`, in this order, each in one atomic step once all of them are on the disk.

    A new file has the mode that the user's umask gives it; one that was there keeps its own.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=DRAFT) as draft:
            for name, content in contents.items():
                (Path(draft) / name).parent.mkdir(exist_ok=True)
                with open(Path(draft) / name, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                if (folder / name).exists():
                    shutil.copymode(folder / name, Path(draft) / name)
            for name in contents:
                (folder / name).parent.mkdir(exist_ok=True)
                os.replace(Path(draft) / name, folder / name)
    except OSError as error:
        raise LESSError(
            f"{folder}: cannot be written ({error}). Free space, or choose a folder that can be written."
        ) from error
