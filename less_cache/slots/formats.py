"""How slots store keys and values: a new format is one class here and one line in `FORMATS`."""

import abc
import functools
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.nn.functional import pad

from less_cache.errors import LESSError
from less_cache.memory.state import in_16_bits

GROUP = 64  # numbers of a head that share a scale


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
    """A code for each number of the rotated state, and a 16-bit scale for every `GROUP` numbers:

        x = R (scale · level[code])        R: Hadamard matrices of the largest power of two that divides d, orthonormal

    The rotation spreads a state's outliers over its numbers, which come near a normal distribution. The scale is the largest
    number of its group with its sign, for which there is the level 1: storing again what was stored changes nothing. Abstract:
    the levels, and how codes lie in bytes.
    """

    levels: ClassVar[torch.Tensor]  # ascending, the last one 1
    parts = ("codes", "scales")
    is_exact = False

    def encode(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        rotated = _rotated(states.float())
        d = rotated.shape[-1]
        groups = pad(rotated, (0, -d % GROUP)).unflatten(-1, (-1, GROUP))
        scales = in_16_bits(groups.gather(-1, groups.abs().argmax(-1, keepdim=True)))
        levels = self.levels.to(groups.device)
        middles = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(groups / scales.float().where(scales != 0, 1), middles)
        return {"codes": self.pack(codes.to(torch.uint8).flatten(-2)[..., :d]), "scales": scales.squeeze(-1)}

    def decode(self, stored: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        codes = self.unpack(stored["codes"])
        d = codes.shape[-1]
        numbers = self.levels.to(codes.device)[codes.int()]
        groups = pad(numbers, (0, -d % GROUP)).unflatten(-1, (-1, GROUP)) * stored["scales"].float().unsqueeze(-1)
        return _rotated(groups.flatten(-2)[..., :d]).to(dtype)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `[..., d]` uint8 as they lie in bytes."""
        return codes.contiguous()

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """The codes that `pack` took."""
        return packed


class Int8Slots(QuantizedSlots):
    """A byte a number; levels of equal distance, the lowest one nearer to 0 than -1 is."""

    name = "int8"
    levels = torch.linspace(-127 / 128, 1, 256, dtype=torch.float32)


class Int4Slots(QuantizedSlots):
    """Half a byte a number: number i in the low half, number i + d/2 in the high half of byte i.

    The levels have the least mean square error for `GROUP` numbers of a normal distribution, by Lloyd's algorithm.
    """

    name = "int4"
    levels = torch.tensor(
        [
            *(-0.8516, -0.6624, -0.5191, -0.3985, -0.2931, -0.1979, -0.1096, -0.0237),
            *(0.0614, 0.1490, 0.2405, 0.3402, 0.4536, 0.5891, 0.7577, 1.0),
        ],
        dtype=torch.float32,
    )

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        if codes.shape[-1] % 2:
            raise LESSError(f"Expected an even head dim for slots='int4', got {codes.shape[-1]}. Use slots='int8'.")
        low, high = codes.chunk(2, dim=-1)
        return low | (high << 4)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        return torch.cat([packed & 15, packed >> 4], dim=-1)


class QueryCodes:
    """Two bits a number, for queries that need not be exact: as `QuantizedSlots`, the levels those of a normal distribution, a
    query's scale its root mean square. Byte i has numbers i, i + d/4, i + d/2, i + 3d/4.
    """

    levels = torch.tensor([-1.5104, -0.4528, 0.4528, 1.5104], dtype=torch.float32)

    @classmethod
    def encode(cls, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes `[..., d/4]` and scales `[..., 1]` of states `[..., d]`."""
        rotated = _rotated(states.float())
        scales = in_16_bits(rotated.square().mean(-1, keepdim=True).sqrt())
        middles = (cls.levels[1:] + cls.levels[:-1]) / 2
        codes = torch.bucketize(rotated / scales.float().where(scales != 0, 1), middles.to(states.device)).to(torch.uint8)
        first, second, third, fourth = pad(codes, (0, -codes.shape[-1] % 4)).chunk(4, dim=-1)
        return first | (second << 2) | (third << 4) | (fourth << 6), scales

    @classmethod
    def decode(cls, codes: torch.Tensor, scales: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """The states `[..., head_dim]` that `encode` took, as near as two bits allow."""
        numbers = torch.cat([(codes >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1)[..., :head_dim]
        return _rotated(cls.levels.to(codes.device)[numbers.int()] * scales.float()).to(dtype)


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
