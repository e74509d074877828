"""The import graph, read from the sources: no cycle, one way, and the core needs nothing that is optional."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

import less_cache

ROOT = Path(less_cache.__file__).parent
SOURCES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}
CORE = [  # each imports only from those before it
    "version",
    "errors",
    "config",
    "hub.files",
    "hub.__init__",
    "hub.client",
    "hub.card",
    "hub.publish",
    "hub.catalogue",
    "hook",
    "families",
    "attention",
    "state",
    "memory",
    "centroids",
    "soft_centroids",
    "policies.base",
    "policies.h2o",
    "policies.sink_recent",
    "policies.corm",
    "policies.__init__",
    "kernels",
    "call",
    "recording",
    "prompt",
    "fused",
    "layer",
    "static",
    "resolution",
    "snapshot",
    "cache",
    "__init__",
]
CORE_NEEDS = {"torch", "transformers", "safetensors", "huggingface_hub"}
MAY_NEED = {"fused": {"triton"}}  # `layer` goes on without it
DISPATCH = {
    "AttentionInterface",
    "ALL_ATTENTION_FUNCTIONS",
    "get_interface",
    "AttentionMaskInterface",
    "ALL_MASK_ATTENTION_FUNCTIONS",
}


def tree(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"))


def imported(module: str) -> set[str]:
    """Every dotted name that a module imports, inside functions too."""
    names = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def inside(name: str) -> str | None:
    """The module of this package that `import name` or `from … import name` reaches; None for another package."""
    if name.split(".")[0] != "less_cache":
        return None
    path = name.removeprefix("less_cache").removeprefix(".")
    for candidate in (path, f"{path}.__init__", path.rpartition(".")[0], f"{path.rpartition('.')[0]}.__init__".lstrip(".")):
        if candidate in SOURCES:
            return candidate
    raise AssertionError(f"{name}: no such module")


GRAPH = {module: {target for name in imported(module) if (target := inside(name))} for module in SOURCES}


def test_every_import_is_understood():
    assert GRAPH["layer"] >= {"hook", "attention", "policies.__init__", "memory"}
    assert GRAPH["__init__"] >= {"cache", "config", "kernels"}
    assert GRAPH["version"] == set()


def test_no_cycles():
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError


@pytest.mark.parametrize("module", CORE)
def test_core_points_one_way(module):
    assert GRAPH[module] <= set(CORE[: CORE.index(module)])


@pytest.mark.parametrize("module", CORE)
def test_core_needs_no_extra(module):
    packages = {name.split(".")[0] for name in imported(module)} - set(sys.stdlib_module_names) - {"less_cache"}
    assert packages <= CORE_NEEDS | MAY_NEED.get(module, set())


def test_every_policy_is_core():
    assert {module for module in SOURCES if module.startswith("policies.")} == {
        module for module in CORE if module.startswith("policies.")
    }


@pytest.mark.parametrize("module", [module for module in SOURCES if module != "hook"])
def test_only_the_hook_touches_dispatch(module):
    used = {node.id for node in ast.walk(tree(module)) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)}
    used |= {part for name in imported(module) for part in name.split(".")}
    assert not used & DISPATCH
    assert not any(part.startswith("modeling_") for part in used)


def test_the_hook_does():
    """The names that the test above looks for are the right ones."""
    assert imported("hook") >= {"transformers.AttentionInterface", "transformers.models.falcon.modeling_falcon"}
