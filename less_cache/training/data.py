"""Token sequences to train on: text files, a dataset of the Hub, or text that the model writes itself.

Axes: `b` sequences, `t` tokens.
"""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from less_cache.errors import LESSError
from less_cache.integration.families import fingerprint
from less_cache.training.work import differences, load_tensors, readable, save_tensors

OWN = "self"
OWN_BATCH = 8  # sequences sampled at once from a model


class TokenSampler:
    """Random stretches of texts. Every source gets the same share; within a source, texts share by length.

    Args:
        sources: For each source its texts, one tensor `[t]` of token ids each.
        names: What errors call the sources; by default their numbers.
    """

    def __init__(self, sources: Sequence[Sequence[torch.Tensor]], names: Sequence[str] | None = None):
        self.sources = sources
        self.names = names or [f"source {index} of {len(sources)}" for index in range(1, len(sources) + 1)]

    def check(self, length: int) -> None:
        """Raise `LESSError` unless every source has a text of `length` tokens."""
        for name, texts in zip(self.names, self.sources, strict=True):
            if (longest := max(map(len, texts), default=0)) < length:
                raise LESSError(
                    f"{name}: expected a text of at least {length} tokens, the longest prompt and what is decoded after it, "
                    f"got at most {longest}. Pass longer texts or shorter prompts (--prompt-length)."
                )

    def digest(self) -> str:
        """sha256 of all token ids: another text, another digest."""
        found = hashlib.sha256()
        for texts in self.sources:
            for text in texts:
                found.update(f"{len(text)} ".encode() + text.numpy().tobytes())
            found.update(b"end")
        return found.hexdigest()

    def batch(self, batch_size: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """`[batch_size, length]` token ids, a function of `generator`'s state; see `check`."""
        rows = []
        for _ in range(batch_size):
            texts = self.sources[_draw([1.0] * len(self.sources), generator)]
            starts = [max(0, len(text) - length + 1) for text in texts]
            text = texts[_draw(starts, generator)]
            start = int(torch.randint(len(text) - length + 1, (), generator=generator))
            rows.append(text[start : start + length])
        return torch.stack(rows)


def text_files(source: Path) -> list[Path]:
    """The file, or the folder's `*.txt` files; an error where there is none."""
    files = sorted(source.glob("*.txt")) if source.is_dir() else [source]
    if not files or not all(file.is_file() for file in files):
        raise LESSError(f"Expected a text file, a folder of .txt files, a Hub dataset id or 'self', got {source}.")
    return files


def hub_text(dataset: str, tokenizer, tokens: int) -> torch.Tensor:
    """The first `tokens` tokens of a Hub dataset's train split, streamed, its documents joined; `[t]`.

    `dataset`: an id, with a configuration after a colon where it has several (`allenai/c4:en`). The text is the column
    `text`, or else the one with the longest string in the first document.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise LESSError("Reading a Hub dataset needs the package datasets: pip install 'less-cache[train]'.") from error
    name, _, configuration = dataset.partition(":")
    try:
        rows = load_dataset(name, configuration or None, split="train", streaming=True)
        pieces, total, column = [], 0, None
        for row in rows:
            column = column or text_column(row, dataset)
            pieces.append(tokenize((row[column] or "") + "\n\n", tokenizer))
            total += len(pieces[-1])
            if total >= tokens:
                break
    except LESSError:
        raise
    except Exception as error:  # whatever the Hub client and the readers of many formats raise
        first = str(error).strip().splitlines()[:1]
        raise LESSError(
            f"Cannot read the dataset {dataset!r} ({type(error).__name__}: {' '.join(first)}). Expected a text file, a folder "
            "of .txt files, 'self', or a Hub dataset id that can be reached, its configuration after a colon."
        ) from error
    if not pieces:
        raise LESSError(f"Dataset {dataset!r}: expected documents in its train split, got none.")
    return torch.cat(pieces)


def text_column(row: Mapping[str, Any], dataset: str) -> str:
    """The column of a dataset's texts, by its first document."""
    if isinstance(row.get("text", 0), str | None):  # without a text where a document has none
        return "text"
    strings = {name: value for name, value in row.items() if isinstance(value, str)}
    if not strings:
        raise LESSError(f"Dataset {dataset!r}: expected a column of text, got the columns {sorted(row)}.")
    return max(strings, key=lambda name: len(strings[name]))


def own_text(
    model: Any,
    sequences: int,
    length: int,
    seed: int,
    folder: Path,
    report: Callable[[str, int, int], object] = lambda stage, done, total: None,
) -> list[torch.Tensor]:
    """`sequences` texts `[length]` that the model samples at temperature 1, kept in `folder` as they are written.

    `LESSError` where the folder has those of another model, seed, number or length: they belong to another run.
    """
    texts: list[torch.Tensor] = []
    origin = {
        "model": str(fingerprint(model)),
        "seed": str(seed),
        "sequences": str(sequences),
        "tokens of each": str(length),
    }
    start = model.generation_config.bos_token_id
    for first in range(0, sequences, OWN_BATCH):
        batch_path = folder / f"own_{first:04d}.safetensors"
        if batch_path.exists() and (found := _own_batch(batch_path)[1]) != origin:
            raise LESSError(
                f"{folder} holds texts that were written for another run. {differences(found, origin)}. Repeat its options to "
                "go on, or choose another output folder."
            )
        if not batch_path.exists():
            rows = min(OWN_BATCH, sequences - first)
            draw = random.Random(f"{seed}/own/{first}")
            vocabulary = model.get_input_embeddings().num_embeddings
            tokens = torch.tensor([[draw.randrange(vocabulary) if start is None else start] for _ in range(rows)])
            with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
                torch.manual_seed(draw.getrandbits(63))
                written = model.generate(
                    tokens.to(model.device),
                    attention_mask=torch.ones_like(tokens).to(model.device),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    min_new_tokens=length,
                    max_new_tokens=length,
                    pad_token_id=0,
                )
            save_tensors(batch_path, {"tokens": written[:, 1:]}, origin)
        texts += _own_batch(batch_path)[0]
        report("own text", len(texts), sequences)
    return texts


def _own_batch(path: Path) -> tuple[list[torch.Tensor], dict[str, str]]:
    """Texts of one file of `own_text`, and whose they are."""
    with readable(path):
        tensors, origin = load_tensors(path)
        return list(tensors["tokens"].unbind(0)), origin


def tokenize(text: str, tokenizer) -> torch.Tensor:
    """Token ids `[t]`, no special tokens."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)


def _draw(weights: Sequence[float], generator: torch.Generator) -> int:
    return int(torch.multinomial(torch.tensor(weights, dtype=torch.double), 1, generator=generator))
