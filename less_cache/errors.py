"""The one error type that this package raises on purpose."""


class LESSError(ValueError):
    """Bad input or an unsupported use: says what was expected, what came, and what to do."""
