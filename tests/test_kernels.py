"""φ and ψ against the formulas written out, and the official code's checkpoints."""

import math
import pickle

import pytest
import torch
from tiny import fill

from less_cache import LESSConfig, LESSError, LESSKernels
from less_cache.memory import LayerKernels

H, G, D, M, R = 4, 2, 8, 6, 3  # heads, KV heads, head dim, hidden size, rank


def layer_kernels() -> LayerKernels:
    return fill(LayerKernels(H, G, D, M, R), torch.Generator().manual_seed(0))


def gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def official_layer(num_heads: int = H, seed: int = 0, rank: int = R, hidden_size: int = M) -> dict[str, torch.Tensor]:
    """The official multi-head form."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "kernel_q_mat1": (num_heads, D, hidden_size),
        "kernel_q_mat2": (num_heads, hidden_size, rank),
        "kernel_k_mat1": (num_heads, D, hidden_size),
        "kernel_k_mat2": (num_heads, hidden_size, rank),
        "interaction_k": (num_heads, rank, rank),
        "scalingD": (1, num_heads, 1, rank),
        "scalingD2": (1, num_heads, 1, rank),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def official_multi_query_layer(seed: int = 0) -> dict[str, torch.Tensor]:
    """The official form for Falcon: one KV head, whose matrices are `nn.Linear` weights, `[out, in]`."""
    layer, one = official_layer(seed=seed), official_layer(num_heads=1, seed=seed + 1)
    queries = {name: layer[name] for name in ("kernel_q_mat1", "kernel_q_mat2")}
    linear = {f"{name}.weight": one[name][0].T.contiguous() for name in ("kernel_k_mat1", "kernel_k_mat2", "interaction_k")}
    return {**queries, **linear, "scalingD": one["scalingD"], "scalingD2": one["scalingD2"]}


# The formulas


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_are_the_formulas(dtype):
    kernels = layer_kernels()
    torch.nn.init.uniform_(kernels.key_scale, -1.5, -0.5)  # the formula takes |s1|, and s2 as it is
    torch.nn.init.uniform_(kernels.mix_scale, -1.5, 1.5)
    queries, keys = torch.randn(2, H, 5, D).to(dtype), torch.randn(2, G, 5, D).to(dtype)
    phi, psi = kernels.query_features(queries), kernels.key_features(keys)
    assert phi.dtype == psi.dtype == torch.float32
    assert phi.shape == (2, H, 5, R)
    assert psi.shape == (2, G, 5, R)
    for row in range(2):
        for head in range(H):
            q = queries[row, head].float()
            expected = gelu(gelu(q @ kernels.query_in[head]) @ kernels.query_out[head]).abs()
            torch.testing.assert_close(phi[row, head], expected)
        for head in range(G):
            k = keys[row, head].float()
            u = kernels.key_scale[head].abs() * gelu(gelu(k @ kernels.key_in[head]) @ kernels.key_out[head])
            torch.testing.assert_close(psi[row, head], (u + kernels.mix_scale[head] * (u @ kernels.key_mix[head])).abs())


def test_features_are_not_negative():
    kernels = layer_kernels()
    assert (kernels.query_features(10 * torch.randn(1, H, 100, D)) >= 0).all()
    assert (kernels.key_features(10 * torch.randn(1, G, 100, D)) >= 0).all()


def test_initial_weights():
    kernels = LayerKernels(H, G, 32, 64, 8)
    for name, parameter in kernels.named_parameters():
        if name.endswith("scale"):
            assert (parameter == 1e-4).all()
        else:
            bound = math.sqrt(6 / (parameter.shape[1] + parameter.shape[2]))
            assert 0.9 * bound < parameter.abs().max() <= bound
            assert abs(parameter.mean()) < 0.1 * bound


def test_initial_weights_repeat_with_a_generator():
    kernels = LayerKernels(H, G, D, M, R)
    drawn = []
    for seed in (1, 1, 2):
        kernels.reset_parameters(torch.Generator().manual_seed(seed))
        drawn.append(kernels.query_in.clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_model_of_kernels():
    config = LESSConfig(num_hidden_layers=4, num_attention_heads=H, num_key_value_heads=G, head_dim=D, rank=R, layers=[1, 3])
    kernels = LESSKernels(config)
    assert [index for index in range(4) if kernels.for_layer(index) is not None] == [1, 3]
    assert kernels.for_layer(1) is not kernels.for_layer(3)
    assert kernels.for_layer(1).num_virtual_tokens == R
    assert not any(parameter.requires_grad for parameter in kernels.parameters())


def test_sizes_by_layer(monkeypatch):
    """Also in the share of the heads that one of two processes has."""
    config = LESSConfig(4, H, G, D, layers=[3, 1], rank=[R, R + 2], hidden_size=[M + 1, M])
    kernels = LESSKernels(config)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    for index, hidden_size, rank in ((3, M + 1, R), (1, M, R + 2)):
        layer = fill(kernels.for_layer(index), torch.Generator().manual_seed(0))
        assert layer.query_in.shape == (H, D, hidden_size) and layer.num_virtual_tokens == rank
        half = layer.for_heads(1)
        assert half.num_virtual_tokens == rank
        queries, keys = torch.randn(1, H, 5, D), torch.randn(1, G, 5, D)
        assert torch.equal(half.query_features(queries[:, H // 2 :]), layer.query_features(queries)[:, H // 2 :])
        assert torch.equal(half.key_features(keys[:, 1:]), layer.key_features(keys)[:, 1:])


def test_kernels_are_float32_whatever_the_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        kernels = LayerKernels(H, G, D, M, R)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(parameter.dtype == torch.float32 for parameter in kernels.parameters())


# The official checkpoints


def test_from_official_multi_head():
    """One head at a time, in the official code's words."""
    layers = [official_layer(seed=seed) for seed in (1, 2)]
    kernels = LESSKernels.from_official(layers)
    described = kernels.config
    assert (described.num_hidden_layers, described.num_attention_heads, described.num_key_value_heads) == (2, H, H)
    assert (described.head_dim, described.hidden_size, described.rank) == (D, M, R)
    states = torch.randn(1, H, 5, D)
    for index, layer in enumerate(layers):
        phi, psi = kernels.for_layer(index).query_features(states), kernels.for_layer(index).key_features(states)
        for head in range(H):
            x = states[0, head]
            expected = gelu(gelu(x @ layer["kernel_q_mat1"][head]) @ layer["kernel_q_mat2"][head]).abs()
            torch.testing.assert_close(phi[0, head], expected)
            u = gelu(gelu(x @ layer["kernel_k_mat1"][head]) @ layer["kernel_k_mat2"][head])
            u = u * layer["scalingD"][0, head].abs()
            expected = (u + layer["scalingD2"][0, head] * (u @ layer["interaction_k"][head])).abs()
            torch.testing.assert_close(psi[0, head], expected)


