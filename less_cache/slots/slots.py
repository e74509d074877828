"""Slots: the only place that knows how kept tokens are stored.

Axes: `b` rows, `g` KV heads, `c` slots of the longest head, `N` slots of all heads, `m` slots of a head, `d` head dim.
"""

import dataclasses
from collections.abc import Callable, Mapping

import torch

from less_cache.errors import LESSError
from less_cache.policies import EvictionPolicy
from less_cache.slots import ragged
from less_cache.slots.coding import OF_CODING, Coding
from less_cache.slots.columns import Columns

SPARE_SLOTS = 64  # free slots of a head that may still grow
SLACK = 1.25  # heads are padded to the longest where that takes no more than so many times the sum over heads
OF_SLOTS = ("positions", "scores", "bias", "starts")  # tensors beside those of the coding
COMPILES_WELL = torch.__version__ >= "2.13"  # torch 2.11 makes code of `index_copy_` that does not run


@dataclasses.dataclass
class Slots:
    """Kept tokens of every KV head, in no order: RoPE is in the keys, so attention does not mind.

    Heads of one size lie as a block, `[b, g, c, *]` a tensor; heads of different sizes one after the other, `[N, *]`, and
    `starts` says where each begins. The bytes are those of the sum over heads, within `SLACK`.

    A head has slots for its capacity and one more, for the token that comes before another leaves; they grow with the text
    until then. Without a budget it has some more than it holds.
    """

    coding: Coding
    dtype: torch.dtype  # of keys and values, as the model gives them
    stored: dict[str, torch.Tensor]  # keys and values in its format, by `keys`, `values`, or with a part: `keys_codes`
    positions: torch.Tensor  # [b, g, c] or [N] int32, -1: an empty slot
    scores: torch.Tensor  # as positions, float32, or 16 bit under a policy that chooses in blocks
    bias: torch.Tensor | None  # as scores
    starts: torch.Tensor | None  # [b·g + 1] int64; None: heads of one size
    own_sizes: torch.Tensor | None  # [b, g] int64, on the processor, where it differs by head
    room: int | None  # steps that may come before a head may be full; None: any number

    # Making them

    @classmethod
    def keep(
        cls,
        columns: Columns,
        kept: torch.Tensor,
        capacity: torch.Tensor | None,
        tokens: int | None,
        coding: Coding,
    ) -> "Slots":
        """Fresh slots of the columns that are `kept`, bool `[b, g, c]`; nothing else stays referenced.

        `capacity`: most tokens that a head keeps, `[b, 1 or g, 1]`; None: there is no budget. `tokens`: how many were seen,
        padding included, which no head can exceed; None: all slots at once, for shapes that never change.
        """
        b, g, _ = kept.shape
        if capacity is None:
            return cls._compact(columns, kept, coding, kept.sum(-1).cpu() + SPARE_SLOTS, SPARE_SLOTS)
        capacity = capacity.cpu().expand(b, g, 1).squeeze(-1)
        most = int(capacity.max())
        if tokens is None or most <= tokens + SPARE_SLOTS:
            return cls._compact(columns, kept, coding, capacity + 1, None)
        spare = max(SPARE_SLOTS, tokens // 4)
        return cls._compact(columns, kept, coding, capacity.clamp_max(tokens + spare) + 1, spare)

    @classmethod
    def chosen(cls, columns: Columns, kept: torch.Tensor, coding: Coding, before: "Slots | None" = None) -> "Slots":
        """Fresh slots of the columns that are `kept`, bool `[b, g, c]`, in their order, without a free one: nothing comes in
        before the next choice. The first columns are those of the slots `before`, whose codes stay as they are.
        """
        return cls._compact(columns, kept, coding, kept.sum(-1).clamp_min(1).cpu(), None, before)

    @classmethod
    def _compact(
        cls,
        columns: Columns,
        kept: torch.Tensor,
        coding: Coding,
        sizes: torch.Tensor,
        room: int | None,
        before: "Slots | None" = None,
    ) -> "Slots":
        b, g, c = kept.shape
        longest = int(sizes.max())
        differ = longest * b * g > SLACK * int(sizes.sum())
        starts = ragged.starts_of(sizes).to(kept.device) if differ else None
        held = min(c, longest)
        order = (~kept).int().argsort(dim=-1, stable=True)[..., :held]  # [b, g, held], kept ones first

        def compact(tensor: torch.Tensor, fill: int) -> torch.Tensor:
            more = tensor.shape[3:]
            try:
                buffer = tensor.new_full((b, g, longest, *more), fill)
            except RuntimeError as error:  # a processor's allocator has no error of its own
                raise LESSError(
                    f"No memory for {longest:,} slots in each of {b * g} KV heads. Use a smaller budget"
                    f"{'' if room is not None else ', or static=False, where slots come with the text'}."
                ) from error
            buffer[:, :, :held] = tensor.gather(2, order.view(b, g, held, *[1] * len(more)).expand(b, g, held, *more))
            return buffer if starts is None else buffer.flatten(0, 2)[ragged.index_in_padded(sizes, starts)]

        slots = cls(
            coding=coding,
            dtype=columns.keys.dtype,
            stored={},
            positions=compact(columns.positions.masked_fill(~kept, -1), -1),
            scores=compact(columns.scores, 0),
            bias=None if columns.bias is None else compact(columns.bias, 0),
            starts=starts,
            own_sizes=sizes if differ else None,
            room=room,
        )
        if before is None:
            slots.stored = slots._coding().encode(compact(columns.keys, 0), compact(columns.values, 0), slots.positions)
            return slots
        new = slice(before.longest, None)  # the columns that are not stored yet
        coded = coding.encode(columns.keys[:, :, new], columns.values[:, :, new], columns.positions[:, :, new])
        for name, codes in coded.items():
            slots.stored[name] = compact(torch.cat([before._padded(before.stored[name], 0), codes], dim=2), 0)
        return slots

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, torch.Tensor],
        coding: Coding,
        dtype: torch.dtype,
        b: int,
        capacity: torch.Tensor | None,
    ) -> "Slots":
        """The slots that `tensors` gave these of; `b`: rows, `capacity` as in `keep`, `coding`: without its tensors."""
        starts = tensors.get("starts")
        if not coding.format.is_exact:
            coding = Coding(coding.format, rotation=coding.rotation, **{name: tensors[name] for name in OF_CODING})
        stored = {name: tensors[name] for name in coding.format.names()}
        sizes = None if starts is None else starts.diff().view(b, -1).cpu()
        slots = cls(coding, dtype, stored, tensors["positions"], tensors["scores"], tensors.get("bias"), starts, sizes, room=0)
        if capacity is not None and bool((slots.sizes.unsqueeze(-1) > capacity.cpu()).all()):
            slots.room = None
        return slots

    # Reading them

    @property
    def sizes(self) -> torch.Tensor:
        """Slots of each head, `[b, g]` on the processor."""
        if self.own_sizes is not None:
            return self.own_sizes
        return torch.full(self.positions.shape[:2], self.positions.shape[-1], device="cpu")

    @property
    def longest(self) -> int:
        """Slots of the longest head."""
        return self.positions.shape[-1] if self.own_sizes is None else int(self.own_sizes.max())

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        beside = {name: getattr(self, name) for name in OF_SLOTS if getattr(self, name) is not None}
        return self.stored | self.coding.tensors() | beside

    @property
    def host_bytes(self) -> int:
        """Of what the processor knows of heads of different sizes."""
        return 0 if self.own_sizes is None else self.own_sizes.nbytes

    @property
    def is_plain(self) -> bool:
        """Whether heads are of one size, without biases, and keys and values stored as they are."""
        return self.starts is None and self.bias is None and self.coding.format.name == "float"

    @property
    def keys(self) -> torch.Tensor:
        """`[b, g, c, d]`; beyond a head's last slot they mean nothing."""
        decoded = self._padded(self._coding().keys(self.stored, self.positions, self.dtype), 0)
        return self.coding.with_first(decoded, self._padded(self.positions, -1), "keys")

    @property
    def values(self) -> torch.Tensor:
        """`[b, g, c, w]`; 0 beyond a head's last slot."""
        decoded = self._padded(self.coding.values(self.stored, self.dtype), 0)
        return self.coding.with_first(decoded, self._padded(self.positions, -1), "values")

    def scores_by_column(self) -> torch.Tensor:
        """The scores alone of `columns`, `[b, g, c]`."""
        return self._padded(self.scores, 0)

    def columns(self) -> Columns:
        """All slots as columns; those of a block of equal heads are the slots themselves, others are copies."""
        return Columns(
            self.keys,
            self.values,
            self._padded(self.positions, -1),
            self.scores_by_column(),
            None if self.bias is None else self._padded(self.bias, 0),
        )

    def pairs(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in `slots` `[b, g, m]`: `[b, g, m, d]` and `[b, g, m, w]`; beyond a head's last slot they mean
        nothing.
        """
        at = slots.unsqueeze(-1) if self.starts is None else self._at(slots).clamp_max(self.positions.shape[0] - 1)
        gathered = {name: self._gather(tensor, at) for name, tensor in self.stored.items()}
        if self.coding.format.is_exact:  # in few operations
            return gathered["keys"], gathered["values"]
        positions = self.positions.gather(-1, slots) if self.starts is None else self.positions[at]
        keys, values = self.coding.keys(gathered, positions, self.dtype), self.coding.values(gathered, self.dtype)
        return self.coding.with_first(keys, positions, "keys"), self.coding.with_first(values, positions, "values")

    # Changing them, in place

    def put(
        self, key_states: torch.Tensor, value_states: torch.Tensor, positions: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        """Put one token a head, `[b, g, 1, *]`, into an empty slot each; the slots, `[b, g, 1]`.

        There is one in every head after `Held.make_room`.
        """
        empty = self.positions if self.starts is None else self._padded(self.positions, torch.iinfo(torch.int32).max)
        slots = empty.argmin(dim=-1, keepdim=True)
        self.set_positions(slots, positions)
        self._scatter(self.scores, slots, scores)
        if self.bias is not None:
            self._scatter(self.bias, slots, torch.zeros_like(scores))
        for name, tensor in self.coding.meeting(key_states, value_states, positions).tensors().items():
            self.coding.tensors()[name].copy_(tensor)  # in place, for shapes and addresses that never change
        for name, tensor in self.coding.encode(key_states, value_states, positions).items():
            self._write(self.stored[name], slots, tensor)
        return slots

    def set_positions(self, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """Say where in its row the token in each of `slots` `[b, g, m]` is; -1: the slot is empty now."""
        self._scatter(self.positions, slots, positions)

    def set_scores(self, scores: torch.Tensor) -> None:
        """Take the policy's scores, `[b, g, c]`."""
        self.scores.copy_(self._flat(scores))

    def drop(self, leaves: torch.Tensor) -> None:
        """Empty the slots that `leaves`, bool `[b, g, c]`."""
        self.positions.masked_fill_(self._flat(leaves), -1)

    def renumber(self, policy: EvictionPolicy, moved: torch.Tensor) -> None:
        """Count positions anew: the token at position p is at `moved[row, p]` now, `[b, t]`; -1: it leaves."""
        columns = self.columns()
        b, g, c = columns.positions.shape
        at = columns.positions.clamp_min(0).long().view(b, g * c)
        positions = moved.gather(-1, at).view(b, g, c).masked_fill(columns.positions < 0, -1)
        self.positions.copy_(self._flat(positions))
        self.coding = self.coding.meeting(columns.keys, columns.values, positions)
        if self.coding.turns_keys:  # they stay as they are, wherever they count from now on
            keys, values = self._flat(columns.keys), self._flat(columns.values)
            for name, tensor in self._coding().encode(keys, values, self.positions).items():
                self.stored[name].copy_(tensor)
        self.set_scores(policy.renumbered(columns.scores, moved))

    # All of them at once

    def refit(self, capacity: torch.Tensor | None, tokens: int) -> "Slots":
        """The same tokens in slots with room for more, after `tokens` were seen; arguments as in `keep`."""
        columns = self.columns()
        return Slots.keep(columns, columns.positions >= 0, capacity, tokens, self.coding)

    def map(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> "Slots":
        """The same with every tensor changed, by its name; shapes stay."""
        return dataclasses.replace(
            self,
            coding=self.coding.map(change),
            stored={name: change(name, tensor) for name, tensor in self.stored.items()},
            positions=change("positions", self.positions),
            scores=change("scores", self.scores),
            bias=None if self.bias is None else change("bias", self.bias),
            starts=None if self.starts is None else change("starts", self.starts),
        )

    def select(self, indices: torch.Tensor) -> "Slots":
        """The rows at `indices`, which may repeat."""
        if self.own_sizes is None:
            return self.map(lambda name, rows: rows[indices.to(rows.device)])
        sizes = self.own_sizes[indices.cpu()]
        starts = ragged.starts_of(sizes).to(self.starts.device)
        first = self.starts[:-1].view(self.own_sizes.shape)[indices.to(starts.device)].flatten()  # of each chosen head
        head, slot = ragged.heads_and_slots(sizes, starts)
        at = first[head] + slot
        own = dataclasses.replace(self, coding=Coding(self.coding.format), starts=None)
        selected = own.map(lambda name, slots: slots[at.to(slots.device)])
        coding = self.coding.map(lambda name, rows: rows[indices.to(rows.device)])
        return dataclasses.replace(selected, coding=coding, starts=starts, own_sizes=sizes)

    # Equal heads and others

    def _coding(self) -> Coding:
        """The coding of all slots as they lie: where heads differ in size, with centers for each slot."""
        if self.starts is None or self.coding.centers is None:
            return self.coding
        heads, _ = ragged.heads_and_slots(self.own_sizes, self.starts)
        return dataclasses.replace(self.coding, centers=self.coding.centers.flatten(0, 2)[heads])

    def _padded(self, tensor: torch.Tensor, fill: int) -> torch.Tensor:
        """`[N, *]` as `[b, g, c, *]`, `fill` beyond a head's last slot; `[b, g, c, *]` as it is."""
        return tensor if self.own_sizes is None else ragged.padded(tensor, self.own_sizes, self.starts, fill)

    def _flat(self, columns: torch.Tensor) -> torch.Tensor:
        """`[b, g, c, *]` as the slots lie."""
        return columns if self.own_sizes is None else columns.flatten(0, 2)[ragged.index_in_padded(self.own_sizes, self.starts)]

    def _at(self, slots: torch.Tensor) -> torch.Tensor:
        """Where `slots` `[b, g, m]` of heads of different sizes lie, among all."""
        assert self.starts is not None
        return self.starts[:-1].view(*slots.shape[:2], 1) + slots

    def _gather(self, tensor: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """What lies at `[b, g, m, 1]` in equal heads, or at `[b, g, m]` among all slots: `[b, g, m, *]`."""
        if self.starts is not None:
            return tensor[at]
        return tensor.gather(2, at.expand(*at.shape[:3], tensor.shape[-1]))

    def _scatter(self, tensor: torch.Tensor, slots: torch.Tensor, numbers: torch.Tensor) -> None:
        """A number a slot, into `[b, g, c]` or `[N]`."""
        if self.starts is None:
            tensor.scatter_(-1, slots, numbers)
        else:
            tensor[self._at(slots)] = numbers

    def _write(self, tensor: torch.Tensor, slots: torch.Tensor, states: torch.Tensor) -> None:
        """The states `[b, g, 1, *]` of one token, into `[b, g, c, *]` or `[N, *]` at `slots` `[b, g, 1]`.

        A compiler turns `scatter_` into a copy of all slots, but not `index_copy_`, which takes more operations uncompiled.
        """
        if self.starts is not None:
            tensor.index_copy_(0, self._at(slots).flatten(), states.flatten(0, 2))
        elif COMPILES_WELL and torch.compiler.is_compiling():
            b, g, c, d = tensor.shape
            first = torch.arange(0, b * g * c, c, device=slots.device)  # of each head's slots among all
            tensor.view(-1, d).index_copy_(0, first + slots.flatten(), states.reshape(-1, d))
        else:
            tensor.scatter_(2, slots.unsqueeze(-1).expand_as(states), states)
