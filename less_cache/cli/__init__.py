"""The command line."""

try:
    from less_cache.cli.app import app
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("typer", "rich"):
        raise
    raise SystemExit("The command line needs more packages: pip install 'less-cache[demo]'") from error

__all__ = ["app"]
