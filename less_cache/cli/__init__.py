"""The command line."""

from less_cache.cli.app import app

__all__ = ["app"]