def test_from_official_multi_query():
    layer = official_multi_query_layer()
    kernels = LESSKernels.from_official([layer])
    assert (kernels.config.num_attention_heads, kernels.config.num_key_value_heads) == (H, 1)
    keys = torch.randn(1, 1, 5, D)
    hidden = gelu(torch.nn.functional.linear(keys, layer["kernel_k_mat1.weight"]))
    u = layer["scalingD"].abs() * gelu(torch.nn.functional.linear(hidden, layer["kernel_k_mat2.weight"]))
    mixed = torch.nn.functional.linear(u, layer["interaction_k.weight"])
    torch.testing.assert_close(kernels.for_layer(0).key_features(keys), (u + layer["scalingD2"] * mixed).abs())


@pytest.mark.parametrize("make", [official_layer, official_multi_query_layer])
def test_from_official_files(tmp_path, make):
    layers = [make(seed=1), make(seed=2)]
    paths = [tmp_path / "0.pt", str(tmp_path / "1.pt")]
    for layer, path in zip(layers, paths, strict=True):
        torch.save(layer, path)
    from_files, from_dicts = LESSKernels.from_official(paths), LESSKernels.from_official(layers)
    assert from_files.config == from_dicts.config
    for name, tensor in from_dicts.state_dict().items():
        assert torch.equal(from_files.state_dict()[name], tensor)


