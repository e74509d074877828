"""Training: the simulation equals the cache it stands for, runs resume exactly, the model is left alone."""

import dataclasses
import json

import pytest
import tiny
import torch

from less_cache import CORM, H2O, LESSCache, LESSError, LESSKernels, SinkRecent
from less_cache.attention import attention_logits
from less_cache.layer import LESSLayer
from less_cache.training import TokenSampler, TrainingOptions, train, trainer
from less_cache.training.layers import TeacherLayer, roll_layers
from less_cache.training.simulate import attend, columns

TINY = TrainingOptions(
    prompts=(6, 10),
    decoded=4,
    batch_size=2,
    layerwise_steps=2,
    joint_steps=2,
    prompts_per_step=1,
    hidden_size=4,
    checkpoint_every=1,
)


class Characters:
    """A tokenizer: one token a character."""

    def __call__(self, text, **options):
        return {"input_ids": [ord(character) % tiny.VOCAB for character in text]}


@pytest.fixture
def sampler(tmp_path):
    (tmp_path / "text.txt").write_text("It is a truth universally acknowledged, that a single man in possession. " * 3)
    return TokenSampler([tmp_path], Characters())


@pytest.mark.parametrize("policy", [H2O(3, 2), SinkRecent(2, 3), CORM(3, 2)], ids=lambda policy: policy.name)
@pytest.mark.parametrize("with_kernels", [False, True])
def test_simulated_decoding_equals_the_cache(policy, with_kernels):
    b, h, g, d, p, n = 2, 4, 2, 8, 11, 9
    queries, keys, values = tiny.random_states(b, h, g, p + n, d)
    kernels = tiny.layer_kernels(h, g, d) if with_kernels else None
    cached = tiny.feed(LESSLayer(policy, kernels, 0), queries, keys, values, [p] + [1] * n)[:, :, p:]

    teacher = TeacherLayer()
    teacher.attend(tiny.plain_attention, torch.nn.Identity(), queries, keys, values, None, scaling=queries.shape[-1] ** -0.5)
    counts = policy.resolve(torch.full((b,), p)).T[:, :, None, None]
    (decode,) = roll_layers([teacher], policy, [teacher.prompt_scores(policy, p, counts)], n)
    logits = attention_logits(queries[:, :, p:], columns(keys, decode.order, p), decode.visible, d**-0.5)
    simulated = attend(decode, queries[:, :, p:], keys, values, kernels, logits)
    torch.testing.assert_close(simulated, cached, rtol=1e-4, atol=1e-5)


def test_scores_go_on_from_a_shorter_prompt():
    queries, keys, values = tiny.random_states(2, 4, 2, 20, 8)
    teacher = TeacherLayer()
    teacher.attend(tiny.plain_attention, torch.nn.Identity(), queries, keys, values, None, scaling=queries.shape[-1] ** -0.5)
    policy = H2O(2, 2)
    counts = policy.resolve(torch.full((2,), 20)).T[:, :, None, None]
    earlier = teacher.prompt_scores(policy, 7, counts)
    torch.testing.assert_close(teacher.prompt_scores(policy, 20, counts, earlier), teacher.prompt_scores(policy, 20, counts))


def test_training_lowers_the_layerwise_loss(tmp_path, sampler):
    model = tiny.tiny_llama()
    train(model, sampler, dataclasses.replace(TINY, layerwise_steps=60, joint_steps=0, checkpoint_every=60), tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "training_log.jsonl").read_text().splitlines()]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path, sampler, monkeypatch):
    whole = train(tiny.tiny_llama(), sampler, TINY, tmp_path / "whole")
    real_step = trainer._Run.joint_step

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer._Run, "joint_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tiny.tiny_llama(), sampler, TINY, tmp_path / "resumed")
    monkeypatch.setattr(trainer._Run, "joint_step", real_step)
    resumed = train(tiny.tiny_llama(), sampler, TINY, tmp_path / "resumed")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_trained_kernels_serve_the_cache(tmp_path, sampler):
    model = tiny.tiny_llama()
    train(model, sampler, TINY, tmp_path / "run").save_pretrained(tmp_path / "kernels")
    cache = LESSCache(model, policy=H2O(3, 3), kernels=LESSKernels.from_pretrained(tmp_path / "kernels"))
    model.generate(torch.arange(20)[None], past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert cache.get_seq_length() == 22


def test_training_leaves_the_model_as_it_was(tmp_path, sampler):
    model = tiny.tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    before = {name: (parameter.clone(), parameter.requires_grad) for name, parameter in model.named_parameters()}
    train(model, sampler, TINY, tmp_path / "run")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1] and parameter.grad is None


def test_other_options_do_not_resume(tmp_path, sampler):
    train(tiny.tiny_llama(), sampler, TINY, tmp_path / "run")
    with pytest.raises(LESSError, match="other options"):
        train(tiny.tiny_llama(), sampler, dataclasses.replace(TINY, seed=1), tmp_path / "run")


def test_a_text_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(LESSError, match="at least 14 tokens, got at most 10"):
        train(tiny.tiny_llama(), TokenSampler([tmp_path / "short.txt"], Characters()), TINY, tmp_path / "run")
