"""Training: the simulation equals the cache it stands for, runs survive anything, the model is left alone."""

import dataclasses
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
import zoo
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, MistralForCausalLM

from less_cache import CORM, H2O, POLICIES, LESSCache, LESSError, LESSKernels, SinkRecent
from less_cache.backends import cpu as native
from less_cache.backends.cpu import build
from less_cache.cache.layer import LESSLayer
from less_cache.files import atomic
from less_cache.integration import hook
from less_cache.memory import MEMORIES
from less_cache.ops.attention import attention_logits
from less_cache.training import TokenSampler, TrainingOptions, estimate, train
from less_cache.training import joint as joint_module
from less_cache.training import layers as layers_module
from less_cache.training.capture import CaptureLayer, Shard, layer_folder, shard_path
from less_cache.training.data import hub_text, own_text
from less_cache.training.joint import distances
from less_cache.training.layers import StudentLayer, TeacherLayer, apart, roll_layers, student_cache, teacher_cache
from less_cache.training.options import Example, draw_examples, falling
from less_cache.training.processes import Processes
from less_cache.training.simulate import Decode, attend, columns
from less_cache.training.work import load_tensors

TINY = TrainingOptions(
    prompts=(6, 10),
    prompts_per_sequence=2,
    decoded=4,
    sequences=3,
    layerwise_steps=3,
    joint_steps=3,
    batch_size=2,
    hidden_size=4,
    checkpoint_every=1,
)


TESTS = Path(__file__).parent


def sampler() -> TokenSampler:
    return TokenSampler([[torch.arange(300) * 7 % tiny.VOCAB]])


def equal(left: LESSKernels, right: LESSKernels) -> bool:
    return all(torch.equal(tensor, right.state_dict()[name]) for name, tensor in left.state_dict().items())


@pytest.mark.parametrize("policy", [H2O(3, 2), SinkRecent(2, 3), CORM(3, 2)], ids=lambda policy: policy.name)
@pytest.mark.parametrize("memory", [None, *MEMORIES])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_simulated_decoding_equals_the_cache(policy, memory, with_sinks):
    b, h, g, d, p, n = 2, 4, 2, 8, 11, 9
    queries, keys, values = tiny.random_states(b, h, g, p + n, d)
    kernels = tiny.layer_kernels(h, g, d, memory=memory) if memory else None
    sinks = {"s_aux": torch.linspace(-1, 2, h)} if with_sinks else {}
    cached = tiny.feed(LESSLayer(policy, kernels, 0), queries, keys, values, [p] + [1] * n, **sinks)[:, :, p:]

    teacher = TeacherLayer()
    teacher.attend(tiny.plain_attention, torch.nn.Identity(), queries, keys, values, None, scaling=d**-0.5, **sinks)
    example = Example(p, policy)
    (decode,) = roll_layers([teacher], example, list(teacher.scores_after([example])), n)
    logits = attention_logits(queries[:, :, p:], columns(keys, decode.order, p), decode.visible, d**-0.5)
    simulated = attend(decode, queries[:, :, p:], keys, values, kernels, logits, d**-0.5, sinks=teacher.sinks)
    torch.testing.assert_close(simulated, cached, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", [None, *MEMORIES])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_a_student_knows_how_far_its_attention_is_from_a_full_cache(memory, with_sinks):
    h, g, d, p, n = 4, 2, 8, 20, 6
    queries, keys, values = tiny.random_states(1, h, g, p + n, d)
    teacher, module = TeacherLayer(), torch.nn.Identity()
    sinks = {"s_aux": torch.linspace(-1, 2, h)} if with_sinks else {}
    dense, _ = teacher.attend(tiny.plain_attention, module, queries, keys, values, None, scaling=d**-0.5, **sinks)
    example = Example(p, SinkRecent(2, 3))
    (decode,) = roll_layers([teacher], example, list(teacher.scores_after([example])), n)
    kernels = tiny.layer_kernels(h, g, d, memory=memory) if memory else None
    student = StudentLayer(teacher, decode, kernels)
    output, _ = student.attend(tiny.plain_attention, module, *(x[:, :, p:] for x in (queries, keys, values)), None)
    mine, full = output[:, [1, 5]], dense[:, [p + 1, p + 5]]  # the last token and every fourth before it
    torch.testing.assert_close(student.error, (mine - full).square().sum() / full.square().sum(), rtol=1e-4, atol=1e-6)
    assert student.error > 1e-3

    all_kept = Example(p, SinkRecent(p, n))
    (decode,) = roll_layers([teacher], all_kept, list(teacher.scores_after([all_kept])), n)
    student = StudentLayer(teacher, decode, None)
    student.attend(tiny.plain_attention, module, *(x[:, :, p:] for x in (queries, keys, values)), None)
    assert student.error < 1e-10


def test_a_centroid_that_has_faded_has_finite_gradients():
    """Only the five oldest pairs are evicted, so long ago that a value over what is left of them is no float any more."""
    h, g, d, p, n = 4, 2, 8, 60, 3
    queries, keys, values = tiny.random_states(1, h, g, p + n, d)
    values[:, :, :5] *= 100
    kernels = tiny.layer_kernels(h, g, d, memory="soft_centroids").requires_grad_(True)
    torch.nn.init.constant_(kernels.fading, 1.24)  # e^(−1.24² · 56) = 4e-38, and 1e-38 is the smallest normal float
    keep = (torch.arange(p) >= 5).expand(1, g, p)
    order = torch.arange(5, p).expand(1, g, p - 5)
    visible = torch.ones(1, g, n, p - 5 + n, dtype=torch.bool).tril(p - 5)
    decode = Decode(keep, order, visible, torch.zeros_like(visible))
    logits = attention_logits(queries[:, :, p:], columns(keys, order, p), visible, d**-0.5)
    attend(decode, queries[:, :, p:], keys, values, kernels, logits, d**-0.5).square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in kernels.parameters())


