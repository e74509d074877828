"""The static form: what the dynamic form does, in fixed shapes at fixed addresses, and compiled into one graph."""

import copy
import functools
import shutil

import pytest
import torch
import zoo
from tiny import tiny_kernels, tiny_llama
from torch._dynamo import lookup_backend
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, PreTrainedModel

from less_cache import CORM, H2O, LESSCache, LESSError, LESSKernels, SinkRecent
from less_cache.backends import select
from less_cache.cache import guards
from less_cache.cache.layer import LESSLayer
from less_cache.slots import slots

POLICIES = [H2O(heavy=4, recent=3), H2O(heavy=0.2, recent=0.1), SinkRecent(sinks=2, recent=5)]
KERNELS = {
    "sparse": lambda model: None,
    "low_rank": tiny_kernels,
    "soft_centroids": functools.partial(tiny_kernels, memory="soft_centroids"),
    "untrained": LESSKernels.untrained,
}

each_policy = pytest.mark.parametrize("policy", POLICIES, ids=repr)
each_kernels = pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)


def both(model: PreTrainedModel, policy=POLICIES[0], kernels=tiny_kernels) -> tuple[LESSCache, LESSCache]:
    """The dynamic and the static form of one cache."""
    shared = kernels(model)
    return LESSCache(model, policy, shared), LESSCache(model, policy, shared, static=True)


