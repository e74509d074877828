"""How much of a budget each KV head of a model gets: measured once, stored in a folder, found beside the model's kernels."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from less_cache.errors import LESSError
from less_cache.files import atomic, plain_json
from less_cache.files.paths import expanded
from less_cache.kernels import entries
from less_cache.kernels import folder as files
from less_cache.kernels.config import MOST_LAYERS, LESSConfig
from less_cache.version import __version__

BUDGETS_NAME = "head_budgets.json"
FORMAT_VERSION = 1
OFF = 1e-3  # how far the mean share may be from 1: shares are rounded


@dataclasses.dataclass(repr=False)
class HeadBudgets:
    """Shares of the budget by layer and KV head, 1 on average over all of them: a profile of a model, for `LESSCache(heads=…)`.

    A head with share s keeps s times the policy's tokens, rounded, at least 1. No layer waits for another one, as with adaptive
    heads, and shapes do not depend on the prompt. `less-cache profile` measures it.

    Args:
        shares: Of each layer under LESS, in their order, one for each KV head.
        layers: Indices of these layers; default: from 0 on.
        model_type: `model_type` of the model's config.
        base_model: Name of the model.
        base_model_fingerprint: `less_cache.integration.families.fingerprint` of its weights; None: not compared.
        measured: On what: texts, sequences, lengths, budget.
        less_cache_version: Version that wrote the file.
        format_version: Of the file.
        source: The folder that they were loaded from.

    Raises:
        LESSError: An entry is none that could be, or the mean of the shares is not 1.

    >>> HeadBudgets(shares=[[0.5, 1.5], [0.75, 1.25]], base_model="org/name")
    HeadBudgets(2 layers of 2 KV heads, 0.50 to 1.50 of the mean, of org/name)
    """

    shares: Sequence[Sequence[float]]
    layers: list[int] | None = None
    model_type: str | None = None
    base_model: str | None = None
    base_model_fingerprint: str | None = None
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)
    less_cache_version: str = __version__
    format_version: int = FORMAT_VERSION
    source: str | None = dataclasses.field(default=None, compare=False, metadata={"stored": False})

    def __post_init__(self) -> None:
        rows = self.shares
        if not isinstance(rows, Sequence) or not rows or not all(isinstance(row, Sequence) and len(row) for row in rows):
            raise LESSError(f"HeadBudgets: expected shares to be a list for each layer, got {_short(rows)}.")
        if any(len(row) != len(rows[0]) for row in rows):
            raise LESSError(
                f"HeadBudgets: expected as many shares for each layer, got {sorted({len(row) for row in rows})} of them."
            )
        for share in (share for row in rows for share in row):
            if type(share) not in (int, float) or not math.isfinite(share) or share <= 0:
                raise LESSError(f"HeadBudgets: expected shares to be finite numbers above 0, got {_short(share)}.")
        self.shares = [[float(share) for share in row] for row in rows]
        mean = sum(map(sum, self.shares)) / (len(rows) * len(rows[0]))
        if not abs(mean - 1) <= OFF:
            raise LESSError(f"HeadBudgets: expected shares that are 1 on average, got {mean:g}. Divide them by it.")
        if self.layers is None:
            self.layers = list(range(len(rows)))
        if not isinstance(self.layers, list) or not all(type(each) is int and 0 <= each < MOST_LAYERS for each in self.layers):
            raise LESSError(f"HeadBudgets: expected layers to be indices below {MOST_LAYERS:,}, got {_short(self.layers)}.")
        if self.layers != sorted(set(self.layers)) or len(self.layers) != len(rows):
            raise LESSError(
                f"HeadBudgets: expected layers to name each of the {len(rows)} layers that have shares once, in order, "
                f"got {_short(self.layers)}."
            )
        for name in ("model_type", "base_model", "base_model_fingerprint"):
            if not isinstance(getattr(self, name), str | None):
                raise LESSError(f"HeadBudgets: expected {name} to be a string or null, got {_short(getattr(self, name))}.")
        if not isinstance(self.measured, dict):
            raise LESSError(f"HeadBudgets: expected measured to be a JSON object, got {_short(self.measured)}.")
        if not isinstance(self.less_cache_version, str):
            raise LESSError(f"HeadBudgets: expected less_cache_version to be a string, got {_short(self.less_cache_version)}.")

    def __repr__(self) -> str:
        shares = [share for row in self.shares for share in row]
        span = f"{min(shares):.2f} to {max(shares):.2f} of the mean"
        return f"HeadBudgets({len(self.shares)} layers of {self.num_key_value_heads} KV heads, {span}, of {self.base_model})"

    @property
    def num_key_value_heads(self) -> int:
        """KV heads of each layer."""
        return len(self.shares[0])

    def to_dict(self) -> dict[str, Any]:
        """JSON form, read back by `from_json`."""
        return entries.stored(self)

    def to_json(self) -> str:
        """JSON text. `LESSError` where `measured` is no JSON."""
        return plain_json.dump(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "HeadBudgets":
        """Read `to_json`'s form. A key that this version does not know is an error."""
        return entries.read(cls, BUDGETS_NAME, text, FORMAT_VERSION)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `head_budgets.json` into `folder` in one atomic step; made where it does not exist.

        Raises:
            LESSError: The folder holds kernels of another model, or it cannot be written.
        """
        folder = expanded(folder)
        if os.path.lexists(folder / files.CONFIG_NAME):
            self.check_beside(files.read_config(folder), str(folder))
        atomic.replace(folder, {BUDGETS_NAME: self.to_json().encode()})

    @classmethod
    def from_pretrained(
        cls, folder_or_repo: str | os.PathLike, revision: str | None = None, token: str | bool | None = None
    ) -> "HeadBudgets":
        """Those of a folder, with or without kernels beside them, or of a Hub repository.

        Args:
            folder_or_repo: A folder with `head_budgets.json`, or a Hub id.
            revision: Branch, tag or commit of a repository; default: main.
            token: For private and gated repositories; default: the one of `hf auth login`.

        Raises:
            LESSError: The file is missing, or says what cannot be; or the Hub does not hand it out.
        """
        folder = expanded(folder_or_repo)
        if not os.path.isdir(folder) or revision is not None:
            from less_cache.hub import client  # the network: when it is asked for

            folder = client.find_head_budgets(folder_or_repo, revision=revision, token=token)
        if (found := cls.of(folder)) is None:
            raise LESSError(
                f"{folder}: expected {BUDGETS_NAME}, found none. Measure it with less-cache profile MODEL --output {folder}."
            )
        return found

    @classmethod
    def of(cls, folder: Path) -> "HeadBudgets | None":
        """Those of a local folder; None: it has none."""
        if not os.path.lexists(folder / BUDGETS_NAME):
            return None
        return dataclasses.replace(files.read_json(folder, BUDGETS_NAME, cls.from_json), source=str(folder))

    def check_beside(self, config: LESSConfig, where: str) -> None:
        """Raise unless kernels with this config may lie in one folder with them: of the same layers, heads and weights."""
        for name, ours, theirs in (
            ("layers", self.layers, sorted(config.layers or [])),
            ("KV heads", self.num_key_value_heads, config.num_key_value_heads),
            ("base_model_fingerprint", self.base_model_fingerprint, config.base_model_fingerprint),
        ):
            if ours != theirs and None not in (ours, theirs):
                raise LESSError(
                    f"{where}: the head budgets and the kernels are for different models: {name} {ours} and {theirs}. "
                    f"Measure {BUDGETS_NAME} for the kernels' model with less-cache profile, or keep it in a folder of its own."
                )


def _short(value: object) -> str:
    """What came, no longer than an error should be."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
