"""Whatever the Hub's client raises, as one LESSError that says what failed and what to do."""

import contextlib
from collections.abc import Iterator

from huggingface_hub import errors as hub_errors

from less_cache.errors import LESSError
from less_cache.kernels.folder import CONFIG_NAME, WEIGHTS_NAME


class UnreachableError(LESSError):
    """The Hub gave no answer."""


@contextlib.contextmanager
def explained(task: str, state: str = "Nothing was changed") -> Iterator[None]:
    """Whatever the client raises inside becomes a LESSError that says what failed and what to do.

    `state`: what a failure half-way leaves behind.
    """
    try:
        yield
    except LESSError as error:
        raise type(error)(f"{task}: {error}") from error
    except Exception as error:  # the client raises its own errors, its HTTP library's, OSError, ValueError and RuntimeError
        kind = UnreachableError if _has_no_answer(error) else LESSError
        raise kind(f"{task}: {_explanation(error, state)}") from error


def _explanation(error: BaseException, state: str) -> str:
    if isinstance(error, hub_errors.HFValidationError):
        return f"no such folder, and not a valid Hub repository id. {_first_line(error)}"
    if isinstance(error, hub_errors.GatedRepoError):  # before its base class, RepositoryNotFoundError
        return "the repository is gated. Ask for access on its page, then log in (hf auth login) or pass token=."
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return (
            "no such folder, and the Hub shows no such repository. Check the name; "
            "if it is private, log in (hf auth login) or pass token= of an account that may read it."
        )
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return "the repository has no such revision. Check the branch, tag or commit."
    if isinstance(error, hub_errors.RemoteEntryNotFoundError):
        return f"the repository lacks a file that kernels have ({CONFIG_NAME}, {WEIGHTS_NAME}). Is it a set of kernels?"
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return "not in the local cache, and HF_HUB_OFFLINE is set. Unset it, or run less-cache pull where there is a network."
    if isinstance(error, hub_errors.LocalEntryNotFoundError | RuntimeError) and error.__cause__ is not None:
        return _explanation(error.__cause__, state)  # the client's wrapping
    if isinstance(error, hub_errors.HfHubHTTPError) and error.response is not None:
        return _status(error.response.status_code, error, state)
    if _has_no_answer(error):
        return (
            f"the Hub cannot be reached, or the connection broke ({_first_line(error)}). "
            f"{state}: check the network and run again."
        )
    if isinstance(error, OSError) and error.errno is not None:
        return (
            f"cannot write to the disk ({error}). Free space, or set HF_HOME (for downloads) or TMPDIR (for uploads) to a "
            "folder that can be written."
        )
    return f"the Hub's client failed: {_first_line(error)} {state}: run again."


def _has_no_answer(error: BaseException) -> bool:
    """Whether it is of the network; statuses are answers."""
    if isinstance(error, hub_errors.HfHubHTTPError) and error.response is not None:
        return False
    return isinstance(error, hub_errors.HTTPError | hub_errors.LocalEntryNotFoundError | ConnectionError | TimeoutError)


def _status(status: int, error: BaseException, state: str) -> str:
    if status == 401:
        return "the Hub does not know the token (401). Log in again (hf auth login), or pass another token=."
    if status == 403:
        return f"the token does not allow this (403: {_first_line(error)}). Use one with the right to."
    if status == 429:
        return "too many requests (429). Wait some minutes; logged in (hf auth login) the limit is higher."
    if status >= 500:
        return f"the Hub has a problem of its own ({status}). {state}: try again later."
    return f"the Hub answered {status}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
