"""Every way to generate: each against one forward a token under the same cache, or against the full cache."""

import copy
import functools

import pytest
import torch
import zoo
from tiny import tiny_kernels, tiny_llama
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from less_cache import CORM, H2O, AttentionMatching, LESSCache, LESSError, SinkRecent

FITTED = AttentionMatching(budget=8, every=5)
POLICIES = [H2O(heavy=4, recent=3), H2O(heavy=0.2, recent=0.1), SinkRecent(sinks=2, recent=5), CORM(window=4, recent=3), FITTED]
NEW = 24

each_policy = pytest.mark.parametrize("policy", POLICIES, ids=repr)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    made = tiny_llama()
    made.generation_config.pad_token_id = 1000  # no token: a draft's mask hides what has the padding's id, from any cache
    return made


@pytest.fixture
def prompt() -> torch.Tensor:
    """Text that repeats itself, so that prompt lookup finds candidates."""
    return torch.randint(1, 97, (1, 6)).repeat(1, 4)


def less(model: PreTrainedModel, policy=POLICIES[0]) -> LESSCache:
    options = {"heads": "adaptive", "slots": "int4", "fit": True} if policy is FITTED else {}
    return LESSCache(model, policy, tiny_kernels(model), **options)


@torch.no_grad()
def feed(model: PreTrainedModel, cache, *blocks: torch.Tensor) -> torch.Tensor:
    """Logits of all tokens of all blocks, `[b, T, vocabulary]`."""
    return torch.cat([model(block, past_key_values=cache).logits for block in blocks], dim=1)


def by_hand(model: PreTrainedModel, cache, block: torch.Tensor, new_tokens: int = NEW) -> torch.Tensor:
    """Greedy continuation of what the cache has seen and `block`: one forward a token."""
    generated = []
    for _ in range(new_tokens):
        block = feed(model, cache, block)[:, -1].argmax(-1, keepdim=True)
        generated.append(block)
    return torch.cat(generated, dim=-1)


class Rounds(BaseStreamer):
    """How many tokens each forward of the target gave."""

    def __init__(self):
        self.lengths = []

    def put(self, value):
        self.lengths.append(value.shape[-1])

    def end(self):
        self.lengths = self.lengths[1:]  # the first is the prompt


def speculate(model: PreTrainedModel, prompt: torch.Tensor, cache=None, **options) -> tuple[torch.Tensor, list[int]]:
    """The new tokens, and how many came with each forward."""
    rounds = Rounds()
    sequences = model.generate(prompt, past_key_values=cache, max_new_tokens=NEW, do_sample=False, streamer=rounds, **options)
    return sequences[:, prompt.shape[1] :], rounds.lengths


def drafting(model: PreTrainedModel, cache: LESSCache | None = None, draft_length: int = 4) -> PreTrainedModel:
    """`model` as an assistant, with a cache of its own."""
    draft = copy.copy(model)
    draft.generation_config = copy.deepcopy(model.generation_config)
    draft.generation_config.num_assistant_tokens = draft_length
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0
    if cache is not None:
        cache.activate_past_recording()
        draft.generate = functools.partial(draft.generate, past_key_values=cache)
    return draft


# Prompt lookup and assisted decoding


