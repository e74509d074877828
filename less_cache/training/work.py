"""Files of a run: written whole or not at all, one error where one is damaged, removed by nobody but the run itself."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from less_cache.errors import LESSError
from less_cache.files import plain_json
from less_cache.files.atomic import DRAFT, replace
from less_cache.reports import machine

FORMAT = 4  # of what `work/` holds, and of what the stages do with it
WORK_NAME = "work"
RUN_NAME = "run.json"  # says which run `work/` belongs to: the first file there, and the last to go
OWN_NAME = "own"  # texts that the model wrote itself
MADE = ("capture", "layers", "joint.pt", RUN_NAME)  # all else that a run makes in `work/`
OF_JOINT = ("joint_steps", "joint_learning_rate")  # options that the first stage does not depend on


def identity(training: Mapping[str, Any], fingerprint: str | None, texts: str | None) -> dict[str, Any]:
    """What tells a run from others, as `run.json` has it.

    `training`: the config's entry of that name; `fingerprint`: of the model; `texts`: digest of the token ids.
    """
    options = {name: value for name, value in training.items() if name not in OF_JOINT}
    return {"format": FORMAT, **options, "model": fingerprint, "texts": texts}


def read_run(work: Path) -> dict[str, Any]:
    """What `run.json` says."""
    with readable(work / RUN_NAME, f"Nothing tells whose {work} is. Choose another output folder, or remove it to begin anew."):
        run = plain_json.parse((work / RUN_NAME).read_text("utf-8"))
        if not isinstance(run, dict):
            raise LESSError(f"expected a JSON object, got {type(run).__name__}.")
        return run


def made_by_others(work: Path) -> list[str]:
    """Names in `work` that no run makes there before `run.json`."""
    names = sorted(path.name for path in work.iterdir()) if work.is_dir() else []
    return [name for name in names if name not in (OWN_NAME, RUN_NAME) and not name.startswith(DRAFT)]


def remove(work: Path, own_texts: bool) -> list[str]:
    """Remove what a run made in `work`, `run.json` last; the folder too, unless something else is there: what is left.

    `own_texts`: whether the run's model wrote texts.
    """
    drafts = [path.name for path in work.glob(f"{DRAFT}*")]  # of processes of this run that were killed
    for name in [*drafts, *([OWN_NAME] if own_texts else []), *MADE]:
        if (work / name).is_dir() and not (work / name).is_symlink():
            shutil.rmtree(work / name)
        else:
            (work / name).unlink(missing_ok=True)
    left = sorted(path.name for path in work.iterdir())
    if not left and not work.is_symlink():
        work.rmdir()
    return left


@contextmanager
def readable(path: Path, remedy: str = "Remove it: the same command makes it anew.") -> Iterator[None]:
    """Whatever a damaged file makes its readers raise inside becomes one LESSError with what to do."""
    try:
        yield
    except Exception as error:  # readers of damaged files raise whatever they stumble over
        if isinstance(error, RuntimeError) and machine.out_of_memory(error):
            raise
        said = f"{type(error).__name__}: {' '.join(str(error).strip().splitlines()[:1])}"
        raise LESSError(f"{path}: expected a file as a training run writes it, got a damaged one ({said}). {remedy}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one atomic step."""
    try:
        replace(path.parent, {path.name: content})
    except LESSError as error:
        raise LESSError(f"{error} What was finished before stays: the same command goes on.") from error


def differences(expected: Mapping[str, Any], got: Mapping[str, Any]) -> str:
    """What two descriptions of a run do not share, for an error."""
    names = [name for name in {**expected, **got} if expected.get(name) != got.get(name)]
    return "; ".join(f"{name}: expected {expected.get(name)}, got {got.get(name)}" for name in names)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, in one atomic step."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(contiguous, metadata=dict(metadata or {})))


def load_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors, memory-mapped on a CPU, and metadata of a safetensors file."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        return tensors, file.metadata() or {}