def test_scores_go_on_from_a_shorter_prompt():
    queries, keys, values = tiny.random_states(2, 4, 2, 60, 8)
    teacher = TeacherLayer()
    teacher.attend(tiny.plain_attention, torch.nn.Identity(), queries, keys, values, None, scaling=8**-0.5)
    short, other, long = Example(7, H2O(2, 2)), Example(30, CORM(3, 2)), Example(60, H2O(4, 4))
    for example, scores in zip((short, other, long), teacher.scores_after([short, other, long]), strict=True):
        (alone,) = teacher.scores_after([example])
        torch.testing.assert_close(scores, alone)


@pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler here")
def test_scores_come_from_the_fused_form_where_there_is_one():
    teacher = TeacherLayer()
    teacher.queries, teacher.keys, teacher.values = tiny.random_states(1, 6, 2, 40, 64)
    teacher.scaling, teacher.softcap, teacher.sinks = 0.125, None, None
    examples = [Example(30, H2O(4, 4)), Example(40, H2O(2, 2))]
    with mock.patch.object(native, "read_prompt", wraps=native.read_prompt) as read:
        fused = list(teacher.scores_after(examples))
    assert read.call_count == 2
    with mock.patch.dict("less_cache.backends.select.BACKENDS", clear=True):
        for mine, expected in zip(fused, teacher.scores_after(examples), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_training_lowers_the_error_of_each_layer(tmp_path):
    options = dataclasses.replace(TINY, sequences=8, layerwise_steps=60, joint_steps=0, hidden_size=16)
    train(tiny.tiny_llama(), sampler(), options, tmp_path)
    records = json.loads((tmp_path / "training_log.json").read_text())["layers"]
    assert [record["layer"] for record in records] == [0, 1]
    for record in records:
        assert record["after"] < record["before"]


def test_joint_training_lowers_the_divergence(tmp_path):
    """On one sequence, policy and budget, the same at every step."""
    same = {"prompts": (10,), "policies": ("sink_recent",), "least_budget": 0.4, "most_budget": 0.4, "batch_size": 1}
    options = dataclasses.replace(TINY, layerwise_steps=0, joint_steps=30, joint_learning_rate=3e-2, hidden_size=16, **same)
    train(tiny.tiny_llama(), TokenSampler([[torch.arange(14) * 7 % tiny.VOCAB]]), options, tmp_path)
    losses = json.loads((tmp_path / "training_log.json").read_text())["joint"]
    assert losses[-1] < 0.6 * losses[0]


def test_how_far_layers_are_apart():
    dense = [torch.ones(1, 4, 8) * 5, torch.ones(1, 4, 8), torch.ones(1, 4, 8) * 2]
    student = [torch.zeros(1, 4, 8), torch.ones(1, 4, 8) * 1.5, torch.ones(1, 4, 8) * 2]
    assert distances(student, dense).tolist() == [0.25, 0]  # not of the embeddings, which come first


@pytest.mark.parametrize("term", ["what layers hand on", "their attention"])
def test_the_joint_loss_counts_every_layer(term, tmp_path, monkeypatch):
    """Without a term of the layers, the first step's gradient is another one."""
    trained = []
    for weight in (1, 0):
        if term == "what layers hand on":
            monkeypatch.setattr(joint_module, "distances", lambda *states, weight=weight: distances(*states) ** weight)
        else:
            monkeypatch.setattr(layers_module, "apart", lambda *states, weight=weight: apart(*states) ** weight)
        options = dataclasses.replace(TINY, layerwise_steps=0, joint_steps=1)
        trained.append(train(tiny.tiny_llama(), sampler(), options, tmp_path / str(weight)).state_dict())
    assert any((trained[0][name] != trained[1][name]).float().mean() > 0.05 for name in trained[0])


def test_a_model_without_hidden_states_is_an_error(tmp_path, monkeypatch):
    model = tiny.tiny_llama()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, output_hidden_states, **kwargs: forward(*args, **kwargs))
    with pytest.raises(LESSError, match="expected a model that returns its hidden states"):
        train(model, sampler(), dataclasses.replace(TINY, layerwise_steps=0), tmp_path)


