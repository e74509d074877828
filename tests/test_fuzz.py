"""The whole life of a cache, in any order: each forward against a cache that was fed the same blocks and nothing else.

Under a budget above the text's length that is a DynamicCache, under a small one another LESSCache, each row alone, and the
O(T²) reference where it knows the kind of cache. `HYPOTHESIS_PROFILE=dev` lives more lives, each time others.

Put back one at a time, six faults were found within 40 lives, by one kind of budget at least: unpickling without the hook,
ignored masks over seen tokens, padding told by what the last query sees, a first chunk of padding alone that is refused, the
untrained state under torch's default dtype, and no look at whether the forward before came to its end.
"""

import contextlib
import copy
import dataclasses
import io
import os
import pickle
import tempfile
from unittest import mock

import pytest
import tiny
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_interruption import StopAt, Stopped
from tiny import VOCAB, tiny_kernels, tiny_llama
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.models.falcon.modeling_falcon import FalconAttention

from less_cache import CORM, H2O, AttentionMatching, LESSCache, LESSError, LESSKernels, SinkRecent
from less_cache.cache.layer import LESSLayer
from less_cache.integration import hook
from less_cache.memory.centroids import CentroidState
from less_cache.testing.reference import reference_attention

MODEL, OTHER = tiny_llama(), tiny_llama(seed=1)
HALF = copy.deepcopy(MODEL).bfloat16()
KERNELS = {
    "none": None,
    "low_rank": tiny_kernels(MODEL),
    "soft_centroids": tiny_kernels(MODEL, memory="soft_centroids"),
    "untrained": LESSKernels.untrained(MODEL),
}
LARGE = [
    {"policy": H2O(500, 500)},
    {"policy": SinkRecent(2, 500)},
    {"policy": CORM(500, 500)},
    {"policy": AttentionMatching(500, every=5)},
    {"policy": AttentionMatching(500, every=5), "heads": "adaptive"},
]
SMALL = [
    {"policy": H2O(3, 4)},
    {"policy": H2O(0.3, 0.2)},
    {"policy": SinkRecent(2, 4)},
    {"policy": CORM(3, 4)},
]
FITTED = [
    {"policy": AttentionMatching(7, every=4), "fit": False},
    {"policy": AttentionMatching(7, every=4)},
    {"policy": AttentionMatching(0.4, every=5), "heads": "adaptive", "slots": "int4"},
    {"policy": AttentionMatching(9, every=3), "heads": "adaptive", "slots": "int8"},
    {"policy": H2O(3, 4), "heads": "adaptive", "fit": True},
]
SPECIAL = [{"padded": True}, {"hides": 1}, {"hides": 3, "padded": True}, {"split": True}]  # kinds of blocks
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LONGEST, OF_PROMPT = 80, 6
FEW = {  # so that a dozen tokens are many
    "less_cache.cache.recording.OF_PROMPT": OF_PROMPT,
    "less_cache.slots.asked.PLACES": 2,
    "less_cache.slots.asked.STRIDE": 3,
    "less_cache.fitting.references.MOST": 5,
}

SEEDS = st.integers(0, 2**16)
LENGTHS = st.integers(1, 9)


@dataclasses.dataclass
class Block:
    """Tokens of one forward, and what it shows of all tokens so far."""

    tokens: torch.Tensor  # [b, n]
    mask: torch.Tensor  # [b, t + n] bool, of those seen and these
    split: int | None = None  # tokens from here on do not see those of this block before it, as two packed documents
    waits: bool = False  # it came while tokens were recorded, when adaptive heads get no budgets of their own

    @property
    def real(self) -> torch.Tensor:
        return self.mask[:, -self.tokens.shape[1] :]

    def rows(self, indices: torch.Tensor) -> "Block":
        return dataclasses.replace(self, tokens=self.tokens[indices], mask=self.mask[indices])

    def part(self, start: int, stop: int) -> "Block":
        before = self.mask.shape[1] - self.tokens.shape[1]
        return dataclasses.replace(self, tokens=self.tokens[:, start:stop], mask=self.mask[:, : before + stop])

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


def feed(cache, block: Block) -> torch.Tensor:
    """`read`, as the tokens came to another cache."""
    for layer in cache.layers:
        layer.record_past = block.waits
    try:
        return read(cache, block)
    finally:
        for layer in cache.layers:
            layer.record_past, layer._recording = False, None


