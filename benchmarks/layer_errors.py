"""What trained kernels and the untrained state leave of each layer's error, on the dense model's activations.

    python benchmarks/layer_errors.py MODEL KERNELS TEXT

One JSON line: for each layer |LESS − dense|² / |policy alone − dense|², mean over four sequences with prompts of 512 and
1,024 tokens, H2O with 5 % kept.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from less_cache import LESSKernels, models
from less_cache.bench.command import without_folder
from less_cache.integration import hook
from less_cache.ops.attention import add_virtual_tokens, attention_logits, sparse_softmax
from less_cache.reports.machine import describe
from less_cache.training import TokenSampler, TrainingOptions
from less_cache.training.capture import capture, layer_folder
from less_cache.training.data import tokenize
from less_cache.training.layerwise import LayerTask
from less_cache.training.simulate import columns

model_name, kernels_name, text = sys.argv[1:]
options = TrainingOptions(
    least_budget=0.05, most_budget=0.05, prompts=(512, 1024), prompts_per_sequence=2, decoded=64, sequences=4
)
model, tokenizer = models.load(model_name)
trained, untrained = LESSKernels.from_pretrained(kernels_name), LESSKernels.untrained(model)
layers = trained.config.layers
hook.install()


def centroids_left(task: LayerTask, layer_idx: int, sequence: int) -> list[float]:
    """As `LayerTask.losses`, but tokens that are evicted while decoding are lost."""
    shard, left = task.shard(sequence), []
    for index, decoded in enumerate(shard.decoded):
        decode = task.decodes[sequence, index]
        p, n = decode.keep.shape[-1], decoded.queries.shape[1]
        queries, keys, values = decoded.queries[None], shard.keys[None, :, : p + n], shard.values[None, :, : p + n]
        logits = attention_logits(queries, columns(keys, decode.order, p), decode.visible, shard.scaling)
        weights, log_sum = sparse_softmax(logits)
        alone = weights @ columns(values, decode.order, p)[:, :, None]
        memory = untrained.for_layer(layer_idx)
        state = memory.empty_state(1, keys.shape[1], keys.shape[-1], keys.device)
        positions = torch.arange(p).expand_as(decode.keep)
        memory.fold_in(state, keys[:, :, :p], values[:, :, :p], ~decode.keep, positions, torch.tensor([[[p]]]))
        output = add_virtual_tokens(alone, log_sum, *memory.virtual_tokens(state, queries, shard.scaling))
        error, before = (
            task._projected(each.flatten(1, 2) - decoded.outputs[None]).square().mean().item() for each in (output, alone)
        )
        left.append(error / before)
    return left


results = []
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    sampler = TokenSampler([[tokenize(Path(text).read_text(encoding="utf-8"), tokenizer)]])
    capture(model, sampler, options, Path(folder), layers, list(range(options.sequences)), lambda done: None)
    for layer_idx in layers:
        task = LayerTask(layer_folder(Path(folder), layer_idx), options, range(options.sequences), model.device)
        errors = [error for sequence in task.sequences for error in centroids_left(task, layer_idx, sequence)]
        row = {"trained": task.error_left(trained.for_layer(layer_idx)), "untrained": sum(errors) / len(errors)}
        results.append({name: round(value, 3) for name, value in row.items()})
mean = {name: round(sum(row[name] for row in results) / len(results), 3) for name in results[0]}
names = {"model": without_folder(model_name), "kernels_sha256": trained.config.sha256, "text": Path(text).name}
print(json.dumps({**names, **describe(torch.device("cpu")), "mean": mean, "layers": results}))