# multi-query outside of AttentionInterface, sliding, several streams, sinks, biases
ARCHITECTURES = ("falcon", "gemma3_text", "gemma3n_text", "gpt_oss", "opt")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_second_stage_sees_what_the_cache_computes(name):
    """Under a policy that no query changes, so that the student's own queries keep what the teacher's keep."""
    model, p, n = zoo.build(name), 9, 5
    kernels = tiny.tiny_kernels(model)
    tokens = torch.arange(p + n)[None] * 5 % 97
    example = Example(p, SinkRecent(1, 3))
    hook.install()
    with torch.no_grad():
        dense = teacher_cache(model.config, kernels.config.layers)
        model(tokens, past_key_values=dense)
        teachers = [layer for layer in dense.layers if isinstance(layer, TeacherLayer)]
        scores = [next(teacher.scores_after([example])) for teacher in teachers]
        student = student_cache(dense, example, roll_layers(teachers, example, scores, n), kernels)
        simulated = model(tokens[:, p:], past_key_values=student).logits
        cache = LESSCache(model, example.policy, kernels)
        model(tokens[:, :p], past_key_values=cache)
        stepped = [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(p, p + n)]
    torch.testing.assert_close(simulated, torch.cat(stepped, dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_train_from_start_to_finish(name, tmp_path):
    """Kernels for full-attention layers alone, and a cache that takes them."""
    model = zoo.build(name)
    kernels = train(model, sampler(), TINY, tmp_path)
    cache = LESSCache(model, policy=H2O(3, 3), kernels=kernels)
    assert kernels.config.layers == [index for index, layer in enumerate(cache.layers) if isinstance(layer, LESSLayer)]
    model.generate(torch.arange(20)[None], past_key_values=cache, max_new_tokens=3, do_sample=False)


def test_every_policy_can_be_drawn():
    options = dataclasses.replace(TINY, policies=tuple(POLICIES))
    drawn = {example.policy.name for index in range(20) for example in draw_examples(options, "joint", index)}
    assert drawn == set(POLICIES)


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path, monkeypatch):
    """Interrupted in the middle of every part, once each."""
    whole = train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "whole")
    interruptions = {"capture": 2, "layer 1": 2, "joint": 2}

    def interrupt(stage, done, total, loss=None):
        if interruptions.get(stage) == done:
            del interruptions[stage]
            raise KeyboardInterrupt

    while interruptions:
        with pytest.raises(KeyboardInterrupt):
            train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "resumed", interrupt)
    stages = []
    resumed = train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "resumed", lambda stage, *_: stages.append(stage))
    assert stages == ["layers"] * 2 + ["joint"] * 2 + ["capture"] + ["measure"] * 2, "finished work was done again"
    assert equal(whole, resumed)


SCRIPT = """
    import sys
    sys.path.insert(0, {tests!r})
    import tiny, test_training, torch
    from pathlib import Path
    from less_cache.training import train
    torch.set_num_threads(1)
    kernels = train(tiny.tiny_llama(), test_training.sampler(), test_training.TINY, Path({folder!r}))
    torch.save(kernels.state_dict(), Path({folder!r}) / f"kernels_{{sys.argv[1]}}.pt")
    """


def start(tmp_path: Path, rank: int = 0, **environment: str) -> subprocess.Popen:
    """The tiny run in a process of its own."""
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT.format(tests=str(TESTS), folder=str(tmp_path / "run"))))
    environment |= {"PYTHONPATH": str(TESTS.parent)}
    return subprocess.Popen([sys.executable, str(path), str(rank)], env=os.environ | environment)


