"""What a layer of the cache holds, and all that happens to it as a whole.

Axes: `b` rows, `g` KV heads, `c` slots, `d` head dim, `w` width of values.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from less_cache.errors import LESSError
from less_cache.slots import Held, Hidden, Setup


class HoldingLayer(CacheLayerMixin):
    """A layer as a container: rows can be chosen, copied, moved to another device, saved and loaded.

    Abstract: `LESSLayer` says how tokens come in.
    """

    setup: Setup
    leads: bool
    cumulative_length: Any  # tokens seen, padding included
    _held: Held | None

    @property
    def held(self) -> Held | None:
        """All that the layer holds of its sequences; None before the first block."""
        return self._held

    def _hold(self, held: Held) -> None:
        self._held = held

    @property
    def is_empty(self) -> bool:
        """Whether nothing was read yet: the next block is the first."""
        return self._held is None or self._held.slots is None

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """Kept keys, `[b, g, c, d]`; heads that keep fewer end with empty slots."""
        return None if self.is_empty else self._held.columns().keys

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """Kept values, as `keys`."""
        return None if self.is_empty else self._held.columns().values

    @property
    def positions(self) -> torch.Tensor | None:
        """Where in its row each kept token is, `[b, g, c]`; -1: an empty slot."""
        return None if self.is_empty else self._held.columns().positions

    @property
    def seen(self) -> torch.Tensor | None:
        """Real tokens of each row, `[b]`."""
        return None if self._held is None else self._held.rows.seen

    @property
    def state(self) -> Any:
        """What evicted tokens were folded into, a dataclass of tensors; None without a memory."""
        return None if self._held is None else self._held.state

    def hidden_by(self, visible: torch.Tensor | None) -> Hidden | None:
        """What a mask hides of the tokens seen, `visible` bool `[b, t]`; None: nothing, or it is not a mask of these rows."""
        if visible is None or self.is_empty or len(visible) not in (1, len(self._held.rows.seen)):
            return None
        return self._held.rows.hidden_by(visible)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is kept of the sequences, by name."""
        return {} if self._held is None else self._held.tensors()

    def allocated(self) -> dict[str, torch.Tensor]:
        """All that takes memory, by the same names."""
        return self.tensors()

    @torch.inference_mode(False)
    def load(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, cumulative_length: int) -> None:
        """Go on from what `tensors` gave after so many tokens; `dtype`: of keys and values before they were stored."""
        held = Held.from_tensors(tensors, self.setup, dtype)
        b, g = held.slots.sizes.shape
        self._begin(b, g, held.slots.values.shape[-1], dtype, held.slots.values.dtype, held.slots.positions.device)
        if self.leads:
            held.rows.assume_left_padding(cumulative_length)  # files of earlier versions do not say where padding was
        self._hold(held)
        self.cumulative_length += cumulative_length

    def _begin(self, b: int, g: int, width: int, dtype: torch.dtype, value_dtype: torch.dtype, device: torch.device) -> None:
        """Hold nothing yet, of `b` rows and `g` KV heads whose values have this width."""
        self.dtype, self.value_dtype, self.device = dtype, value_dtype, device
        self.setup = self.setup.on(device, g)
        self._held = Held.empty(self.setup, b, g, width, device)
        self.is_initialized = True

    @torch.inference_mode(False)
    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change every tensor; shapes stay."""
        if self._held is not None:
            self._hold(self._held.map(lambda name, tensor: change(tensor)))

    def offload(self) -> None:
        self.map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self.map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    @torch.inference_mode(False)
    def batch_select_indices(self, indices: torch.Tensor | Sequence[int]) -> None:
        """Go on with the rows at `indices`: numbers, which may repeat, or one truth value a row."""
        if self._held is not None:
            rows = torch.arange(len(self._held.rows.seen), device=self._held.rows.seen.device)
            try:
                chosen = rows[torch.as_tensor(indices, device=rows.device)]
            except (IndexError, TypeError, ValueError) as error:
                raise LESSError(f"batch_select_indices: expected rows of a batch of {len(rows)}, got {indices}.") from error
            self._hold(self._held.select(chosen))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._held is not None:
            rows = torch.arange(len(self._held.rows.seen), device=self._held.rows.seen.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))
