"""Faults that were found in use, each with the right value: a DynamicCache's, or one clear error."""

import copy
import io
import multiprocessing
import os
import pickle
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
import zoo
from tiny import VOCAB, tiny_kernels, tiny_llama
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from less_cache import CORM, H2O, AttentionMatching, LESSCache, LESSError, LESSKernels, SinkRecent, models
from less_cache.cache import LESSLayer
from less_cache.slots import formats

PROMPT, NEXT = (torch.randint(1, VOCAB, (2, n), generator=torch.Generator().manual_seed(n)) for n in (20, 6))
LARGE = H2O(200, 200)


@torch.no_grad()
def read(model, cache, tokens, **options) -> torch.Tensor:
    return model(tokens, past_key_values=cache, **options).logits


def used_cache(model, policy=LARGE, kernels=None) -> LESSCache:
    cache = LESSCache(model, policy, kernels)
    read(model, cache, PROMPT)
    return cache


# Copies in other processes


def read_elsewhere(cache, queue) -> None:
    queue.put(read(tiny_llama(), cache, NEXT).numpy())


def test_a_cache_sent_to_a_spawned_process():
    cache, context = used_cache(tiny_llama()), multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=read_elsewhere, args=(cache, queue))
    process.start()
    theirs = torch.tensor(queue.get(timeout=120))
    process.join()
    torch.testing.assert_close(theirs, read(tiny_llama(), cache, NEXT))


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_caches_read_from_files_in_a_new_process(how, tmp_path):
    model = tiny_llama()
    caches = {name: used_cache(model, H2O(4, 4), name and tiny_kernels(model, memory=name)) for name in (None, "low_rank")}
    paths = [tmp_path / str(name) for name in caches]
    for cache, path in zip(caches.values(), paths, strict=True):
        if how == "pickle":
            path.write_bytes(pickle.dumps(cache))
        else:
            torch.save(cache, path)
    script = f"""
import pickle, sys, torch
sys.path.insert(0, {os.path.dirname(__file__)!r})
from tiny import tiny_llama
model = tiny_llama()
for path in sys.argv[1:]:
    cache = {"pickle.load(open(path, 'rb'))" if how == "pickle" else "torch.load(path, weights_only=False)"}
    with torch.no_grad():
        torch.save(model(torch.tensor({NEXT.tolist()}), past_key_values=cache).logits, path)
"""
    subprocess.run([sys.executable, "-c", script, *paths], check=True)
    for cache, path in zip(caches.values(), paths, strict=True):
        torch.testing.assert_close(torch.load(path), read(model, cache, NEXT))


def test_a_pickled_cache_goes_on_beside_the_first():
    model = tiny_llama()
    cache = used_cache(model, CORM(4, 4))
    other = pickle.load(io.BytesIO(pickle.dumps(cache)))
    assert torch.equal(read(model, other, NEXT), read(model, cache, NEXT))


# Attention functions of the user's own


def softer(module, query, key, value, mask, scaling=None, **options):
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling / 2, **options)


def test_an_attention_function_that_somebody_registered_is_refused(monkeypatch):
    monkeypatch.setattr(AttentionInterface, "_global_mapping", {**AttentionInterface._global_mapping, "softer": softer})
    masks = {**AttentionMaskInterface._global_mapping, "softer": sdpa_mask}
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", masks)
    model = tiny_llama(attn_implementation="softer")
    expected = model.generate(PROMPT, max_new_tokens=4, do_sample=False)
    cache = LESSCache(model, LARGE)
    with pytest.raises(LESSError, match=r"attention function 'softer' is not transformers' own.*attn_implementation=\"sdpa\""):
        read(model, cache, PROMPT)
    full = model.generate(PROMPT, past_key_values=DynamicCache(config=model.config), max_new_tokens=4, do_sample=False)
    assert torch.equal(full, expected), "other caches go through it"
    model.set_attn_implementation("sdpa")
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(read(model, cache, PROMPT), model(PROMPT).logits)


# Another model's cache


