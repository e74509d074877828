"""Hypothesis strategies for raw layers: small shapes, policies and ways to feed tokens; all shrink."""

import dataclasses

import tiny
import torch
from hypothesis import strategies as st

from less_cache import POLICIES, EvictionPolicy
from less_cache.cache.layer import LESSLayer
from less_cache.integration.rotation import Rotation
from less_cache.memory import MEMORIES
from less_cache.memory.base import TrainedMemory

SEEDS = st.integers(0, 2**16)
FRACTIONS = st.sampled_from([0.1, 0.25, 0.4, 0.75])


@st.composite
def policies(draw, name: str, fractions: bool = False) -> EvictionPolicy:
    """The policy `name` with a small budget: counts up to 5, or some of them fractions of the prompt."""
    policy = POLICIES[name]
    counts = {}
    for field in dataclasses.fields(policy):
        count = st.integers(field.metadata.get("least", 1), 5)
        whole = field.metadata.get("whole", False)
        counts[field.name] = draw(count | FRACTIONS if fractions and not whole else count)
    return policy(**counts)


def partitions() -> st.SearchStrategy[list[int]]:
    """Block lengths, up to 40 tokens: chunks, each followed by steps."""
    turns = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 8)), min_size=1, max_size=3)
    return turns.map(lambda turns: [n for chunk, steps in turns for n in [chunk] + [1] * steps]).filter(
        lambda blocks: sum(blocks) <= 40
    )


@dataclasses.dataclass(repr=False)
class Case:
    """A raw layer, and the tokens that it is fed."""

    policy: EvictionPolicy
    kernels: TrainedMemory | None
    blocks: list[int]
    real: torch.Tensor | None  # [b, T]
    states: tuple[torch.Tensor, ...]  # queries [b, h, T, d], keys and values [b, g, T, d]
    shares: torch.Tensor | None = None  # [g]
    rotation: Rotation | None = None

    def __repr__(self) -> str:  # a failing example is read by people: shapes, not numbers
        shapes = [list(states.shape) for states in self.states]
        kernels = type(self.kernels).__name__
        heads = f"shapes={shapes}, shares={self.shares}"
        return f"Case({self.policy}, kernels={kernels}, blocks={self.blocks}, real={self.real}, {heads})"

    def layer(self) -> LESSLayer:
        return LESSLayer(self.policy, self.kernels, layer_idx=0, shares=self.shares, rotation=self.rotation)

    def real_tokens(self) -> torch.Tensor:
        b, _, length, _ = self.states[0].shape
        return torch.ones(b, length, dtype=torch.bool) if self.real is None else self.real


@st.composite
def cases(
    draw,
    name: str,
    blocks: st.SearchStrategy[list[int]] | None = None,
    padding: str = "none",
    kernels: bool | None = None,
    fractions: bool = False,
    uneven: bool = False,
) -> Case:
    """`padding`: "none", "left" (every row starts with its padding) or "anywhere"; row 0 has none. `uneven`: KV heads have
    budgets of their own.
    """
    b = draw(st.integers(1 if padding == "none" else 2, 3))
    g = draw(st.integers(1, 2))
    h = g * draw(st.integers(1, 3))
    d = draw(st.sampled_from([2, 4, 6]))
    lengths = draw(partitions() if blocks is None else blocks)
    length = sum(lengths)
    with_kernels = draw(st.booleans()) if kernels is None else kernels
    memory = draw(st.sampled_from(list(MEMORIES))) if with_kernels else None
    seed = draw(SEEDS)
    real = None
    if padding == "left":
        starts = [0, *draw(st.lists(st.integers(0, length - 1), min_size=b - 1, max_size=b - 1))]
        real = torch.arange(length) >= torch.tensor(starts).unsqueeze(-1)
    elif padding == "anywhere":
        masks = draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=b - 1, max_size=b - 1))
        real = torch.tensor([[True] * length, *masks])
    states = tiny.random_states(b, h, g, length, d, seed=seed)
    rotation = None
    if POLICIES[name].asks_references:
        states = 0.3 * states[0], *states[1:]  # weights that are all but 1 would be ties, which rounding decides
        rotation = draw(st.sampled_from([None, tiny.rotation(d)]))
    return Case(
        policy=draw(policies(name, fractions)),
        kernels=tiny.layer_kernels(h, g, d, seed=seed, memory=memory) if memory else None,
        blocks=lengths,
        real=real,
        states=states,
        shares=torch.tensor(draw(st.lists(st.sampled_from([0.2, 1.0, 2.5]), min_size=g, max_size=g))) if uneven else None,
        rotation=rotation,
    )
