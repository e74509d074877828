"""CONTRIBUTING's promise: a new policy, memory, backend or slot format is one new file and one line in a table.

Each class here is that file, each `setitem` that line. The rest of the package takes them as it takes its own.
"""

import dataclasses
import sys
import types
from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from tiny import VOCAB, tiny_kernels, tiny_llama

from less_cache import H2O, POLICIES, EvictionPolicy, LESSCache, LESSConfig, LESSKernels
from less_cache.backends import select
from less_cache.backends import torch as in_pytorch
from less_cache.cache.layer import LESSLayer
from less_cache.memory import MEMORIES, TrainedMemory
from less_cache.slots import FORMATS, SlotFormat

PROMPT = torch.randint(1, VOCAB, (2, 30), generator=torch.Generator().manual_seed(0))
OPTIONS = {"max_new_tokens": 12, "do_sample": False}


@dataclasses.dataclass(frozen=True)
class Newest(EvictionPolicy):
    """Keeps the last `recent` tokens."""

    name: ClassVar[str] = "newest"
    recent: int | float = 8

    @classmethod
    def from_budget(cls, budget):
        return cls(recent=budget)

    def capacity(self, counts):
        return counts[0]

    def observed(self, counts, num_queries):
        return 0

    def protected(self, positions, seen, counts):
        return positions >= seen - counts[0]


def test_a_policy(monkeypatch, tmp_path):
    monkeypatch.setitem(POLICIES, "newest", Newest)
    model = tiny_llama()
    kernels = tiny_kernels(model)
    kernels.config.policy = Newest(6).to_dict()
    kernels.save_pretrained(tmp_path / "kernels")
    cache = LESSCache.from_pretrained(tmp_path / "kernels", model, budget=0.2)
    model.generate(PROMPT, past_key_values=cache, **OPTIONS)
    assert cache.policy == Newest(0.2)
    cache.save(tmp_path / "cache")
    other = LESSCache.load(tmp_path / "cache", model, cache.kernels)
    assert torch.equal(other.layers[0].held.slots.positions, cache.layers[0].held.slots.positions)
    assert sorted(other.layers[0].held.slots.positions[0, 0].tolist()) == [-1, *range(35, 41)]


class Mean(TrainedMemory):
    """One virtual token a KV head: the mean of the evicted values, as heavy as a learned share of them."""

    words = "{} mean"
    rank_step = 8  # one virtual token, whatever the rank

    @staticmethod
    def shapes(h, g, d, m, rank):
        return {"weight": (g, rank // 8)}

    def reset_parameters(self, generator=None):
        torch.nn.init.constant_(self.weight, 0.5)

    def key_features(self, key_states):
        b, g, m, _ = key_states.shape
        return self.weight.abs().view(1, g, 1, -1).expand(b, g, m, -1)

    def log_query_features(self, query_states, means, scaling, softcap=None):
        b, h, n, _ = query_states.shape
        return query_states.new_zeros(b, self.sizes[1], h // self.sizes[1], n, self.num_virtual_tokens, dtype=torch.float32)


def test_a_memory(monkeypatch, tmp_path):
    monkeypatch.setitem(MEMORIES, "mean", Mean)
    model = tiny_llama()
    kernels = LESSKernels(LESSConfig(2, 4, 2, 8, rank=8, hidden_size=4, memory="mean"))
    kernels.save_pretrained(tmp_path)
    cache = LESSCache(model, H2O(4, 4), LESSKernels.from_pretrained(tmp_path))
    model.generate(PROMPT, past_key_values=cache, **OPTIONS)
    evicted = 41 - 8
    for layer in cache.layers:
        torch.testing.assert_close(layer.held.state.features_sum, torch.full((2, 2, 1), 0.5 * evicted))


class SixteenBits(SlotFormat):
    """Keys and values in float16, each token over its largest number."""

    name = "sixteen bits"
    parts = ("", "scale")

    def encode(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = states.abs().amax(-1, keepdim=True).clamp_min(1e-6)
        return {"": (states / scale).half(), "scale": scale.half()}

    def decode(self, stored: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return stored[""].to(dtype) * stored["scale"].to(dtype)


@pytest.mark.parametrize("shares", [None, torch.tensor([0.3, 1.7])], ids=["equal heads", "uneven heads"])
def test_a_slot_format(monkeypatch, shares):
    monkeypatch.setitem(FORMATS, "sixteen bits", SixteenBits)
    model = tiny_llama()
    caches = [LESSCache(model, H2O(8, 8)) for _ in range(2)]
    for cache, slots in zip(caches, ("float", "sixteen bits"), strict=True):
        cache.layers = [LESSLayer(H2O(8, 8), None, index, index == 0, slots, shares) for index in range(2)]
    outputs = []
    for cache in caches:
        with torch.no_grad():
            model(PROMPT, past_key_values=cache)
            cache.reorder_cache(torch.tensor([1, 0]))
            cache = cache.fork()
            blocks = [model(block, past_key_values=cache).logits for block in PROMPT[:, :13].split([1, 1, 1, 8, 1, 1], dim=1)]
        outputs.append(torch.cat(blocks, dim=1))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0.05)
    assert not torch.equal(outputs[1], outputs[0])
    stored = caches[1].layers[0].held.slots.stored
    assert set(stored) == {"keys", "keys_scale", "values", "values_scale"}
    assert stored["keys"].dtype == torch.float16
    kept = caches[1].memory_footprint().keys_values / caches[0].memory_footprint().keys_values
    assert kept == (2 * 8 + 2) / (4 * 8)


def test_a_backend(monkeypatch):
    """A module of four functions; what it does not know it refuses."""
    module = types.ModuleType("own_backend")
    taken = []

    def step(setup, held, call):
        taken.append(len(taken))
        return in_pytorch.step(setup, held, call)

    module.can_step = lambda setup, held, call: call.softcap is None
    module.step = step
    module.can_read = lambda policy, call: False
    monkeypatch.setitem(sys.modules, "own_backend", module)
    monkeypatch.setitem(select.BACKENDS, "cpu", "own_backend")
    model = tiny_llama()
    output = model.generate(PROMPT, past_key_values=LESSCache(model, H2O(4, 4)), **OPTIONS)
    assert len(taken) == 2 * 11
    monkeypatch.setattr(select, "BACKENDS", {})
    assert torch.equal(output, model.generate(PROMPT, past_key_values=LESSCache(model, H2O(4, 4)), **OPTIONS))
