"""What a run will take, before it starts: floating-point operations, disk and memory.

Axes: `h` query heads, `g` KV heads, `t` tokens, `p` prompt tokens, `n` decoded tokens, `c` columns, `d` head dim, `m`
hidden size, `r` rank.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from less_cache.errors import LESSError
from less_cache.integration.families import full_attention_layers, geometry
from less_cache.memory import MEMORIES
from less_cache.training import capture, joint
from less_cache.training.layers import EVERY
from less_cache.training.options import Example, TrainingOptions, draw_examples


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations of each part of a run (a multiplication and an addition are two), and bytes.

    Args:
        own_text: Floating-point operations of the texts that the model writes itself, matrix products alone.
        capture, layerwise, joint: The same of each part of the training.
        disk: Most bytes in the output folder.
        memory: Bytes of a process: weights, kernels, the dense pass's activations, and `backward`.
        backward: Bytes of it that are held for the backward pass of a joint step, roughly.
    """

    own_text: float
    capture: float
    layerwise: float
    joint: float
    disk: int
    memory: int
    backward: int


FLOAT32_LOGITS = 5  # copies that the divergence makes of a block's logits
HIDDEN_STATES = 16  # bytes that the backward pass keeps of a layer for each of a token's hidden size, attention apart
OPTIMIZED = 4  # weights, gradients, two moments: copies of the kernels in memory
ON_DISK = 6  # copies of the kernels: finished layers, and a checkpoint's weights and moments while the next is written


def columns(example: Example, decoded: int) -> int:
    """Most columns that a query after the example's prompt attends to: kept tokens and those of the block."""
    counts = example.policy.resolve(torch.tensor([example.prompt_length], device="cpu"))  # [1, f]
    capacity = example.policy.capacity(counts.T)
    kept = example.prompt_length if capacity is None else min(example.prompt_length, int(capacity.max()))
    return kept + decoded


def estimate(model: PreTrainedModel, options: TrainingOptions, own_text: bool = False) -> Cost:
    """The cost of training kernels for `model`, which may lie on `meta`, over the very sequences that a run would draw.

    `own_text`: whether the model writes `options.sequences` texts first.
    """
    sizes = geometry(model.config)
    h, g, d = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim
    text_config = model.config.get_text_config(decoder=True)
    feed_forward = getattr(text_config, "intermediate_size", None)
    if not isinstance(feed_forward, int):  # none, or one a layer
        feed_forward = 4 * text_config.hidden_size
    layers = len(full_attention_layers(model.config))
    ranks = [options.rank] * layers if isinstance(options.rank, int) else options.rank
    if len(ranks) != layers:
        raise LESSError(f"TrainingOptions: expected one rank, or one for each of {layers} layers, got {len(ranks)} ranks.")
    n, m, r = options.decoded, options.hidden_size, sum(ranks) / layers
    parameters = sum(parameter.numel() for parameter in model.parameters())
    itemsize = next(model.parameters()).element_size()

    def dense(examples: Sequence[Example]) -> float:
        """A forward over the whole sequence, and the policy's scores after the longest prompt."""
        p = examples[-1].prompt_length
        t = p + n
        return 2 * parameters * t + layers * h * d * (2 * t**2 + p**2)

    def less(examples: Sequence[Example]) -> float:
        """One layer's attention under LESS over all decoded tokens: forward and backward."""
        total = 0.0
        for example in examples:
            p, c = example.prompt_length, columns(example, n)
            total += 2 * (h * n + g * (p + n)) * (d * m + m * r) + 4 * h * n * c * d + 2 * g * n * c * r * (d + 1)
        return 3 * total

    def compared(example: Example) -> float:
        """One layer's attention to a full cache, of the tokens that it is compared for."""
        return 4 * h * math.ceil(n / EVERY) * (example.prompt_length + n) * d

    def shard(examples: Sequence[Example]) -> int:
        t = examples[-1].prompt_length + n
        scores = sum(4 * g * example.prompt_length for example in examples)
        return itemsize * d * (2 * g * t + 2 * h * n * len(examples)) + scores

    def kept_for_backward(example: Example) -> float:
        """Of a block of decoded tokens: what the memory, attention and the rest of each layer compute, and the logits."""
        p, c = example.prompt_length, columns(example, n)
        t, width = p + n, 2 * d  # numbers that a centroid has means of
        networks = (g * t + h * n) * (d + 2 * m + 3 * r)
        state = g * (t * width + c * (r + 1) * width + 3 * n * r * width + n * c)
        less = 4 * (networks + state + 2 * h * n * (c + r))
        rest = n * (HIDDEN_STATES * text_config.hidden_size + itemsize * 3 * (feed_forward + (h + 2 * g) * d))
        logits = n * text_config.vocab_size * (4 * FLOAT32_LOGITS + 2 * itemsize)
        return layers * (less + rest) + logits

    projections = layers * text_config.hidden_size * h * d * itemsize
    captured = range(options.sequences) if options.layerwise_steps else options.held_out
    examples = [draw_examples(options, capture.STAGE, index) for index in captured]
    shapes = [MEMORIES[options.memory].shapes(h, g, d, m, rank) for rank in ranks]
    kernel_bytes = 4 * sum(math.prod(shape) for layer in shapes for shape in layer.values())
    mean = sum(map(less, examples)) / len(examples)
    drawn = [draw_examples(options, joint.STAGE, index) for index in range(options.joint_steps * options.batch_size)]
    hidden = text_config.hidden_size * (sizes.num_hidden_layers + 1)  # numbers a token that layers hand on
    activations = options.longest * (sizes.num_hidden_layers * d * (h + 2 * g) + hidden) if options.joint_steps else 0
    written = own_text * options.sequences * (2 * parameters * options.longest + 2 * layers * h * d * options.longest**2)
    backward = int(max((kept_for_backward(example) for each in drawn for example in each), default=0))
    return Cost(
        own_text=written,
        capture=sum(map(dense, examples)),
        layerwise=layers * options.layerwise_steps * mean,
        joint=sum(
            dense(each) + layers * (less(each) + sum(map(compared, each))) + 6 * parameters * n * len(each) for each in drawn
        ),
        disk=layers * sum(map(shard, examples)) + projections + ON_DISK * kernel_bytes,
        memory=parameters * itemsize + (OPTIMIZED + 2 * options.batch_size) * kernel_bytes + activations * itemsize + backward,
        backward=backward,
    )
