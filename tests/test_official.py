"""Parity with the official implementation's recorded logits.

`fixtures/official_*.safetensors` hold a random model (`model.*`), kernels (`kernels.<layer>.*`), a prompt, a
continuation, and for every `logits.<policy>_<first count>_<second count>.<sparse or less>` the logits at the prompt's
last position and after each continuation token.
"""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig, PreTrainedModel

from less_cache import H2O, LESSCache, LESSKernels, SinkRecent

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("official_*.safetensors"))
POLICY_OF = {"h2o": H2O, "lambda": SinkRecent}  # both take the two counts in the recorded order


def recorded_cases() -> list[tuple[Path, str, str]]:
    """Every (file, case, sparse or less) that was recorded."""
    cases = []
    for path in FIXTURES:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, a safetensors file cannot be iterated
                if match := re.fullmatch(r"logits\.(\w+_\d+_\d+)\.(sparse|less)", name):
                    cases.append((path, *match.groups()))
    return cases


CASES = recorded_cases()


def below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def build(tensors: dict[str, torch.Tensor], attn_implementation: str) -> PreTrainedModel:
    """The recorded model; its sizes are those of its weights."""
    weights = below(tensors, "model.")
    vocab_size, hidden_size = weights["lm_head.weight"].shape
    num_attention_heads, head_dim, _ = tensors["kernels.0.kernel_q_mat1"].shape
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": sum(name.endswith("input_layernorm.weight") for name in weights),
        "num_attention_heads": num_attention_heads,
    }
    if "transformer.word_embeddings.weight" in weights:
        config = FalconConfig(
            **sizes, new_decoder_architecture=False, multi_query=True, parallel_attn=True, bias=False, alibi=False
        )
    else:
        config = LlamaConfig(
            **sizes,
            intermediate_size=weights["model.layers.0.mlp.up_proj.weight"].shape[0],
            num_key_value_heads=weights["model.layers.0.self_attn.k_proj.weight"].shape[0] // head_dim,
            rms_norm_eps=1e-6,
        )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    model.load_state_dict(weights)
    return model.eval()


def official_kernels(tensors: dict[str, torch.Tensor], num_layers: int) -> LESSKernels:
    return LESSKernels.from_official([below(tensors, f"kernels.{index}.") for index in range(num_layers)])


@torch.no_grad()
def teacher_forced(model: PreTrainedModel, cache: LESSCache | None, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits at the prompt's last position and after each continuation token, `[tokens, vocabulary]`."""
    output = model(tensors["prompt"], past_key_values=cache, use_cache=True)
    logits = [output.logits[0, -1]]
    for token in tensors["continuation"][0]:
        output = model(token.view(1, 1), past_key_values=output.past_key_values)
        logits.append(output.logits[0, -1])
    return torch.stack(logits)


def test_fixtures_are_complete():
    architectures = {path.stem.split("_")[1] for path in FIXTURES}
    assert architectures >= {"llama", "falcon"}
    for path in FIXTURES:
        found = {(case.split("_")[0], kind) for file, case, kind in CASES if file == path}
        assert found == {("h2o", "sparse"), ("h2o", "less"), ("lambda", "sparse"), ("lambda", "less")}


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("path, case, kind", CASES, ids=lambda part: part.stem if isinstance(part, Path) else part)
def test_recorded_logits(path: Path, case: str, kind: str, attn_implementation: str):
    tensors = load_file(path)
    model = build(tensors, attn_implementation)
    name, *counts = case.split("_")
    policy = POLICY_OF[name](*map(int, counts))
    kernels = official_kernels(tensors, model.config.num_hidden_layers) if kind == "less" else None
    logits = teacher_forced(model, LESSCache(model, policy, kernels), tensors)
    torch.testing.assert_close(logits, tensors[f"logits.{case}.{kind}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_recorded_model_is_rebuilt(path: Path):
    """With transformers' own cache too: what differs above is the cache, not the model."""
    tensors = load_file(path)
    logits = teacher_forced(build(tensors, "sdpa"), None, tensors)
    torch.testing.assert_close(logits, tensors["logits.full"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_recorded_cases_differ(path: Path):
    """The comparison can tell the policies, and the sparse from the low-rank form, apart."""
    recorded = [tensor for name, tensor in load_file(path).items() if name.startswith("logits.")]
    for index, one in enumerate(recorded):
        for other in recorded[:index]:
            assert (one - other).abs().max() > 1e-2
