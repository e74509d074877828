"""Whether a forward came to its end: the model's own layers take tokens in as well, and know nothing of the others."""


class Forward:
    """How far a forward has come among the layers that are not under LESS, which keep no account of it themselves.

    A layer may be reached for several things, such as a convolution's state and a recurrent one; each comes once a forward.
    So a layer before the last one that was reached, or the same thing again, begins another forward.
    """

    def __init__(self, last: int | None):
        self.last = last  # of these layers; None: there are none
        self.reset()

    def reset(self) -> None:
        """No forward has come."""
        self.at: int | None = None
        self.seen = 0  # tokens that the layers under LESS had seen when the forward began
        self.reached: set[tuple[int, str, int]] = set()

    def reach(self, seen: int, layer_idx: int, what: str, index: int = 0) -> bool:
        """Say that a layer is reached; False where this begins a forward, and the one before never came to its end.

        `seen`: tokens that the last layer under LESS has seen.
        """
        begins = self.at is None or layer_idx < self.at or (layer_idx, what, index) in self.reached
        ended = not begins or self.at is None or (self.at == self.last and seen != self.seen)
        if begins:
            self.reached.clear()
            self.seen = seen
        self.reached.add((layer_idx, what, index))
        self.at = layer_idx
        return ended
