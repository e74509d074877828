"""Ways to get a prompt's attention output and H2O's scores of it, by blocks of queries.

    python benchmarks/score_blocks.py [TOKENS [FORM …]]

Prints one JSON line: median and least processor time in seconds of one layer shaped like SmolLM2-135M's, one thread, the
forms in turns, each turn in another order (what runs after a form that filled the processor's cache is slower), and the
largest relative difference of the scores from those of the first form with scores.

    sdpa                 torch's attention alone, no scores
    masked N             attention, then weights of N queries at once, every column masked
    blocks N             attention, then weights of N queries at once, the last columns masked
    log-sum-exp N        attention that gives its log-sum-exp too, then e^(l - lse) as one product and one exponential
    together N           `causal_blocks`: weights of N queries of one KV head, and the output from them
    together, all heads  the same for all KV heads at once
    exponentials N       as together, with e^(l - shift) instead of a softmax: the shift is known before the product, so it is
                         one more dimension of it, and scores are a product of weights and 1 / sums
    transposed N         the same with a column of queries in each row of the weights
    compiled N           attention, then `blocks`, by torch.compile
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from less_cache.ops.attention import attention_logits, causal_blocks

HEADS, KV_HEADS, DIM, ROUNDS = 9, 3, 64, 5
LENGTH = int(sys.argv[1]) if len(sys.argv) > 1 else 2048

torch.manual_seed(0)
torch.set_num_threads(1)
queries = torch.randn(1, HEADS, LENGTH, DIM)
keys, values = torch.randn(1, KV_HEADS, LENGTH, DIM), torch.randn(1, KV_HEADS, LENGTH, DIM)
column = torch.arange(LENGTH)
each_keys, each_values = (states.repeat_interleave(HEADS // KV_HEADS, dim=1) for states in (keys, values))


def attention() -> None:
    scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)


def by_weights(weights: Callable, block: int) -> torch.Tensor:
    attention()
    scores = torch.zeros(1, KV_HEADS, LENGTH)
    for first in range(0, LENGTH, block):
        stop = min(first + block, LENGTH)
        scores[..., :stop] += weights(queries[:, :, first:stop], first).sum((2, 3))
    return scores


def masked_weights(rows: torch.Tensor, first: int) -> torch.Tensor:
    stop = first + rows.shape[2]
    visible = (column[:stop] <= column[first:stop, None]).expand(1, KV_HEADS, -1, -1)
    return attention_logits(rows, keys[:, :, :stop], visible, DIM**-0.5).softmax(-1)


def last_masked_weights(rows: torch.Tensor, first: int) -> torch.Tensor:
    n = rows.shape[2]
    logits = attention_logits(rows, keys[:, :, : first + n], None, DIM**-0.5)
    logits[..., first:].masked_fill_(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
    return logits.softmax(-1)


def by_log_sum(block: int) -> torch.Tensor:
    """-lse is one more dimension of the queries, 1 of the keys."""
    _, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, each_keys, each_values, 0.0, True, scale=DIM**-0.5
    )
    longer_queries = torch.cat([queries * DIM**-0.5, -log_sum.unsqueeze(-1)], dim=-1).view(KV_HEADS, -1, LENGTH, DIM + 1)
    longer_keys = torch.cat([keys, torch.ones(1, KV_HEADS, LENGTH, 1)], dim=-1)[0].transpose(1, 2).contiguous()
    scores = torch.zeros(1, KV_HEADS, LENGTH)
    for head in range(KV_HEADS):
        for first in range(0, LENGTH, block):
            stop = min(first + block, LENGTH)
            weights = longer_queries[head, :, first:stop].flatten(0, 1) @ longer_keys[head, :, :stop]
            later = torch.ones(stop - first, stop - first, dtype=torch.bool).triu(1)
            weights.view(-1, stop - first, stop)[..., first:].masked_fill_(later, -torch.inf)
            scores[0, head, :stop] += weights.exp_().sum(0)
    return scores


def together(block: int, heads: int = 1) -> torch.Tensor:
    scores, output = torch.zeros(KV_HEADS, LENGTH), torch.empty(KV_HEADS, HEADS // KV_HEADS, LENGTH, DIM)
    blocks = causal_blocks(queries, keys, values, DIM**-0.5, heads_at_once=heads, queries_at_once=block)
    for some, rows, _, weights, attended in blocks:
        scores[some, : rows.stop] += weights.sum((1, 2))
        output[some, :, rows] = attended
    return scores.unsqueeze(0)


def by_exponentials(block: int, transposed: bool) -> torch.Tensor:
    """The shift is the larger logit of the query's own key and of the first: a sum is at least 1, and may overflow."""
    scaled, group = queries.view(KV_HEADS, -1, LENGTH, DIM) * DIM**-0.5, HEADS // KV_HEADS
    shift = torch.maximum((scaled * keys[0, :, None]).sum(-1), (scaled * keys[0, :, None, :1]).sum(-1))
    longer_queries = torch.cat([scaled, -shift.unsqueeze(-1)], dim=-1)
    longer_keys = torch.cat([keys[0], torch.ones(KV_HEADS, LENGTH, 1)], dim=-1)
    columns, head_values = longer_keys.transpose(1, 2).contiguous(), values[0].transpose(1, 2).contiguous()
    scores, output = torch.zeros(KV_HEADS, LENGTH), torch.empty(KV_HEADS, group, LENGTH, DIM)
    later, buffer = torch.ones(block, block, dtype=torch.bool).triu(1), torch.empty(group * block * LENGTH)
    for head in range(KV_HEADS):
        for first in range(0, LENGTH, block):
            stop = min(first + block, LENGTH)
            n = stop - first
            rows, mask = longer_queries[head, :, first:stop].flatten(0, 1), later[:n, :n]
            weights = buffer[: group * n * stop]
            if transposed:
                weights = torch.mm(longer_keys[head, :stop], rows.T, out=weights.view(stop, group * n)).T
                weights.T[first:].view(n, group, n).masked_fill_(mask.T.unsqueeze(1), -torch.inf)
            else:
                weights = torch.mm(rows, columns[head, :, :stop], out=weights.view(group * n, stop))
                weights.view(group, n, stop)[..., first:].masked_fill_(mask, -torch.inf)
            mass = weights.exp_().sum(1)
            assert bool(mass.isfinite().all())
            attended = (head_values[head, :, :stop] @ weights.T).T if transposed else weights @ values[0, head, :stop]
            output[head, :, first:stop] = (attended / mass.unsqueeze(-1)).view(group, n, DIM)
            scores[head, :stop] += weights.T @ (1 / mass)
    return scores.unsqueeze(0)


