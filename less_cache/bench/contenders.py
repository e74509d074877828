"""The model that is measured, and the caches that compete on it.

Axes: `b` sequences, `n` tokens, `g` KV heads, `d` head dim.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel, StaticCache

from less_cache import models
from less_cache.bench.options import BenchOptions
from less_cache.cache import LESSCache
from less_cache.config import LESSConfig
from less_cache.errors import LESSError
from less_cache.families import full_attention_layers, geometry
from less_cache.kernels import LESSKernels
from less_cache.policies import EvictionPolicy, policy_class
from less_cache.training.options import TrainingOptions


@dataclasses.dataclass(frozen=True)
class Contender:
    """One kind of cache.

    Args:
        name: One of `CACHES`.
        make: An empty cache, given the tokens of the context and those to come after it.
        forward: Called as the model is: the model itself, or a compiled form of it.
    """

    name: str
    make: Callable[[int, int], Cache]
    forward: Callable[..., Any]


class Contest:
    """A model, a policy and kernels, and the caches of `options.caches` on them. `weights`: bytes of the model."""

    def __init__(self, options: BenchOptions):
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.options = options
        self.device = torch.device(options.device)
        self.model = load(options)
        self.weights = sum(parameter.nbytes for parameter in self.model.parameters())
        if 0 < options.memory <= self.weights:
            raise LESSError(f"Expected --memory to be above the {self.weights:,} bytes of the weights, got {options.memory:,}.")
        given = options.kernels
        kernels = random_kernels(self.model, options.seed) if given is None else LESSKernels.from_pretrained(given)
        self.kernels = kernels.to(self.device)
        self.generator = torch.Generator(self.device).manual_seed(options.seed)

    @property
    def contenders(self) -> list[Contender]:
        config = self.model.config
        made: dict[str, Callable[[int, int], Cache]] = {
            "dynamic": lambda context, more: DynamicCache(config=config),
            "static": lambda context, more: StaticCache(config=config, max_cache_len=context + more),
            "policy": lambda context, more: LESSCache(config, policy=self.policy(context)),
            "less": lambda context, more: LESSCache(config, policy=self.policy(context), kernels=self.kernels),
        }
        return [Contender(name, make, self.model) for name, make in made.items() if name in self.options.caches]

    def policy(self, context: int) -> EvictionPolicy:
        """The policy with the budget at a context, in tokens."""
        return policy_class(self.options.policy).from_budget(self.options.tokens_kept(context))

    def tokens(self, batch: int, count: int) -> torch.Tensor:
        """Random tokens, `[b, n]`."""
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        return torch.randint(vocabulary, (batch, count), generator=self.generator, device=self.device)

    def read(self, contender: Contender, cache: Cache, tokens: torch.Tensor, chunk: int | None) -> None:
        """Feed `tokens` `[b, n]` to the cache, `chunk` at once."""
        for part in tokens.split(chunk or tokens.shape[1], dim=1):
            contender.forward(input_ids=part, past_key_values=cache, logits_to_keep=1)

    def fill(self, contender: Contender, context: int, batch: int, more: int = 0) -> Cache:
        """A cache that holds `context` tokens of `batch` sequences, with room for `more`.

        A full cache gets random keys and values, as speed does not depend on them. A LESSCache reads one text in chunks,
        then holds it `batch` times.
        """
        cache = contender.make(context, more)
        if isinstance(cache, LESSCache):
            self.read(contender, cache, self.tokens(1, context), self.options.chunk)
            if batch > 1:
                cache.batch_repeat_interleave(batch)
            return cache
        self.read(contender, cache, self.tokens(batch, 1), None)  # for the shapes
        layers: list[Any] = cache.layers
        for index, layer in enumerate(layers):
            keys, values = (getattr(layer, name, None) for name in ("keys", "values"))
            if keys is None or values is None:
                raise LESSError(f"Layer {index}: expected a layer with keys and values, got {type(layer).__name__}.")
            layer.update(*(self._like(states, context - 1) for states in (keys, values)))
        return cache

    def _like(self, states: torch.Tensor, count: int) -> torch.Tensor:
        """Random states `[b, g, n, d]` for `count` tokens."""
        b, g, _, d = states.shape
        return torch.empty(b, g, count, d, dtype=states.dtype, device=states.device).normal_(generator=self.generator)


def load(options: BenchOptions) -> PreTrainedModel:
    """The model on its device, in evaluation mode."""
    dtype = getattr(torch, options.dtype)
    if not options.random:
        return models.load(options.model, dtype=dtype, device=options.device)[0]
    config: Any
    try:
        config = AutoConfig.for_model(options.model)
    except ValueError:
        name, gguf_file = models.locate(options.model)
        try:
            config = AutoConfig.from_pretrained(name, **({"gguf_file": gguf_file} if gguf_file else {}))
        except Exception as error:  # readers of damaged files raise whatever they stumble over
            raise LESSError(
                f"Expected --random with a model type such as llama, a folder, a .gguf file or a Hub id, got {options.model!r}."
            ) from error
    torch.manual_seed(options.seed)
    with torch.device(options.device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_kernels(model: PreTrainedModel, seed: int) -> LESSKernels:
    """Kernels of the size that `less-cache train` makes: their speed does not depend on what they have learned."""
    config = LESSConfig(
        **dataclasses.asdict(geometry(model.config)),
        memory=TrainingOptions.memory,
        rank=TrainingOptions.rank,
        hidden_size=TrainingOptions.hidden_size,
        layers=full_attention_layers(model.config),
    )
    torch.manual_seed(seed)
    return LESSKernels(config)