@contextlib.contextmanager
def default_type(dtype: torch.dtype):
    """torch's default dtype within, as it was afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def as_in_a_new_process() -> None:
    """No cache was made yet: attention is transformers' own."""
    if hook._installed:
        AttentionInterface.get_interface = AttentionInterface.get_interface.__wrapped__
        AttentionMaskInterface.__getitem__ = AttentionMaskInterface.__getitem__.__wrapped__
        FalconAttention.forward = FalconAttention.forward.__wrapped__
        hook._installed = False


class Life(RuleBasedStateMachine):
    """A cache, and the blocks that lead to it."""

    kinds: list[dict]

    def __init__(self):
        super().__init__()
        self.patched = contextlib.ExitStack()
        for name, number in FEW.items():
            self.patched.enter_context(mock.patch(name, number))
        self.patched.enter_context(default_type(torch.float32))

    def teardown(self):
        self.patched.close()

    @initialize(
        data=st.data(),
        memory=st.sampled_from([*KERNELS, "untrained", "untrained"]),
        b=st.integers(1, 3),
        dtype=st.sampled_from(TYPES[1:]),
        n=st.integers(0, 24),
        seed=SEEDS,
    )
    def begin(self, data, memory, b, dtype, n, seed):
        """A cache, and for most a prompt."""
        torch.set_default_dtype(dtype)
        self.options, self.b = {**data.draw(st.sampled_from(self.kinds)), "kernels": KERNELS[memory]}, b
        self.cache = self.new_cache()
        self.forget()
        if n:
            block = self.block(n, seed, padded=bool(seed % 2))
            self.check(read(self.cache, block), [block], block)

    def new_cache(self) -> LESSCache:
        return LESSCache(MODEL, **self.options)

    def forget(self):
        self.history: list[Block] = []
        self.mask = torch.ones(self.b, 0, dtype=torch.bool)  # of all tokens seen
        self.plain = None  # a cache that was fed the history; None: there is none now
        self.is_owned = True  # a cache of another process belongs to whom reads it first
        self.has_hidden = False  # a mask has hidden tokens that were seen

    # What is right

    @property
    def is_large(self) -> bool:
        return self.kinds is LARGE

    @property
    def records(self) -> bool:
        return self.cache.layers[0].record_past

    @property
    def recorded(self) -> int:
        recording = self.cache.layers[0]._recording
        return 0 if recording is None else recording.num_tokens

    @default_type(torch.float32)
    def fed(self):
        cache = DynamicCache(config=MODEL.config) if self.is_large else self.new_cache()
        for block in self.history:
            feed(cache, block)
        return cache

    def parts(self, block: Block) -> list[Block]:
        """The blocks that the cache takes a block for."""
        n = block.tokens.shape[1]
        if self.is_large or not self.records:
            return [block]
        if self.options.get("heads") == "adaptive":
            block = dataclasses.replace(block, waits=True)
        if self.history:
            return [block.part(token, token + 1) for token in range(n)]
        before = 0 if self.options.get("heads") == "adaptive" else n - OF_PROMPT
        return [block.part(0, before), block.part(before, n)] if before > 0 and block.split is None else [block]

    @default_type(torch.float32)
    def expect(self, parts: list[Block], block: Block) -> torch.Tensor:
        """The right logits of a block, which becomes part of the history. A first block has full attention."""
        self.has_hidden |= bool((self.mask & ~block.mask[:, : self.mask.shape[1]]).any())
        self.plain = self.fed() if self.plain is None else self.plain
        expected = torch.cat([feed(self.plain, part) for part in parts], dim=1)
        if not self.history:
            expected = read(DynamicCache(config=MODEL.config), block)
        self.history += parts
        self.mask, self.is_owned = block.mask, True
        return expected

    def check(self, logits: torch.Tensor, parts: list[Block], block: Block):
        expected = self.expect(parts, block)
        self.assert_close(logits[block.real], expected[block.real])

    def assert_close(self, logits: torch.Tensor, expected: torch.Tensor):
        """Up to rounding, which other rows change, and of which a fit makes more."""
        close = {"rtol": 1e-2, "atol": 1e-2} if self.cache.options.fit and not self.is_large else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(logits, expected, **close)

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
    @rule(n=LENGTHS, seed=SEEDS, kind=st.sampled_from([{}, *SPECIAL]))
    def a_block(self, n, seed, kind):
        block = self.block(n, seed, **kind)
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

    @rule(dtype=st.sampled_from(TYPES))
    def another_default_type(self, dtype):
        """From now on; what is right is computed under float32."""
        torch.set_default_dtype(dtype)

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
                self.cache = LESSCache.load(os.path.join(folder, "cache"), MODEL, self.options["kernels"])
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
        parts = self.parts(after) if self.history else [after]
        with default_type(torch.float32):
            wanted = torch.cat([feed(expected, part) for part in parts], dim=1)
        self.assert_close(logits, wanted)

    @precondition(lambda self: self.history and not self.is_large)
    @rule(n=LENGTHS, seed=SEEDS)
    @default_type(torch.float32)
    def rows_alone(self, n, seed):
        """Each as in a cache of its own; one that was padding alone for a block would be taken for a shorter prompt there."""
        block = self.block(n, seed)
        parts = self.parts(block)
        logits = read(self.cache.fork(), block)
        for row in torch.arange(self.b).split(1):
            if not all(each.real[row].any() for each in self.history):
                continue
            alone = self.new_cache()
            for each in (*self.history, *parts):
                own = feed(alone, each.rows(row))
            self.assert_close(logits[row, -own.shape[1] :], own)

    def the_formula_takes_it(self) -> bool:
        """The oracle knows padding anywhere and trained memories, but nothing that is fitted, shared out or stored in codes."""
        is_plain = not self.cache.options.fit and self.options.keys() <= {"policy", "kernels", "fit"}
        trained = self.cache.kernels is None or self.cache.kernels.is_trained
        return is_plain and trained and not self.has_hidden and all(block.split is None for block in self.history)

    @precondition(lambda self: self.history and not self.is_large and self.the_formula_takes_it())
    @rule()
    @default_type(torch.float32)
    def every_layer_is_the_formula(self):
        """The same blocks again, of which every layer gives what the O(T²) reference does, and holds the same as this cache."""
        blocks = [block.tokens.shape[1] for block in self.history]
        for index, (layer, calls) in enumerate(self.attended()):
            *states, output = (torch.cat(each, dim=2) for each in zip(*calls, strict=True))
            options = {"rotation": layer.setup.rotation}
            expected, kept = reference_attention(*states, layer.setup.policy, blocks, layer.setup.memory, self.mask, **options)
            attended = self.mask[:, None, :, None].expand_as(output)
            torch.testing.assert_close(output[attended], expected[attended].float(), rtol=1e-3, atol=1e-4)
            assert torch.equal(tiny.held_tokens(self.cache.layers[index], self.mask), kept[-1])

    def attended(self) -> list[tuple[LESSLayer, list[tuple[torch.Tensor, ...]]]]:
        """Every layer of a cache that was fed the history, with the queries, keys, values and outputs of each block."""
        calls: dict[int, list] = {}
        attend = LESSLayer.attend

        def recorded(layer, original, module, *states_and_mask, **attention):
            output, weights = attend(layer, original, module, *states_and_mask, **attention)
            calls.setdefault(layer.layer_idx, []).append((*states_and_mask[:3], output.transpose(1, 2)))
            return output, weights

        with mock.patch.object(LESSLayer, "attend", recorded):
            layers = self.fed().layers
        return [(layer, calls[index]) for index, layer in enumerate(layers)]

    @invariant()
    def all_is_counted(self):
        if not getattr(self, "history", None):
            return
        assert self.cache.get_seq_length() == self.mask.shape[1]
        seen = self.mask.sum(-1)  # [b]
        for layer in self.cache.layers:
            assert layer.seen.tolist() == seen.tolist()
            assert all(each.isfinite().all() for each in layer.tensors().values())
            for row, heads in zip(seen.tolist(), tiny.held_positions(layer), strict=True):
                for head in heads:
                    assert len(set(head)) == len(head) and set(head) <= set(range(row))
            kept = (layer.positions >= 0).sum(-1)  # [b, g]
            if self.is_large:
                assert (kept == seen.unsqueeze(-1)).all()
            elif isinstance(layer.state, CentroidState):
                folded = layer.state.count.sum(-1)
                counted = kept + folded
                assert (counted >= seen.unsqueeze(-1)).all() if self.has_hidden else (counted == seen.unsqueeze(-1)).all()


class LargeBudget(Life):
    kinds = LARGE


class SmallBudget(Life):
    kinds = SMALL


class FittedBudget(Life):
    kinds = FITTED


lives = settings(
    max_examples=4 * settings.default.max_examples // 3,
    stateful_step_count=14,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking a life takes minutes; its steps are printed as they are
    suppress_health_check=list(HealthCheck),
)
TestLargeBudget, TestSmallBudget, TestFittedBudget = (each.TestCase for each in (LargeBudget, SmallBudget, FittedBudget))
TestLargeBudget.settings = TestSmallBudget.settings = TestFittedBudget.settings = lives
