"""The whole life of a cache, in any order: each forward against a cache that was fed the same blocks and nothing else.

Under a budget above the text's length that is a DynamicCache, under a small one another LESSCache.
"""

import copy
import dataclasses
import io
import os
import pickle
import tempfile
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_interruption import StopAt, Stopped
from tiny import VOCAB, tiny_kernels, tiny_llama
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.models.falcon.modeling_falcon import FalconAttention

from less_cache import CORM, H2O, LESSCache, LESSError, LESSKernels, SinkRecent
from less_cache.integration import hook

MODEL, OTHER = tiny_llama(), tiny_llama(seed=1)
HALF = copy.deepcopy(MODEL).bfloat16()
KERNELS = {
    "none": None,
    "low_rank": tiny_kernels(MODEL),
    "soft_centroids": tiny_kernels(MODEL, memory="soft_centroids"),
    "untrained": LESSKernels.untrained(MODEL),
}
LARGE = [H2O(500, 500), SinkRecent(2, 500), CORM(500, 500)]
SMALL = [H2O(3, 4), H2O(0.3, 0.2), SinkRecent(2, 4), CORM(3, 4)]
LONGEST, OF_PROMPT = 60, 6

SEEDS = st.integers(0, 2**16)
LENGTHS = st.integers(1, 9)


@dataclasses.dataclass
class Block:
    """Tokens of one forward, and what it shows of all tokens so far."""

    tokens: torch.Tensor  # [b, n]
    mask: torch.Tensor  # [b, t + n] bool, of those seen and these
    split: int | None = None  # tokens from here on do not see those of this block before it, as two packed documents

    @property
    def real(self) -> torch.Tensor:
        return self.mask[:, -self.tokens.shape[1] :]

    def rows(self, indices: torch.Tensor) -> "Block":
        return Block(self.tokens[indices], self.mask[indices], self.split)

    def part(self, start: int, stop: int) -> "Block":
        before = self.mask.shape[1] - self.tokens.shape[1]
        return Block(self.tokens[:, start:stop], self.mask[:, : before + stop], self.split)

    def attention_mask(self) -> torch.Tensor:
        if self.split is None:
            return self.mask.long()
        n = self.tokens.shape[1]
        visible = torch.ones(n, n, dtype=torch.bool).tril()
        visible[self.split :, : self.split] = False
        new = visible & self.real[:, None, None, :]
        return torch.cat([self.mask[:, None, None, :-n].expand(-1, 1, n, -1), new], dim=-1)  # [b, 1, n, t + n]


@torch.no_grad()
def read(cache, block: Block, model=MODEL) -> torch.Tensor:
    positions = (block.mask.long().cumsum(-1) - 1).clamp_min(0)[:, -block.tokens.shape[1] :]
    options = {"attention_mask": block.attention_mask(), "position_ids": positions}
    return model(block.tokens, past_key_values=cache, **options).logits


def as_in_a_new_process() -> None:
    """No cache was made yet: attention is transformers' own."""
    if hook._installed:
        AttentionInterface.get_interface = AttentionInterface.get_interface.__wrapped__
        AttentionMaskInterface.__getitem__ = AttentionMaskInterface.__getitem__.__wrapped__
        FalconAttention.forward = FalconAttention.forward.__wrapped__
        hook._installed = False


