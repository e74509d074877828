"""One layer of the cache: slots for the kept tokens, and the low-rank state for all the others.

Axes: `b` batch, `h` query heads, `g` KV heads, `s` = h / g, `n` new tokens, `c` slots or columns, `d` head dim,
`r` rank, `f` token counts of the policy.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from less_cache.cache.recording import Recording
from less_cache.errors import LESSError
from less_cache.integration import hook
from less_cache.memory.base import LayerMemory
from less_cache.ops.attention import attention_logits, kept_attention, less_attention, sparse_softmax
from less_cache.ops.call import AttentionCall
from less_cache.ops.prompt import read_prompt
from less_cache.policies import EvictionPolicy

QUERY_BLOCK = 256  # queries attended at once in a block: memory is O(QUERY_BLOCK · columns)
SPARE_SLOTS = 64  # a policy without a budget gets this many free slots at a time
# The module that has the fused form of a step and of reading a prompt, by type of device. Triton's, `less_cache.fused`,
# waits for a GPU to run it.
FUSED = {"cpu": "less_cache.backends.cpu.bridge"}
COMPILES_WELL = torch.__version__ >= "2.13"  # torch 2.11 makes code of `index_copy_` that does not run
READ_AT_ONCE = {"cpu"}  # types of device whose tensors Python reads without waiting
REACH = 1024  # tokens after which a recording that nobody crops ends
PER_ROW = ("keys", "values", "positions", "scores", "seen", "counts", "settled")

# Arguments of an attention function that do not change its result here. `scaling`, `softcap` and `s_aux` are read.
HARMLESS = {"is_causal", "position_ids", "cache_position", "token_type_ids", "logits_to_keep"}


class LESSLayer(CacheLayerMixin):
    """Keys and values of the tokens that `policy` keeps, and H, z of all evicted ones.

    Slots hold tokens in no order: RoPE is in the keys, so attention does not mind, and a new token goes into the slot
    that the last victim left. `positions` `[b, g, c]` says which token is where, -1 for an empty slot.

    A step: attend with what is kept and the old state, add the step's weights to the scores, choose the victim, fold
    it in. A block of several tokens attends causally to itself as well, then there is one selection for all of it.

    While `record_past` is true, `crop` can give back what came since the last `crop`, and a block that is not the first
    counts as the sequence of steps that its tokens stand for: whichever candidates are accepted, the layer is as if
    they had been decoded one by one. Recording ends with `reset`, and where `REACH` tokens come without a `crop`.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, policy: EvictionPolicy, kernels: LayerMemory | None, layer_idx: int, leads: bool = True):
        super().__init__()
        self.leads = leads  # checks what is the same for all layers of a cache, which may wait for the device
        self.policy = policy
        self.kernels = kernels
        self.layer_idx = layer_idx
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next block is a new prompt."""
        self.keys: torch.Tensor | None = None  # [b, g, c, d]
        self.values: torch.Tensor | None = None  # [b, g, c, d]
        self.positions: torch.Tensor | None = None  # [b, g, c] int32, real tokens of the row before it, -1: empty
        self.scores: torch.Tensor | None = None  # [b, g, c] float32
        self.seen: torch.Tensor | None = None  # [b] int64, real tokens
        self.counts: torch.Tensor | None = None  # [b, f] int64, the policy's token counts
        self.settled: torch.Tensor | None = None  # [b] bool, a token came alone: the prompt is over, counts stay
        self.state: Any = None  # a dataclass of tensors, whatever the kernels keep evicted tokens in
        self.cumulative_length: Any = 0  # tokens seen, padding included
        self.is_initialized = False
        self._awaiting_attention = False
        self.record_past = False
        self._recording: Recording | None = None

    def fork(self) -> "LESSLayer":
        """A copy that goes its own way: tensors are copied, kernels and policy shared. It records nothing yet."""
        other = copy.copy(self)
        other._recording = None
        other._map_rows(torch.clone)
        return other

    # What transformers asks

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        b, g, _, _ = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.seen = torch.zeros(b, dtype=torch.long, device=self.device)
        self.settled = torch.zeros(b, dtype=torch.bool, device=self.device)
        if self.kernels is not None:
            self.kernels = self.kernels.for_heads(g).on(self.device)
            self.state = self.kernels.empty_state(b, g, value_states.shape[-1], self.device)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Announce new keys and values, `[b, g, n, d]`; `attend` takes them in. Returns the new ones alone."""
        if self._awaiting_attention:
            raise LESSError(
                f"Layer {self.layer_idx}: attention never read the last tokens: the model's attention does not go through "
                "transformers' AttentionInterface, or changes the keys that the cache returns. Use a DynamicCache; "
                "after an interrupted forward, call cache.reset()."
            )
        self._check_new(key_states.shape[-2])
        if self.keys is None:
            self.is_initialized = False  # a forward that failed does not bind the next one
        if self.is_initialized and key_states.shape[0] != self.seen.shape[0]:
            raise LESSError(
                f"Layer {self.layer_idx}: expected a batch of {self.seen.shape[0]}, as in the turns before, "
                f"got {key_states.shape[0]}. Call cache.reset() for a new batch, or cache.batch_repeat_interleave()."
            )
        if not self.is_initialized:
            with torch.inference_mode(False):
                self.lazy_initialization(key_states, value_states)
        self._awaiting_attention = True
        return hook.tag(key_states, self), value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask covers the new tokens alone, at their logical offset."""
        self._check_new(query_length)
        return query_length, self.cumulative_length

    def checks(self, num_tokens: int) -> bool:
        """Whether this layer checks that `num_tokens` new ones follow what was seen; all layers of a cache see the same."""
        return self.leads

    def _check_new(self, num_tokens: int) -> None:
        if num_tokens == 0:
            raise LESSError(
                f"Layer {self.layer_idx}: expected new tokens, got none: the prompt is shorter than the "
                f"{self.cumulative_length} tokens that the cache has seen. Pass the whole conversation, or call cache.reset()."
            )

    def activate_past_recording(self) -> None:
        """Record from the next block on, so that `crop` can give tokens back; see `record_past` above."""
        self.record_past = True

    def get_seq_length(self) -> int:
        """Tokens seen, padding included, whatever is kept of them."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def offload(self) -> None:
        self._map_rows(lambda rows: rows.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map_rows(lambda rows: rows.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._recording = None
        self._map_rows(lambda rows: rows[indices.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._recording = None
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Give back the last `-tokens_to_remove` tokens, state and scores included; 0: they stay, and nothing older goes."""
        self.check_crop(tokens_to_remove)
        recording, self._recording = self._recording, None
        if tokens_to_remove < 0:
            with torch.inference_mode(False), torch.no_grad():
                self.__dict__.update(vars(recording.without_last(-tokens_to_remove)))

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise unless `crop` can do it."""
        if tokens_to_remove > 0:
            raise LESSError(f"crop: expected 0 or minus the number of tokens to remove, got {tokens_to_remove}.")
        recorded = self._recording.num_tokens if self._recording is not None else 0
        if -tokens_to_remove > recorded:
            raise LESSError(
                f"Layer {self.layer_idx}: crop({tokens_to_remove}) goes back further than the {recorded} tokens that are "
                "recorded: older ones are folded in. Call cache.activate_past_recording() before the tokens to crop, and "
                f"crop before {REACH} more have come."
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is kept of the sequences, by name; every tensor has the batch as its first dimension."""
        tensors = {name: getattr(self, name) for name in PER_ROW}
        if self.state is not None:
            tensors |= vars(self.state)
        return {name: rows for name, rows in tensors.items() if rows is not None}

    def held(self) -> dict[str, torch.Tensor]:
        """All that takes memory, by the same names; what is recorded for `crop` apart."""
        return self.tensors()

    def set_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `tensors` gave."""
        for name in PER_ROW:
            setattr(self, name, tensors.get(name))
        if self.state is not None:
            self.state = dataclasses.replace(self.state, **{name: tensors[name] for name in vars(self.state)})

    @torch.inference_mode(False)
    def _map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply `change` to every tensor."""
        self.set_tensors({name: change(rows) for name, rows in self.tensors().items()})

    @property
    def recorded_bytes(self) -> int:
        """Bytes held only for `crop`; 0 right after one."""
        return 0 if self._recording is None else self._recording.nbytes

    # What attention asks

    @torch.inference_mode(False)  # a cache filled under inference mode may go on outside of it
    @torch.no_grad()
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
        if not self._awaiting_attention:
            raise LESSError(
                f"Layer {self.layer_idx} ({type(module).__name__}): attention reads the same keys twice, as in a model whose "
                "layers share keys. Use a DynamicCache; to go on with this cache, call cache.reset()."
            )
        self._awaiting_attention = False
        self._check_call(module, dropout, kwargs)
        n = query_states.shape[2]
        if again := self._seen_again(kwargs.get("position_ids"), n):
            query_states, key_states, value_states = (s[:, :, again:] for s in (query_states, key_states, value_states))
            kwargs["position_ids"], attention_mask, n = kwargs["position_ids"][:, again:], None, n - again
        real = self._real_tokens(attention_mask, n)
        if self.checks(n) and self.keys is not None:
            self._check_continuation(real, kwargs.get("position_ids"))
        scaling = query_states.shape[-1] ** -0.5 if scaling is None else scaling
        softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
        output = None
        if self.keys is None and not self._attends_prompt(query_states, attention_mask):
            output, _ = original(
                module, query_states, key_states, value_states, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        if real is not None:  # what a model computes at padding may be NaN
            padding = ~real[:, None, :, None]
            query_states, key_states, value_states = (
                states.masked_fill(padding, 0) for states in (query_states, key_states, value_states)
            )
        states = query_states.detach(), key_states.detach(), value_states.detach()  # untagged: no cycle with the layer
        call = AttentionCall(*states, attention_mask, real, scaling, softcap, sinks)
        if self.record_past and self._recording is None:
            self._recording = Recording(self)
        attended = self.take_in(call)
        self._record(call)
        output = attended.transpose(1, 2).contiguous() if output is None else output
        return torch.nn.functional.pad(output, (0, 0, 0, 0, again, 0)) if again else output, None

    def take_in(self, call: AttentionCall) -> torch.Tensor | None:
        """Read the new tokens and take them in: attention output `[b, h, n, d]`, or None where the model's own gives it."""
        n = call.num_tokens
        with _no_autocast(call.query_states.device.type):  # scores and the state stay in float32
            if self.keys is None or (n > 1 and not self.record_past):
                output = self._block(call)
            elif n == 1:
                output = self._step(call)
            else:
                output = torch.cat([self._step(call.part(token, token + 1)) for token in range(n)], dim=2)
        self.cumulative_length += n
        return output

    def _attends_prompt(self, query_states: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
        """Whether the first block's output comes with the weights that the policy asks for. Elsewhere than in float32 on a
        processor, the model's own attention is so much faster that it is called as well.
        """
        n = query_states.shape[2]
        if attention_mask is not None or query_states.device.type != "cpu" or query_states.dtype != torch.float32:
            return False
        counts = self.policy.resolve(torch.tensor([n], device=query_states.device))  # [1, f]
        return self.policy.observed(counts.T[:, :, None, None], n) == n

    def _record(self, call: AttentionCall) -> None:
        """Record a call; where nobody crops, recording ends, so that memory stays constant."""
        if self._recording is not None:
            self._recording.append(call)
            self.record_past = self.record_past and self._recording.num_tokens - self._recording.calls[0].num_tokens < REACH
        if not self.record_past:
            self._recording = None

    def _check_call(self, module: torch.nn.Module, dropout: float, kwargs: dict) -> None:
        where = f"Layer {self.layer_idx} ({type(module).__name__})"
        if module.training:
            raise LESSError(f"{where}: the model is in training mode. A LESSCache is for inference: call model.eval().")
        if dropout:
            raise LESSError(f"{where}: expected no attention dropout, got {dropout}.")
        if kwargs.get("sliding_window") is not None:
            raise LESSError(
                f"{where}: expected full attention, got sliding_window {kwargs['sliding_window']}. Use a DynamicCache."
            )
        for name, argument in kwargs.items():
            if isinstance(argument, torch.Tensor) and name not in HARMLESS and name != "s_aux":
                raise LESSError(f"{where}: attention argument {name!r} is not supported. Use a DynamicCache.")

    def _real_tokens(self, attention_mask: torch.Tensor | None, n: int) -> torch.Tensor | None:
        """Which new tokens are not padding, `[b, n]`, read off the last query's row; None: all, where a look is for free."""
        if attention_mask is None:
            return None
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() not in (2, 4):
            raise LESSError(
                f"Layer {self.layer_idx}: expected a mask tensor of 2 or 4 dimensions, got {type(attention_mask).__name__}. "
                'Load the model with attn_implementation="sdpa" or "eager".'
            )
        if attention_mask.dim() == 4 and attention_mask.shape[1] != 1:
            raise LESSError(
                f"Layer {self.layer_idx}: expected one mask for all heads, got a mask of shape {list(attention_mask.shape)}."
            )
        last = attention_mask[:, -n:] if attention_mask.dim() == 2 else attention_mask[:, 0, -1, -n:]
        real = last if last.dtype == torch.bool else _additive_to_bool(last)
        if real.device.type in READ_AT_ONCE and not torch.compiler.is_compiling() and real.all():
            return None
        return real.expand(self.seen.shape[0], n)

    def _seen_again(self, position_ids: torch.Tensor | None, n: int) -> int:
        """How many of `n` new tokens were seen before: assisted decoding starts with the whole conversation, unsliced."""
        if not self.record_past or position_ids is None or not n > self.cumulative_length > 0:
            return 0
        if bool((position_ids[:, 0] >= self.seen).all()):
            return 0
        if position_ids.shape != (1, n) or not torch.equal(position_ids[0], torch.arange(n, device=position_ids.device)):
            raise LESSError(
                f"Layer {self.layer_idx}: expected the conversation to start with the {self.cumulative_length} tokens that "
                "the cache has seen, without padding: assisted decoding passes all of it again. Or call cache.reset()."
            )
        return self.cumulative_length

    def _check_continuation(self, real: torch.Tensor | None, position_ids: torch.Tensor | None) -> None:
        """Raise where `generate` was given a prompt shorter than what was seen: it slices such a prompt silently."""
        too_short = real is not None and not bool(real.any())
        if position_ids is not None and position_ids.dim() == 2:
            behind = position_ids[:, -1] < self.seen
            too_short = too_short or bool((behind if real is None else behind & real[:, -1]).any())
        if too_short:
            raise LESSError(
                f"Layer {self.layer_idx}: the new tokens lie before the {self.cumulative_length} tokens that the cache has "
                "seen: the prompt or its mask is shorter. Pass the whole conversation with its mask, or call cache.reset()."
            )

    def _step(self, call: AttentionCall) -> torch.Tensor:
        """One token: O(slots) work, in place. Returns `[b, h, 1, d]`."""
        fused = _fused(call)
        if fused is not None and fused.can(self, call) and (output := fused.step(self, call)) is not None:
            return output
        key_states, value_states, real = call.key_states, call.value_states, call.real
        b, g, _, _ = key_states.shape
        counts = self._counts()
        slot = self.positions.argmin(dim=-1, keepdim=True)  # [b, g, 1], an empty one
        arrival = self.seen.int().view(b, 1, 1).expand(b, g, 1)
        self.positions.scatter_(-1, slot, arrival)
        self.scores.scatter_(-1, slot, self.policy.arrival(arrival))
        _write(self.keys, slot, key_states)
        _write(self.values, slot, value_states)

        observes = self.policy.observed(counts, 1) > 0
        attended = call.query_states, self.keys, self.values, (self.positions >= 0).unsqueeze(2), call.scaling
        if observes or any(each is not None for each in (self.state, call.softcap, call.sinks)):
            virtual = self._virtual_tokens(call.query_states, call)
            output, weights = less_attention(*attended, call.softcap, call.sinks, virtual)
        else:  # nothing but the output is needed
            output = kept_attention(*attended)
        if real is not None:  # padding leaves no trace
            self.positions.scatter_(-1, slot, arrival.masked_fill(~real.unsqueeze(-1), -1))
        if observes:
            query_positions = self.seen.unsqueeze(-1)  # [b, 1]
            if real is not None:
                weights = weights * real[:, None, None, :, None]
                query_positions = query_positions.masked_fill(~real, -1)
            self.scores.copy_(self.policy.observe(self.scores, weights, query_positions))
        arrived = True if real is None else real.squeeze(-1)
        self._settle(arrived)
        self.seen += arrived
        if self.state is not None:
            self.kernels.pass_time(self.state, arrived)
        self._evict(counts)
        return output

    def _evict(self, counts: torch.Tensor) -> None:
        """Bring every head back to its capacity after a step, and fold in what leaves."""
        seen = self.seen.view(-1, 1, 1)
        capacity = self.policy.capacity(counts)
        if capacity is not None:  # at most one token a head is over
            victim = self.policy.victim(self.scores, self.positions, seen, counts)  # [b, g, 1]
            leaves = (self.positions >= 0).sum(dim=-1, keepdim=True) > capacity
            victim_positions = self.positions.gather(-1, victim)
            self._fold_in(victim, leaves, victim_positions, seen)
            self.positions.scatter_(-1, victim, victim_positions.masked_fill(leaves, -1))
            return
        leaves = (self.positions >= 0) & ~self.policy.keep(self.scores, self.positions, seen, counts)  # [b, g, c]
        if most := int(leaves.sum(dim=-1).max()):
            victims = leaves.int().argsort(dim=-1, descending=True, stable=True)[..., :most]
            self._fold_in(victims, leaves.gather(-1, victims), self.positions.gather(-1, victims), seen)
            self.positions.masked_fill_(leaves, -1)
        held = int((self.positions >= 0).sum(dim=-1).max())
        slots = self.positions.shape[-1]
        if held == slots or slots > 2 * (held + SPARE_SLOTS):  # no slot for the next token, or mostly empty
            self._store(self.keys, self.values, self.positions, self.scores, held + SPARE_SLOTS)

    def _fold_in(self, slots: torch.Tensor, leaves: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor) -> None:
        """Add the pairs in `slots` `[b, g, m]`, of these `positions`, to the state where `leaves` `[b, g, m]`."""
        if self.state is None:
            return
        index = slots.unsqueeze(-1)
        keys = self.keys.gather(2, index.expand(*slots.shape, self.keys.shape[-1]))
        values = self.values.gather(2, index.expand(*slots.shape, self.values.shape[-1]))
        self.kernels.fold_in(self.state, keys, values, leaves, positions, seen)

    def _virtual_tokens(
        self, query_states: torch.Tensor, call: AttentionCall, later: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The state as columns for some of the call's queries, `later` tokens after it, `[b, n]`."""
        if self.state is None:
            return None
        return self.kernels.virtual_tokens(self.state, query_states, call.scaling, call.softcap, later)

    def _block(self, call: AttentionCall) -> torch.Tensor | None:
        """Several tokens: causal attention to the kept, the state and themselves, then one selection.

        Returns `[b, h, n, d]`, or None for a first block whose output the model's own attention gives.
        """
        query_states, key_states, value_states, real = call.query_states, call.key_states, call.value_states, call.real
        scaling, softcap, sinks = call.scaling, call.softcap, call.sinks
        b, g, n, _ = key_states.shape
        is_first = self.keys is None
        tokens = torch.ones(b, n, dtype=torch.bool, device=key_states.device) if real is None else real
        # [b, n]: the new tokens count on from the row's last real one
        new_positions = (self.seen.unsqueeze(-1) + tokens.cumsum(-1) - 1).masked_fill(~tokens, -1).int()
        self._settle(tokens.sum(-1) == 1)
        seen = self.seen + tokens.sum(-1)
        resolved = self.policy.resolve(seen)
        self.counts = resolved if is_first else torch.where(self.settled.unsqueeze(-1), self.counts, resolved)
        counts = self._counts()

        positions = new_positions.unsqueeze(1).expand(b, g, n)
        keys, values, scores = key_states, value_states, self.policy.arrival(positions)
        if not is_first:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
            scores = torch.cat([self.scores, scores], dim=-1)
            positions = torch.cat([self.positions, positions], dim=-1)

        observed = self.policy.observed(counts, n)
        if real is not None and not bool(real[:, n - observed :].all()):
            observed = n  # the last real queries of a row may come before padding
        outputs: list[torch.Tensor] = []
        first = n - observed if is_first else 0  # of the queries to go through
        if first < n and is_first and call.attention_mask is None:
            attends = self._attends_prompt(query_states, None)
            scores, output = read_first_block(self.policy, call, scores, new_positions, first, attends)
            outputs, first = [output] if output is not None else [], n
        for start in range(first, n, QUERY_BLOCK):
            rows = slice(start, min(start + QUERY_BLOCK, n))
            visible = self._visible(call.attention_mask, tokens, rows, g)  # [b, g, rows, c up to what the last row may see]
            seen_columns = slice(0, visible.shape[-1])
            queries, row_keys = query_states[:, :, rows], keys[:, :, seen_columns]
            if is_first:
                weights, _ = sparse_softmax(attention_logits(queries, row_keys, visible, scaling, softcap), sinks)
            else:
                later = (new_positions[:, rows] - self.seen.unsqueeze(-1)).clamp_min(0)
                row_values, virtual = values[:, :, seen_columns], self._virtual_tokens(queries, call, later)
                output, weights = less_attention(queries, row_keys, row_values, visible, scaling, softcap, sinks, virtual)
                outputs.append(output)
            late = max(n - observed - start, 0)  # rows of this block that the policy does not ask for
            if late < queries.shape[2]:
                weights = weights[:, :, :, late:]
                if real is not None:
                    weights = weights * real[:, None, None, rows, None][:, :, :, late:]
                scores[..., seen_columns] = self.policy.observe(
                    scores[..., seen_columns], weights, new_positions[:, rows][:, late:]
                )

        self.seen = seen
        keep = self.policy.keep(scores, positions, seen.view(b, 1, 1), counts)
        if self.state is not None:
            leaves = (positions >= 0) & ~keep
            self.kernels.pass_time(self.state, tokens.sum(-1))
            self.kernels.fold_in(self.state, keys, values, leaves, positions, seen.view(b, 1, 1))
        capacity = self.policy.capacity(counts)
        held = int(keep.sum(dim=-1).max())
        slots = held + SPARE_SLOTS if capacity is None else int(capacity.max()) + 1
        self._store(keys, values, positions.masked_fill(~keep, -1), scores, slots)
        return torch.cat(outputs, dim=2) if outputs else None

    def _visible(self, attention_mask: torch.Tensor | None, real: torch.Tensor, rows: slice, g: int) -> torch.Tensor:
        """Which columns the queries `rows` see, `[b, g, rows, c]`; each sees itself.

        The columns are the slots, then the new tokens: up to the last row's without a 4D mask, all of them with one.
        """
        b, n = real.shape
        if attention_mask is None or attention_mask.dim() == 2:
            new = torch.arange(rows.stop, device=real.device)
            visible = (new <= new[rows, None]) & real[:, None, None, : rows.stop]  # [b, 1, rows, rows.stop]
        else:
            new = torch.arange(n, device=real.device)
            visible = attention_mask[:, :, -n:, -n:][:, :, rows]
            visible = visible if visible.dtype == torch.bool else _additive_to_bool(visible)
        visible = (visible | (new == new[rows, None])).expand(b, g, -1, -1)
        if self.positions is None:
            return visible
        kept = (self.positions >= 0).unsqueeze(2).expand(-1, -1, visible.shape[2], -1)
        return torch.cat([kept, visible], dim=-1)

    def _store(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, scores: torch.Tensor, slots: int
    ) -> None:
        """Copy the columns of `positions >= 0` into fresh buffers of `slots` slots; nothing else stays referenced."""
        b, g, c = positions.shape
        held = min(c, slots)
        order = (positions < 0).int().argsort(dim=-1, stable=True)[..., :held]  # [b, g, held], held ones first

        def compact(columns: torch.Tensor, fill: int) -> torch.Tensor:
            buffer = columns.new_full((b, g, slots, *columns.shape[3:]), fill)
            index = order.view(b, g, held, *[1] * (columns.dim() - 3)).expand(b, g, held, *columns.shape[3:])
            buffer[:, :, :held] = columns.gather(2, index)
            return buffer

        self.keys, self.values = compact(keys, 0), compact(values, 0)
        self.positions, self.scores = compact(positions, -1), compact(scores, 0)

    def _settle(self, alone: torch.Tensor | bool) -> None:
        """End the prompt of the rows that get one token `alone`, bool `[b]` or for all, after their first block."""
        self.settled |= (self.seen > 0) & alone

    def _counts(self) -> torch.Tensor:
        """The policy's token counts in the form that its methods take, `[f, b, 1, 1]`."""
        return self.counts.T[:, :, None, None]


def _write(columns: torch.Tensor, slot: torch.Tensor, states: torch.Tensor) -> None:
    """Put the states `[b, g, 1, d]` of one token into the columns `[b, g, c, d]` at `slot` `[b, g, 1]`, in place.

    A compiler turns `scatter_` into a copy of all columns, but not `index_copy_`, which takes more operations uncompiled.
    """
    if COMPILES_WELL and torch.compiler.is_compiling():
        b, g, c, d = columns.shape
        first = torch.arange(0, b * g * c, c, device=slot.device)  # of each head's columns among all
        columns.view(-1, d).index_copy_(0, first + slot.flatten(), states.reshape(-1, d))
    else:
        columns.scatter_(2, slot.unsqueeze(-1).expand_as(states), states)


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    if not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()  # turning it off takes a while even where it is off
    return torch.autocast(device_type, enabled=False)


def read_first_block(
    policy: EvictionPolicy, call: AttentionCall, scores: torch.Tensor, positions: torch.Tensor, start: int, attends: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`read_prompt`, in the fused form where there is one."""
    fused = _fused(call)
    if fused is not None and fused.can_read(policy, call):
        return fused.read_prompt(call, scores, start, attends)
    return read_prompt(policy, call, scores, positions, start, attends)


def _fused(call: AttentionCall) -> Any:
    """The module of the fused step for the call's device, or None. torch.compile fuses the step in its own way."""
    if torch.compiler.is_compiling() or call.query_states.device.type not in FUSED:
        return None
    return _module(FUSED[call.query_states.device.type])


@functools.cache
def _module(name: str) -> Any:
    """The module of this name, imported at its first use; None where what it needs is not installed, as triton."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _additive_to_bool(mask: torch.Tensor) -> torch.Tensor:
    """True where an additive mask lets a column be seen, or a 0/1 mask says it is real."""
    if not mask.dtype.is_floating_point:
        return mask.bool()
    return mask > torch.finfo(mask.dtype).min / 2
