"""The work of a layer on a GPU, in Triton.

It has run through Triton's interpreter alone, and been compiled for GPUs, never on one: speed unmeasured, and off until it has.
`less_cache.backends.select.BACKENDS["cuda"] = "less_cache.backends.triton"` turns it on. A model compiled with torch.compile
never comes here. Needs triton: nothing but `backends.select` imports this folder, on a GPU.
"""

from less_cache.backends.triton.bridge import attend, can_attend, can_read, can_step, read_prompt, step

__all__ = ["attend", "can_attend", "can_read", "can_step", "read_prompt", "step"]