@each_policy
def test_prompt_lookup_after_a_prefilled_prompt_is_greedy(policy):
    model = tiny_llama(vocab_size=6)  # few words: text repeats itself
    prompt = torch.randint(1, 6, (1, 24))
    cache, greedy = less(model, policy), less(model, policy)
    feed(model, cache, prompt[:, :-1])
    feed(model, greedy, prompt[:, :-1])
    tokens, rounds = speculate(model, prompt, cache, prompt_lookup_num_tokens=4)
    assert torch.equal(tokens, by_hand(model, greedy, prompt[:, -1:]))
    assert 1 < len(rounds) < NEW  # some candidates were accepted, not all
    assert cache.get_seq_length() == greedy.get_seq_length()
    more = torch.randint(1, 6, (1, 5)).split(1, dim=1)
    logits = (feed(model, each, tokens[:, -1:], *more) for each in (cache, greedy))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_prompt_lookup_in_a_later_turn(model, prompt):
    """New text and candidates come in one block: text after a prompt is read as one forward a token."""
    cache, greedy = less(model), less(model)
    feed(model, cache, prompt[:, :9])
    feed(model, greedy, prompt[:, :9], *prompt[:, 9:-1].split(1, dim=1))
    tokens, _ = speculate(model, prompt, cache, prompt_lookup_num_tokens=4)
    assert torch.equal(tokens, by_hand(model, greedy, prompt[:, -1:]))


@each_policy
@pytest.mark.parametrize("seed", [0, 1], ids=["candidates accepted", "candidates rejected"])
def test_candidates_in_the_first_block_count_as_the_prompts_end(policy, seed, model, prompt):
    """Accepted in the first round: what the full cache would give. After it: greedy on the prompt that they lengthen."""
    tokens, rounds = speculate(model, prompt, less(model, policy), assistant_model=drafting(tiny_llama(seed=seed)))
    accepted = rounds[0] - 1
    assert accepted == (4 if seed == 0 else 0)
    full = by_hand(model, DynamicCache(config=model.config), prompt, rounds[0])
    assert torch.equal(tokens[:, : rounds[0]], full)
    lengthened = torch.cat([prompt, tokens[:, :accepted]], dim=1)
    assert torch.equal(tokens[:, accepted:], by_hand(model, less(model, policy), lengthened, NEW - accepted))


@each_policy
def test_self_speculation_gives_what_the_full_cache_gives(policy, model, prompt):
    draft_cache = less(model, policy)
    tokens, rounds = speculate(model, prompt, assistant_model=drafting(model, draft_cache))
    assert torch.equal(tokens, by_hand(model, DynamicCache(config=model.config), prompt))
    assert sum(rounds) == NEW and 1 < len(rounds) < NEW


