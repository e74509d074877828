"""What is measured, and how."""

import dataclasses
from typing import Any

from less_cache import models
from less_cache.errors import LESSError
from less_cache.policies import policy_class

# By these names in the reports; the first is what others are compared with.
CACHES = ("dynamic", "static", "policy", "less", "policy_static", "less_static")

# What a benchmark takes beside the options of all, with its defaults. Our static forms are measured where they are asked for:
# their layers refuse some policies and models. Static caches read a prompt as the others do.
USUAL = ("dynamic", "static", "policy", "less")
DEFAULTS: dict[str, dict[str, Any]] = {
    "decode": {"caches": USUAL, "batch": 1, "chunk": 512, "rounds": 7, "tokens": 16, "compile": False},
    "prefill": {"caches": ("dynamic", "policy", "less"), "batch": 1, "chunk": None, "rounds": 5, "padding": 0},
    "memory": {"caches": USUAL, "batch": 1, "chunk": 512},
    "batch": {"caches": USUAL, "memory": 0, "chunk": 512, "rounds": 3, "tokens": 4, "compile": False},
}


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
        padding: Tokens at the start of the first sequence that are padding; measured beside the same without.
        compile: Decode with `torch.compile` where the cache is static, before anything is timed.
        memory: Bytes that weights and caches may take together; for `batch`, 0 for the others.
        seed: Of random weights, keys, values and tokens.
    """

    model: str
    random: bool = False
    kernels: str | None = None
    policy: str = "h2o"
    budget: int | float = 0.05
    caches: tuple[str, ...] = USUAL
    contexts: tuple[int, ...] = (512, 2048)
    batch: int = 1
    chunk: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    rounds: int = 7
    tokens: int = 16
    padding: int = 0
    compile: bool = False
    memory: int = 0
    seed: int = 0

    @classmethod
    def of(cls, benchmark: str, **given: Any) -> "BenchOptions":
        """The options of a benchmark, with its defaults for those that are None. `LESSError` for one that it does not take."""
        if benchmark not in DEFAULTS:
            raise LESSError(f"Expected BENCHMARK to be one of {', '.join(DEFAULTS)}, got {benchmark!r}.")
        given = {name: value for name, value in given.items() if value not in (None, [])}
        for name, value in given.items():
            takers = [other for other, defaults in DEFAULTS.items() if name in defaults]
            if takers and benchmark not in takers:
                raise LESSError(
                    f"Expected --{name} with bench {', '.join(takers)} alone, got {value} with {benchmark}. Leave it out."
                )
        values = {**DEFAULTS[benchmark], **given}
        values["caches"] = tuple(sorted(set(values["caches"]), key=(*CACHES, *values["caches"]).index))
        values["contexts"] = tuple(sorted(set(values.get("contexts", cls.contexts))))
        options = cls(**values)
        if not 0 <= options.padding < min(options.contexts):
            raise LESSError(
                f"Expected --padding to be less than the context of {min(options.contexts)}, got {options.padding}."
            )
        if benchmark == "batch" and options.memory <= 0:
            raise LESSError("Expected --memory with bench batch, such as 16GiB: what weights and caches may take; got none.")
        return options

    def __post_init__(self) -> None:
        policy_class(self.policy).from_budget(self.budget)
        for cache in self.caches:
            if cache not in CACHES:
                raise LESSError(f"Expected --cache to be one of {', '.join(CACHES)}, got {cache!r}.")
        models.weights_type(self.dtype)

    def tokens_kept(self, context: int) -> int:
        """The budget in tokens at a context."""
        return self.budget if isinstance(self.budget, int) else max(2, round(self.budget * context))
