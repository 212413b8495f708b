"""What the README and the docstrings show is run."""

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fxprune
from fxprune.cli.app import app

README = Path(__file__).resolve().parent.parent / "README.md"
MODULES = [module.name for module in pkgutil.walk_packages(fxprune.__path__, "fxprune.")]


def test_every_python_block_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, in an empty folder; a failure points at the line of README.md."""
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert blocks
    namespace = {"__name__": "__main__"}
    for block in blocks:
        first_line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * first_line + block[1], str(README), "exec"), namespace)


def test_every_command_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    commands = re.findall(r"^fxprune (.*)$", "\n".join(blocks), re.MULTILINE)
    assert {command.split()[0] for command in commands} == {each.callback.__name__ for each in app.registered_commands}
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command))
        assert result.exit_code == 0, (command, result.output, result.exception)


@pytest.mark.parametrize("name", ["fxprune", *MODULES])
def test_docstring_examples(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert not failed
