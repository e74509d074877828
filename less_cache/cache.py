"""The cache that users pass to `generate`."""

import dataclasses
import os

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from less_cache import hook
from less_cache.errors import LESSError
from less_cache.families import Geometry, check_supported, fingerprint, geometry, warn_untested
from less_cache.kernels import LESSKernels
from less_cache.layer import LESSLayer
from less_cache.policies import EvictionPolicy, policy_from_dict


@dataclasses.dataclass(frozen=True)
class MemoryFootprint:
    """Bytes that a cache holds.

    Args:
        keys_values: Slots of kept tokens.
        low_rank_state: H and z, float32.
        bookkeeping: Positions, scores and counters.
        full_cache: What a full cache would take for the tokens seen.
    """

    keys_values: int
    low_rank_state: int
    bookkeeping: int
    full_cache: int

    @property
    def total(self) -> int:
        """All that the cache holds."""
        return self.keys_values + self.low_rank_state + self.bookkeeping

    @property
    def saved(self) -> float:
        """Share of the full cache's bytes that is not held, at least 0."""
        return max(0.0, 1 - self.total / self.full_cache) if self.full_cache else 0.0


class LESSCache(Cache):
    """A KV cache of constant size: a sparse policy keeps a few tokens, a learned state remembers all the others.

        out = ( φ(q) H + Σ_{i kept} e^{q·k_i/√d} v_i ) / ( φ(q) z + Σ_{i kept} e^{q·k_i/√d} )

    Pass it to `generate` and change nothing else. Full-attention layers are compressed; sliding-window and linear
    layers keep the model's own cache. `get_seq_length()` is the number of tokens seen, not kept. The prompt gets
    ordinary full attention, then one selection; `prefill_chunk_size` bounds its memory as well. One cache serves one
    batch of conversations; `reset()` makes it ready for others.

    Differs from a `DynamicCache`: no attention weights are returned under `output_attentions`, no gradients flow, and
    a model in training mode is refused.

    Args:
        model: The model, or its config. With the model, the kernels' base model is checked too.
        policy: What to keep, such as `H2O(heavy=64, recent=64)`. Default: the policy that the kernels were trained with.
        kernels: φ and ψ; None: the plain sparse policy.

    Raises:
        LESSError: The model cannot work with a LESSCache, or the kernels belong to another model.

    Source: Dong et al., "Get More with LESS", ICML 2024 (arXiv 2402.09398).

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from less_cache import H2O
    >>> heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=99, **heads)
    >>> model = LlamaForCausalLM(config).eval()
    >>> cache = LESSCache(model, policy=H2O(heavy=4, recent=4))
    >>> model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=10, do_sample=False).shape
    torch.Size([1, 50])
    >>> cache.get_seq_length(), cache.layers[0].keys.shape
    (49, torch.Size([1, 2, 9, 8]))
    """

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        policy: EvictionPolicy | None = None,
        kernels: LESSKernels | None = None,
    ):
        config = model if isinstance(model, PreTrainedConfig) else getattr(model, "config", None)
        if not isinstance(config, PreTrainedConfig):
            raise LESSError(f"LESSCache: expected a transformers model or its config, got {type(model).__name__}.")
        if kernels is not None and not isinstance(kernels, LESSKernels):
            raise LESSError(
                f"LESSCache: expected kernels to be LESSKernels or None, got {type(kernels).__name__}. "
                "Load them with LESSKernels.from_pretrained(…)."
            )
        if policy is None and kernels is not None and kernels.config.policy is not None:
            try:
                policy = policy_from_dict(kernels.config.policy)
            except LESSError as error:
                raise LESSError(f"The kernels' config: {error} Pass policy= to use another.") from error
        if not isinstance(policy, EvictionPolicy):
            raise LESSError(f"LESSCache: expected a policy such as H2O(heavy=64, recent=64), got {policy!r}.")
        loaded_model = None if isinstance(model, PreTrainedConfig) else model
        check_supported(config, loaded_model)

        layers = list(DynamicCache(config=config).layers)
        full_attention = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not full_attention:
            kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
            raise LESSError(
                f"LESSCache cannot work with {config.get_text_config(decoder=True).model_type!r}: no full-attention layer to "
                f"compress, its cache has {kinds} only. Use a DynamicCache."
            )
        warn_untested(config.model_type)
        if kernels is not None:
            check_kernels(kernels, config, full_attention, loaded_model)
        for index in full_attention:
            layer_kernels = kernels.for_layer(index) if kernels is not None else None
            layers[index] = LESSLayer(policy, layer_kernels, index, leads=index == full_attention[0])
        super().__init__(layers=layers)
        self.policy = policy
        self.kernels = kernels
        hook.install()

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo: str | os.PathLike,
        model: PreTrainedModel | PreTrainedConfig,
        policy: EvictionPolicy | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "LESSCache":
        """A cache with the kernels of a folder or Hub repository, and their policy unless another is given."""
        return cls(model, policy=policy, kernels=LESSKernels.from_pretrained(folder_or_repo, revision=revision, token=token))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the model's attention. Raises `LESSError` after a forward that ended between two layers."""
        if getattr(self.layers[layer_idx], "leads", False):
            lengths = {layer.cumulative_length for layer in self.layers if isinstance(layer, LESSLayer)}
            if len(lengths) > 1:
                raise LESSError(
                    f"The last forward was interrupted between two layers (tokens seen: {sorted(lengths)}). "
                    "Call cache.reset() and pass the whole conversation."
                )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def memory_footprint(self) -> MemoryFootprint:
        """Bytes held now, and what a full cache would take for as many tokens."""
        keys_values = low_rank_state = bookkeeping = full_cache = 0
        for layer in self.layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            keys_values += _bytes(keys, values)
            if not isinstance(layer, LESSLayer):
                full_cache += _bytes(keys, values)
                continue
            bookkeeping += _bytes(layer.positions, layer.scores, layer.seen, layer.counts)
            if layer.state is not None:
                low_rank_state += _bytes(layer.state.values_sum, layer.state.features_sum)
            if keys is not None and values is not None:
                full_cache += _bytes(keys[:, :, :1], values[:, :, :1]) * layer.cumulative_length
        return MemoryFootprint(keys_values, low_rank_state, bookkeeping, full_cache)


