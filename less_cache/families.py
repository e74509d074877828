"""What is known of model families: geometry, identity, and who cannot work with a LESSCache."""

import dataclasses
import hashlib
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from less_cache.errors import LESSError

MLA = "multi-head latent attention: what attention sees is not what the cache was given"
ALIBI = "ALiBi adds a bias by distance, which is lost for evicted tokens"
REFUSED = {
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "glm_moe_dsa": MLA,
    "kimi_linear": MLA,
    "longcat_flash": MLA,
    "minicpm3": MLA,
    "youtu": MLA,
    "bloom": ALIBI,
    "mpt": ALIBI,
    "diffllama": "its attention swaps the values after the cache returned them",
    "jetmoe": "its attention repeats keys and values after the cache returned them",
    "moonshine": "its attention pads keys and values after the cache returned them",
}


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of a model's attention that kernels must share."""

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


def geometry(config: PreTrainedConfig) -> Geometry:
    """The attention sizes of a decoder config, KV heads as the cache sees them."""
    config = config.get_text_config(decoder=True)
    num_attention_heads = config.num_attention_heads
    if config.model_type == "falcon":
        multi_query = config.multi_query and not config.new_decoder_architecture
        num_key_value_heads = 1 if multi_query else num_attention_heads  # the new architecture repeats its KV heads
    else:
        num_key_value_heads = getattr(config, "num_key_value_heads", None) or num_attention_heads
    try:
        head_dim = getattr(config, "head_dim", None)
    except RuntimeError as error:  # gemma4: the size differs by layer
        raise LESSError(
            f"{config.model_type!r}: its attention sizes differ by layer; kernels for it are not supported."
        ) from error
    head_dim = head_dim or config.hidden_size // num_attention_heads
    return Geometry(config.num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim)


def full_attention_layers(config: PreTrainedConfig) -> list[int]:
    """Indices of the layers that a LESSCache compresses."""
    return [index for index, layer in enumerate(DynamicCache(config=config).layers) if type(layer) is DynamicLayer]


def check_supported(config: PreTrainedConfig, model: PreTrainedModel | None = None) -> None:
    """Raise `LESSError` for a model that is known not to work, with the reason."""
    if config.is_encoder_decoder:
        raise LESSError(f"Expected a decoder-only model, got {config.model_type!r}, an encoder-decoder model.")
    config = config.get_text_config(decoder=True)
    model_type = config.model_type
    reason = REFUSED.get(model_type) or (MLA if getattr(config, "kv_lora_rank", None) else None)
    if reason is not None:
        raise LESSError(f"LESSCache cannot work with {model_type!r}: {reason}. Use a DynamicCache.")
    if model_type == "falcon":
        if config.alibi:
            raise LESSError(f"LESSCache cannot work with this Falcon model: {ALIBI}. Use a DynamicCache.")
        return
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return  # custom code: the next update tells whether its attention reaches the cache
    mapped: Any = AutoModelForCausalLM._model_mapping[type(config)]
    model_class = type(model) if isinstance(model, PreTrainedModel) else mapped
    if not model_class._can_set_attn_implementation():
        raise LESSError(
            f"LESSCache cannot work with {model_type!r}: its attention does not go through transformers' "
            "AttentionInterface, so it never reaches the cache. Use a DynamicCache."
        )


def fingerprint(model: PreTrainedModel) -> str:
    """Identity of a model's weights: a digest of its one-dimensional parameters in bfloat16, and its geometry.

    Norm weights survive conversion and weight quantisation, so a GGUF file and the original agree; another
    training run differs. Independent of the model's path.
    """
    digest = hashlib.sha256()
    config = model.config.get_text_config(decoder=True)
    digest.update(f"{config.model_type} {geometry(config)} {config.vocab_size}".encode())
    for parameter in model.parameters():
        if parameter.dim() == 1:
            digest.update(parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
