"""The trained centroids alone, against their formula in Python numbers."""

import math

import pytest
import tiny
import torch
from hypothesis import given
from strategies import SEEDS

from less_cache import LESSConfig, LESSError, LESSKernels
from less_cache.memory.soft_centroids import HEAVIEST, LIGHT, LayerSoftCentroids

H, G, D, M, RANK = 2, 1, 4, 3, 6


def memory(seed: int = 0) -> LayerSoftCentroids:
    return tiny.layer_kernels(H, G, D, rank=RANK, hidden_size=M, seed=seed, memory="soft_centroids")


def network(memory, side: str, head: int, state: torch.Tensor) -> list[float]:
    """GELU(x W1 + b1) W2 + x W3 + b2 of one token, x = state / its root mean square."""
    w1, b1, w2, w3, b2 = (
        getattr(memory, f"{side}_{part}")[head].double().tolist() for part in ("in", "in_bias", "out", "skip", "bias")
    )
    x = state.double().tolist()
    size = math.sqrt(sum(value**2 for value in x) / D + 1e-6)
    x = [value / size for value in x]
    hidden = [sum(x[i] * w1[i][j] for i in range(D)) + b1[j] for j in range(M)]
    hidden = [value / 2 * (1 + math.erf(value / math.sqrt(2))) for value in hidden]
    return [
        sum(hidden[j] * w2[j][r] for j in range(M)) + sum(x[i] * w3[i][r] for i in range(D)) + b2[r] for r in range(RANK // 2)
    ]


@given(SEEDS)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_virtual_tokens_are_the_formula(softcap, seed):
    query, key, value = tiny.random_states(1, H, G, 5, D, seed=seed)
    centroids = memory(seed)
    state = centroids.empty_state(1, G, D, key.device)
    leaves, ages = torch.tensor([[[True, False, True, True, False]]]), torch.tensor([[[7, 6, 5, 3, 1]]])
    later = torch.tensor([[0, 1, 2, 3, 4]])  # query i comes so long after the state
    centroids.fold_in(state, key, value, leaves, 9 - ages, torch.tensor([[[9]]]))
    logits, values = centroids.virtual_tokens(state, query, 0.5, softcap, later)  # [1, 1, h, 5, r], [1, 1, r, d]
    evicted = [0, 2, 3]
    rates = [f**2 for f in centroids.fading[0].double().tolist()]
    log_psi = {j: network(centroids, "key", 0, key[0, 0, j]) for j in evicted}
    for r in range(RANK // 2):
        weight = {j: math.exp(log_psi[j][r] - rates[r] * int(ages[0, 0, j])) for j in evicted}
        mass = sum(weight.values())
        mean_key, mean_value = (sum(weight[j] * states[0, 0, j].double() for j in evicted) / mass for states in (key, value))
        torch.testing.assert_close(values[0, 0, r].double(), mean_value, rtol=1e-4, atol=1e-5)
        for head in range(H):
            for i in range(5):
                dot = 0.5 * float(query[0, head, i].double() @ mean_key)
                dot = dot if softcap is None else softcap * math.tanh(dot / softcap)
                limit = math.exp(float(centroids.limit[0, r]))
                weight_then = 1 / (1 / (mass * math.exp(-rates[r] * i)) + 1 / limit)
                expected = math.log(weight_then) + dot + network(centroids, "query", head, query[0, head, i])[r]
                assert logits[0, 0, head, i, r].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@given(SEEDS)
@pytest.mark.parametrize("tokens", [3, torch.tensor([3, 0])])
def test_a_state_fades_as_if_its_pairs_were_older(tokens, seed):
    _, key, value = tiny.random_states(2, H, G, 5, D, seed=seed)
    centroids, everything = memory(seed), torch.ones(2, G, 5, dtype=torch.bool)
    positions, seen = torch.arange(5).expand(2, G, 5), torch.tensor([5, 6]).view(2, 1, 1)
    faded, older = (centroids.empty_state(2, G, D, key.device) for _ in range(2))
    centroids.fold_in(faded, key, value, everything, positions, seen)
    centroids.pass_time(faded, tokens)
    centroids.fold_in(older, key, value, everything, positions, seen + torch.as_tensor(tokens).view(-1, 1, 1))
    for name, tensor in vars(faded).items():
        torch.testing.assert_close(tensor, getattr(older, name))


def test_the_first_centroid_never_fades_and_the_others_do():
    centroids = LayerSoftCentroids(H, G, D, M, 8)
    torch.testing.assert_close(centroids.fading_rates(), torch.tensor([[0, 1 / 512, 1 / 128, 1 / 32]]).expand(G, 4))
    centroids.fading_rates().sum().backward()
    assert centroids.fading.grad[:, 0].eq(0).all()
    assert LayerSoftCentroids(H, G, D, M, 2).fading_rates().eq(0).all()  # the only one


def test_before_training_a_centroid_is_about_the_mean_pair_and_light():
    _, key, value = tiny.random_states(1, H, G, 50, D)
    centroids = LayerSoftCentroids(H, G, D, M, RANK)
    query = torch.zeros(1, H, 1, D)
    state = centroids.empty_state(1, G, D, key.device)
    centroids.fold_in(state, key, value, torch.ones(1, G, 50, dtype=torch.bool), torch.zeros(1, G, 50), torch.zeros(1, 1, 1))
    logits, _ = centroids.virtual_tokens(state, query, scaling=0.5)
    weights = 1 / (1 / state.features_sum[0] + 1 / HEAVIEST)
    torch.testing.assert_close(logits[0, 0, :, 0], (weights.log() + LIGHT).expand(H, -1))


@pytest.mark.parametrize("mass", [1e-30, 1e-3, 1.0, 1e3, 1e9, 1e30])
def test_a_centroid_weighs_as_its_tokens_but_never_more_than_its_limit(mass):
    centroids, log_mass = memory(), torch.full((1, G, 1, 1, RANK // 2), math.log(mass))
    weights, limit = centroids.log_weights(log_mass).exp()[0, :, 0, 0], centroids.limit.exp()  # [g, r]
    torch.testing.assert_close(weights, (1 / (1 / mass + 1 / limit.double())).float())
    assert (weights <= limit.clamp_max(mass) * (1 + 1e-5)).all()


def test_an_empty_state_has_no_weight():
    query, _, _ = tiny.random_states(1, H, G, 2, D)
    centroids = memory()
    logits, values = centroids.virtual_tokens(centroids.empty_state(1, G, D, query.device), query, scaling=0.5)
    assert (logits < -1e30).all() and values.eq(0).all()


def test_no_more_bytes_than_the_low_rank_state():
    sizes = 4, 2, 64, 8, 8
    (soft, low_rank) = (
        sum(
            tensor.numel()
            for tensor in vars(tiny.layer_kernels(*sizes[:3], rank=8, memory=name).empty_state(1, 2, 64, None)).values()
        )
        for name in ("soft_centroids", "low_rank")
    )
    assert 0.97 * low_rank < soft <= low_rank


def test_saved_and_loaded(tmp_path):
    config = LESSConfig(2, H, G, D, rank=RANK, hidden_size=M, memory="soft_centroids")
    kernels = LESSKernels(config)
    kernels.save_pretrained(tmp_path)
    loaded = LESSKernels.from_pretrained(tmp_path)
    assert loaded.config == config and config.format_version == 2
    assert all(torch.equal(tensor, kernels.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"memory": "hash"}, "expected memory to be one of low_rank, soft_centroids, got 'hash'"),
        ({"rank": 3}, "expected an even rank .* got 3"),
    ],
)
def test_wrong_configs(entries, message):
    with pytest.raises(LESSError, match=message):
        LESSConfig(2, H, G, D, **{"memory": "soft_centroids"} | entries)
