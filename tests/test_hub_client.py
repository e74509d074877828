"""The real Hub client against a server on the loopback interface: what works, and every way in which a network fails."""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import OWNER_TOKEN, READER_TOKEN, STRANGER_TOKEN
from huggingface_hub import constants
from test_hub_files import contents, small_kernels

from less_cache import LESSError, LESSKernels
from less_cache.kernels.folder import CONFIG_NAME, WEIGHTS_NAME

REPO = "someone/some-kernels"


def files_of(kernels: LESSKernels) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        kernels.save_pretrained(folder)
        return contents(Path(folder))


FILES, OTHER_FILES = files_of(small_kernels(seed=0)), files_of(small_kernels(seed=1))


@pytest.fixture
def hub(hub):
    """A server with one set of kernels."""
    hub.create(REPO, FILES)
    return hub


def same(kernels: LESSKernels, seed: int = 0) -> bool:
    expected = small_kernels(seed).state_dict()
    return all(torch.equal(tensor, expected[name]) for name, tensor in kernels.state_dict().items())


def test_download(hub):
    assert same(LESSKernels.from_pretrained(REPO))


def test_a_second_load_downloads_nothing(hub):
    LESSKernels.from_pretrained(REPO)
    hub.log.clear()
    assert same(LESSKernels.from_pretrained(REPO))
    assert not hub.requests("GET .*/resolve/.*")


def test_revisions(hub):
    first = hub.repositories[REPO].refs["main"]
    hub.repositories[REPO].refs["v1"] = first
    hub.repositories[REPO].commit(OTHER_FILES)
    assert same(LESSKernels.from_pretrained(REPO), seed=1)
    assert same(LESSKernels.from_pretrained(REPO, revision="v1"))
    assert same(LESSKernels.from_pretrained(REPO, revision=first))


def test_a_load_is_of_one_commit(hub):
    """The repository moves on between the two files."""
    repository, resolve = hub.repositories[REPO], huggingface_hub.hf_hub_download

    def download_then_move_on(repo_id, name, **options):
        path = resolve(repo_id, name, **options)
        repository.commit(OTHER_FILES)
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "hf_hub_download", download_then_move_on)
        assert same(LESSKernels.from_pretrained(REPO))


def test_token_opens_what_is_private_or_gated(hub):
    for options in ({"private": True}, {"gated": True}):
        hub.create("someone/closed", FILES, **options)
        assert same(LESSKernels.from_pretrained("someone/closed", token=OWNER_TOKEN))
    hub.create("someone/gated", FILES, gated=True)
    assert same(LESSKernels.from_pretrained("someone/gated", token=READER_TOKEN))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_shown(hub, monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    LESSKernels.from_pretrained(REPO)
    shown = sys.stderr.getvalue()
    assert CONFIG_NAME in shown and WEIGHTS_NAME in shown and "100%" in shown


# Refusals


def load(repo_id: str = REPO, **options):
    return lambda: LESSKernels.from_pretrained(repo_id, **options)


REFUSED = {
    "no such repository": (load("someone/nothing"), {}, "no such folder, and the Hub shows no such repository. Check the name"),
    "private": (load("someone/private"), {}, "if it is private, log in"),
    "private, other account": (load("someone/private", token=STRANGER_TOKEN), {}, "token= of an account that may read it"),
    "gated": (load("someone/gated"), {}, "is gated. Ask for access on its page"),
    "gated, not on the list": (load("someone/gated", token=STRANGER_TOKEN), {}, "is gated. Ask for access on its page"),
    "unknown token": (load(token="hf_wrong"), {}, "does not know the token"),
    "no such revision": (load(revision="v9"), {}, r"\(revision 'v9'\): the repository has no such revision"),
    "no kernels": (load("someone/empty"), {}, f"lacks a file that kernels have .{CONFIG_NAME}"),
    "no weights": (load("someone/half"), {}, f"lacks a file that kernels have .*{WEIGHTS_NAME}"),
    "rate limit": (load(), {"request": ".*", "status": 429}, "too many requests"),
    "rate limit, weights": (load(), {"request": ".*safetensors", "status": 429, "headers": {"Retry-After": "0"}}, "too many"),
    "broken": (load(), {"request": ".*", "status": 500}, r"a problem of its own \(500\)"),
    "broken, weights": (load(), {"request": ".*safetensors", "status": 503}, r"a problem of its own \(503\)"),
    "no answer": (load(), {"request": ".*", "hang": True}, "cannot be reached, or the connection broke"),
    "no answer, weights": (
        load(),
        {"request": "GET .*safetensors", "hang": True},
        "cannot be reached, or the connection broke",
    ),
    "cut, again and again": (load(), {"request": "GET .*safetensors", "cut_at": 0}, "connection broke|client failed"),
    "short": (load(), {"request": "GET .*safetensors", "content": FILES[WEIGHTS_NAME][:-100]}, "client failed"),
    "other content": (
        load(),
        {"request": "GET .*safetensors", "content": OTHER_FILES[WEIGHTS_NAME]},
        "damaged in the transfer or on the disk, and removed",
    ),
    "other config": (
        load(),
        {"request": "GET .*json", "content": FILES[CONFIG_NAME].replace(b'"rank": 2', b'"rank": 3')},
        "damaged in the transfer or on the disk, and removed",
    ),
}


@pytest.mark.parametrize("attempt, failure, message", REFUSED.values(), ids=REFUSED)
def test_refused(hub, tmp_path, attempt, failure, message):
    """One LESSError that names the repository; and once the failure is over, the same call works."""
    hub.create("someone/private", FILES, private=True)
    hub.create("someone/gated", FILES, gated=True)
    hub.create("someone/empty", {"README.md": b""})
    hub.create("someone/half", {CONFIG_NAME: FILES[CONFIG_NAME]})
    with hub.failing(**failure) if failure else contextlib.nullcontext(), pytest.raises(LESSError, match=message) as caught:
        attempt()
    assert "someone/" in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("refs/*")), "a set that never worked is not what a branch leads to"
    if failure:
        assert same(LESSKernels.from_pretrained(REPO))


