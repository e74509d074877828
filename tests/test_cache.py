"""`model.generate(past_key_values=LESSCache(...))` is unmodified generate."""

import collections
import copy
import weakref

import pytest
import torch
import zoo
from tiny import tiny_kernels, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from less_cache import CORM, H2O, LESSCache, LESSKernels, SinkRecent
from less_cache.cache.layer import LESSLayer
from less_cache.memory import MEMORIES
from less_cache.slots import Slots

POLICIES = [H2O(heavy=4, recent=3), H2O(heavy=0.1, recent=0.1), SinkRecent(sinks=2, recent=5), CORM(window=4, recent=3)]
NEW = 12
LARGER_THAN_LENGTH = H2O(heavy=64, recent=64)

each_policy = pytest.mark.parametrize("policy", POLICIES, ids=repr)
each_kernels = pytest.mark.parametrize("memory", [None, *MEMORIES])
each_base = pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])


def tokens(batch: int = 1, length: int = 30) -> torch.Tensor:
    return torch.randint(1, 97, (batch, length))


def caches(model: PreTrainedModel, policy=POLICIES[0], memory: str | None = "low_rank"):
    """A function that makes one equal cache after another."""
    kernels = tiny_kernels(model, memory=memory) if memory else None
    return lambda: LESSCache(model, policy, kernels)


def generate(model: PreTrainedModel, cache, ids: torch.Tensor | None = None, **options):
    """Greedy generation with the logits of every step."""
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, **options}
    return model.generate(ids, past_key_values=cache, return_dict_in_generate=True, **options)


@torch.no_grad()
def feed(model: PreTrainedModel, cache, *blocks: torch.Tensor) -> torch.Tensor | None:
    """Logits after the last of several forwards, `[b, vocabulary]`; None after no forward."""
    logits = None
    for block in blocks:
        logits = model(block, past_key_values=cache).logits[:, -1]
    return logits


def by_hand(model: PreTrainedModel, cache, block: torch.Tensor, new_tokens: int = NEW) -> torch.Tensor:
    """What greedy `generate` should add to a cache that has seen all before `block`: one forward a token."""
    generated = []
    for _ in range(new_tokens):
        block = feed(model, cache, block).argmax(-1, keepdim=True)
        generated.append(block)
    return torch.cat(generated, dim=-1)


def assert_same(one, other, atol: float = 1e-5):
    """Two results of `generate` hold the same tokens and logits."""
    assert torch.equal(one.sequences, other.sequences)
    torch.testing.assert_close(torch.stack(one.logits), torch.stack(other.logits), atol=atol, rtol=0)


# One prompt


@each_policy
@each_kernels
@each_base
def test_greedy_is_one_forward_a_token(policy, memory, attn_implementation):
    model = tiny_llama(attn_implementation)
    cache = caches(model, policy, memory)
    prompt = tokens(batch=2)
    assert torch.equal(generate(model, cache(), prompt).sequences[:, 30:], by_hand(model, cache(), prompt))


def test_kernels_and_policy_matter():
    """What the other tests compare is far from the full cache, and LESS from its sparse policy."""
    model, prompt = tiny_llama(), tokens()
    full = generate(model, DynamicCache(config=model.config), prompt, max_new_tokens=2).logits[1]
    sparse = generate(model, caches(model, memory=None)(), prompt, max_new_tokens=2).logits[1]
    less = generate(model, caches(model)(), prompt, max_new_tokens=2).logits[1]
    for one, other in ((full, sparse), (full, less), (sparse, less)):
        assert (one - other).abs().max() > 1e-2


@each_base
def test_sampling_draws_what_a_full_cache_draws(attn_implementation):
    model, prompt = tiny_llama(attn_implementation), tokens(batch=2)
    drawn = []
    for cache in (DynamicCache(config=model.config), caches(model, LARGER_THAN_LENGTH)()):
        torch.manual_seed(1)
        drawn.append(generate(model, cache, prompt, do_sample=True, temperature=2.0, top_k=0).sequences)
    assert torch.equal(*drawn)


def test_sampling_repeats_under_a_seed():
    model, prompt = tiny_llama(), tokens()
    cache = caches(model)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(generate(model, cache(), prompt, do_sample=True).sequences)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@each_base
