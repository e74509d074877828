"""Whether kernels and head budgets belong to a model."""

import logging

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from less_cache.errors import LESSError
from less_cache.integration.families import Geometry, fingerprint, geometry, is_rounded_twice
from less_cache.kernels.head_budgets import HeadBudgets
from less_cache.kernels.kernels import LESSKernels

logger = logging.getLogger(__name__)

KERNELS = "kernels", "trained", "kernels.config.base_model_fingerprint"
HEAD_BUDGETS = "head budgets", "measured", "head_budgets.base_model_fingerprint"


def check_kernels(
    kernels: LESSKernels, config: PreTrainedConfig, full_attention: list[int], model: PreTrainedModel | None
) -> None:
    """Raise unless the kernels fit the model: same geometry, same layers, same base model where both are known."""
    if any(parameter.dtype != torch.float32 for parameter in kernels.parameters()):
        raise LESSError("The kernels: expected float32, in which they compute, got another type. Call kernels.layers.float().")
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
    _check_model_type(described.model_type, config, "kernels", "Use kernels that were trained for this model.")
    if model is not None and described.base_model_fingerprint is not None:
        check_base_model(described.base_model, described.base_model_fingerprint, model)


def check_head_budgets(
    budgets: HeadBudgets, config: PreTrainedConfig, full_attention: list[int], model: PreTrainedModel | None
) -> None:
    """Raise unless the head budgets fit the model: same layers and KV heads, same base model where both are known."""
    num_key_value_heads = geometry(config).num_key_value_heads
    if budgets.layers != full_attention or budgets.num_key_value_heads != num_key_value_heads:
        raise LESSError(
            f"The head budgets are for another model: expected shares of {num_key_value_heads} KV heads for the full-attention "
            f"layers {full_attention}, got those of {budgets.num_key_value_heads} for the layers {budgets.layers}"
            f"{f' ({budgets.base_model})' if budgets.base_model else ''}. Measure them with less-cache profile."
        )
    _check_model_type(budgets.model_type, config, "head budgets", "Measure them with less-cache profile.")
    if model is not None and budgets.base_model_fingerprint is not None:
        check_base_model(budgets.base_model, budgets.base_model_fingerprint, model, HEAD_BUDGETS)


def _check_model_type(got: str | None, config: PreTrainedConfig, label: str, what_to_do: str) -> None:
    """Raise unless what is called `label` is for the model's architecture, as far as it says."""
    model_type = config.get_text_config(decoder=True).model_type
    if got is not None and got != model_type:
        raise LESSError(f"The {label} are for another architecture: expected {model_type!r}, got {got!r}. {what_to_do}")


def check_base_model(name: str | None, wanted: str, model: PreTrainedModel, what: tuple[str, str, str] = KERNELS) -> None:
    """Raise unless the model is that of the fingerprint, or a copy of it in another type, as far as that can be told.

    `what` belongs to it: its name, how it came to be, and where its fingerprint stands.
    """
    label, made, place = what
    actual = fingerprint(model)
    if actual is None or wanted in (actual, fingerprint(model, through=torch.float16)):  # they may have seen a float16 copy
        return
    if is_rounded_twice(model):
        logger.warning(
            "The %s were %s for %s. Whether this model is a float16 copy of it cannot be told from weights that "
            "were rounded: only the geometry was compared. Load the model in float32 or bfloat16 once to make sure.",
            label,
            made,
            name or "a model without a name",
        )
        return
    raise LESSError(
        f"The {label} are for another base model: they were {made} for {name!r} "
        f"(fingerprint {wanted[:12]}…), the model's fingerprint is {actual[:12]}…. "
        f"If it is a derivative on purpose, set {place} = None."
    )