@pytest.mark.parametrize("kernels", [None, "low_rank"])
@pytest.mark.parametrize("when", ["from the start", "in the middle"])
def test_another_model_of_the_same_shape_is_refused(when, kernels):
    model, other = tiny_llama(), tiny_llama(seed=1)
    cache = LESSCache(model, LARGE, kernels and tiny_kernels(model, memory=kernels))
    if when == "in the middle":
        read(model, cache, PROMPT)
    with pytest.raises(LESSError, match=r"belongs to another model, with other weights\. Make a LESSCache for each model"):
        read(other, cache, NEXT)
    if when == "in the middle":
        expected = read(model, DynamicCache(config=model.config), torch.cat([PROMPT, NEXT], dim=1))[:, -6:]
        torch.testing.assert_close(read(model, cache, NEXT), expected, rtol=1e-4, atol=1e-5)


def test_a_cache_of_a_config_belongs_to_whom_reads_it_first():
    model, other = tiny_llama(), tiny_llama(seed=1)
    cache = LESSCache(model.config, LARGE)
    read(other, cache, PROMPT)
    with pytest.raises(LESSError, match="belongs to another model"):
        read(model, cache, NEXT)


@pytest.mark.filterwarnings("default::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("same", [copy.deepcopy, lambda model: tiny_llama(), torch.compile], ids=["copy", "twin", "compiled"])
def test_the_same_weights_elsewhere_are_the_same_model(same):
    model = tiny_llama()
    cache = used_cache(model)
    expected = read(model, cache.fork(), NEXT)
    other = same(model)
    if same is torch.compile:
        other = torch.compile(model, backend="eager")
    torch.testing.assert_close(read(other, cache, NEXT), expected)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_hidden_layers": 3}, "belongs to another model"),
        ({"num_key_value_heads": 1}, "belongs to another model"),
        ({"num_key_value_heads": 4}, "belongs to another model"),
        ({"num_attention_heads": 8, "num_key_value_heads": 8}, "belongs to another model"),
    ],
)
@pytest.mark.parametrize("of", ["model", "config"])
def test_a_model_of_another_shape_is_refused(sizes, message, of):
    model = tiny_llama()
    cache = LESSCache(model if of == "model" else model.config, LARGE, tiny_kernels(model))
    with pytest.raises(LESSError, match=message):
        read(tiny_llama(**sizes), cache, PROMPT)


# torch's default type


KINDS = [
    {"policy": H2O(0.05, 0.05)},
    {"policy": SinkRecent(2, 0.1)},
    {"policy": CORM(0.05, 0.05)},
    {"policy": AttentionMatching(0.3, every=1), "heads": "adaptive"},
    {"policy": AttentionMatching(0.3, every=1), "heads": "adaptive", "slots": "int4"},
]


@pytest.mark.parametrize("kind", KINDS, ids=["h2o", "sink_recent", "corm", "fitted", "fitted int4"])
@pytest.mark.parametrize("memory", ["low_rank", "soft_centroids", "untrained"])
def test_torchs_default_type_changes_nothing(kind, memory):
    model, prompt = tiny_llama(), torch.randint(1, VOCAB, (1, 1032))
    kernels = LESSKernels.untrained(model) if memory == "untrained" else tiny_kernels(model, memory=memory)
    expected = LESSCache(model, kernels=kernels, **kind)
    logits = read(model, expected, prompt)
    formats._hadamard.cache_clear()  # nothing is left of before, nor is what is known of a model
    model = tiny_llama()
    torch.set_default_dtype(torch.bfloat16)
    try:
        cache = LESSCache(model, kernels=kernels, **kind)
        output = read(model, cache, prompt)
        after = read(model, cache, NEXT[:1, :1])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(output, logits)
    assert torch.equal(after, read(model, expected, NEXT[:1, :1]))
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        for name, tensor in layer.tensors().items():
            assert torch.equal(tensor, other.tensors()[name]), name


def test_kernels_made_under_another_default_type_are_the_same():
    model = tiny_llama()
    expected = tiny_kernels(model, memory="soft_centroids").state_dict()
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = tiny_kernels(model, memory="soft_centroids").state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in expected.items():
        assert made[name].dtype == torch.float32
        if not name.endswith("fading"):  # of which `tiny` draws its own
            torch.testing.assert_close(made[name], tensor)