def saved(tmp_path: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(tmp_path / "run" / f"kernels_{rank}.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the tiny run ends with, undisturbed; in one thread, as in the script: another number may add in another order."""
    assert torch.get_num_threads() == 1
    return train(tiny.tiny_llama(), sampler(), TINY, tmp_path_factory.mktemp("whole")).state_dict()


@pytest.mark.parametrize("written", ["capture/*/sequence_0000.safetensors", "layers/layer_00.safetensors", "joint.pt"])
def test_a_killed_run_goes_on(written, tmp_path, whole):
    """kill -9 as soon as the first shard, layer or checkpoint is there; another process, this one, goes on."""
    process = start(tmp_path)
    work = tmp_path / "run" / "work"
    while not list(work.glob(written)) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL  # it had not come to its end by itself
    resumed = train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "run").state_dict()
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


def test_two_processes_end_with_the_bytes_of_one(tmp_path, whole):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "1"}
    processes = [start(tmp_path, rank, RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    for rank in range(2):
        assert all(torch.equal(whole[name], tensor) for name, tensor in saved(tmp_path, rank).items()), f"process {rank}"


def test_trained_kernels_serve_the_cache(tmp_path):
    model = tiny.tiny_llama()
    train(model, sampler(), TINY, tmp_path / "run").save_pretrained(tmp_path / "kernels")
    cache = LESSCache(model, policy=H2O(3, 3), kernels=LESSKernels.from_pretrained(tmp_path / "kernels"))
    model.generate(torch.arange(20)[None], past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert cache.get_seq_length() == 22


@pytest.mark.parametrize("fails", [False, True])
def test_training_leaves_the_model_as_it_was(tmp_path, monkeypatch, fails):
    """Flags, modes and the state of the random generator, whether it ends well or not."""
    model = tiny.tiny_llama().train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    before = {name: (parameter.clone(), parameter.requires_grad) for name, parameter in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    draws = torch.random.get_rng_state()
    if fails:
        monkeypatch.setattr(joint_module, "kl_div", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(model, sampler(), TINY, tmp_path / "run")
    else:
        kernels = train(model, sampler(), TINY, tmp_path / "run")
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in kernels.parameters())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), draws)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1] and parameter.grad is None


def test_capture_keeps_one_layer_in_memory(tmp_path, monkeypatch):
    """When a layer's shard is written, no other layer's activations are held."""
    written, layers, holding = [], [], []
    real_start, real_write = CaptureLayer.__init__, Shard.write

    def start(self, *args):
        layers.append(self)
        real_start(self, *args)

    def write(self, path):
        written.append(path.parent.name)
        holding.append(sum(getattr(layer, "queries", None) is not None for layer in layers))
        real_write(self, path)

    monkeypatch.setattr(CaptureLayer, "__init__", start)
    monkeypatch.setattr(Shard, "write", write)
    train(tiny.tiny_llama(num_hidden_layers=3), sampler(), dataclasses.replace(TINY, joint_steps=0), tmp_path)
    assert written == ["layer_00", "layer_01", "layer_02"] * TINY.sequences, "a layer waited for another"
    assert holding == [1] * len(written)


def test_the_estimate_of_disk_is_what_capture_writes(tmp_path):
    model = tiny.tiny_llama()

    class Stop(Exception):
        pass

    def stop(stage, done, total, loss=None):
        if stage == "capture" and done == total:
            raise Stop

    with pytest.raises(Stop):
        train(model, sampler(), TINY, tmp_path, stop)
    tensors = 0
    for layer_idx in range(2):
        for sequence in range(TINY.sequences):
            shard = Shard.read(
                shard_path(layer_folder(tmp_path / "work" / "capture", layer_idx), sequence), torch.device("cpu")
            )
            tensors += shard.keys.nbytes + shard.values.nbytes
            tensors += sum(tensor.nbytes for decoded in shard.decoded for tensor in vars(decoded).values())
        tensors += model.model.layers[layer_idx].self_attn.o_proj.weight.nbytes
    kernels = 4 * 2 * (4 * (8 * 4 + 4 * 8) + 2 * (8 * 4 + 4 * 8 + 8 * 8 + 2 * 8))
    low_rank = dataclasses.replace(TINY, memory="low_rank")
    assert estimate(model, low_rank).disk == tensors + 6 * kernels
    parameters = sum(parameter.numel() for parameter in model.parameters())
    written = estimate(model, low_rank, own_text=True).own_text
    assert estimate(model, low_rank).own_text == 0 and written > TINY.sequences * TINY.longest * 2 * parameters


@pytest.mark.parametrize(
    ("layerwise_steps", "joint_steps", "least", "most"),
    [(1, 0, 0.82, 0.92), (20, 0, 0.67, 0.77), (0, 4, 0.72, 0.8)],
    ids=["capture", "layerwise", "joint"],
)
@pytest.mark.parametrize("memory", MEMORIES)
def test_the_estimate_of_operations_counts_matrix_products(memory, layerwise_steps, joint_steps, least, most, tmp_path):
    """As torch counts them as they run; embeddings, which are none, and what masks hide are counted as well."""
    model = tiny.tiny_llama(hidden_size=64, head_dim=32)
    options = dataclasses.replace(TINY, prompts=(40, 80), decoded=16, hidden_size=32, memory=memory)
    options = dataclasses.replace(options, layerwise_steps=layerwise_steps, joint_steps=joint_steps)
    cost = estimate(model, options)
    with FlopCounterMode(display=False) as counted:
        train(model, sampler(), options, tmp_path)
    assert least < counted.get_total_flops() / (cost.capture + cost.layerwise + cost.joint) < most


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("prompt_length", [40, 200])
def test_the_estimate_of_memory_counts_what_the_backward_pass_keeps(memory, prompt_length, tmp_path):
    """Storages that autograd holds in a joint step, the model's weights apart; the estimate counts passing copies as well."""
    model = tiny.tiny_llama(num_hidden_layers=3)
    options = TrainingOptions(
        policies=("h2o",), prompts=(prompt_length,), decoded=64, joint_steps=1, batch_size=1, hidden_size=16, memory=memory
    )
    held = {}

    def hold(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        train(model, sampler(), options, tmp_path)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    measured = sum(nbytes for storage, nbytes in held.items() if storage not in weights)
    assert 0.5 < measured / estimate(model, options).backward < 1


def test_a_model_writes_its_own_text(tmp_path):
    model = tiny.tiny_llama()
    texts = own_text(model, 3, 20, 0, tmp_path)
    assert [len(text) for text in texts] == [20] * 3
    assert len({tuple(text.tolist()) for text in texts}) == 3
    again = own_text(model, 3, 20, 0, tmp_path / "again")
    assert all(torch.equal(left, right) for left, right in zip(texts, again, strict=True))
    other = own_text(model, 3, 20, 1, tmp_path / "other")
    assert not any(torch.equal(left, right) for left, right in zip(texts, other, strict=True))
    with pytest.raises(LESSError, match=r"written for another run.*seed: expected 0, got 1\."):  # nor is it written over
        own_text(model, 3, 20, 1, tmp_path)
    assert all(torch.equal(left, right) for left, right in zip(texts, own_text(model, 3, 20, 0, tmp_path), strict=True))


class Characters:
    """A tokenizer: one token a character."""

    def __call__(self, text, **options):
        return {"input_ids": [ord(character) for character in text]}


@pytest.mark.parametrize("column", ["text", "article"])
def test_a_dataset_is_streamed_as_far_as_needed(tmp_path, column):
    """From the column `text`, whatever others there are, or else from the one with most to read."""
    rows = [{"id": f"row {index}", column: f"Document {index}.", "page": index} for index in range(5)]
    if column == "text":
        rows[0] |= {"note": "longer than the first document", column: None}
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    text = "".join(map(chr, hub_text(str(tmp_path), Characters(), 30)))
    first = "" if column == "text" else "Document 0."
    assert text == first + "\n\nDocument 1.\n\nDocument 2.\n\n" + "Document 3.\n\n" * (column == "text")


def test_a_dataset_without_text_says_what_it_has(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"label": 1, "score": 0.5}))
    with pytest.raises(LESSError, match=r"column of text, got the columns \['label', 'score'\]"):
        hub_text(str(tmp_path), Characters(), 30)


