"""Text files that something is measured on."""

from collections.abc import Sequence
from pathlib import Path

from less_cache.errors import LESSError


def check(texts: Sequence[Path]) -> None:
    """Raise for what is no file, before a model is loaded."""
    for path in texts:
        if not path.is_file():
            raise LESSError(f"Expected a text file, got {path}, which {'is no file' if path.exists() else 'does not exist'}.")


def encoded(path: Path, tokenizer) -> list[int]:
    """The tokens of a text in UTF-8, without special ones."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LESSError(f"{path}: expected text in UTF-8, got: {error}. Save it as UTF-8.") from error
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
