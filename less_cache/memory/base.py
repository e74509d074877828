"""What a layer remembers evicted tokens with.

Axes: `b` batch, `h` query heads, `g` KV heads, `s` = h / g, `m` tokens folded at once, `n` queries, `d` head dim, `r`
virtual tokens.
"""

import abc
import copy
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from less_cache.errors import LESSError
from less_cache.memory.state import LowRankState, PackedState
from less_cache.ops.attention import LOWEST

Self = TypeVar("Self", bound="LayerMemory")
Trained = TypeVar("Trained", bound="TrainedMemory")


class LayerMemory(nn.Module, abc.ABC):
    """Folds evicted pairs (k, v) into a state of constant size and reads it back as *virtual tokens*.

    A virtual token has a logit for every query and a value; attention treats it like any other column. Stateless: the
    state, a dataclass of tensors whose first dimension is the batch, is handed in.
    """

    @abc.abstractmethod
    def empty_state(self, batch: int, num_key_value_heads: int, head_dim: int, device: torch.device) -> Any:
        """The state before anything was evicted. `head_dim`: of the values."""

    @property
    def numbers_to_fold(self) -> int | None:
        """How many numbers it takes to fold in a token of a head, so that a long text comes in blocks; None: what comes at once
        is folded in together, and the state is another one in blocks.
        """
        return None

    def pass_time(self, state: Any, tokens: torch.Tensor | int) -> None:
        """Let a state fade, in place, over so many new tokens, `[b]` or for all rows."""

    @abc.abstractmethod
    def fold_in(
        self,
        state: Any,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        leaves: torch.Tensor,
        positions: torch.Tensor,
        seen: torch.Tensor,
    ) -> None:
        """Fold in, in place, the pairs `[b, g, m, d]` that leave, `[b, g, m]` bool.

        `positions`: where in its row each pair is, `[b, g, m]`; `seen`: tokens that the row has seen, `[b, 1, 1]`.
        """

    @abc.abstractmethod
    def virtual_tokens(
        self,
        state: Any,
        query_states: torch.Tensor,
        scaling: float,
        softcap: float | None = None,
        later: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[b, g, s, n, r]` for the queries `[b, h, n, d]`, and values `[b, g, r, d]`; float32.

        `later`: how many tokens of its row come between the state and each query, `[b, n]`; None: none.
        """

    @abc.abstractmethod
    def packed(self, state: Any) -> Any:
        """The state at rest, in half the bytes: a dataclass of tensors whose first dimension is the batch. To pack
        again what was unpacked changes nothing.
        """

    @abc.abstractmethod
    def unpacked(self, packed: Any) -> Any:
        """What `packed` gave, to read and to change."""

    def change_values(self, state: Any, change: torch.Tensor) -> None:
        """Add to the values of the virtual tokens, in place, `[b, g, r, d]`; a memory that cannot keeps them."""

    def for_heads(self: Self, num_key_value_heads: int) -> Self:
        """The part for the KV heads that this process has: under tensor parallelism a share of them, in order."""
        return self

    def on(self: Self, device: torch.device) -> Self:
        """This, or a copy of it on `device`: the user's kernels stay where they are."""
        if all(parameter.device == device for parameter in self.parameters()):
            return self
        return copy.deepcopy(self).to(device)


class TrainedMemory(LayerMemory):
    """A memory with learned weights. Virtual token r is a weighted mean of the evicted pairs, of total weight Z_r:

        logit_r(q) = log φ_r(q) + log W_r    Z_r = Σ e^{−λ_r a} ψ_r(k)    value_r = Σ e^{−λ_r a} ψ_r(k) v / Z_r

    a: how many tokens ago the pair came. Only a memory with `fading_rates` λ fades. W is Z unless `log_weights` bounds it. φ
    has weights for every query head, ψ for every KV head: the first dimension of each parameter is the head.

    Args:
        rank: The state takes at most the bytes of a low-rank state of this rank.
    """

    rank_step: ClassVar[int] = 1  # rows of a low-rank state whose bytes a virtual token takes
    rank_rule: ClassVar[str] = "a rank of at least 1"  # what `rank_step` means for users
    words: ClassVar[str]  # what a KV head remembers evicted tokens with, on a card; {}: its number of virtual tokens

    def __init__(self, num_attention_heads: int, num_key_value_heads: int, head_dim: int, hidden_size: int, rank: int):
        super().__init__()
        self.sizes = (num_attention_heads, num_key_value_heads, head_dim, hidden_size, rank)
        for name, shape in self.shapes(*self.sizes).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)))
        self.reset_parameters()

    @staticmethod
    @abc.abstractmethod
    def shapes(h: int, g: int, d: int, m: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, in the order that they are stored; `m`: hidden size."""

    @abc.abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The weights that training starts from."""

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """All parameters by name, as `named_parameters` has them, which takes longer than a step may."""
        parameters: Any = self._parameters  # to torch, some may be None
        return parameters

    @property
    def num_virtual_tokens(self) -> int:
        """Virtual tokens of a KV head."""
        return self.sizes[-1] // self.rank_step

    @property
    def numbers_to_fold(self) -> int:
        _, _, d, hidden_size, _ = self.sizes
        return max(hidden_size, 2 * d)

    @property
    def extra_dims(self) -> int:
        """Dimensions that `remembered` has beside the values'."""
        return 0

    @abc.abstractmethod
    def key_features(self, key_states: torch.Tensor) -> torch.Tensor:
        """ψ(k): `[b, g, m, d]` to `[b, g, m, r]`, float32, not negative."""

    @abc.abstractmethod
    def log_query_features(
        self, query_states: torch.Tensor, means: torch.Tensor, scaling: float, softcap: float | None = None
    ) -> torch.Tensor:
        """log φ(q): `[b, h, n, d]` to `[b, g, s, n, r]`, float32; `means`: the state's, `[b, g, n or 1, r, *]`."""

    def fading_rates(self) -> torch.Tensor | None:
        """λ, nats a token, `[g, r]`, not negative; None: a pair weighs as much after any time."""
        return None

    def log_weights(self, log_mass: torch.Tensor) -> torch.Tensor:
        """log W of virtual tokens with these log Z: `[b, g, 1, n, r]`."""
        return log_mass

    def remembered(self, key_states: torch.Tensor, value_states: torch.Tensor) -> torch.Tensor:
        """What the state keeps weighted means of, `[b, g, m, *]`: the values, then whatever else φ reads."""
        return value_states

    def empty_state(self, batch: int, num_key_value_heads: int, head_dim: int, device: torch.device) -> LowRankState:
        return LowRankState.empty(batch, num_key_value_heads, self.num_virtual_tokens, head_dim + self.extra_dims, device)

    def pass_time(self, state: LowRankState, tokens: torch.Tensor | int) -> None:
        share = self.share_left(tokens)
        if share is not None:
            state.scale(share)

    def share_left(self, tokens: torch.Tensor | int) -> torch.Tensor | None:
        """e^{−λ t}, what is left of a pair's weight after `tokens` more, `[b]` or a number: `[b or 1, g, r]`; None: all."""
        rates = self.fading_rates()
        if rates is None:
            return None
        return torch.exp(-rates * (tokens.view(-1, 1, 1) if isinstance(tokens, torch.Tensor) else tokens))

    def fold_in(
        self,
        state: LowRankState,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        leaves: torch.Tensor,
        positions: torch.Tensor,
        seen: torch.Tensor,
    ) -> None:
        weights = self.pair_weights(key_states, leaves, positions, seen)
        state.fold_in(weights, self.remembered(key_states, value_states))

    def pair_weights(
        self, key_states: torch.Tensor, leaves: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        """e^{−λ a} ψ(k), a = seen − position, 0 where a pair stays: `[b, g, m, r]`."""
        features, rates = self.key_features(key_states) * leaves.unsqueeze(-1), self.fading_rates()
        return features if rates is None else features * torch.exp(rates.unsqueeze(1) * (positions - seen).unsqueeze(-1))

    def virtual_tokens(
        self,
        state: LowRankState,
        query_states: torch.Tensor,
        scaling: float,
        softcap: float | None = None,
        later: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        means, log_mass = state.means(), state.log_mass()  # [b, g, r, *], [b, g, 1, 1, r]
        rates = None if later is None else self.fading_rates()
        if rates is not None and later is not None:
            log_mass = log_mass - rates[:, None, None] * later[:, None, None, :, None]  # [b, g, 1, n, r]
        logits = self.log_query_features(query_states, means.unsqueeze(2), scaling, softcap) + self.log_weights(log_mass)
        return logits.clamp_min(LOWEST), self.values_of(means)

    def packed(self, state: LowRankState) -> PackedState:
        return state.packed()

    def unpacked(self, packed: PackedState) -> LowRankState:
        return LowRankState.unpacked(packed)

    def change_values(self, state: LowRankState, change: torch.Tensor) -> None:
        self.values_of(state.values_sum).add_(change * state.features_sum.unsqueeze(-1))

    def values_of(self, means: torch.Tensor) -> torch.Tensor:
        """The values among the dimensions of `means`."""
        return means[..., : means.shape[-1] - self.extra_dims]

    def for_heads(self: Trained, num_key_value_heads: int) -> Trained:
        parts, rest = divmod(self.sizes[1], num_key_value_heads)
        if rest or (parts != 1 and not torch.distributed.is_initialized()):
            raise LESSError(
                f"The kernels are for {self.sizes[1]} KV heads, the model's attention has {num_key_value_heads}: the cache "
                "belongs to another model. Make a LESSCache for each model."
            )
        return self if parts == 1 else self.part(torch.distributed.get_rank() % parts, parts)

    def part(self: Trained, index: int, parts: int) -> Trained:
        """The weights of the heads that process `index` of `parts` has under tensor parallelism: an equal share, in order."""
        h, g, d, m, rank = self.sizes
        with torch.device("meta"):
            memory = type(self)(h // parts, g // parts, d, m, rank)
        heads = {name: tensor.chunk(parts)[index].clone() for name, tensor in self.state_dict().items()}
        memory.load_state_dict(heads, assign=True)
        return memory.requires_grad_(False)


def by_head(states: torch.Tensor) -> torch.Tensor:
    """`[b, h, n, d]` to `[h, b·n, d]` float32: one product a head, without a copy of its weights for every row."""
    return states.float().transpose(0, 1).flatten(1, 2)


def by_row(features: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """`[h, b·n, r]` back to `[b, h, n, r]`, for `states` of `b` rows."""
    return features.unflatten(1, (states.shape[0], -1)).transpose(0, 1).contiguous()