def test_a_dataset_that_is_not_there_says_what_to_pass(tmp_path):
    with pytest.raises(LESSError, match=r"Cannot read the dataset './absent'.* Hub dataset id that can be reached"):
        hub_text("./absent", Characters(), 30)


@pytest.mark.parametrize("change", [{"seed": 1}, {"least_budget": 0.1}])
def test_other_options_do_not_go_on(tmp_path, change):
    train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "run")
    with pytest.raises(LESSError, match="other options"):
        train(tiny.tiny_llama(), sampler(), dataclasses.replace(TINY, **change), tmp_path / "run")


def test_the_joint_stage_begins_anew_with_another_rate(tmp_path):
    """Finished layers are kept; the checkpoint of another rate is neither taken up nor overwritten."""
    train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "run")
    lower = dataclasses.replace(TINY, joint_learning_rate=1e-3)
    checkpoint = tmp_path / "run" / "work" / "joint.pt"
    before = checkpoint.read_bytes()
    with pytest.raises(LESSError, match=r"joint stage with other options.*remove the file"):
        train(tiny.tiny_llama(), sampler(), lower, tmp_path / "run")
    assert checkpoint.read_bytes() == before
    checkpoint.unlink()
    stages = []
    anew = train(tiny.tiny_llama(), sampler(), lower, tmp_path / "run", lambda stage, *_: stages.append(stage))
    assert "layer 0" not in stages, "a finished layer was trained again"
    assert equal(anew, train(tiny.tiny_llama(), sampler(), lower, tmp_path / "whole"))


