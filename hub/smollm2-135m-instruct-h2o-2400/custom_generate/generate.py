"""`model.generate(**inputs, custom_generate="…", trust_remote_code=True, less_budget=128)`: generate with these kernels."""

import inspect

from transformers import GenerationMixin

from less_cache import LESSCache, LESSError


def generate(model, less_budget=None, less_kernels=None, revision=None, token=None, past_key_values=None, **options):
    """`model.generate` with a LESSCache.

    Args:
        model: The model that `generate` was called on.
        less_budget: What the policy keeps: tokens (an int), or a share of the prompt. Default: what the kernels name.
        less_kernels: Folder or repository of the kernels. Default: the one that this file came from.
        revision, token: Of that repository.
        past_key_values: Not taken: the cache is made here.
        options: All others of `generate`.
    """
    if past_key_values is not None:
        raise LESSError("custom_generate makes a cache of its own. Pass past_key_values without custom_generate.")
    if less_kernels is None:
        # transformers does not hand over where this file came from; the `generate` that calls it knows.
        less_kernels = inspect.stack(context=0)[1].frame.f_locals.get("custom_generate")
    if less_kernels is None:
        raise LESSError("Expected less_kernels= to be the folder or repository of the kernels, got nothing.")
    cache = LESSCache.from_pretrained(less_kernels, model, budget=less_budget, revision=revision, token=token)
    return GenerationMixin.generate(model, past_key_values=cache, **options)