def test_autocast_in_one_call_and_not_in_the_next():
    model = tiny_llama()
    cache = LESSCache(model, LARGE)
    with torch.autocast("cpu", torch.bfloat16):
        read(model, cache, PROMPT)
        expected = read(model, cache.fork(), NEXT)
    message = r"expected (keys|values) of type torch\.bfloat16, as in the turns before, got torch\.float32"
    with pytest.raises(LESSError, match=message):
        read(model, cache, NEXT)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(read(model, cache, NEXT), expected), "nothing was lost"


# Wrapped models


@pytest.mark.filterwarnings("default::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("wrap", ["compiled", "peft"])
def test_for_model_finds_the_kernels_of_a_wrapped_model(wrap, monkeypatch, tmp_path, recwarn):
    model = tiny_llama()
    kernels = tiny_kernels(model)
    kernels.config.policy = H2O(4, 4).to_dict()
    kernels.save_pretrained(tmp_path)
    found = {kernels.config.base_model_fingerprint: [str(tmp_path)]}
    monkeypatch.setattr("less_cache.hub.catalogue.find", lambda base, fingerprint: found.get(fingerprint, []))
    if wrap == "peft":
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).eval()
    else:
        wrapped = torch.compile(model, backend="eager")
    cache = LESSCache.for_model(wrapped)
    assert cache.kernels.source == str(tmp_path)
    assert not [each for each in recwarn.list if "kernels" in str(each.message)]
    wrapped.generate(input_ids=PROMPT, past_key_values=cache, max_new_tokens=3)


# Masks over tokens that were seen


def padded_history() -> tuple[torch.Tensor, torch.Tensor]:
    """Two turns of two rows, and a mask that hides what came after the end of row 0, and a part in the middle of row 1."""
    turns = torch.randint(1, VOCAB, (2, 34), generator=torch.Generator().manual_seed(7))
    mask = torch.ones(2, 34, dtype=torch.long)
    mask[0, 12:20] = 0
    mask[1, 5:9] = 0
    return turns, mask


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


@pytest.mark.parametrize(
    ("policy", "static", "second"),
    [
        (LARGE, False, 13),
        (LARGE, False, 1),
        (LARGE, True, 13),
        (SinkRecent(2, 100), False, 13),
        (SinkRecent(2, 100), True, 13),
        (CORM(100, 100), False, 1),
        (CORM(100, 100), False, 13),
    ],
)
def test_a_mask_that_hides_seen_tokens(policy, static, second):
    """In plain forwards: the first turn was read without a mask, the second hides some of it, a last token follows."""
    model = tiny_llama()
    turns, mask = padded_history()
    positions, outputs = positions_of(mask), []
    for cache in (DynamicCache(config=model.config), LESSCache(model, policy, tiny_kernels(model), static=static)):
        read(model, cache, turns[:, :20])
        for part in (slice(20, 20 + second), slice(20 + second, 21 + second)):
            options = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
            outputs.append(read(model, cache, turns[:, part], **options))
    for full, ours in zip(outputs[:2], outputs[2:], strict=True):
        torch.testing.assert_close(ours, full, rtol=1e-4, atol=2e-5)
    for layer in cache.layers:
        assert layer.seen.tolist() == mask[:, : 21 + second].sum(-1).tolist()


@pytest.mark.parametrize("static", [False, True])
def test_a_chat_of_rows_that_end_at_different_times(static):
    """Row 0 stops early; `generate` writes padding after it, which the next turn's mask hides."""
    model = tiny_llama()
    written = model.generate(PROMPT, max_new_tokens=12, do_sample=False)
    eos = int(written[0, 22])
    question = torch.randint(1, VOCAB, (2, 15), generator=torch.Generator().manual_seed(3))
    cache = LESSCache(model, LARGE, static=static)
    options = {"do_sample": False, "pad_token_id": 0}
    turn = model.generate(PROMPT, past_key_values=cache, max_new_tokens=12, eos_token_id=eos, **options)
    mask = torch.ones_like(turn)
    end = int((turn[0, 20:] == eos).int().argmax()) + 21
    mask[0, end:] = 0
    assert end < turn.shape[1]
    history, mask = torch.cat([turn, question], dim=1), torch.nn.functional.pad(mask, (0, 15), value=1)
    output = model.generate(history, attention_mask=mask, past_key_values=cache, max_new_tokens=6, **options)
    for row in range(2):
        alone = history[row : row + 1, mask[row].bool()]
        expected = model.generate(alone, max_new_tokens=6, **options)
        assert output[row, -6:].tolist() == expected[0, -6:].tolist()


