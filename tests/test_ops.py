"""What a decoding step of one layer does, counted in operations: few, no more for more heads or rows, none twice."""

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from less_cache import H2O, SinkRecent
from less_cache.cache.layer import LESSLayer
from less_cache.cache.static import StaticLESSLayer
from less_cache.memory import MEMORIES
from less_cache.memory.centroids import LayerCentroids

BUDGET, DIM = 64, 16
POLICIES = {"h2o": H2O(BUDGET // 2, BUDGET // 2), "sink_recent": SinkRecent(4, BUDGET - 4)}
MOST = {  # operations of a step; lower a number when it has become lower
    ("h2o", "sparse"): 75,
    ("h2o", "low_rank"): 143,
    ("h2o", "soft_centroids"): 181,
    ("h2o", "untrained"): 210,
    ("sink_recent", "sparse"): 56,
    ("sink_recent", "low_rank"): 141,
    ("sink_recent", "soft_centroids"): 179,
    ("sink_recent", "untrained"): 208,
}
MODULE = torch.nn.Identity().eval()

each_case = pytest.mark.parametrize("policy, kernels", MOST)


@pytest.fixture(autouse=True)
def in_pytorch(monkeypatch):
    monkeypatch.setattr("less_cache.backends.select.BACKENDS", {})


class Operations(TorchDispatchMode):
    """Names of all operations, and the sizes of the tensors that they allocate."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.allocated: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.name())
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in given:
                self.allocated.append(each.numel())
        return result


def full_layer(policy: str, kernels: str, b: int = 1, g: int = 2, layer_class=LESSLayer, dtype=torch.float32) -> LESSLayer:
    """A layer behind a first one, that evicts with every token; two query heads a KV head."""
    memory = {"sparse": None, "untrained": LayerCentroids(4)}
    memory |= {name: tiny.layer_kernels(2 * g, g, DIM, memory=name) for name in MEMORIES}
    layer = layer_class(POLICIES[policy], memory[kernels], layer_idx=1, leads=False)
    step(layer, b, g, BUDGET + 9, dtype)
    step(layer, b, g, 1, dtype)
    return layer


def step(layer: LESSLayer, b: int = 1, g: int = 2, n: int = 1, dtype=torch.float32) -> Operations:
    """What `n` tokens do to a layer."""
    query, key, value = (states.to(dtype) for states in tiny.random_states(b, 2 * g, g, n, DIM))
    with torch.no_grad(), Operations() as operations:
        key, value = layer.update(key, value)
        layer.attend(tiny.plain_attention, MODULE, query, key, value, None, scaling=0.5)
    return operations


@each_case
def test_a_step_takes_few_operations(policy, kernels):
    names = step(full_layer(policy, kernels)).names
    assert len(names) <= MOST[policy, kernels], names
    static = step(full_layer(policy, kernels, layer_class=StaticLESSLayer)).names
    assert len(static) == len(names) + 1  # the number of tokens seen is a tensor


@each_case
def test_more_heads_and_rows_are_no_more_operations(policy, kernels):
    one, many = step(full_layer(policy, kernels, 1, 1), 1, 1), step(full_layer(policy, kernels, 5, 8), 5, 8)
    copies = {"aten::clone", "aten::_unsafe_view", "aten::view"}  # to put rows and heads in order
    assert [name for name in many.names if name not in copies] == [name for name in one.names if name not in copies]


@each_case
def test_nothing_as_large_as_the_kept_keys_is_allocated(policy, kernels):
    layer = full_layer(policy, kernels)
    assert max(step(layer).allocated) < layer.keys.numel()


def test_without_weights_half_precision_is_not_copied():
    layer = full_layer("sink_recent", "sparse", dtype=torch.bfloat16)
    assert max(step(layer, dtype=torch.bfloat16).allocated) < layer.keys.numel()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_features_are_those_of_one_token(policy, memory, monkeypatch):
    """φ of the new token for every query head, ψ of the victim for every KV head, and no more."""
    layer, shapes = full_layer(policy, memory, b=3), []
    for name in ("log_query_features", "key_features"):
        features = getattr(layer.setup.memory, name)
        monkeypatch.setattr(
            layer.setup.memory,
            name,
            lambda states, *args, name=name, of=features: shapes.append((name, *states.shape)) or of(states, *args),
        )
    step(layer, b=3)
    assert shapes == [("log_query_features", 3, 4, 1, DIM), ("key_features", 3, 2, 1, DIM)]


@pytest.mark.parametrize("kernels", ["sparse", *MEMORIES, "untrained"])
def test_no_weights_where_the_policy_needs_none(kernels):
    names = step(full_layer("sink_recent", kernels)).names
    assert any("scaled_dot_product" in name for name in names) == (kernels == "sparse")
