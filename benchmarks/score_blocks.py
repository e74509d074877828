"""Scores of a prompt of 2,048 tokens, by how many queries are scored at once. Prints one JSON line: medians in seconds.

`masked` masks every column with a mask of its own, as blocks behind a cache must; the others mask the last columns alone.
"""

import json
import statistics
import time

import torch

from less_cache.attention import attention_logits, causal_weights

BATCH, HEADS, KV_HEADS, LENGTH, DIM, ROUNDS = 2, 9, 3, 2048, 64, 7

torch.manual_seed(0)
torch.set_num_threads(1)
queries, keys = torch.randn(BATCH, HEADS, LENGTH, DIM), torch.randn(BATCH, KV_HEADS, LENGTH, DIM)
column = torch.arange(LENGTH)


def masked_weights(first: int, block: int) -> torch.Tensor:
    stop = first + block
    visible = (column[:stop] <= column[first:stop, None]).expand(BATCH, KV_HEADS, block, stop)
    return attention_logits(queries[:, :, first:stop], keys[:, :, :stop], visible, DIM**-0.5).softmax(-1)


def seconds(weights, block: int) -> float:
    scores = torch.zeros(BATCH, KV_HEADS, LENGTH)
    start = time.perf_counter()
    for first in range(0, LENGTH, block):
        scores[..., : first + block] += weights(first, block).sum((2, 3))
    return time.perf_counter() - start


forms = {"masked 256": (masked_weights, 256)}
for size in (256, 128, 64, 32, 16):
    forms[str(size)] = (lambda first, block: causal_weights(queries[:, :, first : first + block], keys, first, DIM**-0.5), size)
rounds = [{name: seconds(*form) for name, form in forms.items()} for _ in range(ROUNDS)][1:]  # alternating; the first warms up
medians = {name: round(statistics.median(each[name] for each in rounds), 3) for name in forms}
print(json.dumps({"torch": torch.__version__, "threads": 1, "seconds": medians}))
