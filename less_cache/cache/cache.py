"""The cache that users pass to `generate`."""

import copy
import dataclasses
import os
import sys
import warnings
import weakref
from pathlib import Path

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from less_cache.cache import snapshot
from less_cache.cache.layer import PER_ROW, LESSLayer
from less_cache.cache.static import StaticLESSLayer
from less_cache.errors import LESSError
from less_cache.hub.resolution import kernels_for
from less_cache.integration import hook
from less_cache.integration.families import (
    Geometry,
    check_supported,
    fingerprint,
    full_attention_layers,
    geometry,
    warn_untested,
)
from less_cache.kernels.kernels import LESSKernels
from less_cache.policies import H2O, USUAL_BUDGET, EvictionPolicy, policy_class, policy_from_dict


@dataclasses.dataclass(frozen=True)
class MemoryFootprint:
    """Bytes that a cache holds.

    Args:
        keys_values: Slots of kept tokens.
        low_rank_state: H and z, float32.
        bookkeeping: Positions, scores and counters, and what is recorded for `crop`.
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
        static: Fixed shapes and addresses, so that `generate` compiles decoding, as it does with a `StaticCache` on a GPU.
            The policy must have a budget, no tokens can be given back (`crop`), and only blocks of several tokens are checked
            against what was seen.

    Raises:
        LESSError: The model cannot work with a LESSCache, or the kernels belong to another model.

    Source: Dong et al., "Get More with LESS", ICML 2024 (arXiv 2402.09398).

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from less_cache import H2O
    >>> heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=99, **heads)
    >>> model = LlamaForCausalLM(config).eval()
    >>> cache = LESSCache(model, policy=H2O(heavy=4, recent=4))
    >>> options = {"min_new_tokens": 10, "max_new_tokens": 10, "do_sample": False}
    >>> model.generate(torch.arange(40)[None], past_key_values=cache, **options).shape
    torch.Size([1, 50])
    >>> cache.get_seq_length(), cache.layers[0].keys.shape
    (49, torch.Size([1, 2, 9, 8]))
    """

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        policy: EvictionPolicy | None = None,
        kernels: LESSKernels | None = None,
        static: bool = False,
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

        own = StaticCache(config=config, max_cache_len=sys.maxsize) if static else DynamicCache(config=config)
        layers = list(own.layers)
        full_attention = full_attention_layers(config)
        warn_untested(config.model_type)
        if kernels is not None:
            check_kernels(kernels, config, full_attention, loaded_model)
        layer_class = StaticLESSLayer if static else LESSLayer
        for index in full_attention:
            layer_kernels = kernels.for_layer(index) if kernels is not None else None
            layers[index] = layer_class(policy, layer_kernels, index, leads=index == full_attention[0])
        if growing := {type(layer).__name__ for layer in layers if getattr(layer, "max_cache_len", 0) == sys.maxsize}:
            raise LESSError(
                "LESSCache: expected layers of a fixed size beside those under LESS for static=True, got "
                f"{', '.join(growing)}, which grows with the text. Use static=False."
            )
        super().__init__(layers=layers)
        self.policy = policy
        self.kernels = kernels
        self._config = config
        self._may_warn = True  # once about positions that the model was not trained for
        self._model = None if loaded_model is None else weakref.ref(loaded_model)  # asked for its weights when saved
        hook.install()

    def __getstate__(self) -> dict:
        return {**vars(self), "_model": None}  # a reference to a model is nothing to pickle

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo: str | os.PathLike,
        model: PreTrainedModel | PreTrainedConfig,
        policy: EvictionPolicy | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        budget: int | float | None = None,
        static: bool = False,
    ) -> "LESSCache":
        """A cache with the kernels of a folder or Hub repository.

        Args:
            folder_or_repo: A folder, or a Hub id.
            model: The model, or its config.
            policy: What to keep. Default: the policy that the kernels were trained with.
            revision: Branch, tag or commit of a repository; default: main.
            token: For private and gated repositories; default: the one of `hf auth login`.
            budget: What the kernels' policy keeps: tokens (an int), or a share of the prompt (a float). Default: its own.
            static: Fixed shapes, as in `LESSCache`.
        """
        kernels = LESSKernels.from_pretrained(folder_or_repo, revision=revision, token=token)
        return cls(model, policy=_spending(budget, policy, kernels), kernels=kernels, static=static)

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel | PreTrainedConfig,
        budget: int | float | None = None,
        policy: EvictionPolicy | None = None,
        token: str | bool | None = None,
        static: bool = False,
    ) -> "LESSCache":
        """A cache with the kernels that are known for this model.

        Looks into the catalogue that is installed with the package, then on the Hub, for kernels of the model's weights,
        wherever they were loaded from; of a config, for kernels of its name. The log of `less_cache` and
        `cache.kernels.source` say which were taken, one warning that there were none: then the untrained state is used.

        Args:
            model: The model, or its config.
            budget: What the kernels' policy keeps: tokens (an int), or a share of the prompt (a float). Default: its own.
            policy: What to keep, instead of the policy that the kernels were trained with.
            token: For private and gated repositories; default: the one of `hf auth login`.
            static: Fixed shapes, as in `LESSCache`.
        """
        kernels = kernels_for(model, token)
        if kernels is None and policy is None:
            return cls(model, policy=H2O.from_budget(USUAL_BUDGET if budget is None else budget), static=static)
        return cls(model, policy=_spending(budget, policy, kernels), kernels=kernels, static=static)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the model's attention. Raises `LESSError` after a forward that ended between two layers."""
        layer = self.layers[layer_idx]
        if isinstance(layer, LESSLayer) and layer.checks(key_states.shape[-2]):
            self._check_whole()
            self._check_positions(self.get_seq_length(layer_idx))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check_positions(self, seen: int) -> None:
        """Warn once where the text gets longer than what the model was trained on: the cache has no end, the model has."""
        trained = getattr(self._config.get_text_config(decoder=True), "max_position_embeddings", None)
        if self._may_warn and trained is not None and seen > trained:
            self._may_warn = False
            warnings.warn(
                f"The text is longer than the {trained} tokens that the model was trained for (max_position_embeddings): "
                "the cache goes on at the same size, but what the model writes may get worse.",
                stacklevel=2,
            )

    def _check_whole(self) -> None:
        less_layers = [layer for layer in self.layers if isinstance(layer, LESSLayer)]
        first, last = int(less_layers[0].cumulative_length), int(less_layers[-1].cumulative_length)
        if first != last:
            raise LESSError(
                f"The last forward was interrupted between two layers (tokens seen: {first} and {last}). "
                "Call cache.reset() and pass the whole conversation."
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Give back the last `-tokens_to_remove` tokens, as assisted decoding does; all layers or, with `LESSError`, none.

        Possible for tokens that came since the last `crop`, after `activate_past_recording()`.
        """
        for layer in self.layers:
            if isinstance(layer, LESSLayer):
                layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def fork(self) -> "LESSCache":
        """A cache that has seen the same and goes its own way: one prefix, many continuations.

        Tensors are copied, which is little; kernels and policy are shared. `copy.deepcopy` does the same.
        """
        other = copy.copy(self)
        other._model = self._model
        other.layers = [layer.fork() if isinstance(layer, LESSLayer) else copy.deepcopy(layer) for layer in self.layers]
        return other

    def __deepcopy__(self, memo: dict) -> "LESSCache":
        return self.fork()

    def save(self, path: str | os.PathLike) -> None:
        """Write what the cache has seen to a safetensors file, in one atomic step; `load` goes on from there, bit by bit.

        The kernels are not in the file, only their digest. What is recorded for `crop` is left out.
        """
        self._check_whole()
        layers: list[dict] = []
        tensors: dict[str, torch.Tensor] = {}
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, LESSLayer | DynamicSlidingWindowLayer):
                raise LESSError(f"Layer {index}: a cache with {type(layer).__name__} cannot be saved.")
            layers.append({"type": type(layer).__name__, "cumulative_length": int(layer.cumulative_length)})
            if layer.cumulative_length > 0:
                kept = layer.tensors() if isinstance(layer, LESSLayer) else _own_tensors(layer)
                tensors |= {f"layers.{index}.{name}": tensor for name, tensor in kept.items()}
        model = self._model() if self._model is not None else None
        header = {
            "model": _describe(self._config, model),
            "policy": self.policy.to_dict(),
            "kernels": None if self.kernels is None else snapshot.digest(self.kernels.state_dict()),
            "layers": layers,
        }
        snapshot.write(Path(path), header, tensors)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        model: PreTrainedModel | PreTrainedConfig,
        kernels: LESSKernels | None = None,
        static: bool = False,
    ) -> "LESSCache":
        """The cache that `save` wrote, on the model's device, with the policy that it had.

        Args:
            path: The file.
            model: The same model, or its config, which cannot tell one set of weights from another.
            kernels: The same kernels; None if the cache had none.
            static: Fixed shapes, as in `LESSCache`, whether the saved cache had them or not.

        Raises:
            LESSError: The cache was saved for another model or other kernels, or the file is damaged.
        """
        header, tensors = snapshot.read(Path(path))
        cache = cls(model, policy=policy_from_dict(header["policy"]), kernels=kernels, static=static)
        saved_for = header["model"]
        loaded = _describe(cache._config, None if isinstance(model, PreTrainedConfig) else model)
        if saved_for["fingerprint"] is None or loaded["fingerprint"] is None:
            saved_for["fingerprint"] = loaded["fingerprint"] = None
        if saved_for != loaded:
            raise LESSError(f"{path}: the cache was saved for another model: expected {saved_for}, got {loaded}.")
        if header["kernels"] != (None if kernels is None else snapshot.digest(kernels.state_dict())):
            had = "without kernels" if header["kernels"] is None else f"with kernels of digest {header['kernels'][:12]}…"
            raise LESSError(f"{path}: the cache was saved {had}. Pass the same as kernels=.")
        device = getattr(model, "device", torch.device("cpu"))
        for index, (layer, saved) in enumerate(zip(cache.layers, header["layers"], strict=True)):
            prefix = f"layers.{index}."
            kept = {name.removeprefix(prefix): tensors[name].to(device) for name in tensors if name.startswith(prefix)}
            if kept:
                assert isinstance(layer, LESSLayer | DynamicSlidingWindowLayer), "no other layer is saved"
                layer.lazy_initialization(kept["keys"], kept["values"])
                if isinstance(layer, LESSLayer):
                    layer.set_tensors(kept)
                else:
                    layer.keys, layer.values = kept["keys"], kept["values"]
                layer.cumulative_length += saved["cumulative_length"]
        return cache

    def memory_footprint(self) -> MemoryFootprint:
        """Bytes held now, and what a full cache would take for as many tokens."""
        keys_values = low_rank_state = bookkeeping = full_cache = 0
        for layer in self.layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if not isinstance(layer, LESSLayer):
                keys_values += _bytes(keys, values)
                full_cache += _bytes(keys, values)
                continue
            for name, tensor in layer.held().items():
                if name in ("keys", "values"):
                    keys_values += tensor.nbytes
                elif name in PER_ROW:
                    bookkeeping += tensor.nbytes
                else:
                    low_rank_state += tensor.nbytes
            bookkeeping += layer.recorded_bytes
            if keys is not None and values is not None:
                full_cache += _bytes(keys[:, :, :1], values[:, :, :1]) * int(layer.cumulative_length)
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


def _spending(budget: int | float | None, policy: EvictionPolicy | None, kernels: LESSKernels | None) -> EvictionPolicy | None:
    """The policy that the kernels were trained with, at another budget; `policy` where no budget is given."""
    if budget is None:
        return policy
    trained_with = (kernels.config.policy or {}).get("name") if kernels is not None else None
    if policy is not None or trained_with is None:
        raise LESSError(
            f"LESSCache: expected a budget for the kernels' policy, got budget={budget!r}, policy={policy!r} and kernels "
            f"trained with {trained_with!r}. Pass the whole policy instead, such as policy=H2O.from_budget({budget!r})."
        )
    return policy_class(trained_with).from_budget(budget)


def _describe(config: PreTrainedConfig, model: PreTrainedModel | None) -> dict:
    """What a saved cache says about its model."""
    return {
        "model_type": config.get_text_config(decoder=True).model_type,
        **dataclasses.asdict(geometry(config)),
        "fingerprint": None if model is None else fingerprint(model),
    }


def _own_tensors(layer: DynamicSlidingWindowLayer) -> dict[str, torch.Tensor]:
    assert layer.keys is not None and layer.values is not None, "a layer that has seen tokens holds some"
    return {"keys": layer.keys, "values": layer.values}


def _bytes(*tensors: torch.Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
