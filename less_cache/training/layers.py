"""Cache layers that training puts where a LESSCache has its own, through the same link to attention.

Axes: `b` batch, `h` query heads, `g` KV heads, `n` queries, `t` tokens, `p` prompt tokens, `d` head dim.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from less_cache.backends.select import read_first_block
from less_cache.errors import LESSError
from less_cache.integration import hook
from less_cache.kernels.kernels import LESSKernels
from less_cache.memory.base import TrainedMemory
from less_cache.ops.attention import attention_logits, less_attention
from less_cache.ops.call import AttentionCall
from less_cache.training.options import Example
from less_cache.training.simulate import Decode, attend, columns, roll

EVERY = 4  # tokens of which one is compared with a full cache: nearly as good as all, in a quarter of the time


class TrainingLayer(CacheLayerMixin):
    """Sees one block of tokens after `prompt_length` others, and stores nothing for a next one."""

    supports_early_init = False
    is_sliding = False
    prompt_length = 0

    def update(self, key_states, value_states, *args, **kwargs):
        return hook.tag(key_states, self), value_states

    def lazy_initialization(self, key_states, value_states) -> None:
        pass

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.prompt_length

    def get_seq_length(self) -> int:
        return self.prompt_length

    def get_max_length(self) -> int:
        return -1


class DenseLayer(TrainingLayer):
    """A layer that LESS leaves alone, such as one with a sliding window: the model's own attention over all tokens.

    `prompt`: the layer that has seen the prompt, and its length; None at the beginning.
    """

    def __init__(self, is_sliding: bool, prompt: tuple["DenseLayer", int] | None = None):
        super().__init__()
        self.is_sliding = is_sliding
        self.prompt = prompt
        self.prompt_length = prompt[1] if prompt is not None else 0

    def update(self, key_states, value_states, *args, **kwargs):
        if self.prompt is not None:
            before, p = self.prompt
            key_states = torch.cat([before.keys[:, :, :p], key_states], dim=2)
            value_states = torch.cat([before.values[:, :, :p], value_states], dim=2)
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.prompt_length + query_length, 0


class TeacherLayer(TrainingLayer):
    """Runs the model's own attention on whole sequences and keeps what students need of them.

    After a forward of `t` tokens it holds their queries, keys and values.
    """

    def attend(
        self, original: Callable, module, query_states, key_states, value_states, attention_mask, scaling=None, **kwargs
    ):
        output, weights = original(module, query_states, key_states, value_states, attention_mask, scaling=scaling, **kwargs)
        self.scaling = query_states.shape[-1] ** -0.5 if scaling is None else scaling
        self.softcap, self.sinks = kwargs.get("softcap"), kwargs.get("s_aux")
        # [b, h or g, t, d]; detached, so that the keys' tag does not tie layer and keys into a cycle
        self.queries, self.keys, self.values = query_states, key_states.detach(), value_states
        return output, weights

    def release(self) -> None:
        """Let go of all activations."""
        self.queries = self.keys = self.values = None

    def scores_after(self, examples: Sequence[Example]) -> Iterator[torch.Tensor]:
        """For each example, shortest first, its policy's scores `[b, g, p]` after its prompt, densely attended.

        A prompt is the beginning of the next, so scores go on from one to the next under a policy that observes every
        query.
        """
        b, g, _, _ = self.keys.shape
        call = AttentionCall(self.queries, self.keys, self.values, None, None, self.scaling, self.softcap, self.sinks)
        earlier: dict[str, torch.Tensor] = {}
        for example in examples:
            p, policy = example.prompt_length, example.policy
            column = torch.arange(p, device=self.keys.device)
            counts = policy.resolve(torch.full((b,), p, device=self.keys.device)).T[:, :, None, None]
            scores = policy.arrival(column.expand(b, g, p))
            start = p - policy.observed(counts, p)
            if start == 0 and policy.name in earlier:
                start = earlier[policy.name].shape[-1]
                scores[:, :, :start] = earlier[policy.name]
            if start < p:
                prompt = call.part(0, p)
                scores, _ = read_first_block(policy, prompt, scores, column.expand(b, p), start, attends=False)
            if policy.observed(counts, p) == p:
                earlier[policy.name] = scores.clone()
            yield scores


class StudentLayer(TrainingLayer):
    """Attention of a block of decoded tokens under LESS, after the teacher's prompt; gradients flow through it.

    What is kept follows the teacher's queries (`decode`), what is attended the student's own. `kernels` None: the policy alone.
    `error`: how far its output is `apart` from what the same queries read in a full cache of the same pairs, over every
    `EVERY`-th token.
    """

    def __init__(self, teacher: TeacherLayer, decode: Decode, kernels: TrainedMemory | None):
        super().__init__()
        self.teacher = teacher
        self.decode = decode
        self.kernels = kernels
        self.prompt_length = decode.keep.shape[-1]

    def attend(self, original: Callable, module, query_states, key_states, value_states, attention_mask, **kwargs):
        teacher, p = self.teacher, self.prompt_length
        keys = torch.cat([teacher.keys[:, :, :p], key_states], dim=2)
        values = torch.cat([teacher.values[:, :, :p], value_states], dim=2)
        logits = attention_logits(
            query_states, columns(keys, self.decode.order, p), self.decode.visible, teacher.scaling, teacher.softcap
        )
        output = attend(
            self.decode, query_states, keys, values, self.kernels, logits, teacher.scaling, teacher.softcap, teacher.sinks
        )
        measured = torch.arange(query_states.shape[2] - 1, -1, -EVERY, device=output.device)
        self.error = apart(output[:, :, measured], self._full(query_states[:, :, measured], keys, values, p + measured))
        return output.transpose(1, 2).to(query_states.dtype), None

    @torch.no_grad()
    def _full(
        self, query_states: torch.Tensor, key_states: torch.Tensor, value_states: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Attention output of queries at these positions, `[n]`, to all tokens up to them: `[b, h, n, d]` float32."""
        teacher = self.teacher
        visible = torch.arange(key_states.shape[2], device=positions.device) <= positions[None, None, :, None]
        constants = teacher.scaling, teacher.softcap, teacher.sinks
        return less_attention(query_states, key_states, value_states.float(), visible, *constants)[0]


