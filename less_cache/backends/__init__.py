"""Who does a layer's work: PyTorch, the oracle, or a form of it for one kind of device."""

from less_cache.backends.again import read_again
from less_cache.backends.base import Backend
from less_cache.backends.choice import Draft, choose
from less_cache.backends.select import attends_prompt, read_first_block, take_block, take_step

__all__ = ["Backend", "Draft", "attends_prompt", "choose", "read_again", "read_first_block", "take_block", "take_step"]
