"""Where tensors live: each layer's state on its layer's device, each process's heads in its own cache."""

import os
from pathlib import Path

import pytest
import tiny
import torch
import zoo
from accelerate import dispatch_model
from torch import distributed
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.distributed.configuration_utils import DistributedConfig

from less_cache import CORM, H2O, LESSCache, LESSError, LESSKernels, SinkRecent
from less_cache.cache.layer import LESSLayer

NEW = 6


def generate(model, cache, prompt: torch.Tensor) -> torch.Tensor:
    return model.generate(prompt, past_key_values=cache, max_new_tokens=NEW, do_sample=False)


# Devices


@pytest.mark.parametrize("policy", [H2O(2, 3), SinkRecent(2, 3), CORM(3, 2)], ids=repr)
@pytest.mark.parametrize("padding", [0, 4])
def test_new_tensors_go_to_the_device_of_the_keys(policy, padding):
    """Whatever the default device is: a tensor made on "meta" cannot be computed with."""
    states, blocks = tiny.random_states(2, 4, 2, 20, 8), [12, 1, 1, 5, 1]
    real = torch.ones(2, 20, dtype=torch.bool)
    real[1, :padding] = False
    real = real if padding else None
    expected = tiny.feed(LESSLayer(policy, tiny.layer_kernels(4, 2, 8), layer_idx=0), *states, blocks, real)
    layer = LESSLayer(policy, tiny.layer_kernels(4, 2, 8), layer_idx=0)
    attend = layer.attend

    def attend_elsewhere(original, *args, **kwargs):
        def original_here(*args, **kwargs):
            with torch.device("cpu"):
                return original(*args, **kwargs)

        with torch.device("meta"):
            return attend(original_here, *args, **kwargs)

    layer.attend = attend_elsewhere
    torch.testing.assert_close(tiny.feed(layer, *states, blocks, real), expected, equal_nan=True)
    assert {
        tensor.device.type
        for tensor in (layer.keys, layer.held.slots.positions, layer.held.rows.seen, layer.held.state.values_sum)
    } == {"cpu"}


def test_each_layer_has_the_device_of_its_keys():
    """One cache, its layers on different devices; the kernels stay where they are and are copied to where they are used."""
    model = tiny.tiny_llama()
    kernels = tiny.tiny_kernels(model)
    cache = LESSCache(model, H2O(4, 3), kernels)
    for layer, device in zip(cache.layers, ("cpu", "meta"), strict=True):
        keys = torch.zeros(1, 2, 5, 8, device=device)
        cache.update(keys, keys, layer.layer_idx)
        tensors = layer.held.rows.seen, layer.held.state.values_sum, layer.held.state.features_sum, layer.setup.memory.query_in
        assert {tensor.device.type for tensor in tensors} == {device}
    assert {parameter.device.type for parameter in kernels.parameters()} == {"cpu"}


def test_device_map(tmp_path):
    """Layers in different places: the second one's weights are on disk between two forwards."""
    model, prompt = tiny.tiny_llama(), torch.arange(1, 31)[None]
    kernels = tiny.tiny_kernels(model)
    expected = generate(model, LESSCache(model, H2O(4, 3), kernels), prompt)
    on_cpu = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    model = dispatch_model(model, {**on_cpu, "model.layers.1": "disk"}, main_device="cpu", offload_dir=tmp_path)
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    assert torch.equal(generate(model, LESSCache(model, H2O(4, 3), kernels), prompt), expected)


# Tensor parallelism


@torch.no_grad()
def next_logits(model, cache) -> torch.Tensor:
    """Finer than tokens: they may agree where the state of a head is wrong."""
    return model(torch.tensor([[5]]), past_key_values=cache).logits


def parallel_worker(rank: int, folder: Path) -> None:
    """One of two processes, each with half of the heads of the model in `folder`; saves what it has generated."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto")).eval()
    cache = LESSCache(model, H2O(4, 3), LESSKernels.from_pretrained(folder))
    generated = generate(model, cache, torch.arange(1, 31)[None])
    cache.save(folder / f"cache-{rank}")
    loaded = LESSCache.load(folder / f"cache-{rank}", model, cache.kernels)
    try:
        LESSCache.load(folder / f"cache-{1 - rank}", model, cache.kernels)
        others = "loaded"
    except LESSError as error:  # with other heads
        others = str(error)
    logits = next_logits(model, cache)
    assert torch.equal(next_logits(model, loaded), logits)
    torch.save((generated, logits, cache.layers[1].keys.shape, others), folder / f"generated-{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    model, prompt = zoo.build("qwen2"), torch.arange(1, 31)[None]  # its biases are split like its heads
    model.resize_token_embeddings(98)  # transformers 5.17 wants equal shares of the output as well
    kernels = tiny.tiny_kernels(model)
    model.save_pretrained(tmp_path)
    kernels.save_pretrained(tmp_path)
    cache = LESSCache(model, H2O(4, 3), kernels)
    expected, expected_logits = generate(model, cache, prompt), next_logits(model, cache)
    assert not torch.equal(expected, generate(model, DynamicCache(config=model.config), prompt))
    torch.multiprocessing.start_processes(parallel_worker, args=(tmp_path,), nprocs=2, start_method="spawn")
    for rank in range(2):
        generated, logits, shape, others = torch.load(tmp_path / f"generated-{rank}.pt")
        assert torch.equal(generated, expected)
        torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
        assert shape == (1, 1, 4 + 3 + 1, 8)  # one of two KV heads
        assert "another model" in others