def test_layers_of_different_rank(tmp_path):
    options = dataclasses.replace(TINY, rank=(2, 4))
    kernels = train(tiny.tiny_llama(), sampler(), options, tmp_path)
    assert [kernels.for_layer(index).num_virtual_tokens for index in range(2)] == [1, 2]
    assert kernels.config.ranks == [2, 4] and estimate(tiny.tiny_llama(), options).disk
    with pytest.raises(LESSError, match="one for each of 2 layers, got 3 ranks"):
        estimate(tiny.tiny_llama(), dataclasses.replace(TINY, rank=(2, 4, 2)))


def test_more_processes_than_sequences_a_step_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Processes, "count", 3)
    with pytest.raises(LESSError, match=r"got 2 for 3 processes. Pass batch_size=3 \(--batch-size\)"):
        train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_rate_falls_to_nothing():
    assert [falling(8.0, done) for done in (0, 0.25, 0.5, 1)] == [8, 6, 4, 0]


def test_other_texts_do_not_go_on(tmp_path):
    train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "run", described={"data": ["a"]})
    with pytest.raises(LESSError, match="other options, texts"):
        train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "run", described={"data": ["b"]})
    for other in (torch.arange(301) * 7, torch.arange(300) * 5):  # longer; as long, but another
        with pytest.raises(LESSError, match="other options, texts"):
            train(tiny.tiny_llama(), TokenSampler([[other % tiny.VOCAB]]), TINY, tmp_path / "run", described={"data": ["a"]})


@pytest.mark.parametrize("version", [{"format": 0}, {}], ids=["older", "oldest"])
def test_a_run_of_another_version_does_not_go_on(version, tmp_path):
    train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "run")
    run = tmp_path / "run" / "work" / "run.json"
    written = json.loads(run.read_text())
    del written["format"]
    run.write_text(json.dumps({**written, **version}))
    with pytest.raises(LESSError, match="another version of less-cache"):
        train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "run")


def test_another_model_does_not_go_on(tmp_path):
    train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "run")
    with pytest.raises(LESSError, match="another model"):
        train(tiny.tiny_llama(num_hidden_layers=3), sampler(), TINY, tmp_path / "run")


