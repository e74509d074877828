"""How slots store keys and values: a new format is one class here and one line in `FORMATS`."""

import abc
import functools
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.nn.functional import pad

from less_cache.errors import LESSError

GROUP = 32  # numbers of a head that share a scale and a zero


class SlotFormat(abc.ABC):
    """Turns states `[..., d]` into the tensors that are stored, and back. Stateless.

    Each tensor has the states' dimensions but the last, so that slots can be written, gathered and compacted without knowing
    what they hold.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ("",)  # names of the stored tensors; "": the states' own
    is_exact: ClassVar[bool] = True  # whether `decode` gives what `encode` took

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


class QuantizedSlots(SlotFormat):
    """Unsigned codes of `bits` bits for the rotated states, with a 16-bit scale and zero for every `GROUP` numbers:

        x = R (zero + scale · code)        R: Hadamard matrices of the largest power of two that divides d, orthonormal

    The rotation spreads a state's outliers over its numbers. Abstract: how codes lie in bytes.
    """

    bits: ClassVar[int]
    parts = ("codes", "scales")
    is_exact = False

    def encode(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        rotated = _rotated(states.float())
        d, top = rotated.shape[-1], 2**self.bits - 1
        more = -d % GROUP  # the last group may be shorter; it is filled with a number that it has
        groups = torch.cat([rotated, rotated[..., -1:].expand(*rotated.shape[:-1], more)], dim=-1).unflatten(-1, (-1, GROUP))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        zero = _in_16_bits(low)
        scale = _in_16_bits(((high - zero.float()) / top).clamp_min(SMALLEST))
        codes = ((groups - zero.float()) / scale.float()).round().clamp(0, top).to(torch.uint8).flatten(-2)[..., :d]
        return {"codes": self.pack(codes), "scales": torch.cat([scale, zero], dim=-1).flatten(-2)}

    def decode(self, stored: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        codes = self.unpack(stored["codes"]).float()
        d = codes.shape[-1]
        scale, zero = stored["scales"].float().unflatten(-1, (-1, 2)).split(1, dim=-1)  # [..., groups, 1]
        groups = pad(codes, (0, -d % GROUP)).unflatten(-1, (-1, GROUP))
        return _rotated((zero + scale * groups).flatten(-2)[..., :d]).to(dtype)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `[..., d]` uint8 as they lie in bytes."""
        return codes

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """The codes that `pack` took."""
        return packed


class Int8Slots(QuantizedSlots):
    """A byte a number."""

    name = "int8"
    bits = 8


class Int4Slots(QuantizedSlots):
    """Half a byte a number: number i in the low half, number i + d/2 in the high half of byte i."""

    name = "int4"
    bits = 4

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        if codes.shape[-1] % 2:
            raise LESSError(f"Expected an even head dim for slots='int4', got {codes.shape[-1]}. Use slots='int8'.")
        low, high = codes.chunk(2, dim=-1)
        return low | (high << 4)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        return torch.cat([packed & 15, packed >> 4], dim=-1)


SMALLEST = 2.0**-24  # scale that 16 bits hold
LARGEST = torch.finfo(torch.float16).max


def _in_16_bits(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.clamp(-LARGEST, LARGEST).half()


def _rotated(states: torch.Tensor) -> torch.Tensor:
    """Times the Hadamard matrices; twice is once forth and back."""
    d = states.shape[-1]
    size = d & -d  # the largest power of two that divides d
    return (states.unflatten(-1, (-1, size)) @ _hadamard(size, states.device)).flatten(-2)


@functools.cache
def _hadamard(size: int, device: torch.device) -> torch.Tensor:
    """The symmetric, orthonormal Hadamard matrix, `[size, size]` float32."""
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=torch.float32, device=device)
        while matrix.shape[0] < size:
            matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
        return matrix / size**0.5


FORMATS: dict[str, type[SlotFormat]] = {each.name: each for each in (FloatSlots, Int8Slots, Int4Slots)}


def format_of(name: object) -> SlotFormat:
    """The format of that name in `FORMATS`."""
    if not isinstance(name, str) or name not in FORMATS:
        raise LESSError(f"Expected slots to be one of {', '.join(FORMATS)}, got {name!r}.")
    return FORMATS[name]()


def stored_name(of: str, part: str) -> str:
    """What a part of the keys or values is called among the tensors of a layer."""
    return f"{of}_{part}" if part else of
