"""How one layer's keys and values become what is stored, and back.

Axes: `b` rows, `g` KV heads, `c` slots, `d` head dim, `w` width of values.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from less_cache.slots.formats import SlotFormat, stored_name


@dataclasses.dataclass(frozen=True)
class Coding:
    """Keys and values in a format, the keys relative to what is known of them.

    RoPE turns every key by its position. Turned back to position 0 the keys of a head are alike: their mean is most of them,
    and what is left has few outliers. So a quantised key is turned back and stored less its head's mean, which leaves a
    fraction of the error.

    Args:
        format: Of the numbers.
        centers: Mean keys, `[b, g, 1, d]` or whatever broadcasts to the keys; None: 0.
        rotation: How keys turn with their position; None: not known, or keys are stored as they are.
    """

    format: SlotFormat
    centers: torch.Tensor | None = None
    rotation: Any = None

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

    def turned_back(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys `[..., d]` as the model would have computed them at position 0, where that is known."""
        return keys if self.rotation is None else self.rotation.turn(keys.float(), -positions)

    def on(self, device: torch.device) -> "Coding":
        """The same on `device`."""
        rotation = None if self.rotation is None else self.rotation.to(device)
        return dataclasses.replace(self.map(lambda name, centers: centers.to(device)), rotation=rotation)

    def map(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> "Coding":
        """The same with its tensor changed, by its name."""
        return self if self.centers is None else dataclasses.replace(self, centers=change("centers", self.centers))

    def _decoded(self, stored: Mapping[str, torch.Tensor], of: str, dtype: torch.dtype) -> torch.Tensor:
        parts = {part: stored[stored_name(of, part)] for part in self.format.parts}
        return self.format.decode(parts, dtype if self.rotation is None or of == "values" else torch.float32)