def test_inputs_embeds(attn_implementation):
    model, prompt = tiny_llama(attn_implementation), tokens(batch=2)
    cache = caches(model)
    from_ids = generate(model, cache(), prompt)
    from_embeds = generate(model, cache(), inputs_embeds=model.get_input_embeddings()(prompt).detach())
    assert torch.equal(from_ids.sequences[:, 30:], from_embeds.sequences)
    torch.testing.assert_close(torch.stack(from_ids.logits), torch.stack(from_embeds.logits), atol=1e-5, rtol=0)


def test_the_cache_comes_back():
    model = tiny_llama()
    cache = caches(model)()
    assert generate(model, cache, tokens()).past_key_values is cache
    with torch.no_grad():
        assert model(tokens(length=1), past_key_values=cache).past_key_values is cache


def test_streamer_gets_every_token_as_it_comes():
    class Recorder(BaseStreamer):
        def __init__(self):
            self.lengths, self.tokens, self.ended = [], [], False

        def put(self, value):
            self.lengths.append(cache.get_seq_length())
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, prompt = tiny_llama(), tokens()
    cache, streamer = caches(model)(), Recorder()
    sequences = generate(model, cache, prompt, streamer=streamer).sequences
    assert streamer.tokens == sequences[0].tolist()
    assert streamer.lengths == [0, *range(30, 30 + NEW)]
    assert streamer.ended


@each_policy
@each_kernels
def test_eager_and_sdpa_agree(policy, memory):
    prompt = tokens(batch=2)
    results = []
    for attn_implementation in ("eager", "sdpa"):
        model = tiny_llama(attn_implementation)
        results.append(generate(model, caches(model, policy, memory)(), prompt))
    assert_same(*results)


def test_output_attentions_gives_none():
    model = tiny_llama("eager")
    output = generate(model, caches(model)(), tokens(), output_attentions=True)
    assert all(weights is None for step in output.attentions for weights in step)


# Batches


@each_policy
@each_kernels
@each_base
def test_left_padded_row_equals_its_single_run(policy, memory, attn_implementation):
    model = tiny_llama(attn_implementation)
    cache = caches(model, policy, memory)
    rows = [tokens(length=length) for length in (30, 23, 5, 1)]
    padded = torch.cat([torch.nn.functional.pad(row, (30 - row.shape[1], 0)) for row in rows])
    batch = generate(model, cache(), padded, attention_mask=(padded > 0).long())
    for index, row in enumerate(rows):
        single = generate(model, cache(), row)
        assert torch.equal(batch.sequences[index, 30:], single.sequences[0, row.shape[1] :])
        logits = torch.stack(batch.logits)[:, index], torch.stack(single.logits)[:, 0]
        torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


def test_batch_equals_its_rows():
    model = tiny_llama()
    cache, prompt = caches(model), tokens(batch=3)
    batch = generate(model, cache(), prompt).sequences
    for index in range(3):
        assert torch.equal(batch[index : index + 1], generate(model, cache(), prompt[index : index + 1]).sequences)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_expanded_batches_equal_a_full_cache(options):
    model, prompt = tiny_llama(), tokens(batch=2)
    results = []
    for cache in (DynamicCache(config=model.config), caches(model, LARGER_THAN_LENGTH)()):
        torch.manual_seed(1)
        results.append(generate(model, cache, prompt, **options).sequences)
    assert torch.equal(*results)


@each_policy
def test_prefilled_cache_for_several_continuations(policy):
    model, prompt = tiny_llama(), tokens()
    prefilled, whole = caches(model, policy)(), caches(model, policy)()
    feed(model, prefilled, prompt[:, :-1], prompt[:, -1:])
    feed(model, whole, prompt[:, :-1].repeat(3, 1), prompt[:, -1:].repeat(3, 1))
    prefilled.batch_repeat_interleave(3)
    continuations = tokens(batch=3, length=4)
    torch.testing.assert_close(feed(model, prefilled, continuations), feed(model, whole, continuations))
    prefilled.batch_select_indices(torch.tensor([2, 0]))
    more = tokens(batch=3, length=1)
    torch.testing.assert_close(feed(model, prefilled, more[[2, 0]]), feed(model, whole, more)[[2, 0]])


