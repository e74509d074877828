"""Choosing and fitting: what later queries will ask, how much each head gets for it, and what the kept tokens should say."""

from less_cache.fitting.budgets import allot
from less_cache.fitting.fit import fit
from less_cache.fitting.references import References, Seen, ask

__all__ = ["References", "Seen", "allot", "ask", "fit"]
