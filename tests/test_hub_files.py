"""Files of kernels: what was saved comes back byte for byte, and anything else is one LESSError."""

import contextlib
import hashlib
import json
import mmap
import os
import pickle
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import tiny_kernels, tiny_llama

from less_cache import H2O, LESSCache, LESSConfig, LESSError, LESSKernels
from less_cache.kernels.config import FORMAT_VERSION
from less_cache.kernels.folder import CONFIG_NAME, WEIGHTS_NAME

FIXTURES = Path(__file__).parent / "fixtures"


def small_kernels(seed: int = 0, rank: int | list[int] = 2, hidden_size: int | list[int] = 4) -> LESSKernels:
    return tiny_kernels(tiny_llama(), rank, hidden_size, seed)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Saved kernels."""
    small_kernels().save_pretrained(tmp_path)
    return tmp_path


def change_config(folder: Path, **changes) -> None:
    entries = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**entries, **changes}))


def change_tensors(folder: Path, change) -> None:
    """Write the tensors after `change(tensors)`, with a digest that fits."""
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    change_config(folder, sha256=hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What was saved


def test_round_trip_is_byte_exact(folder, tmp_path_factory):
    kernels = LESSKernels.from_pretrained(folder)
    original = small_kernels()
    for name, tensor in original.state_dict().items():
        assert torch.equal(kernels.state_dict()[name], tensor)
    original.config.sha256 = kernels.config.sha256
    assert kernels.config == original.config
    again = tmp_path_factory.mktemp("again") / "new" / "folders"
    kernels.save_pretrained(again)
    assert contents(again) == contents(folder)


def test_files(folder):
    assert set(contents(folder)) == {CONFIG_NAME, WEIGHTS_NAME}
    config = LESSConfig.from_json((folder / CONFIG_NAME).read_text())
    assert config.sha256 == hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()
    assert all(tensor.dtype == torch.float32 for tensor in load_file(folder / WEIGHTS_NAME).values())
    assert (folder / WEIGHTS_NAME).stat().st_mode & 0o777 == 0o644


def test_loading_draws_no_random_numbers_and_needs_no_gradients(folder):
    before = torch.get_rng_state()
    kernels = LESSKernels.from_pretrained(str(folder))
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in kernels.parameters())


def test_kernels_of_some_layers(tmp_path):
    kernels = LESSKernels(LESSConfig(4, 4, 2, 8, rank=2, hidden_size=4, layers=[3, 1]))
    kernels.save_pretrained(tmp_path)
    loaded = LESSKernels.from_pretrained(tmp_path)
    assert [index for index in range(4) if loaded.for_layer(index) is not None] == [1, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_become_float32(folder, dtype):
    change_tensors(folder, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    for name, tensor in LESSKernels.from_pretrained(folder).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, small_kernels().state_dict()[name].to(dtype).float())


def test_a_config_without_digest_is_taken(folder):
    change_config(folder, sha256=None)
    LESSKernels.from_pretrained(folder)


def test_sizes_by_layer_come_back(tmp_path):
    small_kernels(rank=[2, 6], hidden_size=[8, 4]).save_pretrained(tmp_path)
    loaded = LESSKernels.from_pretrained(tmp_path)
    assert (loaded.config.rank, loaded.config.hidden_size) == ([2, 6], [8, 4])
    for name, tensor in small_kernels(rank=[2, 6], hidden_size=[8, 4]).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_saved_over_the_files_that_it_came_from(folder):
    kernels = LESSKernels.from_pretrained(folder)
    before = contents(folder)
    kernels.save_pretrained(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("dtype, closeness", [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_saved_in_16_bit(tmp_path, dtype, closeness):
    """Half the bytes, and each number rounded once."""
    for name, chosen in (("32", torch.float32), ("16", dtype)):
        small_kernels().save_pretrained(tmp_path / name, dtype=chosen)
    sizes = [sum(tensor.nbytes for tensor in load_file(tmp_path / name / WEIGHTS_NAME).values()) for name in ("32", "16")]
    assert sizes[0] == 2 * sizes[1]
    loaded = LESSKernels.from_pretrained(tmp_path / "16").state_dict()
    for name, tensor in small_kernels().state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=closeness, atol=1e-7)


def test_a_number_beyond_float16_is_not_saved(tmp_path):
    kernels = small_kernels()
    kernels.layers["0"].key_mix[0, 0, 0] = 70_000
    with pytest.raises(LESSError, match=r"layers\.0\.key_mix holds NaN or infinity"):
        kernels.save_pretrained(tmp_path, dtype=torch.float16)
    with pytest.raises(LESSError, match=r"Expected dtype to be torch.float32, torch.float16 or torch.bfloat16, got torch.int8"):
        kernels.save_pretrained(tmp_path, dtype=torch.int8)
    assert not contents(tmp_path)


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_every_format_keeps_loading(version):
    """`tests/fixtures/format-*` were saved by the first version that wrote the format and are never written again."""
    kernels = LESSKernels.from_pretrained(FIXTURES / f"format-{version}")
    assert kernels.config.format_version == version
    assert kernels.config.policy == {"name": "h2o", "heavy": 0.25, "recent": 8}
    sizes = {} if version == 1 else {"rank": [2, 3], "hidden_size": [5, 4]}
    expected = small_kernels(seed=version, **sizes).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in kernels.state_dict().items())


def test_the_user_s_folder(folder, monkeypatch):
    """`~`, which only a shell would read otherwise; a folder that is really called so is found from where it is."""
    monkeypatch.setenv("HOME", str(folder.parent))
    name = f"~/{folder.name}"
    kernels = LESSKernels.from_pretrained(name)
    assert kernels.source == str(folder)
    assert LESSCache.from_pretrained(Path(name), tiny_llama(), H2O(2, 2)).kernels.source == str(folder)
    kernels.save_pretrained("~/copy")
    assert contents(folder.parent / "copy") == contents(folder)
    monkeypatch.chdir(folder.parent)
    assert not Path("~").exists()
    with pytest.raises(LESSError, match="no such folder"):
        LESSKernels.from_pretrained("~no-such-user/kernels")


# What is wrong with a file


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-100])
    change_config(folder, sha256=None)


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS_NAME).read_bytes())
    content[-5] ^= 1
    (folder / WEIGHTS_NAME).write_bytes(content)


def write_weights(content: bytes):
    """A damage: weights of other content, and no digest that would tell."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS_NAME).write_bytes(content)
        change_config(folder, sha256=None)

    return damage


