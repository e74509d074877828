"""Numbers stay in float32 where a sum needs it."""

import contextlib

import torch


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """A context in which operations on this type of device keep the types of their arguments."""
    if not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()  # turning it off takes a while even where it is off
    return torch.autocast(device_type, enabled=False)
