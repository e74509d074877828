"""Building the C++ form: once for each source, command and processor, into the user's cache folder.

What lies there is run by whoever loads it. So the folder must be this user's alone, and a file's name ends with the sha256 of
what is in it: one that was cut off, or changed, is not loaded but built anew.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from less_cache.backends.cpu.layout import DEFINITIONS

HERE = Path(__file__).parent
COMPILED = [HERE / name for name in ("step.cpp", "prompt.cpp", "attend.cpp")]
INCLUDED = [HERE / name for name in ("step.h", "policies.h", "memories.h", "attend.h", "codes.h", "vector_math.h")]
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"]
INSTRUCTIONS = {  # of a processor that torch calls so
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
CPU_INFO = Path("/proc/cpuinfo")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The C++ functions, built where this user has not built them before; None without a compiler and, with a warning, where
    that fails. Asked again, it does not try again.
    """
    found = compiler()
    if found is None:
        return None
    try:
        return _load_or_build(command(found))
    except (OSError, RuntimeError, ValueError, AttributeError, subprocess.CalledProcessError) as error:
        reason = " ".join((getattr(error, "stderr", None) or str(error)).split())[:300]
        warnings.warn(
            f"less_cache: the C++ form could not be built ({reason}). PyTorch takes its place, with the same result in more "
            "time. The compiler is $CXX, or c++; it writes into $XDG_CACHE_HOME/less-cache, or ~/.cache/less-cache. "
            "LESS_CACHE_NATIVE=0 turns it off.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def compiler() -> str | None:
    """The C++ compiler: $CXX, or what is called c++ or g++; None where there is none that we can drive."""
    if sys.platform == "win32":
        return None
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def command(found: str) -> list[str]:
    """How this compiler is called, without the files."""
    numbers = {name: f"{value!r}f" if isinstance(value, float) else str(value) for name, value in DEFINITIONS.items()}
    return [
        *shlex.split(found),
        *FLAGS,
        *INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), []),
        *(["-fopenmp"] if sys.platform == "linux" else []),  # Apple's compiler has none: one thread
        *(f"-D{name}={number}" for name, number in numbers.items()),
    ]


def digest(command: list[str]) -> str:
    """Of all that decides what is built: the command, the sources and the processor."""
    sources = [path.read_text("utf-8") for path in (*COMPILED, *INCLUDED)]
    return hashlib.sha256("\0".join([*command, *sources, *processor()]).encode()).hexdigest()[:16]


def processor() -> list[str]:
    """What the system says of this processor."""
    said = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    with contextlib.suppress(OSError), CPU_INFO.open("rb") as file:
        lines = file.read(8192).decode(errors="replace").partition("\n\n")[0].splitlines()  # of the first of them
        said += [line for line in lines if line.startswith(("model name", "flags", "CPU part", "Features"))]
    return said


def own_folder() -> Path:
    """The folder that built files lie in, made where it is not there. It must be this user's, and nobody else's to write."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "less-cache"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(each.st_uid != os.geteuid() for each in (folder.lstat(), folder.stat())):
        raise RuntimeError(f"{folder} belongs to another user; set XDG_CACHE_HOME to a folder of your own")
    if folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RuntimeError(f"others may write into {folder}; remove it, or chmod 700 it where what is in it is yours")
    return folder


def _load_or_build(command: list[str]) -> ctypes.CDLL:
    folder, start = own_folder(), f"native-{digest(command)}"
    for path in folder.glob(f"{start}-*.so"):
        content = path.read_bytes()
        if path.name == _name(start, content):
            with contextlib.suppress(OSError):  # it does not load: built anew
                return _load(path)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        built = Path(work) / "native.so"
        subprocess.run([*command, *COMPILED, "-o", built], check=True, capture_output=True, text=True, errors="replace")
        with built.open("rb") as file:
            path = folder / _name(start, file.read())
            os.fsync(file.fileno())
        built.replace(path)  # other processes may build it at the same time: each sees all of it or nothing
    return _load(path)


def _name(start: str, content: bytes) -> str:
    return f"{start}-{hashlib.sha256(content).hexdigest()}.so"


def _load(path: Path) -> ctypes.CDLL:
    functions = ctypes.CDLL(str(path))
    functions.less_step.restype, functions.less_step.argtypes = ctypes.c_bool, [ctypes.c_void_p]
    functions.less_attend.restype, functions.less_attend.argtypes = ctypes.c_bool, [ctypes.c_void_p]
    functions.less_read_prompt.restype, functions.less_read_prompt.argtypes = None, [ctypes.c_void_p]
    return functions
