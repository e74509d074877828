"""What is known of model families: geometry, identity, and who cannot work with a LESSCache."""

import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from less_cache.errors import LESSError
from less_cache.integration import hook
from less_cache.integration.weights import Unreadable, Weights, bytes_of, parts, unwrapped, whole

# Each passes tests/test_models.py; docs/models.md is the table of it.
# fmt: off
SUPPORTED = frozenset({
    "afmoe", "apertus", "arcee", "aria_text", "bamba", "beam", "bert", "bert-generation", "biogpt", "bitnet", "camembert",
    "cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "ctrl", "cwm", "data2vec-text", "dots1", "electra", "ernie",
    "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon", "flex_olmo", "flint", "gemma", "gemma2", "gemma3_text",
    "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe", "gpt-sw3", "gpt2", "gpt_bigcode",
    "gpt_neox", "gpt_oss", "granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared",
    "helium", "hrm_text", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2",
    "jamba", "kolibri1", "laguna", "lfm2", "lfm2_moe", "lfm3", "llama", "llama4_text", "mellum", "mimo_v2_flash", "minimax_m2",
    "minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mixtral", "modernbert-decoder", "nanochat", "nemotron",
    "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "roberta", "roberta-prelayernorm",
    "roc_bert", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "xlm-roberta", "xlm-roberta-xl",
    "xmod",
})
# fmt: on
MLA = "multi-head latent attention: what attention sees is not what the cache was given"
ALIBI = "ALiBi adds a bias by distance, which is lost for evicted tokens"
SHARED = "some of its layers attend to the keys of another layer, of which this cache keeps a part alone"
PREFIX_TUNING = "PEFT starts from a DynamicCache that holds its prefix, and drops the cache that it is given"
DRAFT = "it drafts for another model, whose keys it attends to"
REFUSED = {
    "blt": "each of its parts needs a cache of its own",
    "bloom": ALIBI,
    "mpt": ALIBI,
    "dots3_note_text": MLA,  # the other models of this kind have a kv_lora_rank
    "diffllama": "its attention swaps the values after the cache returned them",
    "doge": "its mask differs by head and is computed from all values",
    "gemma4_assistant": DRAFT,
    "gemma4_unified_assistant": DRAFT,
    "idefics": "its attention normalises keys after the cache returned them",
    "jetmoe": "its attention repeats keys and values after the cache returned them",
    "minimax": "it takes no cache but its own",
    "mllama_text_model": "its cross-attention reads the image's keys from the cache itself",
    "moonshine": "its attention pads keys and values after the cache returned them",
}

SIGNS = 64  # of a matrix, in the fingerprint of a model without norms that have weights


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
    if getattr(getattr(model, "active_peft_config", None), "peft_type", None) in ("PREFIX_TUNING", "CARTRIDGE"):
        raise LESSError(f"LESSCache cannot work with prefix tuning: {PREFIX_TUNING}. Call generate without past_key_values.")
    text_config = config.get_text_config(decoder=True)
    reason = REFUSED.get(config.model_type) or _refusal(text_config, model)
    if reason is None and not full_attention_layers(config):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in DynamicCache(config=config).layers}))
        reason = f"no full-attention layer to compress, its cache has {kinds} only"
    if reason is not None:
        raise LESSError(f"LESSCache cannot work with {text_config.model_type!r}: {reason}. Use a DynamicCache.")


def _refusal(config: PreTrainedConfig, model: PreTrainedModel | None) -> str | None:
    """Why a model with this text config cannot work; None: nothing is known against it."""
    if reason := REFUSED.get(config.model_type):
        return reason
    if getattr(config, "kv_lora_rank", None):
        return MLA
    if getattr(config, "num_kv_shared_layers", None):
        return SHARED
    if hook.is_paged(config):
        return "paged attention is for continuous batching, which brings a cache of its own"
    if config.model_type == "falcon":
        return ALIBI if config.alibi else None
    if not hook.reaches(config, model):
        return "its attention does not go through transformers' AttentionInterface, so it never reaches the cache"
    return None


@functools.cache
def warn_untested(model_type: str) -> None:
    """Warn, once a process, of an architecture that the tests do not cover."""
    if model_type not in SUPPORTED:
        warnings.warn(
            f"LESSCache was never tested with {model_type!r} (docs/models.md lists what was). Compare its output under a "
            "budget above the text's length with that of a DynamicCache: they must be equal.",
            stacklevel=3,  # where the cache is made
        )


def fingerprint(model: PreTrainedModel, through: torch.dtype | None = None) -> str | None:
    """Identity of a base model's weights: a digest of its one-dimensional parameters in bfloat16, and its geometry.

    Norm weights survive conversion and weight quantisation, so a GGUF file and the original agree; another training run
    differs. Independent of the model's path, and of adapters on it, whose own parameters are left out; of norms that an
    adapter has trained, the originals count. Biases that an adapter trains in place (`bias="all"`) make another model.

    A model without any such parameter is known by the signs of some elements of each matrix. They survive a copy in
    bfloat16 or float16, but not quantisation, nor adapters that are merged in.

    Args:
        model: The model, as it is or wrapped by PEFT or torch.compile. Offloaded weights are read where they are.
        through: Round to this type first: the fingerprint of such a copy.

    Returns:
        64 hex digits, or None where a weight cannot be read: it is on the meta device, and accelerate does not know it.
    """
    weights = Weights(model)
    parameters = list(weights.of_the_base())
    vectors = [parameter for parameter in parameters if parameter.dim() == 1]
    try:
        digest = _digest_of_vectors(unwrapped(model).config, map(weights.read, vectors), through)
        if not vectors:
            for matrix in parameters:
                digest.update(_signs(weights.read(matrix)))
    except Unreadable:
        return None
    return digest.hexdigest()


def fingerprint_with_adapters(model: PreTrainedModel) -> str | None:
    """As `fingerprint`, but of one-dimensional parameters alone, and with the adapters': as saved caches always had it."""
    vectors = map(Weights(model).read, (parameter for parameter in model.parameters() if parameter.dim() == 1))
    try:
        return _digest_of_vectors(model.config, vectors).hexdigest()
    except Unreadable:
        return None


def is_rounded_twice(model: PreTrainedModel) -> bool:
    """Whether the model may be a float16 copy of another: then bfloat16 of its norms may not be the other's."""
    weights = Weights(model)
    vectors = (weights.read(each) for each in weights.of_the_base() if each.dim() == 1 and each.dtype == torch.float16)
    return any(not torch.equal(each.to(torch.bfloat16).to(torch.float16), each) for each in map(whole, vectors))


def _digest_of_vectors(config: PreTrainedConfig, vectors: Iterable[torch.Tensor], through: torch.dtype | None = None) -> Any:
    digest = hashlib.sha256()
    config = config.get_text_config(decoder=True)
    digest.update(f"{config.model_type} {geometry(config)} {config.vocab_size}".encode())
    for vector in map(whole, vectors):
        digest.update(bytes_of(vector.to("cpu").to(through or vector.dtype).to(torch.bfloat16)))
    return digest


def _signs(matrix: torch.Tensor) -> bytes:
    """Signs of `SIGNS` elements at fixed places."""
    signs = b""
    for part in parts(whole(matrix)):
        elements = part.reshape(-1)
        signs += bytes_of(elements[:: max(1, len(elements) // SIGNS)][:SIGNS].signbit())
    return signs
