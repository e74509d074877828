"""What a budget in bytes buys: how many tokens a KV head keeps for a share of a full cache's bytes."""

import torch

from less_cache.errors import LESSError
from less_cache.integration.families import Geometry
from less_cache.kernels.kernels import LESSKernels
from less_cache.policies import AttentionMatching
from less_cache.policies.base import MOST_TOKENS
from less_cache.slots import SlotFormat
from less_cache.slots.asked import PLACES

BITS_16 = 2  # bytes a number of the full cache that a share is of
BESIDE = 4 + 2 + 2  # bytes of a slot's position, score and bias


def within(
    share: float, geometry: Geometry, format: SlotFormat, kernels: LESSKernels | None, every: int = 32
) -> AttentionMatching:
    """Attention matching that holds `share` of the bytes of a 16-bit full cache of the prompt.

    All is counted: codes, scales, positions, scores and biases of slots, the newest tokens in 16 bits, the queries that are
    held, and the state. Where the rest takes more than the share, few tokens stay.
    """
    if not isinstance(share, float) or not 0 < share <= 1:
        raise LESSError(
            "LESSCache: expected budget to be an int (tokens) or a float in (0, 1] (share of a full cache's bytes), "
            f"got {share!r}."
        )
    slot, spared = _costs(geometry, format, kernels, every)
    tokens = share * _token(geometry) / slot  # for each of the prompt
    return AttentionMatching(budget=tokens if tokens < 1 else MOST_TOKENS, every=every, spared=spared)


def worth(
    tokens: int, geometry: Geometry, format: SlotFormat, kernels: LESSKernels | None, every: int = 32
) -> AttentionMatching:
    """Attention matching that holds the bytes of so many tokens in 16 bits, a head."""
    slot, spared = _costs(geometry, format, kernels, every)
    return AttentionMatching(budget=max(1, round(tokens * _token(geometry) / slot) - spared), every=every)


def _token(geometry: Geometry) -> int:
    """Bytes of a key and a value of 16 bits a number."""
    return 2 * geometry.head_dim * BITS_16


def _costs(geometry: Geometry, format: SlotFormat, kernels: LESSKernels | None, every: int) -> tuple[float, int]:
    """Bytes of a slot, and how many slots take the bytes of all that a head holds beside its slots."""
    d, queries = geometry.head_dim, geometry.num_attention_heads // geometry.num_key_value_heads
    slot = 2 * _bytes_of(format, d) + BESIDE
    query = d / 4 + BITS_16  # two bits a number, and a scale
    position = 4 / geometry.num_key_value_heads
    newest = every / 2 * (_token(geometry) + queries * query + position)  # on average: they come one by one
    beside = 0 if format.is_exact else 3 * d * BITS_16  # the mean key, and the first token
    asked = PLACES * queries * (query + position)
    return slot, round((newest + asked + beside + _bytes_of_state(kernels, d)) / slot)


def _bytes_of_state(kernels: LESSKernels | None, d: int) -> float:
    """Of what a KV head remembers evicted tokens in, mean over layers."""
    if kernels is None:
        return 0.0
    memories = [kernels.for_layer(index) for index in kernels.config.layers]
    states = [memory.packed(memory.empty_state(1, 1, d, torch.device("cpu"))) for memory in memories]
    return sum(tensor.nbytes for state in states for tensor in vars(state).values()) / max(1, len(states))


def _bytes_of(format: SlotFormat, d: int) -> int:
    """Of the `d` numbers of one key, value or query; of 16 bits each where they are not quantised."""
    return sum(part.nbytes for part in format.encode(torch.zeros(d, dtype=torch.float16)).values())
