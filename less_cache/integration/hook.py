"""The link between a cache layer and attention: the only file that touches transformers' dispatch and its private names.

`Cache.update` never sees the queries and attention never sees the cache. So `update` returns its keys as a fresh view
that carries a reference to its layer (`tag`), and the dispatch of attention functions looks for that reference. Keys
without it, that is every other cache and every forward without a cache, go to the original function untouched.

Installed once, with the first `LESSCache`, not on import.
"""

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.falcon import modeling_falcon

_TAG = "_less_layer"
_lock = threading.Lock()
_installed = False
_dispatching: dict[Callable, Callable] = {}
_noting: dict[Callable, Callable] = {}
_expecting = threading.local()


def tag(key_states: torch.Tensor, layer: Any) -> torch.Tensor:
    """A view of `key_states` that leads attention to `layer`."""
    view = key_states.view_as(key_states)
    setattr(view, _TAG, layer)
    return view


def dispatching(original: Callable, unknown: str | None = None) -> Callable:
    """The attention function `original`, except for keys that a LESS layer has tagged. One for each original.

    `unknown`: the name of a function that somebody has registered. What it computes is not known, so a layer refuses it.
    """
    if original in _dispatching:  # a dict where torch.compile would warn of a functools.cache
        return _dispatching[original]

    @functools.wraps(original)
    def attention(module, query, key, value, attention_mask=None, *args, **kwargs):
        layer = getattr(key, _TAG, None)
        if layer is None:
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        if unknown is not None:
            layer.refuse(
                f"attention function {unknown!r} is not transformers' own: a LESSCache would not compute what it does. "
                'Load the model with attn_implementation="sdpa" or "eager".'
            )
        return layer.attend(original, module, query, key, value, attention_mask, *args, **kwargs)

    return _dispatching.setdefault(original, attention)


def expect_mask(cache: Any) -> None:
    """The next mask that this thread makes is for `cache`: what it says of the tokens seen becomes its `seen_mask`."""
    _expecting.cache = weakref.ref(cache)


def noting(mask_function: Callable) -> Callable:
    """The mask function, which hands the seen tokens' part of a 2D mask to the cache that expects it."""

    @functools.wraps(mask_function)
    def mask(*args, **kwargs):
        expecting, _expecting.cache = getattr(_expecting, "cache", None), None
        cache = None if expecting is None else expecting()
        padding, offset = kwargs.get("attention_mask"), kwargs.get("kv_offset", 0)
        if cache is not None and isinstance(padding, torch.Tensor) and padding.dim() == 2:
            seen = int(offset)
            looks = padding.device.type == "cpu" or kwargs.get("q_length", 2) > 1  # a step on a GPU does not wait for it
            if looks and 0 < seen <= padding.shape[-1]:
                cache.seen_mask = padding[:, :seen].bool()
                if cache.is_compileable and not bool(cache.seen_mask.all()):
                    # `generate` makes this mask, and the forward makes one without it where it gets None for "nothing hidden"
                    kwargs["allow_is_causal_skip"] = False
        return mask_function(*args, **kwargs)

    return mask


def _unknown(interface: AttentionInterface, name: str, function: Callable) -> str | None:
    """The name of a function that somebody has registered; None for transformers' own, a model's, or one from the Hub."""
    registered = name in interface and interface[name] is function and "/" not in name
    is_own = str(getattr(function, "__module__", "")).partition(".")[0] == "transformers"
    return name if registered and not is_own else None


def reaches(config: PreTrainedConfig, model: PreTrainedModel | None) -> bool:
    """Whether attention of this model goes through `AttentionInterface`; True where only a forward can tell."""
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return True  # custom code, or a part of a larger model
    mapped: Any = AutoModelForCausalLM._model_mapping[type(config)]
    model_class = type(model) if isinstance(model, PreTrainedModel) else mapped
    return model_class._can_set_attn_implementation()


def is_paged(config: PreTrainedConfig) -> bool:
    """Whether a model with this config was set to the attention of continuous batching."""
    return str(config._attn_implementation).startswith("paged|")


def install() -> None:
    """Wrap `AttentionInterface.get_interface`, the choice of a mask function, and Falcon's forward, which does not use the
    interface. Idempotent.
    """
    global _installed
    with _lock:
        if _installed:
            return
        get_interface = AttentionInterface.get_interface

        @functools.wraps(get_interface)
        def get_dispatching_interface(self, name, *args, **kwargs):
            original = get_interface(self, name, *args, **kwargs)
            return _dispatching.get(original) or dispatching(original, _unknown(self, name, original))

        AttentionInterface.get_interface = get_dispatching_interface  # type: ignore[method-assign, assignment]
        get_mask_function = AttentionMaskInterface.__getitem__

        @functools.wraps(get_mask_function)
        def get_noting_function(self, name):
            function = get_mask_function(self, name)
            if torch.compiler.is_compiling():
                return function
            return _noting.get(function) or _noting.setdefault(function, noting(function))

        AttentionMaskInterface.__getitem__ = get_noting_function  # type: ignore[method-assign]
        falcon = modeling_falcon.FalconAttention
        falcon.forward = _falcon_forward(falcon.forward)  # type: ignore[method-assign]
        _installed = True


def _falcon_forward(original: Callable) -> Callable:
    """Falcon's attention with the same steps, through `dispatching` where its cache has LESS layers."""
    sdpa = dispatching(AttentionInterface()["sdpa"])

    @functools.wraps(original)
    def forward(
        self,
        hidden_states,
        alibi,
        attention_mask,
        position_ids=None,
        layer_past=None,
        *args,
        position_embeddings=None,
        **kwargs,
    ):
        if layer_past is None or not any(hasattr(layer, "attend") for layer in layer_past.layers):
            return original(
                self,
                hidden_states,
                alibi,
                attention_mask,
                position_ids,
                layer_past,
                *args,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        query_states, key_states, value_states = (
            states.transpose(1, 2) for states in self._split_heads(self.query_key_value(hidden_states))
        )  # [b, h or g, n, d]
        cos, sin = position_embeddings
        query_states, key_states = modeling_falcon.apply_rotary_pos_emb(query_states, key_states, cos, sin)
        key_states, value_states = layer_past.update(key_states, value_states, self.layer_idx)
        output, _ = sdpa(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            scaling=self.inv_norm_factor,
            is_causal=self.is_causal,
            position_ids=position_ids,
        )  # [b, n, h, d]
        return self.dense(output.flatten(2)), None

    return forward