@pytest.mark.parametrize("policy", [H2O(4, 4), SinkRecent(2, 6), CORM(6, 6)], ids=lambda policy: policy.name)
def test_hidden_tokens_leave_a_small_cache(policy):
    model = tiny_llama()
    turns, mask = padded_history()
    cache = LESSCache(model, policy, tiny_kernels(model))
    read(model, cache, turns[:, :20])
    positions = positions_of(mask)
    kept = [layer.positions.clone() for layer in cache.layers]
    with torch.no_grad():
        model(turns[:, 20:21], past_key_values=cache, attention_mask=mask[:, :21], position_ids=positions[:, 20:21])
    for layer, before in zip(cache.layers, kept, strict=True):
        assert layer.seen.tolist() == [13, 17]
        now = layer.positions
        for row, hidden in enumerate((range(12, 20), range(5, 9))):
            for head in range(2):
                stayed = {p - sum(h < p for h in hidden) for p in before[row, head].tolist() if p >= 0 and p not in hidden}
                held = [p for p in now[row, head].tolist() if p >= 0]
                assert len(set(held)) == len(held)
                assert set(held) <= stayed | {12 if row == 0 else 16}


def test_packed_documents_in_a_4d_mask():
    model, n = tiny_llama(), 12
    block = torch.zeros(n, n, dtype=torch.bool)
    block[:7, :7] = block[7:, 7:] = True
    block &= torch.ones(n, n, dtype=torch.bool).tril()
    tokens = PROMPT[:, :n]
    cache, full = LESSCache(model, LARGE, tiny_kernels(model)), DynamicCache(config=model.config)
    for part in (tokens, NEXT[:, :1], NEXT[:, 1:2]):
        options = {"attention_mask": block.expand(2, 1, n, n)} if part is tokens else {}
        torch.testing.assert_close(
            read(model, cache, part, **options), read(model, full, part, **options), rtol=1e-4, atol=2e-5
        )
    assert cache.layers[0].seen.tolist() == [14, 14]


def test_a_4d_mask_that_hides_seen_tokens_is_refused():
    """Candidates of a tree, each seeing a part of the past."""
    model = tiny_llama()
    cache = used_cache(model)
    mask = torch.ones(2, 1, 6, 26, dtype=torch.bool).tril(20)
    torch.testing.assert_close(read(model, cache.fork(), NEXT, attention_mask=mask), read(model, cache.fork(), NEXT))
    mask[:, :, 3:, 4:8] = False
    with pytest.raises(LESSError, match="the 4D mask hides tokens that the cache has seen"):
        read(model, cache, NEXT, attention_mask=mask)
    assert cache.get_seq_length() == 20
    torch.testing.assert_close(read(model, cache, NEXT), read(model, used_cache(model), NEXT))


# Padding


@pytest.mark.parametrize("chunk", [1, 4, 7, 16])
@pytest.mark.parametrize("policy", [LARGE, SinkRecent(2, 100), CORM(100, 100)], ids=lambda policy: policy.name)
def test_left_padding_longer_than_a_chunk_of_the_prompt(policy, chunk):
    model = tiny_llama()
    prompt = torch.nn.functional.pad(PROMPT, (12, 0))
    mask = (prompt > 0).long()
    mask[1, :20] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
    expected = model.generate(prompt, **options)
    cache = LESSCache(model, policy)
    assert torch.equal(model.generate(prompt, past_key_values=cache, prefill_chunk_size=chunk, **options), expected)


