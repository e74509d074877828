"""The newest tokens under a policy that chooses in blocks: they lie beside the slots until the next choice.

Axes: `b` rows, `g` KV heads, `e` places, `n` new tokens, `d` head dim, `w` width of values.
"""

import dataclasses
from collections.abc import Callable, Mapping

import torch

LARGEST = torch.finfo(torch.float16).max


@dataclasses.dataclass
class Newest:
    """Tokens in the order that they came, the same for every head, in places for one block.

    They are as exact as the model's own, or where slots are quantised in 16 bits at most.
    """

    keys: torch.Tensor  # [b, g, e, d]
    values: torch.Tensor  # [b, g, e, w]
    positions: torch.Tensor  # [b, e] int32, where in its row a token is; -1: padding
    count: int = 0  # places that are taken

    @classmethod
    def empty(
        cls, key_states: torch.Tensor, value_states: torch.Tensor, places: int, is_exact: bool, device: torch.device
    ) -> "Newest":
        """No tokens yet, of rows, heads and types as in `key_states` `[b, g, *, d]` and `value_states` `[b, g, *, w]`."""
        b, g = key_states.shape[:2]

        def buffer(states: torch.Tensor) -> torch.Tensor:
            dtype = states.dtype if is_exact or states.dtype.itemsize <= 2 else torch.float16
            return torch.zeros(b, g, places, states.shape[-1], dtype=dtype, device=device)

        positions = torch.full((b, places), -1, dtype=torch.int32, device=device)
        return cls(buffer(key_states), buffer(value_states), positions)

    @property
    def room(self) -> int:
        """Places that are free."""
        return self.positions.shape[-1] - self.count

    def put(self, key_states: torch.Tensor, value_states: torch.Tensor, positions: torch.Tensor) -> None:
        """Take tokens `[b, g, n, *]` at `positions` `[b, n]`, no more than there is room for."""
        places = slice(self.count, self.count + positions.shape[-1])
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if buffer.dtype != states.dtype:
                states = states.clamp(-LARGEST, LARGEST)
            buffer[:, :, places] = states
        self.positions[:, places] = positions
        self.count = places.stop

    def taken(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values and positions of the tokens that there are."""
        taken = slice(self.count)
        return self.keys[:, :, taken], self.values[:, :, taken], self.positions[:, taken]

    def clear(self) -> None:
        """Let all tokens go."""
        self.positions.fill_(-1)
        self.count = 0

    def allocated(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        return {f"newest_{name}": getattr(self, name) for name in ("keys", "values", "positions")}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Of all tensors the part that is taken."""
        return dict(zip(self.allocated(), self.taken(), strict=True))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], places: int) -> "Newest":
        """What `tensors` gave these of, with so many places."""
        keys, values, positions = (tensors[f"newest_{name}"] for name in ("keys", "values", "positions"))
        newest = cls.empty(keys, values, places, True, keys.device)
        newest.put(keys, values, positions)
        return newest

    def map(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> "Newest":
        """The same with every tensor changed, by its name; shapes stay, but for the rows."""
        changed = {name: change(name, tensor) for name, tensor in self.allocated().items()}
        return Newest(**{name.removeprefix("newest_"): tensor for name, tensor in changed.items()}, count=self.count)
