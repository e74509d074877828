"""Long texts in blocks: what is held at once is bounded in numbers, however long the text and large the batch."""

NUMBERS = 2**23  # held at once, 32 MiB of float32


def blocks(start: int, stop: int, size: int, most: int | None = None) -> list[slice]:
    """The tokens from `start` to `stop`, so many at a time that they take at most `NUMBERS`, where one takes `size`.

    At least one token at a time, and no more than `most`.

    >>> blocks(0, 10, NUMBERS // 4)
    [slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)]
    """
    at_once = max(1, NUMBERS // max(1, size))
    at_once = at_once if most is None else min(at_once, most)
    return [slice(first, min(first + at_once, stop)) for first in range(start, stop, at_once)]
