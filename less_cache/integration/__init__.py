"""The link to transformers: attention's dispatch, what is known of model families, and where a model's weights are."""

from less_cache.integration.families import Geometry, check_supported, fingerprint, full_attention_layers, geometry
from less_cache.integration.probing import rotations
from less_cache.integration.rotation import Rotation

__all__ = ["Geometry", "Rotation", "check_supported", "fingerprint", "full_attention_layers", "geometry", "rotations"]