compiled_weights = torch.compile(last_masked_weights, dynamic=True)
forms: dict[str, Callable] = {"sdpa": attention, "masked 256": lambda: by_weights(masked_weights, 256)}
for size in (16, 32, 64):
    forms[f"blocks {size}"] = lambda size=size: by_weights(last_masked_weights, size)
    forms[f"log-sum-exp {size}"] = lambda size=size: by_log_sum(size)
    forms[f"together {size}"] = lambda size=size: together(size)
    forms[f"exponentials {size}"] = lambda size=size: by_exponentials(size, transposed=False)
    forms[f"transposed {size}"] = lambda size=size: by_exponentials(size, transposed=True)
forms["together, all heads 32"] = lambda: together(32, KV_HEADS)
forms["compiled 32"] = lambda: by_weights(compiled_weights, 32)
forms = {name: form for name, form in forms.items() if name in (sys.argv[2:] or forms)}

times: dict[str, list[float]] = {name: [] for name in forms}
scores: dict[str, torch.Tensor] = {}
for turn in range(ROUNDS + 1):  # the first warms up
    for name, form in random.sample(list(forms.items()), len(forms)):
        start = time.process_time()
        scores[name] = form()
        if turn > 0:
            times[name].append(time.process_time() - start)
expected = next(scores[name] for name in forms if name != "sdpa")
report = {"torch": torch.__version__, "threads": 1, "tokens": LENGTH, "forms": {}}
for name, each in times.items():
    report["forms"][name] = {"median": round(statistics.median(each), 4), "least": round(min(each), 4)}
    if name != "sdpa":
        report["forms"][name]["scores"] = float(f"{((scores[name] - expected) / expected).abs().max():.1e}")
print(json.dumps(report))
