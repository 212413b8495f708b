"""What the README, the documentation and the docstrings show is run."""

import doctest
import importlib
import pkgutil
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fxprune
from fxprune.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = [module.name for module in pkgutil.walk_packages(fxprune.__path__, "fxprune.")]
SHELL = ("sh", "bash", "console")
SLOW = ("docs/training.md", "docs/command_line.md")


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """The fenced blocks in some languages, each with the number of lines before it."""
    text = page.read_text(encoding="utf-8")
    matches = re.finditer(rf"^```({'|'.join(languages)})\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, block.start(2)), block[2]) for block in matches]


def names(pages: list[Path]) -> list[Any]:
    paths = [str(page.relative_to(ROOT)) for page in pages]
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in paths]


@pytest.mark.filterwarnings(
    "ignore::UserWarning:lightning",
    "ignore:.*treespec, LeafSpec.*is deprecated",
    "ignore:'pin_memory' argument is set as true",
    "ignore:The given buffer is not writable",  # torch.export.load in torch 2.11
)
@pytest.mark.usefixtures("own_tables")
@pytest.mark.parametrize("page", names([page for page in PAGES if blocks(page, "python")]))
def test_every_python_block_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a page in order, in one namespace, in an empty folder; a failure points at the line of the page."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, block in blocks(ROOT / page, "python"):
        exec(compile("\n" * line + block, str(ROOT / page), "exec"), namespace)


@pytest.mark.parametrize("page", names([page for page in PAGES if blocks(page, *SHELL)]))
def test_what_other_commands_name_exists(page: str) -> None:
    """Other commands are not run, but each task, script, option and extra that they name exists."""
    for line, block in blocks(ROOT / page, *SHELL):
        for command in block.replace("\\\n", " ").splitlines():
            words = shlex.split(command, comments=True)
            wrong = words and unknown(words)
            assert not wrong, f"{page}, after line {line}: {command}: {wrong}"


def commands(page: Path) -> list[list[str]]:
    """What a page types after ``fxprune``, in order."""
    lines = (line for _, block in blocks(page, *SHELL) for line in block.replace("\\\n", " ").splitlines())
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("fxprune ")]


@pytest.mark.parametrize("page", names([page for page in PAGES if commands(page)]))
def test_every_command_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a page in order, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for words in commands(ROOT / page):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (words, result.output, result.exception)


def test_every_verb_is_shown() -> None:
    shown = {words[0] for page in PAGES for words in commands(page)}
    assert shown == {command.callback.__name__ for command in app.registered_commands if command.callback}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    """Those of docs/ are checked when the site is built."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES if page.name != "CONTRIBUTING.md"])
def test_code_is_narrow(page: str) -> None:
    """The site shows 88 columns without scrolling."""
    found = blocks(ROOT / page, "python", *SHELL)
    lines = [line for _, block in found for line in block.splitlines()]
    assert [line for line in lines if len(line) > 88] == []


def test_links_between_pages_lead_somewhere() -> None:
    """Before the site is built: pages and their headings exist."""
    wrong = []
    for page in PAGES:
        for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
            target = page.parent / link if link else page
            if "pictures" in link:
                continue  # drawn when the site is built
            if not target.exists() or (anchor and anchor not in headings(target)):
                wrong.append((page.name, link, anchor))
    assert not wrong


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site has them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", title.replace("`", "").lower()) for title in found)
    return {re.sub(r"[-\s]+", "-", title.strip()) for title in words}


def unknown(words: list[str]) -> str:
    """What is wrong with a command; "" where nothing is."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, arguments = words[0], words[1:]
    if program == "make":
        tasks = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return "" if {word for word in arguments if "=" not in word} <= {*tasks} else "no such task"
    if program in ("python", "torchrun"):
        scripts = [word for word in arguments if word.endswith(".py")]
        missing = [script for script in scripts if not (ROOT / script).exists()]
        options = [word for word in arguments[arguments.index(scripts[0]) :] if word[:2] == "--"] if scripts else []
        strange = [option for option in options if option not in (ROOT / scripts[0]).read_text(encoding="utf-8")]
        return f"there is no {missing + strange}" if missing + strange else ""
    if program == "pip":
        extras = {extra for word in arguments for group in re.findall(r"\[(.*)\]", word) for extra in group.split(",")}
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return f"no extra {extras}" if extras - project["optional-dependencies"].keys() else ""
    if program == ".venv/bin/python":
        return unknown(["python", *arguments])
    return "" if program == "fxprune" else "no test knows this program"


def test_a_wrong_command_is_found() -> None:
    assert not unknown(["make", "test"])
    assert unknown(["make", "tset"]) == "no such task"
    assert "examples/nothing.py" in unknown(["OMP_NUM_THREADS=1", "python", "examples/nothing.py"])
    assert "--depth" in unknown(["python", "benchmarks/cifar10.py", "--data", "PATH", "--depth", "3"])
    assert unknown(["pip", "install", ".[speed]"]) == "no extra {'speed'}"
    assert unknown(["fxprun", "inspect"]) == "no test knows this program"


@pytest.mark.parametrize("name", ["fxprune", *MODULES])
def test_docstring_examples(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert not failed
