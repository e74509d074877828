"""One layer of the cache: what transformers asks of it, and how it takes tokens in.

Axes: `b` rows, `h` query heads, `g` KV heads, `n` new tokens, `d` head dim.
"""

import copy
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from less_cache.backends import Draft, choose
from less_cache.backends.select import attends_prompt, take_block, take_step
from less_cache.cache import gradients, guards
from less_cache.cache.allotment import Allotment
from less_cache.cache.holding import HoldingLayer
from less_cache.cache.recording import Recording, check_crop, num_unrecorded
from less_cache.errors import LESSError
from less_cache.integration import hook
from less_cache.memory import LayerMemory
from less_cache.ops.call import AttentionCall
from less_cache.ops.precision import no_autocast
from less_cache.policies import EvictionPolicy
from less_cache.slots import Held, Hidden, Setup, format_of


class LESSLayer(HoldingLayer):
    """The tokens that `policy` keeps, in slots, and the state of all evicted ones.

    A step: attend with what is kept and the old state, add the step's weights to the scores, choose the victim, fold it
    in. A block of several tokens attends causally to itself as well, then there is one selection for all of it. Backends
    do both; the layer says what may come, and when it is done.

    While `record_past` is true, `crop` can give back what came since the last `crop`, and a block that is not the first
    counts as the sequence of steps that its tokens stand for: whichever candidates are accepted, the layer is as if
    they had been decoded one by one. Of a longer first block the last `OF_PROMPT` tokens can be given back, and are a block
    of their own. Recording ends with `reset`, and where `REACH` tokens come without a `crop`.

    Args:
        leads: Checks what is the same for all layers of a cache, which may wait for the device.
        slots: How keys and values are stored, a name in `FORMATS`.
        shares: How much of the policy's budget each KV head gets, `[g]`, 1 on average; None: the same for all.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False
    grows = True  # slots come with the text; else all at once

    def __init__(
        self,
        policy: EvictionPolicy,
        kernels: LayerMemory | None,
        layer_idx: int,
        leads: bool = True,
        slots: str = "float",
        shares: torch.Tensor | None = None,
        fit: bool = False,
        rotation: Any = None,
        allotment: Allotment | None = None,
    ):
        # Not the base's, which makes `keys` and `values`: here they lie in slots.
        self.leads, self.layer_idx = leads, layer_idx
        self.owner: weakref.ref | None = None  # the model that the cache was made for, or the attention that read first
        self.setup = Setup(policy, kernels, format_of(slots), shares, self.grows, fit, rotation)
        self.allotment = allotment
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next block is a new prompt."""
        self._held: Held | None = None
        self.cumulative_length: Any = 0  # tokens seen, padding included
        self.is_initialized = False
        self.record_past = False
        self._recording: Recording | None = None
        self.hidden: Hidden | None = None  # what the present forward's mask hides of the tokens seen; the cache says it
        self._text = gradients.Text()
        self._announced = False  # `update` came, attention has not read it yet
        self._open = False  # tokens are being taken in: after an exception nobody knows how far
        if self.allotment is not None:
            self.allotment.waiting.clear()

    def __getstate__(self) -> dict:
        return {**vars(self), "owner": None}  # a reference to a model is nothing to pickle

    def fork(self) -> "LESSLayer":
        """A copy that goes its own way: tensors are copied, kernels and policy shared. It records nothing yet."""
        other = copy.copy(self)
        other.owner = self.owner
        other._recording = None
        other.map(torch.clone)
        return other

    # What transformers asks

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        b, g, _, _ = key_states.shape
        self._begin(b, g, value_states.shape[-1], key_states.dtype, value_states.dtype, key_states.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Announce new keys and values, `[b, g, n, d]`; `attend` takes them in. Returns the new ones alone."""
        self.check_whole()
        guards.check_new(self.layer_idx, key_states.shape[-2], self.cumulative_length)
        if self.is_empty:  # a forward that failed does not bind the next one
            with torch.inference_mode(False):
                self.lazy_initialization(key_states, value_states)
        guards.check_batch(self.layer_idx, self._held.rows, key_states.shape[0])
        guards.check_dtypes(self.layer_idx, (self.dtype, self.value_dtype), (key_states.dtype, value_states.dtype))
        self._announced = True
        return hook.tag(key_states, self), value_states

    def check_whole(self) -> None:
        """Raise where tokens were announced or taken in halfway."""
        if self._open:
            raise LESSError(
                f"Layer {self.layer_idx}: the last forward was interrupted while tokens were taken in. "
                "Call cache.reset() and pass the whole conversation."
            )
        if self._announced:
            raise LESSError(
                f"Layer {self.layer_idx}: attention never read the last tokens: the model's attention does not go through "
                "transformers' AttentionInterface, or changes the keys that the cache returns. Use a DynamicCache; "
                "after an interrupted forward, call cache.reset()."
            )

    def refuse(self, reason: str) -> None:
        """Raise for a call that attention cannot hand over; nothing was taken in."""
        self._announced = False
        raise LESSError(f"Layer {self.layer_idx}: {reason}")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask covers the new tokens alone, at their logical offset."""
        guards.check_new(self.layer_idx, query_length, self.cumulative_length)
        return query_length, self.cumulative_length

    def checks(self, num_tokens: int) -> bool:
        """Whether this layer checks that `num_tokens` new ones follow what was seen; all layers of a cache see the same."""
        return self.leads

    def get_seq_length(self) -> int:
        """Tokens seen, padding included, whatever is kept of them."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    @property
    def recorded_bytes(self) -> int:
        """Bytes held only for `crop`; 0 right after one."""
        return 0 if self._recording is None else self._recording.nbytes

    def batch_select_indices(self, indices: torch.Tensor | Sequence[int]) -> None:
        self._recording = None
        super().batch_select_indices(indices)

    def activate_past_recording(self) -> None:
        """Record from the next block on, so that `crop` can give tokens back; see `record_past` above."""
        self.record_past = True

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise unless `crop` can do it."""
        check_crop(self.layer_idx, 0 if self._recording is None else self._recording.num_tokens, tokens_to_remove)

    def crop(self, tokens_to_remove: int) -> None:
        """Give back the last `-tokens_to_remove` tokens, state and scores included; 0: they stay, and nothing older goes."""
        self.check_crop(tokens_to_remove)
        recording, self._recording = self._recording, None
        if tokens_to_remove < 0:
            with torch.inference_mode(False), torch.no_grad():
                self.__dict__.update(vars(recording.without_last(-tokens_to_remove)))

    # What attention asks

    def attend(
        self,
        original: Callable,
        module: torch.nn.Module,
        query_states: torch.Tensor,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """Attention output of the new tokens, `[b, n, h, d]`, and None for the weights; takes the tokens in.

        Args:
            original: The model's own attention function; the first block, which nothing precedes, goes through it, unless
                its weights are needed anyway and computing them again would cost more.
            query_states: `[b, h, n, d]`.
            key_states: What `update` returned, `[b, g, n, d]`.
            value_states: What `update` returned, `[b, g, n, d]`.
            attention_mask: Of the new tokens alone, `[b, 1, n, n]` or `[b, n]`, bool or additive.
        """
        states = query_states, key_states, value_states
        own = functools.partial(original, module, dropout=dropout, scaling=scaling, **kwargs)
        if gradients.wanted(states, self._text):
            return gradients.attended(self._attend, own, states, attention_mask, self.is_empty, self._text), None
        return self._attend(own, states, attention_mask), None

    @torch.inference_mode(False)  # a cache filled under inference mode may go on outside of it
    @torch.no_grad()
    def _attend(
        self, own: functools.partial, states: Sequence[torch.Tensor], attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """What `attend` gives, without gradients, unless `own` gives it: the model's attention function, with its module and
        all arguments but queries, keys, values and mask.
        """
        call, again = self._accept(own, states, attention_mask)
        output, unrecorded = None, num_unrecorded(self, call)
        if self.is_empty and (unrecorded or not attends_prompt(self.setup.policy, call)):
            output, _ = own(*states, attention_mask, scaling=call.scaling)
        self._open = True
        if self.hidden is not None:
            self._forget(self.hidden)
        if unrecorded:
            self.take_in(call.part(0, unrecorded))
            call = call.part(unrecorded, call.num_tokens)
        if self.record_past and self._recording is None:
            self._recording = Recording(self, ends_prompt=unrecorded > 0)
        attended = self.take_in(call, as_block=unrecorded > 0)
        self._record(call)
        self._open = False  # the one place that says so
        output = attended.transpose(1, 2).contiguous() if output is None else output
        return torch.nn.functional.pad(output, (0, 0, 0, 0, again, 0)) if again else output

    def _accept(
        self, own: functools.partial, states: Sequence[torch.Tensor], attention_mask: torch.Tensor | None
    ) -> tuple[AttentionCall, int]:
        """The new tokens as a call, and how many before them the layer has seen already; raises with nothing changed."""
        (module,), kwargs = own.args, own.keywords
        if not self._announced:
            raise LESSError(
                f"Layer {self.layer_idx} ({type(module).__name__}): attention reads the same keys twice, as in a model whose "
                "layers share keys. Use a DynamicCache; to go on with this cache, call cache.reset()."
            )
        self._announced = False
        guards.check_attention(self.layer_idx, module, kwargs)
        if self.checks(states[0].shape[2]):
            self._check_reader(module)
        rows, n, position_ids = self._held.rows, states[0].shape[2], kwargs.get("position_ids")
        real = guards.real_tokens(self.layer_idx, attention_mask, len(rows.seen), n)
        seen, again = rows.seen if self.hidden is None else self.hidden.seen, 0
        if self.record_past:
            again = guards.seen_again(self.layer_idx, seen, real, position_ids, n, self.cumulative_length)
        if again:
            states = [each[:, :, again:] for each in states]
            position_ids, attention_mask, real, n = position_ids[:, again:], None, None, n - again
        if self.checks(n) and attention_mask is not None:
            guards.check_seen_columns(self.layer_idx, rows, attention_mask, n, int(self.cumulative_length))
        if self.checks(n) and not self.is_empty:
            guards.check_continuation(self.layer_idx, rows, seen, real, position_ids, int(self.cumulative_length))
        call = AttentionCall.of(states, attention_mask, real, own)
        if self.record_past and self.checks(n) and not self.is_empty and not call.is_causal:
            raise LESSError(
                f"Layer {self.layer_idx}: expected a causal mask while tokens are recorded for crop: they are taken in one by "
                "one. Pass such a mask before activate_past_recording(), or use a DynamicCache."
            )
        return call, again

    def _forget(self, hidden: Hidden) -> None:
        """Drop seen tokens that the forward's mask hides."""
        self._recording = None  # it would bring them back
        self._held.forget(self.setup.policy, hidden)
        if self.leads:
            self._held.rows.real = hidden.stays
            self._hold(self._held)
        self.hidden = None

    def _check_reader(self, module: torch.nn.Module) -> None:
        """Raise where another model reads the layer than before; a model that is gone is not missed."""
        owner = None if self.owner is None else self.owner()
        if owner is not None and owner is not module:
            guards.check_reader(self.layer_idx, module, owner)
        self.owner = weakref.ref(module)

    def take_in(self, call: AttentionCall, as_block: bool = False) -> torch.Tensor | None:
        """Read the new tokens and take them in: attention output `[b, h, n, d]`, or None where the model's own gives it.

        `as_block`: also while recording, where the tokens of a block count as steps otherwise.
        """
        n = call.num_tokens
        with no_autocast(call.query_states.device.type):  # scores and the state stay in float32
            if self.is_empty or (n > 1 and (as_block or not self.record_past)):
                return self._block(call)
            take = self._step if self.setup.policy.block_size is None else self._block
            if n == 1:
                return take(call)
            return torch.cat([take(call.part(token, token + 1)) for token in range(n)], dim=2)

    def _step(self, call: AttentionCall) -> torch.Tensor:
        """One token a row: `[b, h, 1, d]`."""
        output = take_step(self.setup, self._held, call, self.cumulative_length)
        if self.leads and call.real is not None and call.real.device.type in guards.READ_AT_ONCE and not self.is_compileable:
            self._held.rows.remember_padding(call.real, self.cumulative_length)
        self.cumulative_length += 1
        return output

    def _block(self, call: AttentionCall) -> torch.Tensor | None:
        """Several tokens, or the first, or any where a policy chooses in blocks: `[b, h, n, d]`, or None where the model's own
        attention gives it.
        """
        output, draft = take_block(self.setup, self._held, call, self.cumulative_length)
        if self.leads and call.real is not None:
            self._held.rows.remember_padding(call.real, int(self.cumulative_length))
        self.cumulative_length += call.num_tokens
        if draft is not None:
            self.decide(draft)
        return output

    def decide(self, draft: Draft) -> None:
        """Choose from what was read, at once or with all other layers."""
        if self.allotment is not None and self.allotment.concerns(self, draft):
            self.allotment.add(self, draft)
        else:
            self.choose(draft)

    def choose(self, draft: Draft) -> None:
        """Keep some of what was read, and fold in the rest."""
        choose(self.setup, self._held, draft)
        self._hold(self._held)

    def _record(self, call: AttentionCall) -> None:
        """Record a call, or end the recording."""
        if self._recording is not None:
            self.record_past = self._recording.append(call) and self.record_past
        if not self.record_past:
            self._recording = None
