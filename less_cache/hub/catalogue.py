"""The catalogue of published kernels that comes with the package: `hub/catalogue.json` in the source tree.

    {"org/base-model": [{"fingerprint": "…", "folder": "base-model-h2o", "repo_id": "org/base-model-less"}, …], …}

`folder` stands beside the catalogue, `repo_id` on the Hub; either may be null.
"""

import json
from pathlib import Path

PATHS = (  # where it is: installed, in the source tree
    Path(__file__).with_name("catalogue.json"),
    Path(__file__).parents[2] / "hub" / "catalogue.json",
)


def find(base_model: str | None, fingerprint: str | None) -> list[str]:
    """Folders and repository ids with kernels for a base model, folders first. The fingerprint decides where it is known."""
    path = next((path for path in PATHS if path.is_file()), None)
    if path is None:
        return []
    entries = [
        entry
        for name, sets in json.loads(path.read_text(encoding="utf-8")).items()
        for entry in sets
        if (entry["fingerprint"] == fingerprint if fingerprint is not None else name == base_model)
    ]
    folders = [path.parent / entry["folder"] for entry in entries if entry["folder"] is not None]
    return [str(folder) for folder in folders if folder.is_dir()] + [entry["repo_id"] for entry in entries if entry["repo_id"]]