def tensor_damage(change):
    return lambda folder: change_tensors(folder, change)


def config_damage(**changes):
    return lambda folder: change_config(folder, **changes)


ONE = "layers.1.key_mix"


def header_damage(header: dict | bytes, data: bytes = b""):
    """A damage: weights with this safetensors header."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return write_weights(len(content).to_bytes(8, "little") + content + data)


def link(name: str, target: str):
    """A damage: a symbolic link in place of the file, to a copy of it elsewhere."""

    def damage(folder: Path) -> None:
        elsewhere = folder.parent / f"{folder.name}-elsewhere"
        elsewhere.mkdir()
        (folder / name).rename(elsewhere / name)
        (folder / name).symlink_to(target.format(elsewhere=elsewhere, name=name))

    return damage


def sparse(name: str):
    """A damage: a terabyte that takes no space."""
    return lambda folder: os.truncate(folder / name, 10**12)


def rename(name: str, to: str):
    return lambda folder: (folder / name).rename(folder / to)


def fifo(folder: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()
    os.mkfifo(folder / WEIGHTS_NAME)


TERABYTE = {"dtype": "F32", "shape": [250_000_000_000], "data_offsets": [0, 10**12]}

DAMAGES = {
    "weights are a link out of the folder": (link(WEIGHTS_NAME, "{elsewhere}/{name}"), "a symbolic link out of the folder"),
    "config is a link out of the folder": (
        link(CONFIG_NAME, "../{elsewhere}/{name}"),
        "a symbolic link out of the folder|expected",
    ),
    "link to nothing": (link(WEIGHTS_NAME, "absent"), f"expected {WEIGHTS_NAME}"),
    "link to itself": (link(WEIGHTS_NAME, WEIGHTS_NAME), f"expected {WEIGHTS_NAME}"),
    "pipe": (fifo, f"expected {WEIGHTS_NAME}"),
    "renamed": (rename(WEIGHTS_NAME, "model.safetensors"), f"expected {WEIGHTS_NAME}, found {CONFIG_NAME}, model.safetensors"),
    "renamed tensor": (
        tensor_damage(lambda tensors: tensors.update({"layers.1.mix": tensors.pop("layers.1.key_mix")})),
        "1 tensors are missing, the first is 'layers.1.key_mix'",
    ),
    "tensors named like paths": (
        tensor_damage(lambda tensors: tensors.update({"../../escape": torch.zeros(1)})),
        r"1 unexpected tensors, the first is '\.\./\.\./escape'",
    ),
    "a terabyte of weights": (sparse(WEIGHTS_NAME), r"expected at most [\d,]+ bytes .* got 1,000,000,000,000"),
    "a terabyte of config": (sparse(CONFIG_NAME), r"expected at most 10,000,000 bytes of JSON, got 1,000,000,000,000"),
    "a header that claims a terabyte": (header_damage({"layers.1.key_mix": TERABYTE}), "not a readable safetensors file"),
    "a header of a terabyte": (write_weights((10**12).to_bytes(8, "little")), "not a readable safetensors file"),
    "a header of negative shapes": (
        header_damage({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        "not a readable safetensors file",
    ),
    "tensors that overlap": (
        header_damage({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "xy"}, b"1234"),
        "not a readable safetensors file",
    ),
    "a header that is no JSON": (header_damage(b"{" * 100), "not a readable safetensors file"),
    "absurdly many layers": (config_damage(num_hidden_layers=10**6, layers=None), "num_hidden_layers to be at most 10,000"),
    "sizes of 40 GB": (config_damage(hidden_size=10**6, head_dim=10**3, sha256=None), "expected shape"),
    "many layers": (config_damage(num_hidden_layers=10_000, layers=None), "69986 tensors are missing"),
    "absurd sizes": (config_damage(hidden_size=10**6, rank=10**6, head_dim=10**6, sha256=None), "expected shape"),
    "no config": (lambda folder: (folder / CONFIG_NAME).unlink(), rf"expected {CONFIG_NAME}, found {WEIGHTS_NAME}"),
    "no weights": (lambda folder: (folder / WEIGHTS_NAME).unlink(), rf"expected {WEIGHTS_NAME}, found {CONFIG_NAME}"),
    "config is a folder": (lambda folder: [(folder / CONFIG_NAME).unlink(), (folder / CONFIG_NAME).mkdir()], "expected"),
    "config is binary": (lambda folder: (folder / CONFIG_NAME).write_bytes(b"\xff\xfe\x00"), CONFIG_NAME),
    "config is cut": (lambda folder: (folder / CONFIG_NAME).write_text('{"rank": 2'), rf"{CONFIG_NAME}: expected JSON"),
    "unknown key": (config_damage(alpha=1), r"unknown keys \['alpha'\]"),
    "newer format": (config_damage(format_version=FORMAT_VERSION + 1), "pip install -U 'less-cache>="),
    "other rank": (config_damage(rank=3), r"query_out: expected shape \[4, 4, 3\], got \[4, 4, 2\]"),
    "other ranks": (config_damage(rank=[2, 3]), r"layers\.1\.query_out: expected shape \[4, 4, 3\], got \[4, 4, 2\]"),
    "other hidden sizes": (config_damage(hidden_size=[9, 4]), r"layers\.0\.query_in: expected shape \[4, 8, 9\]"),
    "a rank too many": (config_damage(rank=[2, 2, 2]), "expected rank to be an int .*, or a list with one for each of the 2"),
    "more layers": (config_damage(layers=None, num_hidden_layers=3), "7 tensors are missing, the first is 'layers.2.key_in'"),
    "fewer layers": (config_damage(layers=[0]), "7 unexpected tensors, the first is 'layers.1.key_in'"),
    "huge sizes": (config_damage(hidden_size=10**6, head_dim=10**6, rank=10**6), "expected shape"),
    "truncated": (truncate, "not a readable safetensors file"),
    "same size, other content": (flip_a_bit, "expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}: .* Download it again"),
    "empty": (write_weights(b""), "not a readable safetensors file"),
    "pickle": (write_weights(pickle.dumps({ONE: torch.zeros(2)})), r"not a readable safetensors file \(pickle is never read\)"),
    "missing tensor": (tensor_damage(lambda tensors: tensors.pop(ONE)), f"1 tensors are missing, the first is '{ONE}'"),
    "extra tensor": (
        tensor_damage(lambda tensors: tensors.update(x=torch.zeros(1))),
        "1 unexpected tensors, the first is 'x'",
    ),
    "other shape": (
        tensor_damage(lambda tensors: tensors.update({ONE: torch.zeros(2, 2)})),
        rf"{ONE}: expected shape \[2, 2, 2\], got \[2, 2\]",
    ),
    "other dtype": (
        tensor_damage(lambda tensors: tensors.update({ONE: torch.zeros(2, 2, 2, dtype=torch.long)})),
        f"{ONE}: expected F32, F16 or BF16, got I64",
    ),
    "NaN": (tensor_damage(lambda tensors: tensors[ONE].fill_(torch.nan)), f"{ONE} holds NaN or infinity"),
    "infinity": (tensor_damage(lambda tensors: tensors[ONE][0, 0, :1].fill_(-torch.inf)), f"{ONE} holds NaN or infinity"),
}


@contextlib.contextmanager
def little_memory(more: int = 200_000_000):
    """Nothing inside may allocate or map more bytes than this, torch and the reader of safetensors included."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_little_memory_is_a_limit(tmp_path):
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 10**9)
    with little_memory():
        torch.empty(10**6)
        with pytest.raises(RuntimeError, match="memory"):
            torch.empty(10**8)
        with pytest.raises(OSError), open(tmp_path / "sparse", "rb") as file:
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_damaged_folder(folder, damage, message):
    """One error that names the folder, and hardly any memory: whatever a file claims is checked before it is read."""
    damage(folder)
    with little_memory(), pytest.raises(LESSError, match=message) as caught:
        LESSKernels.from_pretrained(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("closed", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_file_that_this_user_may_not_read(closed):
    with tempfile.TemporaryDirectory() as name:  # not below a folder that only its owner may enter
        small_kernels().save_pretrained(name)
        os.chmod(name, 0o755)
        os.chmod(Path(name, closed), 0)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            with pytest.raises(LESSError, match=f"{closed}: this user may not read it"):
                LESSKernels.from_pretrained(name)
        finally:
            os.seteuid(user)


def test_a_pickle_is_never_loaded(folder, tmp_path_factory):
    trace = tmp_path_factory.mktemp("trace") / "trace"

    class Malicious:
        def __reduce__(self):
            return open, (str(trace), "w")

    for write in (torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))):
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            small_kernels().save_pretrained(folder)
            write({ONE: Malicious()}, folder / name)
            if name == WEIGHTS_NAME:
                change_config(folder, sha256=None)
            with pytest.raises(LESSError):
                LESSKernels.from_pretrained(folder)
    assert not trace.exists()


