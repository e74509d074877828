"""Arithmetic that all forms of a layer share."""

from less_cache.ops.attention import attention_logits, causal_blocks, kept_attention, less_attention, sparse_softmax
from less_cache.ops.call import AttentionCall
from less_cache.ops.prompt import read_prompt

__all__ = [
    "AttentionCall",
    "attention_logits",
    "causal_blocks",
    "kept_attention",
    "less_attention",
    "read_prompt",
    "sparse_softmax",
]
