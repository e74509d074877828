"""Faults around files and kernels that were found in use, each with the right value or one clear error."""

import os
import stat
from pathlib import Path

import pytest
import torch
from tiny import VOCAB, tiny_kernels, tiny_llama

from less_cache import H2O, LESSCache, LESSError, LESSKernels
from less_cache.files import atomic, plain_json
from less_cache.memory import MEMORIES
from less_cache.reports import outputs

# Modes


@pytest.fixture(params=[0o077, 0o027, 0o022, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_new_files_and_folders_have_the_mode_that_the_user_wants(umask, tmp_path):
    """Whatever writes them."""
    tiny_kernels(tiny_llama()).save_pretrained(tmp_path / "kernels")
    atomic.replace(tmp_path / "card", {"custom_generate/generate.py": b"", "README.md": b""})
    outputs.finish({"a": 1}, tmp_path / "report.json")
    cache = LESSCache(tiny_llama(), H2O(4, 4))
    cache.save(tmp_path / "cache.safetensors")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 6 and {mode(path) for path in files} == {0o666 & ~umask}
    assert {mode(path) for path in tmp_path.rglob("*") if path.is_dir()} == {0o777 & ~umask}


def test_a_file_that_is_written_again_keeps_its_mode(umask, tmp_path):
    path = tmp_path / "conversation"
    path.write_bytes(b"before")
    for own in (0o600, 0o640, 0o444):
        path.chmod(own)
        atomic.replace(tmp_path, {path.name: b"after"})
        assert mode(path) == own and path.read_bytes() == b"after"


# Kernels in another type

MOVES = {
    "half": lambda kernels: kernels.half(),
    "bfloat16": lambda kernels: kernels.bfloat16(),
    "double": lambda kernels: kernels.double(),
    "to": lambda kernels: kernels.to(torch.float16),
    "to a device too": lambda kernels: kernels.to("cpu", torch.bfloat16),
    "to another tensor": lambda kernels: kernels.to(torch.zeros(1, dtype=torch.float16)),
    "type": lambda kernels: kernels.type(torch.float16),
    "with the model that holds them": lambda kernels: torch.nn.ModuleDict({"kernels": kernels}).half()["kernels"],
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_kernels_stay_float32_to_the_bit_and_work(move, memory):
    """They compute in float32 in any case: rounded ones would be worse, and no smaller there."""
    model = tiny_llama()
    moved, expected = move(tiny_kernels(model, memory=memory)), tiny_kernels(model, memory=memory)
    assert isinstance(moved, LESSKernels)
    for name, tensor in moved.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected.state_dict()[name])
    tokens = torch.randint(1, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    texts = [
        model.generate(tokens, past_key_values=LESSCache(model, H2O(3, 3), kernels), max_new_tokens=8, do_sample=False)
        for kernels in (moved, expected)
    ]
    assert torch.equal(*texts)


def test_kernels_still_move_between_devices():
    kernels = tiny_kernels(tiny_llama()).to("meta", torch.float16)
    assert {(parameter.device.type, parameter.dtype) for parameter in kernels.parameters()} == {("meta", torch.float32)}


# JSON


@pytest.mark.parametrize("value", [{"a": {1, 2}}, {"a": torch.zeros(1)}, object()], ids=["set", "tensor", "object"])
def test_what_is_no_json_is_one_error(value):
    with pytest.raises(LESSError, match="expected what JSON can say"):
        plain_json.dump(value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "1" * 5_000, b"\xff"], ids=["empty", "cut", "deep", "long", "binary"])
def test_what_cannot_be_read_is_one_error(text):
    with pytest.raises(LESSError, match="expected JSON"):
        plain_json.parse(text)