NOWHERE = {
    "no such folder": ("/no/such/folder", "no such folder"),
    "not in the local cache": ("someone/some-kernels", "not in the local cache, and HF_HUB_OFFLINE is set"),
    "no valid id": ("not a valid id!", "no such folder, and not a valid Hub repository id"),
    "long": ("x" * 5_000, "no such folder"),
    "null": ("a\0b", "no such folder"),
    "file": (__file__, "got the file"),
    "empty": ("", "expected"),
}


@pytest.mark.parametrize("name, message", NOWHERE.values(), ids=NOWHERE)
def test_no_such_kernels(name, message, tmp_path, monkeypatch):
    """conftest.py keeps the Hub out of reach."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LESSError, match=message):
        LESSKernels.from_pretrained(name)


# What is wrong when saving


def fail_at(call: int, function):
    """`function`, but its call number `call` finds the disk full."""
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        return function(*args, **kwargs)

    return failing


@pytest.mark.parametrize("call", [1, 2], ids=["weights", "config"])
def test_full_disk_leaves_the_old_files(folder, monkeypatch, call):
    before = contents(folder)
    monkeypatch.setattr(os, "fsync", fail_at(call, os.fsync))
    with pytest.raises(LESSError, match=f"{folder}: cannot be written .*No space left.* Free space"):
        small_kernels(seed=1).save_pretrained(folder)
    assert contents(folder) == before


WRONG_KERNELS = {
    "NaN": lambda kernels: kernels.layers["1"].key_mix.fill_(torch.nan),
    "infinity": lambda kernels: kernels.layers["0"].query_in[0, 0, :1].fill_(torch.inf),
    "config that is no JSON": lambda kernels: kernels.config.training.update(optimizer=torch.optim.Adam),
}


@pytest.mark.parametrize("spoil", WRONG_KERNELS.values(), ids=WRONG_KERNELS)
def test_kernels_that_cannot_be_saved_leave_the_old_files(folder, spoil):
    before = contents(folder)
    kernels = small_kernels(seed=1)
    spoil(kernels)
    with pytest.raises(LESSError):
        kernels.save_pretrained(folder)
    assert contents(folder) == before


def test_saving_where_a_file_is(tmp_path):
    (tmp_path / "file").write_text("keep me")
    with pytest.raises(LESSError, match="cannot be written"):
        small_kernels().save_pretrained(tmp_path / "file")
    assert contents(tmp_path) == {"file": b"keep me"}


# Fuzzing

CONTENTS = st.lists(
    st.tuples(st.integers(0, 4_000), st.binary(max_size=6), st.integers(0, 40)), min_size=1, max_size=4
)  # (where, what is put in, how much is taken out)


@pytest.fixture(scope="module")
def saved() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        small_kernels().save_pretrained(name)
        change_config(Path(name), sha256=None)
        return contents(Path(name))


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "U8", "F8_E4M3", "x", ""]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 4, 8, 2**31, 2**62, -1]), max_size=4),
        "data_offsets": st.lists(st.sampled_from([0, 4, 32, 64, 128, 2**40, 2**63, -1]), min_size=2, max_size=2),
    }
)


@given(
    header=st.dictionaries(st.sampled_from([ONE, "layers.0.query_in", "x", "__metadata__"]), ENTRIES),
    data=st.binary(max_size=200),
)
def test_fuzzed_headers(saved, header, data):
    """Headers that are well-formed, and claim anything."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / CONFIG_NAME).write_bytes(saved[CONFIG_NAME])
        content = json.dumps(header).encode()
        (Path(name) / WEIGHTS_NAME).write_bytes(len(content).to_bytes(8, "little") + content + data)
        with little_memory(), pytest.raises(LESSError, match=name):
            LESSKernels.from_pretrained(name)


@pytest.mark.parametrize("damaged", [CONFIG_NAME, WEIGHTS_NAME])
@given(changes=CONTENTS)
def test_fuzzed_bytes(saved, damaged, changes):
    content = saved[damaged]
    for start, inserted, removed in changes:
        start %= len(content) or 1
        content = content[:start] + inserted + content[start + removed :]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file_name, old in saved.items():
            (folder / file_name).write_bytes(content if file_name == damaged else old)
        try:
            with little_memory():
                kernels = LESSKernels.from_pretrained(folder)
        except LESSError as error:
            assert name in str(error)
        else:
            assert all(torch.isfinite(parameter).all() for parameter in kernels.parameters())
