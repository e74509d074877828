"""Whether kernels belong to a model."""

from transformers import PreTrainedConfig, PreTrainedModel

from less_cache.errors import LESSError
from less_cache.integration.families import Geometry, fingerprint, geometry
from less_cache.kernels.kernels import LESSKernels


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