def padded_prompts() -> dict[str, torch.Tensor]:
    """Four rows of different lengths."""
    rows = [torch.randint(1, 97, (length,)) for length in (30, 23, 5, 1)]
    ids = torch.stack([torch.nn.functional.pad(row, (30 - len(row), 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def generate(model: PreTrainedModel, cache: LESSCache, prompt: dict[str, torch.Tensor], **options):
    options = {"max_new_tokens": 16, "do_sample": False, "output_logits": True, **options}
    return model.generate(**prompt, past_key_values=cache, return_dict_in_generate=True, **options)


@torch.no_grad()
def decode(forward, cache: LESSCache, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of `tokens` `[b, T]`, one forward each."""
    return torch.cat([forward(token, past_key_values=cache).logits for token in tokens.split(1, dim=1)], dim=1)


@torch.no_grad()
def read(model: PreTrainedModel, cache: LESSCache, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, past_key_values=cache).logits


def assert_same_state(one: LESSCache, other: LESSCache, exactly: bool = True) -> None:
    assert one.get_seq_length() == other.get_seq_length()
    for left, right in zip(one.layers, other.layers, strict=True):
        if not hasattr(left, "tensors"):
            continue
        expected = right.tensors()
        assert left.tensors().keys() == expected.keys()
        for name, tensor in left.tensors().items():
            tolerance = 0 if exactly else 1e-4
            torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance)


def addresses(cache: LESSCache) -> list[int]:
    tensors = [tensor for layer in cache.layers for tensor in (*layer.tensors().values(), layer.cumulative_length)]
    return [tensor.data_ptr() for tensor in tensors]


class Backend:
    """Counts the graphs that torch.compile hands over, and runs them as they are, or through `backend`."""

    def __init__(self, backend: str | None = None):
        torch._dynamo.reset()
        self.graphs = 0
        self.backend = backend

    def __call__(self, graph, inputs, **options):
        self.graphs += 1
        return lookup_backend(self.backend)(graph, inputs) if self.backend else graph.forward

    def __deepcopy__(self, memo):  # generate copies its configuration
        return self


def compiled(model: PreTrainedModel):
    """The model compiled as a whole, and the backend that counts."""
    backend = Backend()
    return torch.compile(model, backend=backend, fullgraph=True), backend


# Against the dynamic form, not compiled


@each_policy
@each_kernels
def test_same_logits_and_state(policy, kernels):
    model, prompt = tiny_llama(), padded_prompts()
    dynamic, static = both(model, policy, kernels)
    expected, output = generate(model, dynamic, prompt), generate(model, static, prompt)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), rtol=0, atol=1e-5)
    assert_same_state(static, dynamic)
    assert static.memory_footprint() == dynamic.memory_footprint()


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_same_in_every_family(family):
    model, prompt = zoo.build(family), padded_prompts()
    dynamic, static = both(model)
    assert torch.equal(generate(model, static, prompt).sequences, generate(model, dynamic, prompt).sequences)
    assert static.is_compileable and not dynamic.is_compileable
    assert_same_state(static, dynamic, exactly=False)  # transformers' own static layers round differently


@each_policy
def test_turns_chunks_and_a_second_text(policy):
    model = tiny_llama()
    dynamic, static = both(model, policy)
    for batch in (2, 2, 3):
        for block in torch.randint(1, 97, (batch, 40)).split([12, 9, 1, 1, 8, 1, 1, 7], dim=1):
            torch.testing.assert_close(read(model, static, block), read(model, dynamic, block))
            assert_same_state(static, dynamic)
        for cache in (static, dynamic):
            cache.reset()
        assert static.get_seq_length() == 0


@each_policy
def test_beams(policy):
    model, prompt = tiny_llama(), padded_prompts()
    dynamic, static = both(model, policy)
    options = {"num_beams": 3, "output_logits": False}
    expected, output = generate(model, dynamic, prompt, **options), generate(model, static, prompt, **options)
    assert torch.equal(output.sequences, expected.sequences)
    assert_same_state(static, dynamic)


def test_rows_repeated_and_selected():
    model, token = tiny_llama(), torch.randint(1, 97, (4, 1))
    dynamic, static = both(model)
    for cache in (dynamic, static):
        read(model, cache, torch.arange(1, 41).view(2, 20))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0, 0, 2]))
    assert torch.equal(read(model, static, token), read(model, dynamic, token))
    assert_same_state(static, dynamic)


def test_made_and_filled_under_inference_mode():
    model = tiny_llama()
    prompt, token = torch.randint(1, 97, (1, 30)), torch.randint(1, 97, (1, 1))
    with torch.inference_mode():
        dynamic, static = both(model)
        for cache in (dynamic, static):
            read(model, cache, prompt)
        fork = static.fork()
    expected = read(model, dynamic, token)
    for cache in (static, fork):
        assert torch.equal(read(model, cache, token), expected)
        cache.reset()


@pytest.mark.parametrize("fork", [LESSCache.fork, copy.deepcopy], ids=["fork", "deepcopy"])
def test_forks_go_their_own_ways(fork):
    model = tiny_llama()
    prompt, question, token = (torch.randint(1, 97, (1, length)) for length in (30, 5, 1))
    dynamic, static = both(model)
    for cache in (dynamic, static):
        read(model, cache, prompt)
    other = fork(static)
    assert set(addresses(other)).isdisjoint(addresses(static))
    read(model, other, question)
    read(model, other, token)
    assert_same_state(static, dynamic)
    assert torch.equal(read(model, static, token), read(model, dynamic, token))


@pytest.mark.parametrize("saved_static, loaded_static", [(True, False), (False, True), (True, True)])
def test_saved_in_one_form_and_loaded_in_the_other(saved_static, loaded_static, tmp_path):
    model, token = tiny_llama(), torch.randint(1, 97, (1, 1))
    cache = LESSCache(model, POLICIES[0], static=saved_static)
    read(model, cache, torch.randint(1, 97, (1, 30)))
    cache.save(tmp_path / "cache.safetensors")
    loaded = LESSCache.load(tmp_path / "cache.safetensors", model, static=loaded_static)
    assert loaded.is_compileable == loaded_static
    assert_same_state(loaded, cache)
    assert torch.equal(read(model, loaded, token), read(model, cache, token))
    assert_same_state(loaded, cache)


def test_ways_to_ask_for_it(monkeypatch, tmp_path):
    model = tiny_llama()
    kernels = tiny_kernels(model)
    kernels.config.policy = POLICIES[0].to_dict()
    kernels.save_pretrained(tmp_path)
    assert LESSCache.from_pretrained(tmp_path, model, static=True).is_compileable
    for known in (kernels, None):
        monkeypatch.setattr("less_cache.hub.resolution.kernels_for", lambda model, token, known=known: known)
        assert LESSCache.for_model(model, static=True).is_compileable
        assert not LESSCache.for_model(model).is_compileable


# What does not move, and what does not wait


@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[2]], ids=repr)
@each_kernels
def test_addresses_stay(policy, kernels):
    """Over steps, a second turn, beams that change places, and another text after a reset."""
    model = tiny_llama()
    _, static = both(model, policy, kernels)
    read(model, static, torch.randint(1, 97, (2, 30)))
    before = addresses(static)
    decode(model, static, torch.randint(1, 97, (2, 3)))
    read(model, static, torch.randint(1, 97, (2, 9)))
    static.reorder_cache(torch.tensor([1, 1]))
    footprint = static.memory_footprint()
    static.reset()
    assert static.memory_footprint().total == footprint.total  # the buffers are still held
    read(model, static, torch.randint(1, 97, (2, 13)))
    assert addresses(static) == before
    assert len(set(before)) == 2 * (len(static.layers[0].tensors()) + 1)
    for tensor in static.layers[0].tensors().values():
        assert tensor._dynamo_static_input_type == "unguarded"  # what torch.compile reads before it uses CUDA graphs


class HostReads(TorchDispatchMode):
    """Counts the operations that hand a value of the device to Python, or give a shape that depends on one."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        self.count += name in ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "unique")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[2]], ids=repr)
@each_kernels
def test_a_step_waits_for_no_device(policy, kernels, monkeypatch):
    monkeypatch.setattr(guards, "READ_AT_ONCE", set())  # as on a GPU
    monkeypatch.setattr(select, "BACKENDS", {})
    model = tiny_llama()
    dynamic, static = both(model, policy, kernels)
    mask = torch.ones(2, 1, 1, 1, dtype=torch.bool)
    for cache, expected in ((static, 0), (dynamic, 2)):  # the first dynamic layer checks that the text goes on
        read(model, cache, torch.randint(1, 97, (2, 30)))
        with torch.no_grad(), HostReads() as reads:
            model(torch.ones(2, 1, dtype=torch.long), attention_mask=mask, past_key_values=cache)
        assert reads.count == expected


# Compiled


def test_one_graph_for_1000_steps_and_a_second_cache():
    model = tiny_llama(num_hidden_layers=1)
    forward, backend = compiled(model)
    dynamic, static = both(model)
    _, second = both(model)
    prompt, tokens = torch.randint(1, 97, (2, 30)), torch.randint(1, 97, (2, 1_000))
    for cache in (dynamic, static, second):
        read(model, cache, prompt)
    torch.testing.assert_close(decode(forward, static, tokens), decode(model, dynamic, tokens), rtol=1e-4, atol=1e-4)
    assert_same_state(static, dynamic, exactly=False)
    decode(forward, second, tokens[:, :5])
    static.reset()
    read(model, static, prompt)
    decode(forward, static, tokens[:, :5])
    assert_same_state(static, second)
    assert backend.graphs == 1


@pytest.mark.parametrize("policy, kernels", [(POLICIES[1], "untrained"), (POLICIES[2], "sparse")], ids=str)
def test_one_graph_for_other_policies(policy, kernels):
    model = tiny_llama("eager")
    forward, backend = compiled(model)
    dynamic, static = both(model, policy, KERNELS[kernels])
    prompt, tokens = torch.randint(1, 97, (2, 30)), torch.randint(1, 97, (2, 20))
    for cache in (dynamic, static):
        read(model, cache, prompt)
    torch.testing.assert_close(decode(forward, static, tokens), decode(model, dynamic, tokens), rtol=1e-4, atol=1e-4)
    assert_same_state(static, dynamic, exactly=False)
    assert backend.graphs == 1


@pytest.mark.parametrize("family", ["falcon", "gemma3_text"])
def test_families_compile(family):
    """Sliding layers are transformers' own: they count in Python, which costs a second graph, once."""
    model = zoo.build(family)
    forward, backend = compiled(model)
    dynamic, *static = (*both(model), both(model)[1])
    prompt, tokens = torch.randint(1, 97, (1, 30)), torch.randint(1, 97, (1, 20))
    for cache in (dynamic, *static):
        read(model, cache, prompt)
    expected = decode(model, dynamic, tokens)
    for cache in static:
        torch.testing.assert_close(decode(forward, cache, tokens), expected, rtol=1e-4, atol=1e-4)
    assert backend.graphs == (1 if family == "falcon" else 2)


def test_generate_compiles_by_itself():
    """As it does on a GPU; in-place updates survive functionalization. A second call, cache and text compile nothing."""
    model, backend = tiny_llama(), Backend("aot_eager")
    configuration = CompileConfig(backend=backend, fullgraph=True)
    assert hasattr(configuration, "_compile_all_devices"), "transformers compiles on a CPU by another switch now"
    configuration._compile_all_devices = True
    dynamic, static = both(model)
    _, second = both(model)
    for cache in (static, second, static):
        prompt = padded_prompts()
        cache.reset()
        dynamic.reset()
        output = generate(model, cache, prompt, compile_config=configuration)
        expected = generate(model, dynamic, prompt)
        assert torch.equal(output.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)
        assert_same_state(cache, dynamic, exactly=False)
    assert backend.graphs == 1


def test_chunks_of_a_prompt_in_a_compiled_model():
    """generate compiles them, too: their attention runs as it is."""
    model = tiny_llama(num_hidden_layers=1)
    dynamic, static = both(model)
    chunks = torch.randint(1, 97, (2, 21)).split([12, 9], dim=1)
    forward = torch.compile(model, backend=Backend())
    for chunk in chunks:
        torch.testing.assert_close(read(forward, static, chunk), read(model, dynamic, chunk), rtol=1e-4, atol=1e-4)
    assert_same_state(static, dynamic, exactly=False)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.skipif(not slots.COMPILES_WELL, reason="torch before 2.13 makes machine code of a step that does not run")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_compiled_to_machine_code_nothing_as_large_as_the_kept_keys_is_copied(monkeypatch):
    """In-place writes that the compiler would make out of place cost a copy of all slots in every step."""
    torch._dynamo.reset()
    model, tokens = tiny_llama(num_hidden_layers=1), torch.randint(1, 97, (2, 20))
    dynamic, static = both(model, H2O(50, 50), KERNELS["soft_centroids"])
    prompt = torch.randint(1, 97, (2, 130))
    for cache in (dynamic, static):
        read(model, cache, prompt)
    expected = decode(model, dynamic, tokens)
    monkeypatch.setattr(LESSLayer, "_step", torch.compile(LESSLayer._step))
    output, (code, *_) = run_and_get_code(decode, model, static, tokens)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert_same_state(static, dynamic, exactly=False)
    keys = static.layers[0].keys
    allocated = [line for line in code.splitlines() if "empty_strided_cpu(" in line]
    assert allocated and not any(str(tuple(keys.shape)) in line for line in allocated)


# What it cannot do


def test_a_policy_without_a_budget_is_refused():
    with pytest.raises(LESSError, match=r"a policy with a budget for static=True, got CORM.*Use a policy such as H2O"):
        LESSCache(tiny_llama(), CORM(4, 4), static=True)


def test_layers_that_grow_are_refused():
    with pytest.raises(LESSError, match=r"got MiniMaxM3VL.*StaticCacheLayer, which grows with the text. Use static=False"):
        LESSCache(zoo.build("minimax_m3_vl_text"), POLICIES[0], static=True)


@pytest.mark.parametrize(
    "give_back",
    [
        lambda model, cache: cache.activate_past_recording(),
        lambda model, cache: cache.crop(0),
        lambda model, cache: cache.crop(-1),
        lambda model, cache: generate(model, cache, padded_prompts(), prompt_lookup_num_tokens=3),
    ],
    ids=["record", "crop nothing", "crop", "prompt lookup"],
)
def test_tokens_are_not_given_back(give_back):
    model = tiny_llama()
    dynamic, static = both(model)
    prompt, token = torch.randint(1, 97, (1, 30)), torch.randint(1, 97, (1, 1))
    for cache in (dynamic, static):
        read(model, cache, prompt)
    with pytest.raises(LESSError, match=r"static=True cannot give tokens back, .* Use static=False"):
        give_back(model, static)
    assert torch.equal(read(model, static, token), read(model, dynamic, token))


def test_a_shorter_prompt_is_refused():
    model = tiny_llama()
    _, static = both(model)
    prompt = {"input_ids": torch.randint(1, 97, (1, 30))}
    generate(model, static, prompt)
    with pytest.raises(LESSError, match=r"call cache\.reset"):
        generate(model, static, prompt)
