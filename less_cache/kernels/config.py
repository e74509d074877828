"""What a set of kernels says about itself."""

import dataclasses
import re

from less_cache.errors import LESSError
from less_cache.files import plain_json
from less_cache.kernels import entries
from less_cache.memory import MEMORIES
from less_cache.version import __version__

FORMAT_VERSION = 2  # 1: one rank and one hidden size for all layers, low_rank alone; 2: or one a layer, any memory
MOST_LAYERS = 10_000  # far beyond any model; a config that claims more would only fill the memory


@dataclasses.dataclass
class LESSConfig:
    """Geometry, origin and integrity of a set of kernels; `less_config.json` beside the weights.

    Args:
        num_hidden_layers: Decoder layers of the base model.
        num_attention_heads: Query heads per layer.
        num_key_value_heads: KV heads per layer.
        head_dim: Dimension of one head.
        rank: R, rows of the state: one number, or a list with one for each entry of `layers`.
        hidden_size: Hidden size of φ and ψ; as `rank`.
        memory: What φ and ψ are: `low_rank`, the paper's (`LayerKernels`), or `soft_centroids` (`LayerSoftCentroids`).
        layers: Indices of the layers that have kernels; default: all.
        model_type: `model_type` of the base model's config.
        base_model: Name of the base model.
        base_model_fingerprint: `less_cache.integration.families.fingerprint` of the base model's weights.
        policy: Policy that the kernels were trained with, in `EvictionPolicy.to_dict`'s form.
        training: How they were trained: data, steps, command.
        metrics: Measured figures.
        sha256: Digest of the weights file, hex.
        less_cache_version: Version that wrote the files.
        format_version: The oldest file format that can say all this; follows from the rest.

    >>> LESSConfig(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, rank=[4, 4, 8]).ranks
    [4, 4, 8]
    """

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rank: int | list[int] = 8
    hidden_size: int | list[int] = 512
    layers: list[int] | None = None
    model_type: str | None = None
    base_model: str | None = None
    base_model_fingerprint: str | None = None
    policy: dict | None = None
    training: dict = dataclasses.field(default_factory=dict)
    metrics: dict = dataclasses.field(default_factory=dict)
    sha256: str | None = None
    less_cache_version: str = __version__
    format_version: int = 1
    memory: str = "low_rank"

    def __post_init__(self) -> None:
        for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"):
            if not _is_size(size := getattr(self, name)):
                raise LESSError(f"LESSConfig: expected {name} to be an int in 1 … 1,000,000, got {size!r}.")
        if self.num_hidden_layers > MOST_LAYERS:
            raise LESSError(
                f"LESSConfig: expected num_hidden_layers to be at most {MOST_LAYERS:,}, got {self.num_hidden_layers:,}."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise LESSError(
                f"LESSConfig: expected num_attention_heads to be a multiple of num_key_value_heads, "
                f"got {self.num_attention_heads} and {self.num_key_value_heads}."
            )
        if self.layers is None:
            self.layers = list(range(self.num_hidden_layers))
        indices = self.layers if isinstance(self.layers, list) else None
        if indices is None or not all(type(index) is int and 0 <= index < self.num_hidden_layers for index in indices):
            raise LESSError(f"LESSConfig: expected layers to be indices below {self.num_hidden_layers}, got {self.layers!r}.")
        if len(set(indices)) != len(indices):
            raise LESSError(f"LESSConfig: expected layers to name each layer once, got {self.layers!r}.")
        if self.memory not in MEMORIES:
            raise LESSError(f"LESSConfig: expected memory to be one of {', '.join(MEMORIES)}, got {self.memory!r}.")
        self.format_version = 1 if self.memory == "low_rank" else 2
        for name in ("rank", "hidden_size"):
            sizes = getattr(self, name)
            each = sizes if isinstance(sizes, list) else [sizes]
            if not all(map(_is_size, each)) or (isinstance(sizes, list) and (not sizes or len(sizes) != len(indices))):
                raise LESSError(
                    f"LESSConfig: expected {name} to be an int in 1 … 1,000,000, or a list with one for each of the "
                    f"{len(indices)} layers, got {sizes!r}."
                )
            memory = MEMORIES[self.memory]
            if name == "rank" and any(size % memory.rank_step for size in each):
                raise LESSError(f"LESSConfig: expected {memory.rank_rule}, got {sizes}.")
            if len(set(each)) > 1:
                self.format_version = 2
            else:
                setattr(self, name, each[0])
        for name in ("training", "metrics"):
            if not isinstance(getattr(self, name), dict):
                raise LESSError(f"LESSConfig: expected {name} to be a JSON object, got {getattr(self, name)!r}.")
        if self.policy is not None and not isinstance(self.policy, dict):
            raise LESSError(f"LESSConfig: expected policy to be a JSON object or null, got {self.policy!r}.")
        for name in ("model_type", "base_model", "base_model_fingerprint"):
            if not isinstance(getattr(self, name), str | None):
                raise LESSError(f"LESSConfig: expected {name} to be a string or null, got {getattr(self, name)!r}.")
        if not isinstance(self.less_cache_version, str):
            raise LESSError(f"LESSConfig: expected less_cache_version to be a string, got {self.less_cache_version!r}.")
        if self.sha256 is not None and not (isinstance(self.sha256, str) and re.fullmatch("[0-9a-f]{64}", self.sha256)):
            raise LESSError(f"LESSConfig: expected sha256 to be 64 hex digits, got {self.sha256!r}.")

    @property
    def ranks(self) -> list[int]:
        """`rank` of each entry of `layers`."""
        return self._each(self.rank)

    @property
    def hidden_sizes(self) -> list[int]:
        """`hidden_size` of each entry of `layers`."""
        return self._each(self.hidden_size)

    def _each(self, size: int | list[int]) -> list[int]:
        return size if isinstance(size, list) else [size] * len(self.layers or [])

    def to_json(self) -> str:
        """JSON text, one key a line, as versions that know `low_rank` alone read it where that is all there is.

        `null` stands for a figure that is NaN or infinite. `LESSError` where `policy`, `training` or `metrics` are no JSON.
        """
        described = entries.stored(self)
        if self.memory == "low_rank":
            del described["memory"]
        return plain_json.dump(described, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "LESSConfig":
        """Read `to_json`'s form. A key this version does not know is an error: it may change the meaning of the rest.

        NaN and infinity, which older versions wrote among `metrics`, are read as None.
        """
        return entries.read(cls, "less_config.json", text, FORMAT_VERSION)


def _is_size(size: object) -> bool:
    return type(size) is int and 1 <= size <= 1_000_000