def test_a_text_that_is_too_short_is_refused(tmp_path):
    """Before anything is trained, whichever of the sources it is."""
    short = TokenSampler([[torch.arange(300) % tiny.VOCAB], [torch.arange(10), torch.arange(13)]])
    with pytest.raises(LESSError, match=r"source 2 of 2: expected a text of at least 14 tokens.* got at most 13"):
        train(tiny.tiny_llama(), short, TINY, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_trained_is_refused_at_once(tmp_path):
    """One without a full-attention layer, and one whose recurrent layers the second stage cannot start in the middle."""
    sliding = MistralForCausalLM(MistralConfig(**zoo.config("mistral").to_diff_dict() | {"sliding_window": 4})).eval()
    with pytest.raises(LESSError, match="no full-attention layer to compress"):
        train(sliding, sampler(), TINY, tmp_path / "run")
    recurrent = zoo.build("jamba")
    with pytest.raises(LESSError, match="Train with layerwise_steps=200, joint_steps=0"):
        train(recurrent, sampler(), TINY, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    kernels = train(recurrent, sampler(), dataclasses.replace(TINY, joint_steps=0), tmp_path / "run")  # as it says
    cache = LESSCache(recurrent, policy=H2O(3, 3), kernels=kernels)
    assert kernels.config.layers == [index for index, layer in enumerate(cache.layers) if isinstance(layer, LESSLayer)]
    recurrent.generate(torch.arange(20)[None], past_key_values=cache, max_new_tokens=3, do_sample=False)


def test_prompts_that_the_model_was_not_made_for_are_refused(tmp_path):
    short = tiny.tiny_llama(max_position_embeddings=13)
    with pytest.raises(LESSError, match=r"at most 13 tokens, the model's context, got 14: prompts of 10 and 4 decoded"):
        train(short, sampler(), TINY, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(short, sampler(), dataclasses.replace(TINY, prompts=(6, 9)), tmp_path / "run")


@pytest.mark.parametrize("said", ["CUDA out of memory.", "DefaultCPUAllocator: you tried to allocate 9 bytes."])
def test_a_full_memory_says_what_takes_less(said, tmp_path, monkeypatch):
    """And nothing else does: other errors stay what they are."""
    kind = torch.OutOfMemoryError if "CUDA" in said else RuntimeError
    monkeypatch.setattr(joint_module, "student_cache", mock.Mock(side_effect=kind(said)))
    with pytest.raises(LESSError, match=rf"ran out of memory: {said}.*--prompt-length"):
        train(tiny.tiny_llama(), sampler(), TINY, tmp_path)
    assert len(list((tmp_path / "work" / "layers").glob("*.safetensors"))) == 2
    monkeypatch.setattr(joint_module, "student_cache", mock.Mock(side_effect=RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(tiny.tiny_llama(), sampler(), TINY, tmp_path)


def damage_json(text: str):
    return lambda path: path.write_text(text)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def without_entries(path: Path) -> None:
    """A file of the right kind that says nothing."""
    torch.save({}, path) if path.suffix == ".pt" else save_file({"x": torch.zeros(1)}, path)


def with_other_entries(path: Path) -> None:
    if path.suffix == ".pt":
        torch.save({**torch.load(path), "optimizers": [], "kernels": {"x": torch.zeros(1)}}, path)
    else:
        tensors, metadata = load_tensors(path)
        save_file({name: tensor for name, tensor in tensors.items() if "0." not in name and "key" not in name}, path, metadata)


SHARD, HELD_OUT, LAYER, CHECKPOINT = (
    "capture/layer_01/sequence_0001.safetensors",
    "capture/layer_00/sequence_0002.safetensors",
    "layers/layer_01.safetensors",
    "joint.pt",
)
TRAINED_FILES = [(SHARD, "layer 1"), (HELD_OUT, "measure"), (LAYER, "joint"), (CHECKPOINT, "joint")]


@pytest.mark.parametrize("damage", [cut, empty, without_entries, with_other_entries])
@pytest.mark.parametrize("name, stage", TRAINED_FILES, ids=["shard", "held-out shard", "layer", "checkpoint"])
def test_a_damaged_file_is_one_error_and_is_made_anew_once_it_is_removed(tmp_path, name, stage, damage):
    def stop(at, done, total, loss=None):
        if at == stage and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "run", stop)
    path = tmp_path / "run" / "work" / name
    if stage == "joint" and name == CHECKPOINT:
        train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "run")
    damage(path)
    with pytest.raises(
        LESSError, match=f"{name}: expected a file as a training run writes it.* damaged one.*Remove it"
    ) as caught:
        train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "run")
    assert "\n" not in str(caught.value)
    path.unlink()
    whole = train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "whole")
    assert equal(whole, train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "run"))


@pytest.mark.parametrize("damage", [cut, empty, without_entries])
def test_a_damaged_projection_says_to_remove_its_folder(tmp_path, damage):
    """The file alone would not come back: shards are there, so nothing is captured."""
    train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "run")
    folder = tmp_path / "run" / "work" / "capture" / "layer_00"
    damage(folder / "projection.safetensors")
    with pytest.raises(LESSError, match=f"damaged one.*Remove {folder}: the same command"):
        train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "run")
    shutil.rmtree(folder)
    whole = train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "whole")
    assert equal(whole, train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "run"))


@pytest.mark.parametrize("damage", [cut, empty, without_entries])
def test_damaged_own_text_is_one_error(tmp_path, damage):
    model = tiny.tiny_llama()
    texts = [text.clone() for text in own_text(model, 3, 20, 0, tmp_path)]  # not mapped from the file any more
    (path,) = tmp_path.iterdir()
    damage(path)
    with pytest.raises(LESSError, match=r"damaged one.*Remove it: the same"):
        own_text(model, 3, 20, 0, tmp_path)
    path.unlink()
    assert all(torch.equal(*both) for both in zip(texts, own_text(model, 3, 20, 0, tmp_path), strict=True))


RUNS = {"cut": '{"format": 4', "empty": "", "list": "[]", "deep": "[" * 100_000, "binary": "\x00", "number": "5"}


@pytest.mark.parametrize("text", RUNS.values(), ids=RUNS)
def test_a_damaged_run_json_says_what_to_do(tmp_path, text):
    train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "run")
    (tmp_path / "run" / "work" / "run.json").write_text(text)
    with pytest.raises(
        LESSError, match=r"run\.json: expected a file as .*damaged one.*Choose another output folder, or remove"
    ):
        train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "run")