def test_from_official_takes_parameters_and_half_precision():
    layer = {name: torch.nn.Parameter(tensor.half()) for name, tensor in official_layer().items()}
    kernels = LESSKernels.from_official([layer])
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in kernels.parameters())


def test_from_official_of_several_sizes():
    """Each layer of a rank and a hidden size of its own."""
    second = official_layer(rank=R + 1, hidden_size=M + 2)
    kernels = LESSKernels.from_official([official_layer(), second])
    assert (kernels.config.rank, kernels.config.hidden_size) == ([R, R + 1], [M, M + 2])
    assert torch.equal(kernels.for_layer(1).key_mix, second["interaction_k"])


def test_from_official_draws_no_random_numbers():
    layer = official_layer()
    before = torch.get_rng_state()
    LESSKernels.from_official([layer])
    assert torch.equal(torch.get_rng_state(), before)


def changed(**changes) -> list[dict]:
    """Two official layers, the second with other entries; None leaves one out."""
    layer = {name: tensor for name, tensor in {**official_layer(), **changes}.items() if tensor is not None}
    return [official_layer(), layer]


WRONG_OFFICIAL = {
    "no layers": ([], "got none"),
    "no state dict": ([5], "layer 0: expected a state dict, got int"),
    "one state dict instead of a list": (official_layer(), "expected"),
    "one path instead of a list": ("layer0.pt", "expected"),
    "no such file": (["/no/such/file.pt"], "layer 0: no such file"),
    "missing entry": (changed(kernel_k_mat2=None), "layer 1: expected 'kernel_k_mat2'"),
    "extra entry": (changed(bias=torch.zeros(3)), r"layer 1: unexpected entries \['bias'\]"),
    "names of several types": ([{"kernel_q_mat1": torch.zeros(H, D, M), 5: 0}], "layer 0: expected 'kernel_q_mat2'"),
    "no tensor": (changed(scalingD2=1e-4), "layer 1.*scalingD2"),
    "other rank": (changed(kernel_q_mat2=torch.zeros(H, M, R + 1)), "layer 1: expected kernel_q_mat"),
    "other rank in one place": (changed(scalingD2=torch.zeros(1, H, 1, R + 1)), "layer 1: expected scalingD2"),
    "other number of heads": ([official_layer(), official_layer(num_heads=2)], "layer 1: expected kernel_q_mat"),
    "two dimensions": (changed(interaction_k=torch.zeros(R, R)), "layer 1: interaction_k has shape"),
    "flat scale": (changed(scalingD=torch.zeros(H, R)), r"layer 1: expected scalingD of shape \[1, heads, 1, rank\]"),
    "batched scale": (changed(scalingD=torch.zeros(2, H, 1, R)), "layer 1: expected scalingD of shape"),
    "NaN": (changed(interaction_k=torch.full((H, R, R), torch.nan)), "layer 1: key_mix holds NaN"),
    "infinity": (changed(scalingD=torch.full((1, H, 1, R), torch.inf)), "layer 1: key_scale holds NaN or infinity"),
    "empty": ([{name: tensor[..., :0] for name, tensor in official_layer().items()}], "expected"),
}


@pytest.mark.parametrize("layers, message", WRONG_OFFICIAL.values(), ids=WRONG_OFFICIAL)
def test_wrong_official_layers(layers, message):
    with pytest.raises(LESSError, match=message):
        LESSKernels.from_official(layers)


class Malicious:
    """Unpickling this runs code."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.mark.parametrize(
    "write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing, protocol=2))], ids=["torch", "pickle"]
)
def test_code_in_a_checkpoint_is_never_run(tmp_path, write):
    trace, path = tmp_path / "trace", tmp_path / "layer0.pt"
    write({**official_layer(), "payload": Malicious(trace)}, path)
    with pytest.raises(LESSError, match=r"layer0\.pt is not a checkpoint of plain tensors"):
        LESSKernels.from_official([path])
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"PK\x03\x04 cut", b"less"], ids=["empty", "zeros", "cut", "text"])
def test_damaged_checkpoint(tmp_path, content):
    path = tmp_path / "layer0.pt"
    path.write_bytes(content)
    with pytest.raises(LESSError, match=r"layer0\.pt is not a checkpoint"):
        LESSKernels.from_official([path])
