"""`cache.save` and `LESSCache.load`: the same cache, or one clear error."""

import json
import pickle
from pathlib import Path

import pytest
import torch
import zoo
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_kernels, tiny_llama

from less_cache import CORM, H2O, LESSCache, LESSError, SinkRecent
from less_cache.cache import snapshot
from less_cache.memory import MEMORIES

FIXTURES = Path(__file__).parent / "fixtures"

POLICIES = [H2O(heavy=4, recent=3), H2O(heavy=0.1, recent=0.1), SinkRecent(sinks=2, recent=5), CORM(window=4, recent=3)]


@pytest.fixture
def prompt() -> torch.Tensor:
    prompt = torch.randint(1, 97, (2, 30))
    prompt[1, :5] = 0
    return prompt


@torch.no_grad()
def prefilled(model, prompt: torch.Tensor, policy=POLICIES[0], kernels=None) -> LESSCache:
    cache = LESSCache(model, policy, kernels)
    mask = (prompt > 0).long()
    for stop, block in ((20, prompt[:, :20]), (21, prompt[:, 20:21]), (29, prompt[:, 21:29])):
        model(block, attention_mask=mask[:, :stop], past_key_values=cache)
    return cache


def continuation(model, cache: LESSCache, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    output = model.generate(
        prompt,
        attention_mask=(prompt > 0).long(),
        past_key_values=cache,
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences, torch.stack(output.logits)


def assert_goes_on_bit_by_bit(model, loaded: LESSCache, cache: LESSCache, prompt: torch.Tensor) -> None:
    for one, other in zip(continuation(model, loaded, prompt), continuation(model, cache, prompt), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [None, *MEMORIES])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_loaded_cache_goes_on_bit_by_bit(policy, memory, dtype, prompt, tmp_path):
    model = tiny_llama()
    kernels = tiny_kernels(model, memory=memory) if memory else None
    model = model.to(dtype)
    cache = prefilled(model, prompt, policy, kernels)
    cache.save(tmp_path / "prefix.safetensors")
    loaded = LESSCache.load(tmp_path / "prefix.safetensors", model, kernels)
    assert loaded.policy == policy
    assert loaded.memory_footprint() == cache.memory_footprint()
    assert_goes_on_bit_by_bit(model, loaded, cache, prompt)


@pytest.mark.parametrize("family", ["gemma3_text", "falcon", "opt"])
def test_families(family, prompt, tmp_path):
    model = zoo.build(family)
    cache = prefilled(model, prompt)
    cache.save(tmp_path / "prefix.safetensors")
    assert_goes_on_bit_by_bit(model, LESSCache.load(tmp_path / "prefix.safetensors", model), cache, prompt)


def test_an_empty_cache(prompt, tmp_path):
    model = tiny_llama()
    kernels = tiny_kernels(model)
    LESSCache(model, POLICIES[0], kernels).save(tmp_path / "empty.safetensors")
    loaded = LESSCache.load(tmp_path / "empty.safetensors", model, kernels)
    assert_goes_on_bit_by_bit(model, loaded, LESSCache(model, POLICIES[0], kernels), prompt)


def test_a_fork_and_a_pickled_cache_can_be_saved(prompt, tmp_path):
    model = tiny_llama()
    cache = prefilled(model, prompt)
    for name, other in {"fork": cache.fork(), "pickled": pickle.loads(pickle.dumps(cache))}.items():
        other.save(tmp_path / name)
        assert_goes_on_bit_by_bit(model, LESSCache.load(tmp_path / name, model), cache.fork(), prompt)


# Errors


def saved(path, model, prompt, kernels=None):
    prefilled(model, prompt, kernels=kernels).save(path)
    return path


def rewritten(path, **changes):
    """The file with another header."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["less_cache"])
    text = json.dumps({**header, **changes})
    save_file(tensors, path, {"less_cache": text, "sha256": snapshot.digest(tensors, text)})


def test_another_model(prompt, tmp_path):
    path = saved(tmp_path / "prefix", tiny_llama(), prompt)
    with pytest.raises(LESSError, match=r"another model: expected .*'num_hidden_layers': 2.*got .*'num_hidden_layers': 3"):
        LESSCache.load(path, tiny_llama(num_hidden_layers=3))
    with pytest.raises(LESSError, match=r"another model: expected .*'llama'.*got .*'opt'"):
        LESSCache.load(path, zoo.build("opt"))
    derivative = tiny_llama()
    torch.nn.init.constant_(derivative.model.norm.weight, 2)
    with pytest.raises(LESSError, match=r"another model: expected .*fingerprint"):
        LESSCache.load(path, derivative)
    LESSCache.load(path, derivative.config)  # a config cannot tell


def test_other_kernels(prompt, tmp_path):
    model = tiny_llama()
    kernels, other = tiny_kernels(model), tiny_kernels(model, seed=1)
    path = saved(tmp_path / "prefix", model, prompt, kernels)
    for wrong in (None, other):
        with pytest.raises(LESSError, match=r"saved with kernels of digest .*Pass the same as kernels="):
            LESSCache.load(path, model, wrong)
    path = saved(tmp_path / "prefix", model, prompt)
    with pytest.raises(LESSError, match="saved without kernels"):
        LESSCache.load(path, model, kernels)


def test_another_policy(prompt, tmp_path):
    path = saved(tmp_path / "prefix", tiny_llama(), prompt)
    rewritten(path, policy={"name": "h3o"})
    with pytest.raises(LESSError, match="got 'h3o'"):
        LESSCache.load(path, tiny_llama())


def with_another_tensor(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_another_tensor, "this is not what was saved"),
        (lambda content: content.replace(b"h2o", b"h3o"), "this is not what was saved"),
        (lambda content: content.replace(b"format_version", b"farmot_version"), "the header of the saved cache is damaged"),
        (lambda content: content[:100], "not a readable safetensors file"),
        (lambda content: b"", "not a readable safetensors file"),
        (lambda content: pickle.dumps({"keys": 1}), r"pickle is never read"),
    ],
)
def test_a_damaged_file(change, message, prompt, tmp_path):
    path = saved(tmp_path / "prefix", tiny_llama(), prompt)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(LESSError, match=message):
        LESSCache.load(path, tiny_llama())


def test_other_files(prompt, tmp_path):
    model = tiny_llama()
    with pytest.raises(LESSError, match="found no such file"):
        LESSCache.load(tmp_path / "missing", model)
    with pytest.raises(LESSError, match="found a folder"):
        LESSCache.load(tmp_path, model)
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(LESSError, match="without its header"):
        LESSCache.load(tmp_path / "weights", model)
    path = saved(tmp_path / "prefix", model, prompt)
    rewritten(path, format_version=3, less_cache_version="9.0")
    with pytest.raises(LESSError, match=r"expected format_version 1 to 2, got 3, written by less-cache 9\.0"):
        LESSCache.load(path, model)
    with pytest.raises(LESSError, match="got the folder"):
        LESSCache(model, POLICIES[0]).save(tmp_path)


def test_a_failed_save_leaves_the_earlier_file(prompt, tmp_path, monkeypatch):
    model = tiny_llama()
    path = saved(tmp_path / "prefix", model, prompt)
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(LESSError, match=r"cannot be written .*no space"):
        LESSCache(model, POLICIES[0]).save(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["prefix"]


def test_an_interrupted_cache_is_not_saved(prompt, tmp_path):
    model = tiny_llama()
    cache = prefilled(model, prompt)
    cache.layers[0].cumulative_length += 1
    with pytest.raises(LESSError, match="interrupted between two layers"):
        cache.save(tmp_path / "prefix")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("policy", [H2O(4, 3), CORM(4, 4)], ids=lambda policy: policy.name)
def test_a_file_of_version_0_2(policy):
    """Written before slots had heads of different sizes: it goes on as a cache that has read the same now."""
    model = tiny_llama()
    kernels = tiny_kernels(model, memory="soft_centroids")
    tokens = torch.randint(1, 97, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 31, dtype=torch.long)
    mask[1, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    loaded = LESSCache.load(FIXTURES / f"snapshot_1_{policy.name}.safetensors", model.config, kernels)
    fresh = LESSCache(model, policy, kernels)
    with torch.no_grad():
        for block in (slice(0, 25), *(slice(at, at + 1) for at in range(25, 30))):
            options = {"attention_mask": mask[:, : block.stop], "position_ids": positions[:, block]}
            model(tokens[:, block], past_key_values=fresh, **options)
        assert loaded.get_seq_length() == fresh.get_seq_length() == 30
        options = {"attention_mask": mask, "position_ids": positions[:, 30:]}
        logits = [model(tokens[:, :1], past_key_values=cache, **options).logits for cache in (loaded, fresh)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    for old, new in zip(loaded.layers, fresh.layers, strict=True):
        assert [sorted(head) for row in old.positions.tolist() for head in row if head] != []
        assert old.seen.tolist() == new.seen.tolist() == [31, 24]