# Files


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o027, 0o640)])
def test_a_saved_cache_has_the_mode_that_the_user_wants(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        used_cache(tiny_llama()).save(tmp_path / "cache")
    finally:
        os.umask(before)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == mode


# What the messages say, and what a DynamicCache can do as well


GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for an old name
@pytest.mark.parametrize("make_for", ["the adapted model", "the base model"])
def test_prefix_tuning_says_that_it_has_a_cache_of_its_own(make_for):
    model = tiny_llama()
    adapted = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with pytest.raises(LESSError, match="cannot work with prefix tuning: PEFT starts from a DynamicCache"):
        cache = LESSCache(adapted if make_for == "the adapted model" else model, LARGE)
        adapted.generate(input_ids=PROMPT, past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_whole_text_in_every_forward_is_refused(static, padded):
    model = tiny_llama()
    mask = torch.ones_like(PROMPT)
    mask[1, : 7 * padded] = 0
    cache = LESSCache(model, LARGE, static=static)
    with pytest.raises(LESSError, match=r"the whole text is passed again: generate does so with use_cache=False"):
        model.generate(PROMPT, attention_mask=mask, past_key_values=cache, use_cache=False, **GREEDY)
    assert cache.get_seq_length() == 20
    cache.reset()
    expected = model.generate(PROMPT, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(PROMPT, attention_mask=mask, past_key_values=cache, **GREEDY), expected)


@pytest.mark.parametrize("chunk", [None, 6])
def test_padding_on_the_right_is_called_by_its_name(chunk):
    model = tiny_llama()
    mask = torch.ones_like(PROMPT)
    mask[1, 12:] = 0
    cache = LESSCache(model, LARGE)
    with pytest.raises(LESSError, match=r"a row ends with padding.*Pad prompts on the left"):
        model.generate(PROMPT, attention_mask=mask, past_key_values=cache, prefill_chunk_size=chunk, **GREEDY)
    expected = read(model, DynamicCache(config=model.config), torch.cat([PROMPT, NEXT[:, :1]], dim=1))[:1, -1:]
    ended = torch.nn.functional.pad(mask, (0, 1), value=1)
    output = read(model, cache, NEXT[:, :1], attention_mask=ended, position_ids=positions_of(ended)[:, -1:])
    torch.testing.assert_close(output[:1], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("at", [[22], [22, 23], [25]], ids=str)
def test_a_model_that_writes_its_own_pad_token(static, at):
    """`generate` takes such tokens for padding when they come back in the next turn."""
    model = tiny_llama()
    outputs = []
    for cache in (DynamicCache(config=model.config), LESSCache(model, LARGE, static=static)):
        history = model.generate(PROMPT, past_key_values=cache, max_new_tokens=6, do_sample=False)
        history[1, at] = model.config.pad_token_id
        outputs.append(model.generate(torch.cat([history, NEXT], dim=1), past_key_values=cache, **GREEDY))
    assert torch.equal(*outputs)


def test_a_cache_is_iterated_as_a_dynamic_cache():
    model = zoo.build("gemma3_text")
    full, cache = DynamicCache(config=model.config), LESSCache(model, LARGE)
    assert len(list(cache)) == len(list(full))
    for each in (full, cache):
        read(model, each, PROMPT)
    for (keys, values, window), expected, layer in zip(cache, full, cache.layers, strict=True):
        if isinstance(layer, LESSLayer):
            assert keys is not None and torch.equal(keys, layer.keys) and torch.equal(values, layer.values)
            assert window is None and expected[2] is None
        else:
            assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1]) and torch.equal(window, expected[2])


@pytest.mark.parametrize("policy", [LARGE, CORM(3, 4)], ids=lambda policy: policy.name)
@pytest.mark.parametrize(
    "indices", [[1], (1, 0, 1), [-1], [False, True], torch.tensor([False, True]), np.array([1]), torch.tensor([1, 1])], ids=str
)
def test_rows_are_chosen_by_whatever_names_them(indices, policy):
    model = tiny_llama()
    cache = used_cache(model, policy)
    rows = torch.arange(2)[torch.as_tensor(indices)]
    expected = read(model, cache.fork(), NEXT)[rows]
    cache.batch_select_indices(indices)
    torch.testing.assert_close(read(model, cache, NEXT[rows]), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("indices", [[2], [0, -3], [True]], ids=str)
def test_rows_that_are_not_there_are_refused(indices):
    model = tiny_llama()
    cache = used_cache(model)
    expected = read(model, cache.fork(), NEXT)
    with pytest.raises(LESSError, match=r"batch_select_indices: expected rows of a batch of 2, got"):
        cache.batch_select_indices(indices)
    assert torch.equal(read(model, cache, NEXT), expected)


# Paths of users that are not there


def test_a_users_folder_that_is_not_there_is_no_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(LESSError, match="which does not exist"):
        models.locate("~no-such-user/model")
    with pytest.raises(LESSError, match="no such file"):
        LESSKernels.from_official(["~no-such-user/layer.pt"])
    torch.save({"other": torch.zeros(1)}, tmp_path / "layer.pt")
    with pytest.raises(LESSError, match="kernel_q_mat1"):
        LESSKernels.from_official(["~/layer.pt"])


# What the fuzz found (tests/test_fuzz.py)


@pytest.mark.parametrize("rows", [1, 3])
def test_another_batch_with_a_mask_is_refused_with_the_usual_error(rows):
    model = tiny_llama()
    cache, expected = used_cache(model), read(model, used_cache(model), NEXT)
    with pytest.raises(LESSError, match=f"expected a batch of 2, as in the turns before, got {rows}"):
        read(model, cache, NEXT[[0] * rows], attention_mask=torch.ones(rows, 26, dtype=torch.long))
    assert torch.equal(read(model, cache, NEXT), expected)


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_recorded_block_longer_than_what_was_seen_is_no_conversation_passed_again(padded, hides):
    """Where it begins with padding in a row, or its mask hides seen tokens."""
    model = tiny_llama()
    mask = torch.ones(2, 26, dtype=torch.long)
    mask[1, 6 : 6 + 3 * padded] = 0
    mask[1, 2 : 2 + 2 * hides] = 0
    tokens, outputs = torch.cat([NEXT, PROMPT], dim=1), []
    for cache in (DynamicCache(config=model.config), LESSCache(model, LARGE)):
        read(model, cache, tokens[:, :6])
        cache.activate_past_recording()
        outputs.append(read(model, cache, tokens[:, 6:], attention_mask=mask, position_ids=positions_of(mask)[:, 6:]))
    full, ours = (output[mask[:, 6:].bool()] for output in outputs)
    torch.testing.assert_close(ours, full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["fork", "static fork", "crop"])
def test_another_model_is_refused_after(how):
    model = tiny_llama()
    cache = LESSCache(model, LARGE, static=how == "static fork")
    if how == "crop":
        cache.activate_past_recording()
    read(model, cache, PROMPT)
    if how == "crop":
        cache.crop(-2)
    else:
        cache = cache.fork()
    with pytest.raises(LESSError, match="belongs to another model"):
        read(tiny_llama(seed=1), cache, NEXT)


def test_packed_documents_in_a_recorded_block_are_refused():
    """They would be read one by one, each seeing those before it; a first block is what its mask says."""
    model = tiny_llama()
    mask = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool().tril().expand(2, 1, 6, 6)
    cache, full = LESSCache(model, LARGE), DynamicCache(config=model.config)
    for each in (cache, full):
        each.activate_past_recording()
    torch.testing.assert_close(
        read(model, cache, NEXT, attention_mask=mask), read(model, full, NEXT, attention_mask=mask), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(LESSError, match="expected a causal mask while tokens are recorded for crop"):
        read(model, cache, PROMPT[:, :6], attention_mask=mask)
    causal = torch.ones(6, 12, dtype=torch.bool).tril(6).expand(2, 1, 6, 12)
    torch.testing.assert_close(
        read(model, cache, NEXT, attention_mask=causal), read(model, full, NEXT, attention_mask=causal), rtol=1e-4, atol=1e-4
    )
