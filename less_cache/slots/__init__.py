"""What a layer is made of and what it holds: slots of kept tokens, counters of rows, the state of all other tokens."""

from less_cache.slots.asked import Asked
from less_cache.slots.coding import Coding
from less_cache.slots.columns import Columns
from less_cache.slots.formats import FORMATS, SlotFormat, format_of
from less_cache.slots.held import Held
from less_cache.slots.newest import Newest
from less_cache.slots.rows import Hidden, Rows
from less_cache.slots.setup import Setup
from less_cache.slots.slots import Slots

__all__ = [
    "FORMATS",
    "Asked",
    "Coding",
    "Columns",
    "Held",
    "Hidden",
    "Newest",
    "Rows",
    "Setup",
    "SlotFormat",
    "Slots",
    "format_of",
]
