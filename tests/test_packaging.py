"""The shape of the project: what is packed, who imports whom, how files and classes are named."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fxprune
from fxprune import passes
from fxprune.cli.prune import CRITERIA as COMMAND_LINE

ROOT = Path(__file__).resolve().parent.parent
COMPILER = sorted((ROOT / "fxprune").rglob("*.py"))
METHODS = sorted((ROOT / "passes").rglob("*.py"))


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dotted(path: Path) -> tuple[str, ...]:
    """The parts of the name that a file is imported by, `__init__` included."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ("fxprune", *parts) if parts[0] == "passes" else parts


def imports(path: Path) -> Iterator[str]:
    """The absolute name of everything that a file imports: modules, and what it takes from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = dotted(path)[: -node.level] if node.level else ()
            source = (*base, node.module) if node.module else base
            yield from (".".join((*source, alias.name)) for alias in node.names)


def imports_from(path: Path, *packages: str) -> list[str]:
    inside = tuple(f"{package}." for package in packages)
    return [name for name in imports(path) if f"{name}.".startswith(inside)]


def environment_variables(text: str) -> set[str]:
    return set(re.findall(r"FXPRUNE_[A-Z_]+", text))


def test_packages_on_disk_are_the_packages_listed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = {tuple(package.split(".")) for package in project["tool"]["setuptools"]["packages"]}
    files = [dotted(path) for path in COMPILER + METHODS]
    assert {name[:-1] for name in files if name[-1] == "__init__"} == listed
    assert {name[:-1] for name in files} == listed


@pytest.mark.parametrize(
    ("system", "machine", "runtime"),
    [
        ("linux", "x86_64", "onnxruntime-gpu"),
        ("win32", "AMD64", "onnxruntime-gpu"),
        ("linux", "aarch64", "onnxruntime"),
        ("win32", "ARM64", "onnxruntime"),
        ("darwin", "arm64", "onnxruntime"),
        ("darwin", "x86_64", "onnxruntime"),
    ],
)
def test_one_onnxruntime_on_every_machine(system: str, machine: str, runtime: str):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [Requirement(text) for text in project["dependencies"]]
    machine_markers = {"sys_platform": system, "platform_machine": machine}
    named = [need.name for need in needed if need.marker is None or need.marker.evaluate(machine_markers)]
    assert [name for name in named if name.startswith("onnxruntime")] == [runtime]


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert fxprune.__version__ == project["version"]


@pytest.mark.parametrize("path", COMPILER, ids=label)
def test_the_compiler_imports_no_method(path):
    # The command line and `prune`, which name methods, stand above them.
    methods = [] if label(path).startswith(("fxprune/cli/", "fxprune/prune.py")) else ["fxprune.passes"]
    assert imports_from(path, "tests", "passes", *methods) == []


@pytest.mark.parametrize("path", METHODS, ids=label)
def test_methods_know_themselves_as_fxprune_passes(path):
    assert imports_from(path, "tests", "passes") == []


def is_memory(node):
    """Whether a class is a dataclass that changes: what a training pass remembers, and no method."""
    return any(isinstance(decorator, ast.Name) and decorator.id == "dataclass" for decorator in node.decorator_list)


ONE_METHOD = [path for path in METHODS if path.stem[0] != "_" and path.stem != "base"]  # "_": what methods share


@pytest.mark.parametrize("path", ONE_METHOD, ids=label)
def test_a_method_has_the_name_of_its_file(path):
    body = ast.parse(path.read_text()).body
    classes = [node.name for node in body if isinstance(node, ast.ClassDef)]
    memories = {node.name for node in body if isinstance(node, ast.ClassDef) and is_memory(node)}
    public = [name for name in classes if not name.startswith("_") and name not in memories]
    # Underscores don't count: PruneTrain is in prunetrain.py, FoldBatchNorm in fold_batchnorm.py.
    assert [name.lower() for name in public] == [path.stem.replace("_", "")]
    assert hasattr(passes, public[0])


def test_no_criterion_is_forgotten_where_criteria_are_listed():
    public = [getattr(passes, name) for name in passes.__all__]
    kinds = [kind for kind in public if issubclass(kind, passes.Criterion) and not inspect.isabstract(kind)]
    assert set(kinds) == set(COMMAND_LINE.values())
    tested = (ROOT / "tests/criteria.py").read_text()
    reference, page = ((ROOT / "docs" / name).read_text() for name in ("reference.md", "methods/criteria.md"))
    before = (ROOT / "docs/methods/single_shot.md").read_text()
    for name in (kind.__name__ for kind in kinds):
        assert f"passes.{name}(" in tested, name
        assert f".{name}\n" in reference, name
        assert name in page or name in before, name


def test_every_environment_variable_is_in_the_readme():
    read = environment_variables("".join(path.read_text() for path in COMPILER + METHODS))
    assert read - environment_variables((ROOT / "README.md").read_text()) == set()


IMPORT = """
import sys, torch
before = set(sys.modules)
import {module}
print(*set(sys.modules) - before)
"""
LIBRARIES_OF_TYPER = ("annotated_doc", "shellingham", "click", "typing_extensions")
SLOW = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.utils.flop_counter")


@pytest.mark.parametrize(
    ("module", "allowed"), [("fxprune", set()), ("fxprune.cli.app", {"typer", "rich", *LIBRARIES_OF_TYPER})]
)
def test_an_import_loads_no_library_before_it_is_used(module, allowed):
    code = IMPORT.format(module=module)
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.split()
    libraries = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert "fxprune" in libraries
    assert libraries - allowed - {"fxprune", "numpy", "torch"} == set()
    assert [name for name in loaded if name.startswith(SLOW)] == []


# ------------------------------------------------------------------------------------- the rooms, and who may know whom

# A room imports from those before it, never from those after it. Imports within functions and those for types count.
ROOMS = (
    *"errors loaded options hints atomic progress tables plan".split(),
    *"graph channels rewrite ops budget files training report".split(),
    *"pipeline passes prune cli".split(),
)
DOORS = {"lightning", "accelerate", "transformers", "fsdp", "__main__"}
UPWARD = {("fxprune.channels.analysis", "fxprune.report.page")}  # Analysis.to_html


def edges() -> Iterator[tuple[str, str]]:
    """(module, module that it imports), of all modules but the doors and the package itself."""
    files = {dotted(path): path for path in COMPILER + METHODS}
    known = {".".join(name).removesuffix(".__init__") for name in files}
    for name, path in files.items():
        if len(name) == 2 and name[1] in {"__init__", *DOORS}:
            continue
        for target in imports(path):
            owner = target if target in known else target.rpartition(".")[0]
            if owner in known and owner != "fxprune":
                yield ".".join(name).removesuffix(".__init__"), owner


def test_every_room_has_its_place():
    rooms = {dotted(path)[1] for path in COMPILER + METHODS} - {"__init__", *DOORS}
    assert rooms == set(ROOMS)


def test_imports_run_one_way():
    rank = {room: at for at, room in enumerate(ROOMS)}
    room = lambda module: module.split(".")[1]  # noqa: E731
    upward = {(a, b) for a, b in edges() if rank[room(a)] < rank[room(b)]}
    assert upward == UPWARD


def test_no_module_imports_itself_by_way_of_others():
    waiting = {(a, b) for a, b in edges() if a != b} - UPWARD
    while ends := {a for a, _ in waiting} & {b for _, b in waiting}:
        inner = {(a, b) for a, b in waiting if a in ends and b in ends}
        if inner == waiting:
            break
        waiting = inner
    circle = sorted(edge for edge in waiting if edge[0] in ends and edge[1] in ends)
    assert circle == []
