"""A dataclass from the JSON object in a file, which another version may have written."""

import dataclasses
import re
from typing import Any, TypeVar

from less_cache.errors import LESSError
from less_cache.files import plain_json
from less_cache.version import __version__

T = TypeVar("T")


def stored(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass that its file has, by name: all but those marked `stored=False`."""
    return {field.name: getattr(instance, field.name) for field in _fields(type(instance))}


def read(kind: type[T], name: str, text: str, newest: int) -> T:
    """The `kind` that the file `name` describes, in a format up to the `newest`.

    A key that this version does not know is an error: it may change the meaning of the rest. NaN and infinity are read as None.
    """
    try:
        entries = plain_json.parse(text)
    except LESSError as error:
        raise LESSError(f"{name}: {error}") from error
    if not isinstance(entries, dict):
        raise LESSError(f"{name}: expected a JSON object, got {type(entries).__name__}.")
    written_by = entries.get("less_cache_version", "an unknown version")
    known = isinstance(written_by, str) and re.fullmatch(r"[\w.+]+", written_by)  # it goes into a command
    upgrade = f"pip install -U 'less-cache>={written_by}'" if known else "pip install -U less-cache"
    version = entries.get("format_version", 1)
    if type(version) is not int or not 1 <= version <= newest:
        raise LESSError(
            f"{name}: expected format_version 1{f' to {newest}' if newest > 1 else ''}, got {version!r}, "
            f"written by less-cache {written_by}; this is {__version__}. Upgrade: {upgrade}"
        )
    unknown = sorted(set(entries) - {field.name for field in _fields(kind)})
    if unknown:
        raise LESSError(
            f"{name}: unknown keys {unknown} (written by less-cache {written_by}; this is {__version__}). "
            f"If this is older, upgrade: {upgrade}. If the keys were added by hand, remove them."
        )
    try:
        return kind(**entries)
    except TypeError as error:
        raise LESSError(f"{name}: an entry is missing: {str(error).split('__init__() ')[-1]}.") from error


def _fields(kind: Any) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(kind) if field.metadata.get("stored", True)]
