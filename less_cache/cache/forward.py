"""Whether a forward came to its end: the model's own layers take tokens in as well, and know nothing of the others."""

from collections.abc import Sequence
from typing import Any

from less_cache.cache.layer import LESSLayer
from less_cache.errors import LESSError


class Forward:
    """How far a forward has come among the layers that are not under LESS, which keep no account of it themselves.

    A layer may be reached for several things, such as a convolution's state and a recurrent one; each comes once a forward.
    So a layer before the last one that was reached, or the same thing again, begins another forward.

    Args:
        layers: Of the cache. Not kept: every call hands in those that the cache has by then.
    """

    def __init__(self, layers: Sequence[Any]):
        own = [index for index, layer in enumerate(layers) if _takes_tokens(layer) and not isinstance(layer, LESSLayer)]
        self.last = own[-1] if own else None
        self.reset()

    def reset(self) -> None:
        """No forward has come."""
        self.at: int | None = None
        self.seen = 0  # tokens that the layers under LESS had seen when the forward began
        self.reached: set[tuple[int, str, int]] = set()
        self.interrupted = False  # one began, and the one before never came to its end

    def reach(self, layers: Sequence[Any], layer_idx: int, what: str, index: int = 0) -> None:
        """Say that a layer is reached. Raises `LESSError` where the forward before this one never came to its end."""
        if not self.interrupted:
            seen = next(int(layer.cumulative_length) for layer in reversed(layers) if isinstance(layer, LESSLayer))
            begins = self.at is None or layer_idx < self.at or (layer_idx, what, index) in self.reached
            if begins:
                self.interrupted = self.at is not None and (self.at != self.last or seen == self.seen)
                self.reached.clear()
                self.seen = seen
            self.reached.add((layer_idx, what, index))
            self.at = layer_idx
        if self.interrupted:
            self.check_whole(layers)

    def check_whole(self, layers: Sequence[Any]) -> None:
        """Raise `LESSError` where a forward ended between two layers, or within one."""
        under_less = [layer for layer in layers if isinstance(layer, LESSLayer)]
        lengths = {int(layer.cumulative_length) for layer in under_less}
        if self.interrupted or len(lengths) > 1:
            seen = f" (tokens seen: {' and '.join(map(str, sorted(lengths)))})" if len(lengths) > 1 else ""
            raise LESSError(
                f"The last forward was interrupted between two layers{seen}. "
                "Call cache.reset() and pass the whole conversation."
            )
        for layer in under_less:
            layer.check_whole()


def _takes_tokens(layer: Any) -> bool:
    """Whether a layer holds anything; transformers puts empty ones where a model has no attention."""
    return type(layer).__name__ != "DummyLayer"  # older versions have no such class