@pytest.mark.parametrize("revision", ["../../../escape", "..", "/etc", ""])
def test_a_revision_is_no_path(hub, revision, tmp_path):
    with pytest.raises(LESSError, match="expected revision to be a branch, a tag or a commit"):
        LESSKernels.from_pretrained(REPO, revision=revision)
    assert not list(tmp_path.rglob("*escape*"))


@pytest.mark.parametrize("repo_id", ["../../etc", "someone/../../etc", "a/b/c", "someone/"])
def test_a_repository_is_no_path(hub, repo_id, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LESSError, match="not a valid Hub repository id"):
        LESSKernels.from_pretrained(repo_id)


def test_a_connection_cut_half_way_resumes(hub, monkeypatch):
    """In the same call; an old client needs a second one."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # what comes in is kept in chunks of 10 MB
    with hub.failing("GET .*safetensors", cut_at=1_000, times=1):
        try:
            kernels = LESSKernels.from_pretrained(REPO)
        except LESSError as error:
            assert "connection broke" in str(error) and huggingface_hub.__version__ < "2"
            kernels = LESSKernels.from_pretrained(REPO)
    assert same(kernels)
    first, second = (request.get("Range", request.get("range")) for request in hub.requests("GET .*safetensors"))
    assert first is None and second.startswith("bytes=") and second != "bytes=0-"


# What is in the local cache


def test_offline_with_a_copy(hub, monkeypatch):
    LESSKernels.from_pretrained(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    assert same(LESSKernels.from_pretrained(REPO))
    assert not hub.log


def test_offline_without_a_copy_says_what_to_do(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LESSError, match=r"not in the local cache, and HF_HUB_OFFLINE is set. Unset it, or run less-cache pull"):
        LESSKernels.from_pretrained(REPO)


UNREACHABLE = {
    "rate limit": {"status": 429},
    "broken": {"status": 500},
    "no answer": {"hang": True},
    "cut": {"cut_at": 0},
}


@pytest.mark.parametrize("failure", UNREACHABLE.values(), ids=UNREACHABLE)
def test_a_copy_works_while_the_hub_does_not(hub, failure):
    LESSKernels.from_pretrained(REPO)
    with hub.failing(".*", **failure):
        assert same(LESSKernels.from_pretrained(REPO))


BAD_COMMITS = {
    "swapped weights": {CONFIG_NAME: FILES[CONFIG_NAME], WEIGHTS_NAME: OTHER_FILES[WEIGHTS_NAME]},
    "truncated weights": {CONFIG_NAME: FILES[CONFIG_NAME], WEIGHTS_NAME: FILES[WEIGHTS_NAME][:-100]},
    "weights missing": {CONFIG_NAME: OTHER_FILES[CONFIG_NAME]},
    "config missing": {WEIGHTS_NAME: OTHER_FILES[WEIGHTS_NAME]},
    "config is no JSON": {CONFIG_NAME: b"{", WEIGHTS_NAME: FILES[WEIGHTS_NAME]},
    "no digest": {
        CONFIG_NAME: json.dumps({**json.loads(FILES[CONFIG_NAME]), "sha256": None}).encode(),
        WEIGHTS_NAME: FILES[WEIGHTS_NAME],
    },
}


@pytest.mark.parametrize("files", BAD_COMMITS.values(), ids=BAD_COMMITS)
def test_a_bad_commit_does_not_replace_a_good_copy(hub, monkeypatch, files):
    LESSKernels.from_pretrained(REPO)
    hub.repositories[REPO].commit(files)
    for _ in range(2):
        with pytest.raises(LESSError):
            LESSKernels.from_pretrained(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(LESSKernels.from_pretrained(REPO))


def test_a_cut_download_of_a_new_commit_does_not_replace_a_good_copy(hub, monkeypatch):
    LESSKernels.from_pretrained(REPO)
    hub.repositories[REPO].commit(OTHER_FILES)
    with hub.failing("GET .*safetensors", cut_at=100), pytest.raises(LESSError):
        LESSKernels.from_pretrained(REPO)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert same(LESSKernels.from_pretrained(REPO))
    assert same(LESSKernels.from_pretrained(REPO), seed=1)


def test_a_copy_that_the_disk_damaged_is_downloaded_afresh(hub, tmp_path):
    LESSKernels.from_pretrained(REPO)
    blob = next(tmp_path.rglob(WEIGHTS_NAME)).resolve()
    content = bytearray(blob.read_bytes())
    content[-5] ^= 1
    blob.write_bytes(content)
    with pytest.raises(LESSError, match=r"damaged .* and removed. Run again"):
        LESSKernels.from_pretrained(REPO)
    assert same(LESSKernels.from_pretrained(REPO))


@contextlib.contextmanager
def nobody(folder: Path):
    """Without root's right to write anywhere."""
    modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*")) if not path.is_symlink()}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222 | 0o055)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)
        for path, mode in modes.items():
            path.chmod(mode)


