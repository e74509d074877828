"""Token sequences to train on."""

from collections.abc import Sequence
from pathlib import Path

import torch

from less_cache.errors import LESSError


class TokenSampler:
    """Random stretches of text. Every entry of `sources` gets the same share; within a folder, files share by length.

    Args:
        sources: Text files, or folders of `*.txt` files.
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, sources: Sequence[str | Path], tokenizer):
        self.sources = [[_tokenize(path, tokenizer) for path in text_files(Path(source))] for source in sources]

    def batch(self, batch_size: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """`[batch_size, length]` token ids."""
        rows = []
        for _ in range(batch_size):
            texts = self.sources[_draw([1.0] * len(self.sources), generator)]
            starts = [max(0, len(text) - length + 1) for text in texts]
            if not sum(starts):
                raise LESSError(f"Expected texts of at least {length} tokens, got at most {max(map(len, texts))}.")
            text = texts[_draw(starts, generator)]
            start = int(torch.randint(len(text) - length + 1, (), generator=generator))
            rows.append(text[start : start + length])
        return torch.stack(rows)


def text_files(source: Path) -> list[Path]:
    """The file, or the folder's `*.txt` files; an error where there is none."""
    files = sorted(source.glob("*.txt")) if source.is_dir() else [source]
    if not files or not all(file.is_file() for file in files):
        raise LESSError(f"Expected a text file or a folder of .txt files, got {source}.")
    return files


def _tokenize(path: Path, tokenizer) -> torch.Tensor:
    text = path.read_text(encoding="utf-8", errors="replace")
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _draw(weights: Sequence[float], generator: torch.Generator) -> int:
    return int(torch.multinomial(torch.tensor(weights, dtype=torch.double), 1, generator=generator))
