"""The work of a layer on a processor, in C++."""

from less_cache.backends.cpu.attending import attend, can_attend
from less_cache.backends.cpu.bridge import can_read, can_step, read_prompt, step

__all__ = ["attend", "can_attend", "can_read", "can_step", "read_prompt", "step"]
