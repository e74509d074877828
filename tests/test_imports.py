"""The import graph, read from the sources: no cycle, folders one way, and the core needs neither extras nor the network."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import less_cache

ROOT = Path(less_cache.__file__).parent
SOURCES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}
FOLDERS = [  # each imports only from those before it; docs/architecture.md says what each is for
    "version",
    "errors",
    "files",
    "policies",
    "ops",
    "memory",
    "slots",
    "fitting",
    "backends",
    "integration",
    "kernels",
    "cache",
    "__init__",
    "hub",
    "testing",
    "models",
    "reports",
    "training",
    "evaluation",
    "bench",
    "cli",
]
CORE = FOLDERS[: FOLDERS.index("__init__") + 1]
CORE_NEEDS = {"torch", "transformers", "safetensors"}
MAY_NEED = {  # `backends.select` goes on without it
    "backends.triton.bridge": {"triton"},
    "backends.triton.programs": {"triton"},
}
# Imports inside functions: what needs the network is imported when it is asked for.
LATE = {
    "kernels.head_budgets": {"hub.client"},
    "kernels.kernels": {"hub.client", "hub.publish"},
    "cache.cache": {"hub.resolution"},
}
DISPATCH = {
    "AttentionInterface",
    "ALL_ATTENTION_FUNCTIONS",
    "get_interface",
    "AttentionMaskInterface",
    "ALL_MASK_ATTENTION_FUNCTIONS",
}
MOST_LINES = 340


def tree(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"))


def imported(module: str, late: bool) -> set[str]:
    """Every dotted name that a module imports: when it is imported itself, or `late`, inside its functions."""
    parsed = tree(module)
    inner = {
        node
        for function in ast.walk(parsed)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    names = set()
    for node in ast.walk(parsed):
        if (node in inner) != late:
            continue
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


def reached(module: str, late: bool = False) -> set[str]:
    return {target for name in imported(module, late) if (target := inside(name))}


def folder(module: str) -> str:
    """Where a module stands in `FOLDERS`: a folder, or a module beside them."""
    return module.partition(".")[0]


GRAPH = {module: reached(module) for module in SOURCES}
IN_CORE = [module for module in SOURCES if folder(module) in CORE]


def test_every_import_is_understood():
    assert GRAPH["cache.layer"] >= {"integration.hook", "backends.select", "memory.__init__", "slots.__init__"}
    assert GRAPH["__init__"] >= {"cache.__init__", "kernels.__init__"}
    assert GRAPH["version"] == set()
    assert reached("cache.cache", late=True) == {"hub.resolution"}


def test_no_cycles():
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError


def test_every_folder_has_its_place():
    assert {folder(module) for module in SOURCES} == set(FOLDERS)


@pytest.mark.parametrize("module", SOURCES)
def test_folders_point_one_way(module):
    earlier = FOLDERS[: FOLDERS.index(folder(module)) + 1]
    assert {folder(target) for target in GRAPH[module]} <= set(earlier)


@pytest.mark.parametrize("module", IN_CORE)
def test_the_core_needs_no_extra(module):
    names = imported(module, late=False) | imported(module, late=True)
    packages = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"less_cache"}
    assert packages <= CORE_NEEDS | MAY_NEED.get(module, set())


@pytest.mark.parametrize("module", IN_CORE)
def test_the_core_imports_nothing_late_but_the_network(module):
    assert reached(module, late=True) == LATE.get(module, set())


def test_a_cache_works_where_the_network_cannot_be_imported():
    script = """
import sys
sys.modules["less_cache.hub"] = None  # importing it raises
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from less_cache import H2O, LESSCache, LESSKernels
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=99, **heads)
model = LlamaForCausalLM(config).eval()
cache = LESSCache(model, H2O(4, 4), LESSKernels.untrained(model))
model.generate(torch.arange(20)[None], past_key_values=cache, max_new_tokens=3, do_sample=False)
assert not any(name.startswith("less_cache.hub.") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("module", [module for module in SOURCES if module != "integration.hook"])
def test_only_the_hook_touches_dispatch(module):
    used = {node.id for node in ast.walk(tree(module)) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)}
    names = imported(module, late=False) | imported(module, late=True)
    used |= {part for name in names for part in name.split(".")}
    assert not used & DISPATCH
    assert not any(part.startswith("modeling_") for part in used)


def test_the_hook_does():
    """The names that the test above looks for are the right ones."""
    names = imported("integration.hook", late=False)
    assert names >= {"transformers.AttentionInterface", "transformers.models.falcon.modeling_falcon"}


def test_backends_take_what_they_need_as_arguments():
    """None looks into what a layer or its slots keep for themselves."""
    for module in SOURCES:
        if folder(module) == "backends":
            private = {
                node.attr
                for node in ast.walk(tree(module))
                if isinstance(node, ast.Attribute)
                and node.attr.startswith("_")
                and not (isinstance(node.value, ast.Name) and node.value.id == "self")
            }
            assert private <= {"_fields_", "__name__"}, module


@pytest.mark.parametrize("module", SOURCES)
def test_no_module_is_long(module):
    assert len(SOURCES[module].read_text(encoding="utf-8").splitlines()) <= MOST_LINES
