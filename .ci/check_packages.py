"""Fails unless the wheel and the sdist in the given folder carry what they need, and the wheel nothing else."""

import sys
import tarfile
import zipfile
from pathlib import Path

PACKAGE = ["less_cache/__init__.py", "less_cache/py.typed", "less_cache/data/pride-and-prejudice-chapter-19.txt"]
PACKAGE += ["less_cache/hub/custom_generate/generate.py", "less_cache/hub/custom_generate/requirements.txt"]
NATIVE = [path for path in Path("less_cache/backends/cpu").iterdir() if path.suffix in (".cpp", ".h")]
PACKAGE += [path.as_posix() for path in NATIVE]
WHEEL = [*PACKAGE, "licenses/LICENSE", "less_cache/hub/catalogue.json"]
SDIST = [
    *PACKAGE,
    *("tests/conftest.py", "tests/fixtures/", "hub/", "examples/quickstart.py", "docs/log.md", ".ci/run"),
    *(
        "constraints.txt",
        "constraints-oldest.txt",
        "Makefile",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "pyproject.toml",
    ),
]

folder = Path(sys.argv[1])
[wheel], [sdist] = folder.glob("*.whl"), folder.glob("*.tar.gz")
with zipfile.ZipFile(wheel) as wheel_file, tarfile.open(sdist) as sdist_file:
    in_wheel = wheel_file.namelist()
    in_sdist = [name.partition("/")[2] for name in sdist_file.getnames()]

missing = [f"{wheel.name}: {name}" for name in WHEEL if not any(name in entry for entry in in_wheel)]
missing += [f"{sdist.name}: {name}" for name in SDIST if not any(entry.startswith(name) for entry in in_sdist)]
surplus = [entry for entry in in_wheel if not entry.startswith(("less_cache/", "less_cache-"))]
if missing or surplus:
    sys.exit(f"error: missing: {missing or 'nothing'}; surplus in the wheel: {surplus or 'nothing'}")
print(f"{wheel.name}: {len(in_wheel)} files; {sdist.name}: {len(in_sdist)} files")