def test_read_only_cache(hub, monkeypatch):
    """A copy works, also where the branch has moved to a commit that is in the cache; a download is refused."""
    with tempfile.TemporaryDirectory() as name:  # not below a folder that only its owner may enter
        cache = Path(name, "cache")
        Path(name).chmod(0o755)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        first = hub.repositories[REPO].refs["main"]
        hub.repositories[REPO].commit(OTHER_FILES)
        LESSKernels.from_pretrained(REPO, revision=first)
        LESSKernels.from_pretrained(REPO)
        hub.repositories[REPO].refs["main"] = first
        hub.create("someone/others", OTHER_FILES)
        with nobody(cache):
            assert same(LESSKernels.from_pretrained(REPO))
            with pytest.raises(LESSError, match=r"'someone/others': cannot write to the disk .* set HF_HOME"):
                LESSKernels.from_pretrained("someone/others")


class FullDisk:
    """A file that takes nothing."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def write(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk(hub, monkeypatch):
    """The disk is full when content comes in; with space, the same call works."""
    opened = Path.open

    def open_full(path, *arguments, **options):
        file = opened(path, *arguments, **options)
        return FullDisk(file) if path.name.endswith(".incomplete") else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        with pytest.raises(LESSError, match=r"cannot write to the disk .*No space left.* Free space"):
            LESSKernels.from_pretrained(REPO)
    assert same(LESSKernels.from_pretrained(REPO))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # the other process does nothing but download
def test_two_processes_at_once(hub, tmp_path):
    def load_and_tell(result):
        result.put(same(LESSKernels.from_pretrained(REPO)))

    fork = multiprocessing.get_context("fork")  # a new interpreter takes ten seconds to import torch
    result = fork.Queue()
    with hub.failing("GET .*safetensors", delay=0.3):
        second = fork.Process(target=load_and_tell, args=(result,))
        second.start()
        assert same(LESSKernels.from_pretrained(REPO))
        assert result.get(timeout=60)
        second.join()
    assert len(hub.requests("GET .*safetensors")) == 1, "one waits for the other"
    assert not list(tmp_path.rglob("*.incomplete"))
    assert same(LESSKernels.from_pretrained(REPO))
