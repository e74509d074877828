"""100,000 tokens decoded by a tiny model: memory, state and positions at the start and at the end. One JSON line last."""

import json
import resource
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from less_cache import H2O, LESSCache, LESSConfig, LESSKernels
from less_cache.families import geometry

STEPS, WARM = 100_000, 2_000
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 64, "initializer_range": 0.3}

torch.manual_seed(0)
torch.set_num_threads(1)
model = LlamaForCausalLM(LlamaConfig(**HEADS, **SIZES, max_position_embeddings=STEPS, eos_token_id=None)).eval()
sizes = geometry(model.config)
kernels = LESSKernels(LESSConfig(**vars(sizes), hidden_size=16))
cache = LESSCache(model, policy=H2O(heavy=8, recent=8), kernels=kernels)


def measured() -> dict[str, int]:
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"tokens": cache.get_seq_length(), "cache_bytes": cache.memory_footprint().total, "peak_rss_kib": rss}


@torch.inference_mode()
def decode(token: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        token = model(token, past_key_values=cache).logits[:, -1].softmax(-1).multinomial(1)
    return token


start = time.perf_counter()
token = decode(torch.tensor([[1]]), WARM)
first = measured()
decode(token, STEPS - WARM)
last = measured()
layer = cache.layers[0]
report = {
    "first": first,
    "last": last,
    "seconds": round(time.perf_counter() - start, 1),
    "finite": all(bool(tensor.isfinite().all()) for tensor in layer.tensors().values()),
    "last_positions": sorted(layer.positions.flatten().tolist())[-8:],
}
assert first["cache_bytes"] == last["cache_bytes"] and report["finite"], report
assert report["last_positions"] == list(range(STEPS - 8, STEPS)), report
print(json.dumps(report))
