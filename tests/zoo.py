"""Tiny random models of families other than Llama, each with something that Llama has not."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
NO_HEAD_DIM = {key: size for key, size in SIZES.items() if key != "head_dim"}

FAMILIES = {
    "falcon": lambda: FalconConfig(  # attention outside of AttentionInterface, multi-query
        **NO_HEAD_DIM, new_decoder_architecture=False, multi_query=True, parallel_attn=True, bias=False, alibi=False
    ),
    "gemma2": lambda: Gemma2Config(**SIZES, **HYBRID, query_pre_attn_scalar=8, attn_logit_softcapping=1.0),  # soft-capped
    "gemma3": lambda: Gemma3TextConfig(**SIZES, **HYBRID, query_pre_attn_scalar=8),
    "qwen2": lambda: Qwen2Config(**NO_HEAD_DIM, **HYBRID, use_sliding_window=True),
    "cohere2": lambda: Cohere2Config(**SIZES, **HYBRID),
    "gpt_oss": lambda: GptOssConfig(**SIZES, **HYBRID, num_local_experts=2, num_experts_per_tok=1),  # attention sinks
    "opt": lambda: OPTConfig(  # scaled queries, learned positions
        vocab_size=97,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        init_std=0.3,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    ),
}
WITHOUT_SDPA = ("gpt_oss", "gemma2")  # gpt_oss has no sdpa form, and gemma2's leaves the soft-capping out
BUILDS = [(family, base) for family in FAMILIES for base in ("eager", "sdpa") if base == "eager" or family not in WITHOUT_SDPA]
HYBRIDS = ("gemma2", "gemma3", "qwen2", "cohere2", "gpt_oss")


def build(family: str, attn_implementation: str = "eager", seed: int = 0) -> PreTrainedModel:
    """A model of `family`, ready to generate."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation=attn_implementation).eval()
