"""How one layer's keys and values become what is stored, and back.

Axes: `b` rows, `g` KV heads, `c` columns, `d` head dim, `w` width of values.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from less_cache.memory.state import in_16_bits
from less_cache.slots.formats import SlotFormat, stored_name

OF_CODING = ("centers", "first_keys", "first_values")  # its tensors, [b, g, 1, *]


@dataclasses.dataclass(frozen=True)
class Coding:
    """Keys and values in a format, the keys relative to what is known of them.

    RoPE turns every key by its position. Turned back to position 0 the keys of a head are alike: their mean is most of them,
    and what is left has few outliers. So a quantised key is turned back and stored less its head's mean, which leaves a
    fraction of the error.

    Half of all attention may go to the first token, whose key is like no other: beside codes it lies in 16 bits.

    Args:
        format: Of the numbers.
        centers: Mean keys, `[b, g, 1, d]` or whatever broadcasts to the keys; None: 0.
        rotation: How keys turn with their position; None: not known, or keys are stored as they are.
        first_keys: Of the tokens at position 0, `[b, g, 1, d]` float16; None: they lie in the format alone.
        first_values: As `first_keys`, `[b, g, 1, w]`.
    """

    format: SlotFormat
    centers: torch.Tensor | None = None
    rotation: Any = None
    first_keys: torch.Tensor | None = None
    first_values: torch.Tensor | None = None

    @property
    def turns_keys(self) -> bool:
        """Whether keys are stored as they would be at position 0."""
        return self.rotation is not None

    def encode(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is stored of keys `[..., d]` and values `[..., w]` of tokens at `positions` `[...]`, by name."""
        of_values = {stored_name("values", part): each for part, each in self.format.encode(values).items()}
        return self.encode_keys(keys, positions) | of_values

    def encode_keys(self, keys: torch.Tensor, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is stored of the keys alone."""
        keys = self.turned_back(keys, positions)
        if self.centers is not None:
            keys = keys - self.centers.to(keys.dtype)
        return {stored_name("keys", part): each for part, each in self.format.encode(keys).items()}

    def keys(self, stored: Mapping[str, torch.Tensor], positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The keys `[..., d]`, as near as the format allows."""
        keys = self._decoded(stored, "keys", dtype)
        if self.centers is not None:
            keys = keys + self.centers.to(keys.dtype)
        return keys if self.rotation is None else self.rotation.turn(keys, positions).to(dtype)

    def values(self, stored: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The values `[..., w]`, as near as the format allows."""
        return self._decoded(stored, "values", dtype)

    def meeting(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> "Coding":
        """The same with the first token of each row that is among these: keys `[b, g, c, d]` at `positions` `[b, g, c]`."""
        if self.format.is_exact:
            return self
        is_first = positions == 0
        there, at = is_first.any(-1)[..., None, None], is_first.int().argmax(-1)[..., None, None]

        def first(states: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
            met = in_16_bits(states.gather(2, at.expand(-1, -1, 1, states.shape[-1])))
            return met.where(there, 0 if before is None else before)

        return self._with({"first_keys": first(keys, self.first_keys), "first_values": first(values, self.first_values)})

    def with_first(self, states: torch.Tensor, positions: torch.Tensor, of: str) -> torch.Tensor:
        """Decoded keys or values `[b, g, c, *]`, the first token's as they came; `of`: `keys` or `values`."""
        first = self.first_keys if of == "keys" else self.first_values
        return states if first is None else torch.where((positions == 0).unsqueeze(-1), first.to(states.dtype), states)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        tensors = {name: getattr(self, name) for name in OF_CODING}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def turned_back(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys `[..., d]` as the model would have computed them at position 0, where that is known."""
        return keys if self.rotation is None else self.rotation.turn(keys.float(), -positions)

    def on(self, device: torch.device) -> "Coding":
        """The same on `device`."""
        rotation = None if self.rotation is None else self.rotation.to(device)
        return dataclasses.replace(self.map(lambda name, tensor: tensor.to(device)), rotation=rotation)

    def map(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> "Coding":
        """The same with every tensor changed, by its name."""
        return self._with({name: change(name, tensor) for name, tensor in self.tensors().items()})

    def _with(self, tensors: dict[str, Any]) -> "Coding":
        return dataclasses.replace(self, **tensors)

    def _decoded(self, stored: Mapping[str, torch.Tensor], of: str, dtype: torch.dtype) -> torch.Tensor:
        parts = {part: stored[stored_name(of, part)] for part in self.format.parts}
        return self.format.decode(parts, dtype if self.rotation is None or of == "values" else torch.float32)
