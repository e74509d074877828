"""The Hugging Face Hub through its own client: download, upload, search. Whatever fails there is one LESSError here."""

import contextlib
import hashlib
import os
import queue
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from less_cache.errors import LESSError
from less_cache.files.paths import expanded
from less_cache.hub.explaining import explained
from less_cache.kernels.folder import CONFIG_NAME, WEIGHTS_NAME, check_digest, read_config
from less_cache.kernels.head_budgets import BUDGETS_NAME, HeadBudgets

T = TypeVar("T")

LIBRARY_TAG = "less-cache"
FINGERPRINT_TAG = "less-fingerprint-{}"  # of the base model's weights; finds kernels for a model that has no Hub id
MOST_CANDIDATES = 5  # repositories that a search returns
PATIENCE = 60.0  # seconds without a byte until an upload gives up
SEARCH_PATIENCE = 5.0  # seconds that a search takes at most: whoever waits can do without


def find(folder_or_repo: str | os.PathLike, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The local folder that holds the two files: the given one, or a download of the Hub repository."""
    folder = expanded(folder_or_repo)
    if os.path.isdir(folder):
        if revision is not None:
            raise LESSError(f"Expected no revision with a local folder, got {revision!r} with {folder}.")
        return folder
    if os.path.exists(folder):
        raise LESSError(f"Expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, got the file {folder}.")
    return download(os.fspath(folder_or_repo), revision, token)


def find_head_budgets(folder_or_repo: str | os.PathLike, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The local folder that holds `head_budgets.json`: the given one, or a download of the Hub repository, with its kernels
    where it has any.
    """
    repo_id, folder = os.fspath(folder_or_repo), expanded(folder_or_repo)
    if os.path.exists(folder):
        return find(folder, revision)
    with explained(_task("Head budgets", repo_id, revision)):
        commit, names = _commit(repo_id, revision, token, BUDGETS_NAME)
        if BUDGETS_NAME not in names:
            raise LESSError(f"the repository has no {BUDGETS_NAME}. Measure it with less-cache profile.")
    if CONFIG_NAME in names:  # a branch in the cache leads to all that a commit has, or not to it
        return download(repo_id, revision, token)
    with explained(_task("Head budgets", repo_id, revision)):
        folder = _fetch(repo_id, BUDGETS_NAME, commit, token).parent
        HeadBudgets.from_pretrained(folder)
        _lead(repo_id, BUDGETS_NAME, revision, token)
    return folder


def download(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> Path:
    """Both files of one commit, checked, from the Hub or its local cache: the folder that holds them; and `head_budgets.json`
    where the commit has one.

    Nothing in the cache is replaced. `revision` leads to the new commit in it, for work without a network, only once the
    new files have passed; a download that was damaged on the way is removed.
    """
    with explained(_task("Kernels", repo_id, revision)):
        commit, names = _commit(repo_id, revision, token, CONFIG_NAME)
        for name in (CONFIG_NAME, WEIGHTS_NAME, *({BUDGETS_NAME} & names)):
            folder = _fetch(repo_id, name, commit, token).parent
        config = read_config(folder)
        if config.sha256 is None:
            raise LESSError(
                f"{folder}: expected {CONFIG_NAME} to name the sha256 of the weights. Publish with less-cache push."
            )
        check_digest(folder, config)
        if (budgets := HeadBudgets.of(folder)) is not None:
            budgets.check_beside(config, repo_id)
        _lead(repo_id, CONFIG_NAME, revision, token)
    return folder


def upload(
    repo_id: str,
    contents: Mapping[str, bytes],
    revision: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    message: str = "Upload LESS kernels",
) -> str:
    """Create the repository where it is missing and put the files there in one commit; the commit's address."""
    task = f"Push to {repo_id!r}" + (f" (revision {revision!r})" if revision else "")
    with (
        explained(task, "The repository is as it was, or has all of the commit"),
        tempfile.TemporaryDirectory() as name,
        patience(PATIENCE),
    ):
        _check_online()
        operations = []
        for path, content in contents.items():
            file = Path(name, path)  # the client shows the progress of files, not of bytes
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
            operations.append(CommitOperationAdd(path_in_repo=path, path_or_fileobj=file))
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision).commit_url


def read_card(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> str | None:
    """The model card of a repository, None where there is no such repository or it has no card."""
    with (
        explained(f"Card of {repo_id!r}"),
        tempfile.TemporaryDirectory() as folder,
    ):  # not the cache: its branches lead to kernels
        _check_online()
        try:
            path = huggingface_hub.hf_hub_download(repo_id, "README.md", revision=revision, token=token, local_dir=folder)
        except hub_errors.GatedRepoError:  # before its base class
            raise
        except (hub_errors.RepositoryNotFoundError, hub_errors.RemoteEntryNotFoundError):
            return None
        return Path(path).read_text(encoding="utf-8")


def search(base_model: str | None, fingerprint: str | None, token: str | bool | None = None) -> list[str]:
    """Ids of repositories with kernels for a base model, by its Hub id, then by its fingerprint; most downloaded first."""
    tags = [f"base_model:{base_model}"] if base_model else []
    tags += [FINGERPRINT_TAG.format(fingerprint[:16])] if fingerprint else []
    seconds = min(SEARCH_PATIENCE, constants.HF_HUB_ETAG_TIMEOUT)

    def look() -> list[str]:
        found: list[str] = []
        for tag in tags:
            found += [repo_id for repo_id in _tagged(tag, seconds, token) if repo_id not in found]
        return found

    with explained("The search for kernels on the Hub"):
        _check_online()
        return within(seconds, look)


def _tagged(tag: str, seconds: float, token: str | bool | None) -> list[str]:
    """Ids of repositories of kernels with a tag. One request: `HfApi.list_models` would try six times, each with a warning."""
    answer = huggingface_hub.get_session().get(
        f"{constants.ENDPOINT}/api/models",
        params={"filter": [LIBRARY_TAG, tag], "sort": "downloads", "limit": MOST_CANDIDATES},
        headers=build_hf_headers(token=token),
        timeout=seconds,
    )
    hf_raise_for_status(answer)
    return [model["id"] for model in answer.json()]


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises; TimeoutError where it takes longer, and nobody heeds its end.

    A client's own limits do not add up to one: a name may have eight addresses, each with a time-out of its own.
    """
    answers: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def answer() -> None:
        try:
            answers.put((work(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=answer, daemon=True).start()
    try:
        result, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} seconds") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def is_repo_id(name: str) -> bool:
    """Whether `name` has the form `organisation/name`, and is no local path."""
    return (
        re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) is not None and not name.startswith(".") and not os.path.exists(name)
    )


def _task(what: str, repo_id: str, revision: str | None) -> str:
    """What a download is called in an error. Raises for a revision that is none."""
    if revision is not None and (not revision or ".." in revision or revision.startswith("/")):
        raise LESSError(f"{what} {repo_id!r}: expected revision to be a branch, a tag or a commit, got {revision!r}.")
    return f"{what} {repo_id!r}" + (f" (revision {revision!r})" if revision else "")


def _commit(repo_id: str, revision: str | None, token: str | bool | None, wanted: str) -> tuple[str, set[str]]:
    """The commit that `revision` is now, and the names of its files; without an answer from the Hub, the one that it was when
    the file `wanted` was last downloaded, and the names that are there.
    """
    try:
        info = HfApi().model_info(repo_id, revision=revision, token=token, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError, hub_errors.HFValidationError):
        raise
    except (hub_errors.HTTPError, OSError):  # offline, no connection, time-out, overloaded, broken
        with contextlib.suppress(hub_errors.LocalEntryNotFoundError):
            cached = huggingface_hub.hf_hub_download(repo_id, wanted, revision=revision, local_files_only=True)
            return Path(cached).parent.name, {path.name for path in Path(cached).parent.iterdir()}
        raise
    if not re.fullmatch("[0-9a-f]{40}", info.sha or ""):
        raise LESSError(f"expected the Hub to name a commit, got {info.sha!r}. Is HF_ENDPOINT right?")
    return info.sha, {file.rfilename for file in info.siblings or []}  # type: ignore[return-value]


def _fetch(repo_id: str, name: str, commit: str, token: str | bool | None) -> Path:
    """A file of a commit in the local cache, as the Hub announced it."""
    path = Path(huggingface_hub.hf_hub_download(repo_id, name, revision=commit, token=token))
    _check_transfer(path)
    return path


def _lead(repo_id: str, name: str, revision: str | None, token: str | bool | None) -> None:
    """Let `revision` lead to the commit of which `name` is in the local cache."""
    with contextlib.suppress(OSError):  # a cache that cannot be written works as well
        huggingface_hub.hf_hub_download(repo_id, name, revision=revision, token=token)


def _check_online() -> None:
    if constants.HF_HUB_OFFLINE:
        raise LESSError("HF_HUB_OFFLINE is set. Unset it where there is a network.")


def _check_transfer(path: Path) -> None:
    """Remove a cached file that is not what the Hub announced, and raise.

    The client stores a file under its digest (sha256 of large files, git's sha1 of small ones) without computing it.
    """
    blob = path.resolve()
    content = blob.read_bytes()
    if len(blob.name) == 64:
        digest = hashlib.sha256(content).hexdigest()
    elif len(blob.name) == 40:
        digest = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    else:
        return  # a file system without symbolic links: the config's digest of the weights is what remains
    if digest != blob.name:
        with contextlib.suppress(OSError):
            path.unlink()
            blob.unlink()
        raise LESSError(
            f"{path}: expected digest {blob.name}, got {digest}: damaged in the transfer or on the disk, and removed. "
            "Run again to download it afresh."
        )


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """No request inside waits longer than this for a byte. Left alone, the client waits for ever in most of its calls."""

    def limit(request: Any) -> None:
        timeouts = request.extensions["timeout"]  # by phase; None: for ever
        timeouts.update({phase: seconds for phase, limit in timeouts.items() if limit is None})

    session = huggingface_hub.get_session()
    session.event_hooks = {**session.event_hooks, "request": [*session.event_hooks["request"], limit]}
    try:
        yield
    finally:
        others = [hook for hook in session.event_hooks["request"] if hook is not limit]
        session.event_hooks = {**session.event_hooks, "request": others}