def apart(states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """|x − x target|² / |x target|², over all that they have."""
    states, target = states.float(), target.float()
    return (states - target).square().mean() / target.square().mean()


def teacher_cache(config: PreTrainedConfig, with_kernels: Collection[int]) -> Cache:
    """A cache for a dense forward: a `TeacherLayer` where there are kernels, a `DenseLayer` elsewhere."""
    layers: list[Any] = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise LESSError(
                f"Layer {index} is a {type(layer).__name__}: a recurrent layer cannot be run from the middle of a sequence, "
                "which the second stage needs. Train with layerwise_steps=200, joint_steps=0 "
                "(--layerwise-steps 200 --joint-steps 0)."
            )
        is_sliding = type(layer) is DynamicSlidingWindowLayer
        layers.append(TeacherLayer() if index in with_kernels else DenseLayer(is_sliding))
    return Cache(layers=layers)


def student_cache(teacher: Cache, example: Example, decodes: Sequence[Decode], kernels: LESSKernels | None) -> Cache:
    """A cache for the block decoded after the example's prompt; `decodes`: of the teacher's layers, in order; `kernels` None:
    the policy alone.
    """
    remaining = iter(decodes)
    layers: list[Any] = []
    for index, layer in enumerate(teacher.layers):
        if isinstance(layer, TeacherLayer):
            memory = None if kernels is None else kernels.for_layer(index)
            layers.append(StudentLayer(layer, next(remaining), memory))
        elif isinstance(layer, DenseLayer):
            layers.append(DenseLayer(layer.is_sliding, (layer, example.prompt_length)))
    return Cache(layers=layers)


def roll_layers(teachers: Sequence[TeacherLayer], example: Example, scores: Sequence[torch.Tensor], steps: int) -> list[Decode]:
    """Every layer's decoding of the `steps` tokens after a prompt, with the teacher's queries.

    The layers are rolled as one batch: they do not depend on one another. `scores`: each layer's `[b, g, p]`.
    """
    b, _, p = scores[0].shape
    scaling = teachers[0].scaling  # of the batch; where layers differ, the difference goes into the queries
    span = slice(p, p + steps)
    counts = example.policy.resolve(torch.full((b * len(teachers),), p, device=scores[0].device)).T[:, :, None, None]
    sinks = None
    if teachers[0].sinks is not None:
        sinks = torch.cat([teacher.sinks.expand(b, -1) for teacher in teachers])
    decode = roll(
        example.policy,
        torch.cat([teacher.queries[:, :, span] * (teacher.scaling / scaling) for teacher in teachers]),
        torch.cat([teacher.keys[:, :, : span.stop] for teacher in teachers]),
        torch.cat(list(scores)),
        counts,
        scaling,
        teachers[0].softcap,
        sinks,
    )
    return decode.split(b)
