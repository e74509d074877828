"""JSON that every reader takes: without NaN and infinity, and of bounded depth."""

import json
import math
from typing import Any

from less_cache.errors import LESSError

DEEPEST = 100  # levels of lists and objects; far beyond anything that is written here


def dump(value: Any, indent: int | None = None) -> str:
    """JSON text. `null` stands for NaN and infinity, which JSON does not have. `LESSError` for what is no JSON."""
    try:
        return json.dumps(_plain(value), indent=indent, allow_nan=False)
    except LESSError:
        raise
    except (TypeError, ValueError) as error:
        raise LESSError(f"expected what JSON can say, got: {error}") from error


def parse(text: str | bytes) -> Any:
    """What JSON text says. NaN and infinity, which older versions wrote, are None. `LESSError` for anything but JSON."""
    try:
        return _plain(json.loads(text))
    except LESSError:
        raise
    except (ValueError, RecursionError) as error:
        raise LESSError(f"expected JSON, got an error: {error}") from error


def _plain(value: Any, depth: int = 0) -> Any:
    """The value, None in place of numbers that are not finite. `LESSError` where it is nested too deeply."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict | list | tuple) and depth == DEEPEST:
        raise LESSError(f"expected JSON of at most {DEEPEST} levels, got more.")
    if isinstance(value, dict):
        return {key: _plain(entry, depth + 1) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, depth + 1) for entry in value]
    return value
