"""100,000 tokens decoded by a whole small model: memory, state and positions early and at the end. Prints one JSON line."""

import dataclasses
import json
import resource
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from less_cache import H2O, LESSCache, LESSConfig, LESSKernels
from less_cache.integration.families import geometry
from less_cache.reports.machine import describe

STEPS, EARLY, LAYERS = 100_000, 2_000, 2

torch.manual_seed(0)
torch.set_num_threads(1)
heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 97, "num_hidden_layers": LAYERS}
model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=STEPS)).eval()
config = LESSConfig(**dataclasses.asdict(geometry(model.config)), hidden_size=16, memory="soft_centroids")
kernels = LESSKernels(config)
for index in range(LAYERS):
    torch.nn.init.zeros_(kernels.for_layer(index).query_bias)  # as it starts, the state would hardly matter
cache = LESSCache(model, H2O(heavy=8, recent=8), kernels)
token = torch.ones(1, 1, dtype=torch.long)


@torch.no_grad()
def decode(steps: int) -> dict[str, int]:
    """Sample tokens; what is held after the last."""
    global token
    for _ in range(steps):
        logits = model(token, past_key_values=cache).logits[:, -1]
        assert logits.isfinite().all()
        token = torch.multinomial(logits.softmax(-1), 1)
    return {
        "tokens": cache.get_seq_length(),
        "cache_bytes": cache.memory_footprint().total,
        "peak_rss_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


start = time.process_time()
report = {"layers": LAYERS, **describe(torch.device("cpu")), "early": decode(EARLY), "last": decode(STEPS - EARLY)}
report["cpu_seconds"] = round(time.process_time() - start, 1)
report["positions"] = [sorted(layer.held.slots.positions.flatten().tolist()) for layer in cache.layers]
assert report["early"]["cache_bytes"] == report["last"]["cache_bytes"], report
assert all(positions[-8:] == list(range(STEPS - 8, STEPS)) for positions in report["positions"]), report
assert all(tensor.isfinite().all() for layer in cache.layers for tensor in layer.tensors().values()), report
print(json.dumps(report))