# Chunked prefill


@pytest.mark.parametrize("chunk", [1, 7, 16, 29, 30, 64])
@each_policy
def test_prefill_chunks_are_blocks(policy, chunk):
    model, prompt = tiny_llama(), tokens(batch=2)
    chunked, manual = caches(model, policy)(), caches(model, policy)()
    blocks = prompt.split(chunk, dim=1)
    feed(model, manual, *blocks[:-1])
    assert torch.equal(
        generate(model, chunked, prompt, prefill_chunk_size=chunk).sequences[:, 30:], by_hand(model, manual, blocks[-1])
    )


def test_prefill_chunks_bound_the_prompts_cache(monkeypatch):
    model, prompt = tiny_llama(), tokens(length=200)
    held = []
    keep = Slots.keep

    def recording(columns, *rest):
        held.append(columns.keys.shape[2])
        return keep(columns, *rest)

    monkeypatch.setattr(Slots, "keep", recording)
    generate(model, caches(model)(), prompt, prefill_chunk_size=16)
    assert max(held) == 16 + POLICIES[0].heavy + POLICIES[0].recent + 1  # one slot is free


class LivingBytes(TorchDispatchMode):
    """The most bytes of tensors that were alive at once."""

    def __init__(self):
        super().__init__()
        self.tensors, self.now, self.most = collections.Counter(), 0, 0  # tensors that share a storage, by its address

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                self.now += 0 if self.tensors[storage.data_ptr()] else storage.nbytes()
                self.tensors[storage.data_ptr()] += 1
                weakref.finalize(each, self.gone, storage.data_ptr(), storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def gone(self, address: int, nbytes: int) -> None:
        self.tensors[address] -= 1
        self.now -= 0 if self.tensors[address] else nbytes


@pytest.mark.parametrize("policy", [H2O(4, 5), SinkRecent(4, 5)], ids=repr)
def test_the_peak_of_a_prompt_in_chunks_does_not_depend_on_its_length(policy):
    model = tiny_llama()
    most = []
    for chunks in (10, 40):
        cache = caches(model, policy)()
        with LivingBytes() as living, torch.no_grad():
            for _ in range(chunks):
                model.base_model(torch.randint(1, 97, (1, 16)), past_key_values=cache)
        most.append(living.most)
    assert most[0] == most[1]
    assert living.now == cache.memory_footprint().total, "what stays is the cache, to the byte"


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_prefill_chunks_of_nothing_but_padding(chunk):
    model, row = tiny_llama(), tokens(length=6)
    padded = torch.cat([tokens(length=20), torch.nn.functional.pad(row, (14, 0))])
    cache = caches(model, LARGER_THAN_LENGTH)
    batch = generate(model, cache(), padded, attention_mask=(padded > 0).long(), prefill_chunk_size=chunk)
    single = generate(model, DynamicCache(config=model.config), row)
    assert torch.equal(batch.sequences[1, 20:], single.sequences[0, 6:])


# Several turns


@each_policy
@each_kernels
@pytest.mark.parametrize("whole_history", [True, False], ids=["whole history", "new text alone"])
def test_turns_on_one_cache(policy, memory, whole_history):
    model = tiny_llama()
    cache, manual = caches(model, policy, memory)(), caches(model, policy, memory)()
    history, unread = tokens(length=0), tokens(length=0)
    for length in (20, 9, 1, 40):
        text = tokens(length=length)
        history = torch.cat([history, text], dim=1)
        block = torch.cat([unread, text], dim=1)  # the last generated token has not been through the model yet
        fed = history if whole_history else block
        sequences = generate(model, cache, fed, attention_mask=torch.ones_like(history)).sequences
        generated = sequences[:, fed.shape[1] :]
        assert torch.equal(generated, by_hand(model, manual, block))
        history, unread = torch.cat([history, generated], dim=1), generated[:, -1:]
        assert cache.get_seq_length() == history.shape[1] - 1


@each_policy
def test_turns_with_padding(policy):
    """Rows of different lengths in every turn, nothing among them: each equals a conversation of its own."""
    model = tiny_llama()
    cache = caches(model, policy)
    turns = [[tokens(length=length) for length in lengths] for lengths in ((12, 7, 3), (1, 0, 1), (2, 9, 5), (1, 1, 0))]
    batch_cache, single_caches = cache(), [cache() for _ in turns[0]]
    masks = torch.ones(3, 0, dtype=torch.long)
    for rows in turns:
        longest = max(row.shape[1] for row in rows)
        padded = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
        masks = torch.cat([masks, (padded > 0).long()], dim=1)
        with torch.no_grad():
            position_ids = (masks.cumsum(-1) - 1).clamp_min(0)[:, -longest:]
            last = model(padded, attention_mask=masks, position_ids=position_ids, past_key_values=batch_cache).logits[:, -1]
        for index, row in enumerate(rows):
            if row.shape[1]:
                torch.testing.assert_close(last[index : index + 1], feed(model, single_caches[index], row), atol=1e-4, rtol=0)


@each_policy
def test_copy_goes_its_own_way(policy):
    model, prompt = tiny_llama(), tokens()
    cache, other = caches(model, policy)(), caches(model, policy)()
    feed(model, cache, prompt)
    feed(model, other, prompt)
    by_hand(model, copy.deepcopy(cache), tokens(length=1))
    token = tokens(length=1)
    assert torch.equal(feed(model, cache, token), feed(model, other, token))


@each_policy
def test_reset_makes_a_fresh_cache(policy):
    model = tiny_llama()
    used, fresh = caches(model, policy)(), caches(model, policy)()
    generate(model, used, tokens(batch=2))
    used.reset()
    assert used.get_seq_length() == 0
    assert used.memory_footprint().total == 0
    prompt = tokens(batch=3, length=17)  # another batch size, another length
    one, other = generate(model, used, prompt), generate(model, fresh, prompt)
    assert torch.equal(torch.stack(one.logits), torch.stack(other.logits))
    assert used.memory_footprint() == fresh.memory_footprint()


# Other families


@pytest.mark.parametrize("family, attn_implementation", zoo.BUILDS)
def test_budget_above_length_is_a_full_cache(family, attn_implementation):
    model, prompt = zoo.build(family, attn_implementation), tokens(batch=2)
    full, ours = DynamicCache(config=model.config), LESSCache(model, LARGER_THAN_LENGTH)
    assert_same(generate(model, full, prompt), generate(model, ours, prompt), atol=1e-4)
    block, token = tokens(batch=2, length=5), tokens(batch=2, length=1)
    for text in (block, token):
        torch.testing.assert_close(feed(model, full, text), feed(model, ours, text), atol=1e-4, rtol=0)


@each_base
@pytest.mark.parametrize("policy", [LARGER_THAN_LENGTH, SinkRecent(8, 120), CORM(128, 128)], ids=repr)
def test_budget_above_length_is_a_full_cache_memory(policy, attn_implementation):
    model, prompt = tiny_llama(attn_implementation), tokens(batch=2)
    full, ours = DynamicCache(config=model.config), caches(model, policy)()
    assert_same(generate(model, full, prompt), generate(model, ours, prompt), atol=1e-4)
    block = tokens(batch=2, length=5)
    torch.testing.assert_close(feed(model, full, block), feed(model, ours, block), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", zoo.HYBRIDS)
def test_hybrid_compresses_full_attention_alone(family):
    model = zoo.build(family)
    own = DynamicCache(config=model.config)
    cache = LESSCache(model, H2O(4, 3))
    assert [type(layer) for layer in cache.layers] == [type(own.layers[0]), LESSLayer]
    generate(model, cache, tokens(length=40))
    generate(model, own, tokens(length=40))
    assert cache.layers[0].keys.shape == own.layers[0].keys.shape
    assert cache.layers[1].keys.shape[2] == 4 + 3 + 1
    assert [layer.get_seq_length() for layer in cache.layers] == [40 + NEW - 1] * 2


@pytest.mark.parametrize("family", zoo.HYBRIDS)
def test_hybrid_with_padding(family):
    """The sliding layers build their own masks; none of them may cost the LESS layers their padding."""
    model, row = zoo.build(family), tokens(length=9)
    padded = torch.cat([tokens(length=20), torch.nn.functional.pad(row, (11, 0))])
    batch = generate(model, LESSCache(model, H2O(4, 3)), padded, attention_mask=(padded > 0).long())
    single = generate(model, LESSCache(model, H2O(4, 3)), row)
    torch.testing.assert_close(torch.stack(batch.logits)[:, 1], torch.stack(single.logits)[:, 0], atol=1e-4, rtol=0)


# Bookkeeping


def test_seq_length_is_logical():
    model = tiny_llama()
    cache = caches(model)()
    assert cache.get_seq_length() == 0
    for block, seen in ((30, 30), (1, 31), (12, 43)):
        feed(model, cache, tokens(batch=2, length=block))
        assert [layer.get_seq_length() for layer in cache.layers] == [seen, seen]
        assert cache.get_seq_length() == seen
        assert cache.get_mask_sizes(5, 0) == (5, seen)


@pytest.mark.parametrize("prompt_blocks", [[30], [15, 15], [20, 9, 1]], ids=str)
def test_fractions_are_of_the_prompt(prompt_blocks):
    """Of the whole prompt, in whatever chunks it comes, and never of what follows."""
    model = tiny_llama()
    cache = LESSCache(model, H2O(heavy=0.2, recent=0.1))
    feed(model, cache, *(tokens(batch=2, length=length) for length in prompt_blocks), tokens(batch=2, length=1))
    for length in (50, 1, 9):
        feed(model, cache, tokens(batch=2, length=length))
        assert cache.layers[0].held.rows.counts.tolist() == [[6, 3]] * 2
        assert cache.layers[0].keys.shape[2] == 6 + 3 + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("new_tokens", [1, 2, 40])
@each_kernels
def test_memory_footprint(memory, new_tokens, dtype):
    model = tiny_llama().to(dtype)
    cache = caches(model, memory=memory)()
    generate(model, cache, tokens(batch=3), max_new_tokens=new_tokens)
    layers, b, g, d, rank, counts = 2, 3, 2, 8, 8, 2
    numbers = {None: 0, "low_rank": rank * (d + 1), "soft_centroids": rank // 2 * (2 * d + 1)}  # of a KV head's state
    slots = 4 + 3 + 1  # heavy, recent, and the slot that the next token goes into
    footprint = cache.memory_footprint()
    assert footprint.keys_values == layers * b * g * slots * d * 2 * dtype.itemsize
    assert footprint.low_rank_state == layers * b * g * 4 * numbers[memory]
    position, score, seen, count, settled = 4, 4, 8, 8, 1
    assert footprint.bookkeeping == layers * b * (g * slots * (position + score) + seen + counts * count + settled)
    assert footprint.full_cache == layers * b * g * (30 + new_tokens - 1) * d * 2 * dtype.itemsize
    assert footprint.total == footprint.keys_values + footprint.low_rank_state + footprint.bookkeeping
    assert footprint.saved == max(0.0, 1 - footprint.total / footprint.full_cache)


def test_ranks_by_layer(tmp_path):
    """Each layer holds a state of its own size, in bytes, in a copy and in a file; rows of zeros would change nothing."""
    model = tiny_llama()
    kernels = tiny_kernels(model, rank=[2, 6], hidden_size=[8, 4])
    cache, prompt = LESSCache(model, H2O(4, 3), kernels), tokens(batch=3)
    expected = generate(model, cache, prompt)
    assert [layer.held.state.features_sum.shape for layer in cache.layers] == [(3, 2, 2), (3, 2, 6)]
    b, g, d = 3, 2, 8
    assert cache.memory_footprint().low_rank_state == b * g * (2 + 6) * (d + 1) * 4
    cache.save(tmp_path / "cache.safetensors")
    more, last = cache.fork(), torch.ones(3, 1, dtype=torch.long)
    loaded = LESSCache.load(tmp_path / "cache.safetensors", model, kernels)
    assert torch.equal(model(last, past_key_values=more).logits, model(last, past_key_values=loaded).logits)

    wider = tiny_kernels(model, rank=6, hidden_size=8)
    for index in range(2):
        layer, part = wider.for_layer(index), kernels.for_layer(index)
        for tensor, smaller in zip(layer.parameters(), part.parameters(), strict=True):
            tensor.data.zero_()[tuple(slice(size) for size in smaller.shape)] = smaller.data
    got = generate(model, LESSCache(model, H2O(4, 3), wider), prompt)
    assert_same(got, expected)


def test_memory_footprint_of_an_empty_cache():
    footprint = LESSCache(tiny_llama(), H2O(4, 3)).memory_footprint()
    assert (footprint.total, footprint.full_cache, footprint.saved) == (0, 0, 0)


def test_memory_footprint_counts_the_models_own_layers():
    model = zoo.build("gemma3_text")
    cache = LESSCache(model, H2O(4, 3))
    generate(model, cache, tokens(length=40))
    sliding, full = cache.layers
    own_bytes = 2 * sliding.keys.nbytes
    token_bytes = 2 * 2 * 8 * 4  # keys and values, KV heads, head dim, float32
    footprint = cache.memory_footprint()
    assert footprint.keys_values == own_bytes + 8 * token_bytes
    assert footprint.full_cache == own_bytes + full.get_seq_length() * token_bytes


def test_from_pretrained(tmp_path):
    model = tiny_llama()
    kernels = tiny_kernels(model)
    kernels.config.policy = H2O(heavy=5, recent=6).to_dict()
    kernels.save_pretrained(tmp_path)
    assert LESSCache.from_pretrained(tmp_path, model).policy == H2O(heavy=5, recent=6)
    assert LESSCache.from_pretrained(tmp_path, model.config, policy=SinkRecent(4, 8)).policy == SinkRecent(4, 8)
    prompt = tokens()
    loaded = generate(model, LESSCache.from_pretrained(str(tmp_path), model), prompt)
    assert_same(loaded, generate(model, LESSCache(model, kernels=kernels), prompt), atol=0)


# What surrounds generate


def test_no_graph_is_kept():
    model = tiny_llama()
    cache = caches(model)()
    for block in (20, 1, 1, 5, 1):
        assert model(tokens(length=block), past_key_values=cache).logits.requires_grad
        for layer in cache.layers:
            state = (
                layer.keys,
                layer.values,
                layer.held.slots.scores,
                layer.held.state.values_sum,
                layer.held.state.features_sum,
            )
            assert not any(tensor.requires_grad for tensor in state)


def test_gradients_on_or_off_change_nothing():
    model, prompt = tiny_llama(), tokens()
    on, off = caches(model)(), caches(model)()
    for block in prompt.split([20, 1, 9], dim=1):
        assert torch.equal(model(block, past_key_values=on).logits[:, -1], feed(model, off, block))


@each_policy
def test_prefilled_under_inference_mode(policy):
    model, prompt = tiny_llama(), tokens()
    cache, other = caches(model, policy)(), caches(model, policy)()
    with torch.inference_mode():
        model(prompt[:, :20], past_key_values=cache)
        model(prompt[:, 20:21], past_key_values=cache)
    feed(model, other, prompt[:, :20], prompt[:, 20:21])
    assert_same(generate(model, cache, prompt), generate(model, other, prompt))


def test_state_is_float32_whatever_the_default():
    model = tiny_llama()
    kernels = tiny_kernels(model)
    model = model.to(torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        cache = LESSCache(model, H2O(4, 3), kernels)
        generate(model, cache, tokens())
    finally:
        torch.set_default_dtype(torch.float32)
    for layer in cache.layers:
        assert layer.keys.dtype == torch.bfloat16
        assert (
            layer.held.slots.scores.dtype
            == layer.held.state.values_sum.dtype
            == layer.held.state.features_sum.dtype
            == torch.float32
        )


def test_caches_share_kernels():
    model, prompt = tiny_llama(), tokens()
    kernels: LESSKernels = tiny_kernels(model)
    one, other = LESSCache(model, H2O(4, 3), kernels), LESSCache(model, H2O(4, 3), kernels)
    assert one.layers[0].setup.memory is other.layers[0].setup.memory is kernels.for_layer(0)
    alone = generate(model, LESSCache(model, H2O(4, 3), kernels), prompt)
    generate(model, other, tokens(batch=2))
    assert_same(alone, generate(model, one, prompt), atol=0)