@each_policy
def test_less_on_target_and_assistant_is_greedy(policy, model, prompt):
    """The same cache drafts and verifies, so every draft is accepted: the assistant's rollback is exact, too."""
    target, draft, greedy = (less(model, policy) for _ in range(3))
    for cache in (target, draft, greedy):
        feed(model, cache, prompt[:, :-1])
    tokens, rounds = speculate(model, prompt, target, assistant_model=drafting(model, draft))
    assert torch.equal(tokens, by_hand(model, greedy, prompt[:, -1:]))
    assert rounds[:-1] == [5] * (NEW // 5)


@pytest.mark.parametrize("family", ["gemma3_text", "falcon", "opt"])
def test_prompt_lookup_in_other_families(family, prompt):
    model = zoo.build(family)
    tokens, _ = speculate(model, prompt, LESSCache(model, H2O(64, 64)), prompt_lookup_num_tokens=4)
    assert torch.equal(tokens, by_hand(model, DynamicCache(config=model.config), prompt))


def test_speculative_sampling(model, prompt):
    """A budget above the length samples what a full cache samples."""
    drawn = []
    for cache in (DynamicCache(config=model.config), less(model, H2O(64, 64))):
        torch.manual_seed(1)
        options = {"assistant_model": drafting(model), "do_sample": True, "temperature": 2.0}
        drawn.append(model.generate(prompt, past_key_values=cache, max_new_tokens=NEW, **options))
    assert torch.equal(*drawn)


def test_a_padded_conversation_that_comes_again_is_refused(model, prompt):
    cache = less(model)
    padded = torch.nn.functional.pad(prompt, (2, 0))
    mask = (padded > 0).long()
    with torch.no_grad():
        model(padded[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
    with pytest.raises(LESSError, match="without padding: assisted decoding passes all of it again"):
        model.generate(padded, attention_mask=mask, past_key_values=cache, prompt_lookup_num_tokens=4, max_new_tokens=4)


# Beams and several sequences


def log_probabilities(model: PreTrainedModel, cache, blocks: list[torch.Tensor], sequences: torch.Tensor) -> torch.Tensor:
    """log p of each of the last tokens of `sequences` under the cache, `[b, new]`: the prompt's blocks, then one by one."""
    prompt_length = sum(block.shape[1] for block in blocks)
    new = sequences[:, prompt_length:]
    logits = feed(model, cache, *blocks, *new[:, :-1].split(1, dim=1))[:, prompt_length - 1 :]
    return logits.log_softmax(-1).gather(-1, new.unsqueeze(-1)).squeeze(-1)


@each_policy
@pytest.mark.parametrize("prefilled", [False, True], ids=["whole prompt", "prefilled"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["beam search", "beam sampling"])
def test_beams_have_the_scores_of_their_own_text(policy, prefilled, do_sample, model):
    """Every beam's score is what its tokens get on a cache of their own: reordering carried all state along."""
    prompt = torch.randint(1, 97, (2, 30))
    beams, kept = 4, 3
    cache = less(model, policy)
    blocks = [prompt]
    if prefilled:
        feed(model, cache, prompt[:, :-1])
        cache.batch_repeat_interleave(beams)
        blocks = [prompt[:, :-1], prompt[:, -1:]]
    options = {"do_sample": True, "top_k": 0, "temperature": 1.0} if do_sample else {}
    output = model.generate(
        prompt,
        past_key_values=cache,
        max_new_tokens=12,
        num_beams=beams,
        num_return_sequences=kept,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    blocks = [block.repeat_interleave(kept, dim=0) for block in blocks]
    expected = log_probabilities(model, less(model, policy), blocks, output.sequences).sum(-1)
    torch.testing.assert_close(output.sequences_scores, expected, rtol=1e-4, atol=1e-3)
    assert len({tuple(sequence) for sequence in output.sequences.tolist()}) == 2 * kept
    indices = output.beam_indices[:, :12]
    assert (indices[:, 1:] != indices[:, :-1]).any()  # beams did change places


@each_policy
def test_several_sequences_are_each_their_own(policy, model):
    prompt = torch.randint(1, 97, (2, 30))
    output = model.generate(
        prompt,
        past_key_values=less(model, policy),
        max_new_tokens=10,
        do_sample=True,
        num_return_sequences=3,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = feed(model, less(model, policy), prompt.repeat_interleave(3, 0), *output.sequences[:, 30:-1].split(1, dim=1))
    torch.testing.assert_close(torch.stack(output.logits, dim=1), logits[:, 29:], rtol=1e-4, atol=1e-4)


@each_policy
def test_rows_selected_under_inference_mode_go_on_outside_of_it(policy, model):
    prompt, token = torch.randint(1, 97, (2, 30)), torch.randint(1, 97, (4, 1))
    cache, other = less(model, policy), less(model, policy)
    with torch.inference_mode():
        model(prompt, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0, 1, 2]))
        cache = cache.fork()
    rows = prompt.repeat_interleave(2, dim=0)[[3, 0, 1, 2]]
    feed(model, other, rows)
    assert torch.equal(feed(model, cache, token, token), feed(model, other, token, token))
    for one, two in zip(cache.layers, other.layers, strict=True):
        expected = two.tensors()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in one.tensors().items())


# One prefix, several continuations


@each_policy
@pytest.mark.parametrize("fork", [LESSCache.fork, copy.deepcopy], ids=["fork", "deepcopy"])
def test_forks_go_their_own_ways(policy, fork, model, prompt):
    prefix = less(model, policy)
    feed(model, prefix, prompt[:, :-1])
    questions = [torch.randint(1, 97, (1, length)) for length in (1, 4, 9)]
    for question in questions:
        alone = less(model, policy)
        feed(model, alone, prompt[:, :-1])
        assert torch.equal(by_hand(model, fork(prefix), question), by_hand(model, alone, question))
    assert prefix.get_seq_length() == prompt.shape[1] - 1


def test_a_fork_shares_the_kernels_and_no_other_tensor(model, prompt):
    prefix = less(model)
    feed(model, prefix, prompt)
    other = copy.deepcopy(prefix)
    assert other.kernels is prefix.kernels and other.policy is prefix.policy
    for one, two in zip(prefix.layers, other.layers, strict=True):
        assert one.setup.memory is two.setup.memory
        pointers = [{tensor.data_ptr() for tensor in layer.tensors().values()} for layer in (one, two)]
        assert pointers[0].isdisjoint(pointers[1])


def test_a_hybrid_forks_its_own_layers(prompt):
    model = zoo.build("gemma3_text")
    prefix, alone = LESSCache(model, H2O(4, 3)), LESSCache(model, H2O(4, 3))
    feed(model, prefix, prompt)
    feed(model, alone, prompt)
    by_hand(model, prefix.fork(), prompt[:, :3])
    assert torch.equal(feed(model, prefix, prompt[:, :1]), feed(model, alone, prompt[:, :1]))


# What surrounds generate


@each_policy
def test_stopping_early_and_going_on(policy, model, prompt):
    """A stopping criterion ends the first call; the second goes on with the whole history."""

    def seven_more(input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= prompt.shape[1] + 7)

    cache = less(model, policy)
    options = {"past_key_values": cache, "do_sample": False}
    history = model.generate(prompt, max_new_tokens=NEW, stopping_criteria=[seven_more], **options)
    assert history.shape[1] == prompt.shape[1] + 7
    history = model.generate(history, max_new_tokens=NEW - 7, **options)
    assert torch.equal(history[:, prompt.shape[1] :], by_hand(model, less(model, policy), prompt))


def test_logits_processors_and_scores(model):
    prompt = torch.randint(1, 97, (2, 30))
    options = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "bad_words_ids": [[5]], "renormalize_logits": True}
    outputs = []
    for cache in (DynamicCache(config=model.config), less(model, H2O(64, 64))):
        output = model.generate(
            prompt,
            past_key_values=cache,
            max_new_tokens=NEW,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
        outputs.append(output)
    full, ours = outputs
    assert torch.equal(full.sequences, ours.sequences)
    torch.testing.assert_close(torch.stack(full.scores), torch.stack(ours.scores), rtol=1e-4, atol=1e-4)
    assert len(ours.scores) == NEW


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_policy
def test_half_precision_is_near_float32(policy, dtype, model):
    """On the same tokens, far nearer than the cache is to the full one; not equal, as rounding may move a choice."""
    tokens = torch.randint(1, 97, (2, 40))
    half = tiny_llama().to(dtype)
    caches = less(model, policy), LESSCache(half, policy, tiny_kernels(model))
    exact = feed(model, DynamicCache(config=model.config), tokens)
    logits = feed(half, caches[1], tokens[:, :30], *tokens[:, 30:].split(1, dim=1))
    expected = feed(model, caches[0], tokens[:, :30], *tokens[:, 30:].split(1, dim=1))
    assert logits.dtype == dtype and logits.isfinite().all()
    assert (logits.float() - expected).abs().mean() < 0.25 * (exact - expected)[:, 30:].abs().mean()


def test_offload_and_prefetch_move_everything(model, prompt):
    """Seen on the device that is no device: every tensor goes there and none is left behind."""
    cache = less(model)
    feed(model, cache, prompt)
    layer = cache.layers[0]
    before = {name: tensor.clone() for name, tensor in layer.tensors().items()}
    layer.offload()
    layer.prefetch()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.tensors().items())
    layer.device = torch.device("meta")
    layer.prefetch()
    assert {tensor.device.type for tensor in layer.tensors().values()} == {"meta"}
    assert layer.tensors().keys() == before.keys() and len(before) == 9