def check_kernels(
    kernels: LESSKernels, config: PreTrainedConfig, full_attention: list[int], model: PreTrainedModel | None
) -> None:
    """Raise unless the kernels fit the model: same geometry, same layers, same base model where both are known."""
    expected, described = geometry(config), kernels.config
    got = Geometry(
        described.num_hidden_layers, described.num_attention_heads, described.num_key_value_heads, described.head_dim
    )
    if expected != got:
        raise LESSError(
            f"The kernels are for another geometry: the model has {expected}, the kernels {got}"
            f"{f' ({described.base_model})' if described.base_model else ''}. Use kernels that were trained for this model."
        )
    if sorted(described.layers or []) != full_attention:
        raise LESSError(
            f"The kernels are for other layers: the model's full-attention layers are {full_attention}, "
            f"the kernels' layers {described.layers}. Use kernels that were trained for this model."
        )
    model_type = config.get_text_config(decoder=True).model_type
    if described.model_type is not None and described.model_type != model_type:
        raise LESSError(
            f"The kernels are for another architecture: expected {model_type!r}, got {described.model_type!r}. "
            "Use kernels that were trained for this model."
        )
    wanted = described.base_model_fingerprint
    readable = model is not None and not any(parameter.is_meta for parameter in model.parameters())  # not offloaded
    if wanted is not None and model is not None and readable and (actual := fingerprint(model)) != wanted:
        raise LESSError(
            f"The kernels are for another base model: they were trained for {described.base_model!r} "
            f"(fingerprint {wanted[:12]}…), the model's fingerprint is {actual[:12]}…. "
            "If it is a derivative on purpose, set kernels.config.base_model_fingerprint = None."
        )


def _bytes(*tensors: torch.Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
