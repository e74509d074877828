"""The layers of a cache: those under LESS in the places of full attention, the model's own in all others."""

import copy
import logging
import sys
import weakref
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from less_cache.cache.allotment import Allotment
from less_cache.cache.layer import LESSLayer
from less_cache.cache.options import Options
from less_cache.cache.own import own_layers
from less_cache.cache.static import StaticLESSLayer
from less_cache.errors import LESSError
from less_cache.integration.families import full_attention_layers
from less_cache.integration.probing import rotations
from less_cache.kernels.check import check_head_budgets
from less_cache.kernels.head_budgets import HeadBudgets
from less_cache.slots import format_of

logger = logging.getLogger(__name__)


def built(config: PreTrainedConfig, model: PreTrainedModel | None, options: Options, static: bool) -> list[Any]:
    """One for each layer of a model, in order; they hold nothing yet. `model`: None where the config alone is known."""
    layers, full_attention = own_layers(config, static), full_attention_layers(config)
    if isinstance(options.heads, HeadBudgets):
        check_head_budgets(options.heads, config, full_attention, model)
    layer_class = StaticLESSLayer if static else LESSLayer
    allotment = Allotment(len(full_attention)) if options.heads == "adaptive" else None
    turns = _turns(config, model, options)
    for position, index in enumerate(full_attention):
        layers[index] = layer_class(
            options.policy,
            options.kernels.for_layer(index) if options.kernels is not None else None,
            index,
            leads=position == 0,
            slots=options.slots,
            shares=options.shares(position),
            fit=options.fit and turns.get(index) is not None,
            rotation=turns.get(index),
            allotment=allotment,
        )
    layers[full_attention[0]].owner = None if model is None else weakref.ref(model)
    if growing := {type(layer).__name__ for layer in layers if getattr(layer, "max_cache_len", 0) == sys.maxsize}:
        raise LESSError(
            "LESSCache: expected layers of a fixed size beside those under LESS for static=True, got "
            f"{', '.join(growing)}, which grows with the text. Use static=False."
        )
    return layers


def forked(layers: Sequence[Any]) -> list[Any]:
    """Layers that hold the same and go their own way."""
    forks = [layer.fork() if isinstance(layer, LESSLayer) else copy.deepcopy(layer) for layer in layers]
    under_less = [layer for layer in forks if isinstance(layer, LESSLayer)]
    if under_less[0].allotment is not None:
        allotment = Allotment(len(under_less))
        for layer in under_less:
            layer.allotment = allotment
    return forks


def _turns(config: PreTrainedConfig, model: PreTrainedModel | None, options: Options) -> dict[int, Any]:
    """How the queries of each layer turn, where that is asked for and known."""
    if not options.policy.asks_references and not options.fit and format_of(options.slots).is_exact:
        return {}
    turns = {} if model is None else rotations(model)
    known = "" if any(turns.values()) else "; how its queries turn is not known: nothing is turned, and nothing fitted"
    logger.info("LESSCache of %s: %s%s", config.model_type, options, known)
    return turns
