"""What a measurement says: the machine, a line of JSON, a plot."""

from less_cache.reports.machine import describe
from less_cache.reports.outputs import check, finish

__all__ = ["check", "describe", "finish"]