@pytest.mark.parametrize("policy", [H2O(3, 2), CORM(6, 2)], ids=lambda policy: policy.name)
def test_layers_that_scale_differently_are_rolled_together(policy):
    """As each on its own: in GPT-2 every layer may have its own scaling. Under CORM they also keep different numbers."""
    teachers, example = [], Example(20, policy)
    for seed, scaling in enumerate((1.0, 0.25)):
        teacher = TeacherLayer()
        queries, keys, values = tiny.random_states(1, 4, 2, 30, 8, seed=seed)
        teacher.attend(tiny.plain_attention, torch.nn.Identity(), queries, keys, values, None, scaling=scaling)
        teachers.append(teacher)
    scores = [next(teacher.scores_after([example])) for teacher in teachers]
    together = roll_layers(teachers, example, scores, 10)
    for index, decode in enumerate(together):
        (alone,) = roll_layers(teachers[index : index + 1], example, scores[index : index + 1], 10)
        for field in dataclasses.fields(Decode):
            assert torch.equal(getattr(decode, field.name), getattr(alone, field.name))


def test_a_loss_that_is_not_finite_keeps_the_finished_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(joint_module, "kl_div", lambda student, *args, **kwargs: student.sum() * torch.nan)
    model = tiny.tiny_llama()
    with pytest.raises(LESSError, match="Joint step 0: the divergence is nan"):
        train(model, sampler(), TINY, tmp_path)
    assert len(list((tmp_path / "work" / "layers").glob("*.safetensors"))) == 2
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("options, said", [(TINY, "Layer 0, step 0"), ({}, "Joint step 0")], ids=["layerwise", "joint"])
def test_a_gradient_that_is_not_finite_is_never_stored(tmp_path, monkeypatch, options, said):
    """The loss is, so nothing else would notice."""

    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(context, features):
            return features.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * torch.nan

    class_ = type(tiny.layer_kernels(4, 2, 8, memory="soft_centroids"))
    features = class_.key_features
    monkeypatch.setattr(class_, "key_features", lambda self, keys: Spoiled.apply(features(self, keys)))
    with pytest.raises(LESSError, match=said):
        train(tiny.tiny_llama(), sampler(), options or dataclasses.replace(TINY, layerwise_steps=0), tmp_path)
    assert {path.name for path in (tmp_path / "work").iterdir()} <= {"run.json", "capture"}


@pytest.mark.parametrize("at", ["write", "replace"])
@pytest.mark.parametrize(("name", "layers"), [("sequence_0002.safetensors", 0), ("layer_01.safetensors", 1), ("joint.pt", 2)])
def test_a_full_disk_keeps_the_finished_layers(name, layers, at, tmp_path, monkeypatch):
    """Full from the second file of this name on: a shard, a layer (there is one of it), a checkpoint."""
    real_replace, written = os.replace, []

    def fill(path):
        if Path(path).name == name:
            written.append(path)
        if len(written) > (name != "layer_01.safetensors"):
            raise OSError(28, "No space left on device")

    class Half(io.FileIO):
        def write(self, content):
            super().write(content[: len(content) // 2])
            fill(self.name)
            return super().write(content[len(content) // 2 :])

    def replace(source, target):
        fill(target)
        real_replace(source, target)

    with monkeypatch.context() as full:
        if at == "write":
            full.setattr(atomic, "open", Half, raising=False)
        else:
            full.setattr(os, "replace", replace)
        with pytest.raises(LESSError, match=r"No space left on device.*the same command goes on"):
            train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "full")
    work = tmp_path / "full" / "work"
    assert len(list(work.glob("layers/*.safetensors"))) == layers and (work / "joint.pt").exists() == (layers == 2)
    assert not list(work.rglob(".saving-*")), "something half written was left"
    assert equal(
        train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "full"),
        train(tiny.tiny_llama(), sampler(), TINY, tmp_path / "whole"),
    )


COUNTS = ("prompts_per_sequence", "decoded", "sequences", "batch_size", "hidden_size", "checkpoint_every")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"policies": ()}, "at least one of policies"),
        ({"policies": ("h3o",)}, "h3o"),
        ({"least_budget": 0.3}, "least_budget <= most_budget"),
        ({"most_budget": 1.5}, "most_budget < 1"),
        ({"sequences": 1}, "2 or more sequences"),
        ({"joint_learning_rate": 0.0}, "joint_learning_rate to be a number above 0, got 0.0"),
        ({"layerwise_learning_rate": float("nan")}, "layerwise_learning_rate to be a number above 0, got nan"),
        ({"prompts": (0, 4)}, "prompts of at least 1 token, got 0"),
        *(({name: 0}, f"{name} to be at least 1, got 0") for name in COUNTS),
        ({"joint_steps": -1}, "joint_steps to be at least 0, got -1"),
    ],
)
def test_bad_options_are_refused(change, said):
    with pytest.raises(LESSError, match=said):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layerwise_steps": 0, "joint_steps": 0}, "expected layerwise_steps or joint_steps"),
        ({"memory": "hash"}, "expected memory to be one of low_rank, soft_centroids, got 'hash'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(LESSError, match=message):
        TrainingOptions(**options)
