"""What a layer of the cache needs to give tokens back."""

from typing import Any

from less_cache.ops.call import AttentionCall

REACH = 1024  # tokens after which a recording that nobody crops ends
OF_PROMPT = 128  # tokens of a first block that can be given back: candidates come at its end


class Recording:
    """A copy of a layer as it was, and the calls of attention that it has taken in since.

    Folding cannot be undone, but it can be done again: to give tokens back, the copy takes in all calls without them.
    That is exact, and costs one copy of the layer and the new tokens' queries, keys and values.

    Of a long first block only the end is recorded. What comes before is taken in first, as one block; the end is another,
    whether tokens are given back or not.

    Args:
        layer: Between two blocks.
        ends_prompt: The first call is the end of a first block.
    """

    def __init__(self, layer: Any, ends_prompt: bool = False):
        self.layer = layer.fork()
        self.layer._open = False
        self.ends_prompt = ends_prompt
        self.calls: list[AttentionCall] = []
        self.num_tokens = 0

    def append(self, call: AttentionCall) -> bool:
        """Record a call; whether to go on: where nobody crops, recording ends, so that memory stays constant."""
        self.calls.append(call.alone())
        self.num_tokens += call.num_tokens
        return self.num_tokens - self.calls[0].num_tokens < REACH

    @property
    def nbytes(self) -> int:
        states = [each for call in self.calls for each in (call.query_states, call.key_states, call.value_states)]
        return sum(tensor.nbytes for tensor in (*states, *self.layer.tensors().values()))

    def without_last(self, num_tokens: int) -> Any:
        """The layer as if the last `num_tokens` tokens had never come. The recording is used up."""
        remaining = self.num_tokens - num_tokens
        for index, call in enumerate(self.calls):
            if remaining > 0:
                as_block = self.ends_prompt and index == 0
                self.layer.take_in(call.part(0, min(call.num_tokens, remaining)), as_block)
                remaining -= call.num_tokens
        return self.layer
