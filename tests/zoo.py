"""Tiny random models of every supported architecture."""

import dataclasses
import warnings

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from less_cache.integration.families import SUPPORTED

SIZES = {  # for every config that has such a field
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "sliding_window": 6,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,  # generation runs to its full length
    "pad_token_id": 0,
    "is_decoder": True,
    # experts
    "num_experts": 2,
    "num_local_experts": 2,
    "n_routed_experts": 2,
    "moe_num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_k": 1,
    "moe_topk": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 0,
    "n_group": 1,
    "topk_group": 1,
    # layers that hold a recurrent state
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 8,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "n_groups": 1,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
FALCON = {"num_key_value_heads": None, "alibi": False, "bias": False}

# What an architecture needs beyond SIZES, or has that others have not. A key with a space is a variant: its first word
# is the model type.
PECULIAR: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": MROPE, "sliding_attention": MROPE}},
    "ctrl": {"dff": 48},
    "falcon": {**FALCON, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "falcon multi-head": {**FALCON, "new_decoder_architecture": False, "multi_query": False},
    "falcon new": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [48] * 4,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
        "num_global_key_value_heads": 2,
        "num_kv_shared_layers": 0,
    },
    "gemma4_unified_text": {"global_head_dim": 8, "num_global_key_value_heads": 2, "num_kv_shared_layers": 0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hrm_text": {"H_cycles": 1, "L_cycles": 1},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "minimax_m3_vl_text": {
        "layer_types": ["minimax_m3_sparse", "full_attention"],
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 2,
    },
    "ministral": {"layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": None},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"]},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48, "init_std": 0.3},  # scaled queries, learned positions
    "qwen2": {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True},
    "roc_bert": {
        "pronunciation_vocab_size": 9,
        "shape_vocab_size": 9,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xmod": {"languages": ["en"], "default_language": "en"},
}
ARCHITECTURES = sorted(
    name for name in SUPPORTED | {name for name in PECULIAR if " " in name} if name.split()[0] in CONFIG_MAPPING
)

# What a user of an architecture should know; docs/models.md shows it.
NOTES = {
    "bamba": "forwards of your own need `position_ids`: without them it counts each from 0, with any cache",
    "falcon": "its ALiBi form (`alibi=True`) is refused",
    "gemma3n_text": "refused where layers share their keys (`num_kv_shared_layers` above 0)",
    "gemma4_text": "refused where layers share their keys (`num_kv_shared_layers` above 0)",
    "gemma4_unified_text": "refused where layers share their keys (`num_kv_shared_layers` above 0)",
    "minimax_m3_vl_text": "left padding changes its own sparse layers, with any cache",
}
WITHOUT_LEFT_PADDING = WITHOUT_STATIC = ("minimax_m3_vl_text",)

# The few that other tests look at more closely.
FAMILIES = ("falcon", "gemma2", "gemma3_text", "qwen2", "cohere2", "gpt_oss", "opt")
HYBRIDS = ("gemma2", "gemma3_text", "qwen2", "cohere2", "gpt_oss")
WITHOUT_SDPA = ("gpt_oss", "gemma2")  # sinks and soft-capping have no sdpa form
BUILDS = [(family, base) for family in FAMILIES for base in ("eager", "sdpa") if base == "eager" or family not in WITHOUT_SDPA]


def config(name: str, **overrides) -> PreTrainedConfig:
    """The config of a tiny model; of every kind of layer that its default has, at least one."""
    config_class = CONFIG_MAPPING[name.split()[0]]
    fields = {field.name for field in dataclasses.fields(config_class)}
    peculiar = PECULIAR.get(name, {})
    default = config_class()
    sizes = {key: size for key, size in SIZES.items() if key in fields | set(config_class.attribute_map)}
    if getattr(default, "sliding_window", None) is None:
        sizes.pop("sliding_window", None)
    if "layer_types" in fields and "layer_types" not in peculiar and default.layer_types:
        kinds = list(dict.fromkeys(default.layer_types))
        sizes["layer_types"] = kinds * 2 if len(kinds) == 1 else kinds
        sizes["num_hidden_layers"] = len(sizes["layer_types"])
    return config_class(**{**sizes, **peculiar, **overrides})


def build(name: str, attn_implementation: str = "eager", seed: int = 0, **overrides) -> PreTrainedModel:
    """A model of an architecture or variant, ready to generate."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config(name, **overrides), attn_implementation=attn_implementation).eval()
