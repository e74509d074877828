"""What a layer of the cache needs to give tokens back."""

from typing import Any

from less_cache.errors import LESSError
from less_cache.ops.call import AttentionCall

REACH = 1024  # tokens after which a recording that nobody crops ends
OF_PROMPT = 128  # tokens of a first block that can be given back: candidates come at its end


def num_unrecorded(layer: Any, call: AttentionCall) -> int:
    """How many tokens at the start of a first block are taken in for good, as `crop` never goes back that far."""
    before = call.num_tokens - OF_PROMPT
    if not layer.record_past or not layer.is_empty or layer.allotment is not None:  # adaptive heads wait with all of it
        return 0
    return before if before > 0 and call.can_part(before) else 0


def check_crop(layer_idx: int, recorded: int, tokens_to_remove: int) -> None:
    """Raise unless the last `-tokens_to_remove` of the `recorded` tokens can be given back."""
    if tokens_to_remove > 0:
        raise LESSError(f"crop: expected 0 or minus the number of tokens to remove, got {tokens_to_remove}.")
    if -tokens_to_remove > recorded:
        raise LESSError(
            f"Layer {layer_idx}: crop({tokens_to_remove}) goes back further than the {recorded} tokens that are recorded: "
            "older ones are folded in. Call cache.activate_past_recording() before the tokens to crop, and "
            f"crop before {REACH} more have come; of a prompt, the last {OF_PROMPT} can be given back."
        )


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
