"""100,000 tokens through one layer: memory, state and positions early and at the end. Prints one JSON line."""

import json
import resource
import time

import torch

from less_cache import H2O
from less_cache.kernels import LayerKernels
from less_cache.layer import LESSLayer

STEPS, EARLY, DIM = 100_000, 2_000, 16

torch.manual_seed(0)
torch.set_num_threads(1)
kernels = LayerKernels(num_attention_heads=2, num_key_value_heads=1, head_dim=DIM, hidden_size=16, rank=8)
torch.nn.init.ones_(kernels.key_scale)  # at their first 1e-4, the state would be next to nothing
layer = LESSLayer(H2O(heavy=8, recent=8), kernels.requires_grad_(False), layer_idx=0)
module = torch.nn.Identity().eval()


def own_attention(module, query, key, value, mask, **options):
    """The model's own, for the first token, which sees itself alone."""
    return value.repeat(1, 2, 1, 1).transpose(1, 2), None


def decode(steps: int) -> dict[str, int]:
    """Feed random tokens; what is held after the last."""
    for _ in range(steps):
        query, key, value = torch.randn(1, 2, 1, DIM), torch.randn(1, 1, 1, DIM), torch.randn(1, 1, 1, DIM)
        output, _ = layer.attend(own_attention, module, query, *layer.update(key, value), None)
        assert output.isfinite().all()
    return {
        "tokens": layer.get_seq_length(),
        "layer_bytes": sum(tensor.nbytes for tensor in layer.tensors().values()),
        "peak_rss_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


start = time.process_time()
report = {"early": decode(EARLY), "last": decode(STEPS - EARLY)}
report["cpu_seconds"] = round(time.process_time() - start, 1)
report["positions"] = sorted(layer.positions.flatten().tolist())
assert report["early"]["layer_bytes"] == report["last"]["layer_bytes"], report
assert report["positions"][-8:] == list(range(STEPS - 8, STEPS)), report
assert all(tensor.isfinite().all() for tensor in layer.tensors().values()), report
print(json.dumps(report))
