"""The model that is measured, and the caches that compete on it.

Axes: `b` sequences, `n` tokens, `g` KV heads, `d` head dim.
"""

import dataclasses
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel, StaticCache

from less_cache import models
from less_cache.bench.options import BenchOptions
from less_cache.cache.cache import LESSCache
from less_cache.errors import LESSError
from less_cache.integration.families import full_attention_layers, geometry
from less_cache.kernels.config import LESSConfig
from less_cache.kernels.kernels import LESSKernels
from less_cache.policies import EvictionPolicy, policy_class
from less_cache.reports.machine import synchronize
from less_cache.training.options import TrainingOptions

COPY_BYTES = 2**28  # far more than any processor or GPU keeps close


class Contest:
    """A model, a policy and kernels, and the caches of `options.caches` on them.

    `weights`: bytes of the model; `read_weights`: of those that every token reads, so without embeddings that are not the
    output's too; `copied`: bytes read and written by `copy`. `kernels`: None where LESS is not among the caches.
    """

    copied = 2 * COPY_BYTES

    def __init__(self, options: BenchOptions):
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.options = options
        self.device = device(options.device)
        with_less = any(name.startswith("less") for name in options.caches)
        given = LESSKernels.from_pretrained(options.kernels) if with_less and options.kernels is not None else None
        self.model = load(options)
        self.compiled = torch.compile(self.model, mode="reduce-overhead") if options.compile else self.model
        self.weights = self.read_weights = sum(parameter.nbytes for parameter in self.model.parameters())
        embeddings: Any = self.model.get_input_embeddings()
        output = self.model.get_output_embeddings()
        if output is None or output.weight is not embeddings.weight:
            self.read_weights -= embeddings.weight.nbytes
        if 0 < options.memory <= self.weights:
            raise LESSError(f"Expected --memory to be above the {self.weights:,} bytes of the weights, got {options.memory:,}.")
        kernels = given or (random_kernels(self.model, options.seed) if with_less else None)
        self.kernels = None if kernels is None else kernels.to(self.device)
        self.generator = torch.Generator(self.device).manual_seed(options.seed)
        self._prompts: dict[tuple[str, int], LESSCache] = {}  # what `fill` has read
        for name in options.caches:
            self.make(name, max(options.contexts))  # one that cannot be made is reported before anything is measured

    def make(self, name: str, context: int, more: int = 0) -> Cache:
        """An empty cache of `CACHES` for `context` tokens, and `more` to come after them."""
        config = self.model.config
        if name == "dynamic":
            return DynamicCache(config=config)
        if name == "static":
            return StaticCache(config=config, max_cache_len=context + more)
        kernels = None if name.startswith("policy") else self.kernels
        return LESSCache(config, policy=self.policy(context), kernels=kernels, static=name.endswith("_static"), heads="equal")

    def policy(self, context: int) -> EvictionPolicy:
        """The policy with the budget at a context, in tokens."""
        return policy_class(self.options.policy).from_budget(self.options.tokens_kept(context))

    def tokens(self, batch: int, count: int) -> torch.Tensor:
        """Random tokens, `[b, n]`."""
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        return torch.randint(vocabulary, (batch, count), generator=self.generator, device=self.device)

    def read(self, cache: Cache, tokens: torch.Tensor, chunk: int | None, padding: int = 0) -> float:
        """Feed `tokens` `[b, n]` to the cache, `chunk` at once; seconds that it took. `padding`: how many of the first row are.

        With `options.compile`, static caches get single tokens through the compiled model.
        """
        model = self.compiled if chunk == 1 and cache.is_compileable else self.model
        parts, read, mask = tokens.split(chunk or tokens.shape[1], dim=1), 0, None
        if padding:
            mask = torch.ones_like(tokens)
            mask[0, :padding] = 0
        synchronize(self.device)
        start = time.perf_counter()
        for part in parts:
            read += part.shape[1]
            masked = {} if mask is None else {"attention_mask": mask[:, :read]}
            model(input_ids=part, past_key_values=cache, logits_to_keep=1, **masked)
        synchronize(self.device)
        return time.perf_counter() - start

    def copy(self) -> float:
        """Copy `COPY_BYTES` from one place of the device's memory to another; seconds that it took."""
        source, target = (torch.ones(COPY_BYTES, dtype=torch.uint8, device=self.device) for _ in range(2))
        synchronize(self.device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(self.device)
        return time.perf_counter() - start

    def fill(self, name: str, context: int, batch: int, more: int = 0) -> Cache:
        """A cache that holds `context` tokens of `batch` sequences, with room for `more`.

        A full cache gets random keys and values, as speed does not depend on them. A LESSCache reads one text in chunks, once
        for each kind and context, then holds it `batch` times.
        """
        cache = self.make(name, context, more)
        if isinstance(cache, LESSCache):
            if (name, context) not in self._prompts:
                self.read(cache, self.tokens(1, context), self.options.chunk)
                self._prompts[name, context] = cache
            cache = self._prompts[name, context].fork()
            if batch > 1:
                cache.batch_repeat_interleave(batch)
            return cache
        self.read(cache, self.tokens(batch, 1), None)  # for the shapes
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


def device(name: str) -> torch.device:
    """A device of this machine."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # no such kind, none here, or a torch without it
        raise LESSError(f"Expected --device to be one that torch finds here, such as cpu or cuda, got {name!r}.") from error


def load(options: BenchOptions) -> PreTrainedModel:
    """The model on its device, in evaluation mode."""
    dtype = models.weights_type(options.dtype)
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
    try:
        with torch.device(options.device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except ValueError as error:
        raise LESSError(
            f"Expected a causal language model such as llama, got {options.model!r} ({config.model_type})."
        ) from error


def random_kernels(model: PreTrainedModel, seed: int) -> LESSKernels:
    """Kernels of the size that `less-cache train` makes: their speed does not depend on what they have learned."""
    config = LESSConfig(
        **dataclasses.asdict(geometry(model.config)),
        memory=TrainingOptions.memory,
        hidden_size=TrainingOptions.hidden_size,
        layers=full_attention_layers(model.config),
    )
    torch.manual_seed(seed)
    return LESSKernels(config)
