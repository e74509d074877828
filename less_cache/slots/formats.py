"""How slots store keys and values: a new format is one class here and one line in `FORMATS`."""

import abc
from collections.abc import Mapping
from typing import ClassVar

import torch

from less_cache.errors import LESSError


class SlotFormat(abc.ABC):
    """Turns states `[..., d]` into the tensors that are stored, and back. Stateless.

    Each tensor has the states' dimensions but the last, so that slots can be written, gathered and compacted without knowing
    what they hold.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ("",)  # names of the stored tensors; "": the states' own

    @abc.abstractmethod
    def encode(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of states `[..., d]` what is stored, by the names of `parts`: `[..., *]` each."""

    @abc.abstractmethod
    def decode(self, stored: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The states `[..., d]` that `encode` stored, as near as the format allows, in the type that they had."""

    def names(self) -> list[str]:
        """Of all tensors that are stored."""
        return [stored_name(of, part) for of in ("keys", "values") for part in self.parts]


class FloatSlots(SlotFormat):
    """Keys and values as the model gives them."""

    name = "float"

    def encode(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"": states}

    def decode(self, stored: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return stored[""]


FORMATS: dict[str, type[SlotFormat]] = {"float": FloatSlots}


def format_of(name: object) -> SlotFormat:
    """The format of that name in `FORMATS`."""
    if not isinstance(name, str) or name not in FORMATS:
        raise LESSError(f"Expected slots to be one of {', '.join(FORMATS)}, got {name!r}.")
    return FORMATS[name]()


def stored_name(of: str, part: str) -> str:
    """What a part of the keys or values is called among the tensors of a layer."""
    return f"{of}_{part}" if part else of
