"""What is measured, and how."""

import dataclasses

from less_cache.errors import LESSError
from less_cache.policies import policy_class

CACHES = ("dynamic", "static", "policy", "less")  # by these names in the reports; the first is what others are compared with


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What is measured, and how.

    Args:
        model: A folder, `.gguf` file or Hub id; with `random`, also a model type such as `llama`.
        random: Random weights of the model's shape: speed and memory do not depend on what the weights say.
        kernels: Folder or Hub id; None: random ones.
        policy: Name in `POLICIES`.
        budget: Tokens that stay per KV head, or a share of each context.
        caches: Which of `CACHES` compete.
        contexts: Tokens in the cache, or in the prompt.
        batch: Sequences at once.
        chunk: Tokens read at once; None: the whole prompt.
        device: Such as `cpu` or `cuda`.
        dtype: Type of the weights.
        threads: Of the processor; None: torch's default.
        rounds: Measured runs of each cache, one cache after the other, after one that warms up.
        tokens: Tokens decoded in a run.
        memory: Bytes that weights and caches may take together; for `batch`, 0 for the others.
        seed: Of random weights, keys, values and tokens.
    """

    model: str
    random: bool = False
    kernels: str | None = None
    policy: str = "h2o"
    budget: int | float = 0.05
    caches: tuple[str, ...] = CACHES
    contexts: tuple[int, ...] = (512, 2048)
    batch: int = 1
    chunk: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    rounds: int = 7
    tokens: int = 16
    memory: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        policy_class(self.policy).from_budget(self.budget)
        for cache in self.caches:
            if cache not in CACHES:
                raise LESSError(f"Expected --cache to be one of {', '.join(CACHES)}, got {cache!r}.")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise LESSError(f"Expected --dtype to be float32, bfloat16 or float16, got {self.dtype!r}.")

    def tokens_kept(self, context: int) -> int:
        """The budget in tokens at a context."""
        return self.budget if isinstance(self.budget, int) else max(2, round(self.budget * context))