class Life(RuleBasedStateMachine):
    """A cache, and the blocks that lead to it."""

    policies: list

    def __init__(self):
        super().__init__()
        self.patched = mock.patch("less_cache.cache.recording.OF_PROMPT", OF_PROMPT)
        self.patched.start()

    def teardown(self):
        self.patched.stop()

    @initialize(data=st.data(), memory=st.sampled_from(list(KERNELS)), b=st.integers(1, 3))
    def begin(self, data, memory, b):
        self.policy, self.kernels, self.b = data.draw(st.sampled_from(self.policies)), KERNELS[memory], b
        self.cache = LESSCache(MODEL, self.policy, self.kernels)
        self.forget()

    def forget(self):
        self.history: list[Block] = []
        self.mask = torch.ones(self.b, 0, dtype=torch.bool)  # of all tokens seen
        self.plain = None  # a cache that was fed the history; None: there is none now
        self.is_owned = True  # a cache of another process belongs to whom reads it first

    # What is right

    @property
    def is_large(self) -> bool:
        return self.policies is LARGE

    @property
    def records(self) -> bool:
        return self.cache.layers[0].record_past

    @property
    def recorded(self) -> int:
        recording = self.cache.layers[0]._recording
        return 0 if recording is None else recording.num_tokens

    def fed(self):
        cache = DynamicCache(config=MODEL.config) if self.is_large else LESSCache(MODEL, self.policy, self.kernels)
        for block in self.history:
            read(cache, block)
        return cache

    def parts(self, block: Block) -> list[Block]:
        """The blocks that the cache takes a block for."""
        n = block.tokens.shape[1]
        if self.is_large or not self.records:
            return [block]
        if self.history:
            return [block.part(token, token + 1) for token in range(n)]
        before = n - OF_PROMPT
        return [block.part(0, before), block.part(before, n)] if before > 0 and block.split is None else [block]

    def expect(self, parts: list[Block], block: Block) -> torch.Tensor:
        """The right logits of a block, which becomes part of the history. A first block has full attention."""
        self.plain = self.fed() if self.plain is None else self.plain
        expected = torch.cat([read(self.plain, part) for part in parts], dim=1)
        if not self.history:
            expected = read(DynamicCache(config=MODEL.config), block)
        self.history += parts
        self.mask, self.is_owned = block.mask, True
        return expected

    def check(self, logits: torch.Tensor, parts: list[Block], block: Block):
        expected = self.expect(parts, block)
        torch.testing.assert_close(logits[block.real], expected[block.real], rtol=1e-3, atol=1e-4)

    # What comes

    def block(self, n: int, seed: int, padded: bool = False, hides: int = 0, split: bool = False) -> Block:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, VOCAB, (self.b, n), generator=generator)
        mask, new = self.mask.clone(), torch.ones(self.b, n, dtype=torch.bool)
        if padded:
            starts = torch.randint(0, n, (self.b, 1), generator=generator)
            starts[0] = 0
            new = torch.arange(n) >= starts
        for _ in range(hides):
            row, column = (int(torch.randint(0, size, (), generator=generator)) for size in (self.b, max(mask.shape[1], 1)))
            if mask.shape[1] and mask[row].sum() > 2:
                mask[row, column] = False
        at = int(torch.randint(1, n, (), generator=generator)) if split and n > 1 and not hides and bool(new.all()) else None
        return Block(tokens, torch.cat([mask, new], dim=1), at)

    def has_room(self) -> bool:
        return self.mask.shape[1] < LONGEST

    @precondition(has_room)
    @rule(n=LENGTHS, seed=SEEDS, padded=st.booleans(), hides=st.sampled_from([0, 0, 1, 3]), split=st.booleans())
    def a_block(self, n, seed, padded, hides, split):
        block = self.block(n, seed, padded, hides, split)
        if self.history and self.records and block.split is not None:
            with pytest.raises(LESSError, match="expected a causal mask while tokens are recorded"):
                read(self.cache, block)
            return
        parts = self.parts(block)
        self.check(read(self.cache, block), parts, block)

    @precondition(lambda self: not self.mask.any() and self.has_room())
    @rule(n=LENGTHS, seed=SEEDS)
    def two_chunks_of_padding(self, n, seed):
        """As a prompt begins that is padded to more than a chunk."""
        for _ in range(2):
            block = self.block(n, seed)
            block.mask[:, -n:] = False
            parts = self.parts(block)
            self.check(read(self.cache, block), parts, block)

    @precondition(has_room)
    @rule(n=st.integers(1, 5), seed=SEEDS)
    def steps(self, n, seed):
        for step in range(n):
            block = self.block(1, seed + step)
            parts = self.parts(block)
            self.check(read(self.cache, block), parts, block)

    @precondition(has_room)
    @rule(n=LENGTHS, seed=SEEDS)
    def a_block_under_another_default_type(self, n, seed):
        block = self.block(n, seed)
        parts = self.parts(block)
        torch.set_default_dtype(torch.bfloat16)
        try:
            logits = read(self.cache, block)
        finally:
            torch.set_default_dtype(torch.float32)
        self.check(logits, parts, block)

    @precondition(lambda self: self.history)
    @rule(seed=SEEDS, what=st.sampled_from(["reorder", "select", "repeat"]))
    def other_rows(self, seed, what):
        generator = torch.Generator().manual_seed(seed)
        if what == "repeat" and self.b == 1:
            rows = torch.arange(self.b).repeat_interleave(2)
            self.cache.batch_repeat_interleave(2)
        elif what == "reorder":
            rows = torch.randint(0, self.b, (self.b,), generator=generator)
            self.cache.reorder_cache(rows)
        else:
            rows = torch.randperm(self.b, generator=generator)[: int(torch.randint(1, self.b + 1, (), generator=generator))]
            self.cache.batch_select_indices(rows.tolist())
        self.b, self.mask, self.plain = len(rows), self.mask[rows], None
        self.history = [block.rows(rows) for block in self.history]

    @rule(what=st.sampled_from(["fork", "deepcopy", "pickle", "torch", "file"]), seed=SEEDS)
    def a_copy(self, what, seed):
        before = self.cache
        self.is_owned = self.is_owned and what not in ("pickle", "torch")
        if what == "fork":
            self.cache = before.fork()
        elif what == "deepcopy":
            self.cache = copy.deepcopy(before)
        elif what == "pickle":
            data = pickle.dumps(before)
            as_in_a_new_process()
            self.cache = pickle.loads(data)
        elif what == "torch":
            file = io.BytesIO()
            torch.save(before, file)
            as_in_a_new_process()
            self.cache = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        elif self.history:
            with tempfile.TemporaryDirectory() as folder:
                before.save(os.path.join(folder, "cache"))
                self.cache = LESSCache.load(os.path.join(folder, "cache"), MODEL, self.kernels)
        if before is not self.cache and seed % 2 and what in ("fork", "deepcopy", "file"):
            read(before, self.block(3, seed))  # goes its own way

    @rule()
    def record(self):
        self.cache.activate_past_recording()

    @precondition(lambda self: self.history)
    @rule(tokens=st.integers(0, 7))
    def crop(self, tokens):
        if tokens > self.recorded:
            with pytest.raises(LESSError, match="goes back further than"):
                self.cache.crop(-tokens)
            return
        self.cache.crop(-tokens)
        self.mask = self.mask[:, : self.mask.shape[1] - tokens]
        while tokens:
            last = self.history.pop()
            n = last.tokens.shape[1]
            if n > tokens:
                self.history.append(last.part(0, n - tokens))
            tokens -= min(n, tokens)
            self.plain = None

    @rule()
    def reset(self):
        self.cache.reset()
        self.forget()

    # What is refused, or ends early

    @precondition(lambda self: self.history)
    @rule(n=LENGTHS, seed=SEEDS, what=st.sampled_from(["autocast", "type", "model", "training", "batch", "none"]))
    def a_wrong_forward(self, n, seed, what):
        block = self.block(n, seed, hides=seed % 3)
        if what == "model" and not self.is_owned:
            return
        if what == "batch":
            block = block.rows(torch.arange(self.b + 1) % self.b)
        if what == "none":
            block = block.part(0, 0)
        model = {"type": HALF, "model": OTHER}.get(what, MODEL)
        model.train(what == "training")
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"), pytest.raises(LESSError):
                read(self.cache, block, model)
        finally:
            model.eval()

    @precondition(has_room)
    @rule(n=LENGTHS, seed=SEEDS, at=st.integers(0, 300), hides=st.sampled_from([0, 2]))
    def a_forward_that_is_stopped(self, n, seed, at, hides):
        """The next use is exact, or says that the cache must be reset."""
        block, seen = self.block(n, seed, hides=hides), self.mask.shape[1]
        parts = self.parts(block)
        try:
            with StopAt(at):
                logits = read(self.cache, block)
        except Stopped:
            logits = None
        if logits is not None:
            self.check(logits, parts, block)
            return
        if self.cache.get_seq_length() > seen:
            self.expect(parts, block)
        after = self.block(2, seed)
        try:
            logits = read(self.cache.fork(), after)
        except LESSError as error:
            assert "cache.reset()" in str(error)
            self.reset()
            return
        expected = self.fed() if self.history else DynamicCache(config=MODEL.config)
        if self.records and self.history and not self.is_large:
            wanted = torch.cat([read(expected, after.part(token, token + 1)) for token in range(2)], dim=1)
        else:
            wanted = read(expected, after)
        torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-4)

    @invariant()
    def all_is_counted(self):
        if hasattr(self, "history") and self.history:
            assert self.cache.get_seq_length() == self.mask.shape[1]
            for layer in self.cache.layers:
                assert layer.positions.max() < self.mask.shape[1]
                if self.is_large:
                    assert layer.seen.tolist() == self.mask.sum(-1).tolist()
                    assert (layer.positions >= 0).sum(-1).tolist() == self.mask.sum(-1, keepdim=True).expand(-1, 2).tolist()


class LargeBudget(Life):
    policies = LARGE


class SmallBudget(Life):
    policies = SMALL


lives = settings(
    max_examples=40,
    stateful_step_count=14,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # shrinking a life takes minutes; its steps are printed as they are
    suppress_health_check=list(HealthCheck),
)
TestLargeBudget, TestSmallBudget = LargeBudget.TestCase, SmallBudget.TestCase
TestLargeBudget.settings = TestSmallBudget.settings = lives
