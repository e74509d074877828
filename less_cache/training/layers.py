"""Cache layers that training puts where a LESSCache has its own, through the same link to attention.

Axes: `b` batch, `h` query heads, `g` KV heads, `n` queries, `t` tokens, `p` prompt tokens, `d` head dim.
"""

from collections.abc import Callable

import torch
from transformers.cache_utils import CacheLayerMixin

from less_cache import hook
from less_cache.attention import attention_logits
from less_cache.kernels import LayerKernels
from less_cache.policies import EvictionPolicy
from less_cache.training.simulate import Decode, attend, columns, roll

QUERY_BLOCK = 32  # queries scored at once: their weights over a long prompt stay in the processor's cache


class TrainingLayer(CacheLayerMixin):
    """Hands attention over to `attend`, and stores nothing for a next block."""

    supports_early_init = False
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


class TeacherLayer(TrainingLayer):
    """Runs the model's own attention on whole sequences and keeps what students need of them.

    After a forward of `t` tokens it holds queries, keys, values, and the attention output, before the output
    projection.
    """

    def attend(
        self, original: Callable, module, query_states, key_states, value_states, attention_mask, scaling=None, **kwargs
    ):
        output, weights = original(module, query_states, key_states, value_states, attention_mask, scaling=scaling, **kwargs)
        self.module = module
        self.scaling = query_states.shape[-1] ** -0.5 if scaling is None else scaling
        self.softcap = kwargs.get("softcap")
        # [b, h or g, t, d]; detached, so that the keys' tag does not tie layer and keys into a cycle
        self.queries, self.keys, self.values = query_states, key_states.detach(), value_states
        self.outputs = output  # [b, t, h, d]
        return output, weights

    def prompt_scores(
        self,
        policy: EvictionPolicy,
        prompt_length: int,
        counts: torch.Tensor,
        earlier: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The policy's scores `[b, g, p]` after a prompt of the first `prompt_length` tokens, densely attended.

        `earlier`: scores `[b, g, p']` of a shorter prompt to go on from, for a policy that observes every query.
        """
        p = prompt_length
        b, g, _, _ = self.keys.shape
        column = torch.arange(p, device=self.keys.device)
        scores = policy.arrival(column.expand(b, g, p))
        start = p - policy.observed(counts, p)
        if earlier is not None and start == 0:
            start = earlier.shape[-1]
            scores[:, :, :start] = earlier
        keys = self.keys[:, :, :p].float()
        for first in range(start, p, QUERY_BLOCK):
            rows = slice(first, min(first + QUERY_BLOCK, p))
            logits = attention_logits(self.queries[:, :, rows], keys[:, :, : rows.stop], None, self.scaling, self.softcap)
            logits[..., first:].masked_fill_(column[first : rows.stop] > column[rows, None], -torch.inf)
            scores[:, :, : rows.stop] = policy.observe(
                scores[:, :, : rows.stop], logits.softmax(dim=-1), column[rows].expand(b, -1)
            )
        return scores


def roll_layers(teachers: list[TeacherLayer], policy: EvictionPolicy, scores: list[torch.Tensor], steps: int) -> list[Decode]:
    """Every layer's decoding of the `steps` tokens after a prompt, with the teacher's queries.

    The layers are rolled as one batch: they do not depend on one another. `scores`: each layer's `[b, g, p]`.
    """
    b, _, p = scores[0].shape
    span = slice(p, p + steps)
    counts = policy.resolve(torch.full((b * len(teachers),), p, device=scores[0].device)).T[:, :, None, None]
    decode = roll(
        policy,
        torch.cat([teacher.queries[:, :, span] for teacher in teachers]),
        torch.cat([teacher.keys[:, :, : span.stop] for teacher in teachers]),
        torch.cat(scores),
        counts,
        teachers[0].scaling,
        teachers[0].softcap,
    )
    return decode.split(b)


class StudentLayer(TrainingLayer):
    """Attention of a block of decoded tokens under LESS, after the teacher's prompt; gradients flow through it.

    What is kept follows the teacher's queries (`decode`), what is attended the student's own.
    """

    def __init__(self, teacher: TeacherLayer, decode: Decode, kernels: LayerKernels):
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
        output = attend(self.decode, query_states, keys, values, self.kernels, logits)
        return output.transpose(1, 2).to(query_states.dtype), None
