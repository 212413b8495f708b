"""benchmarks/run_all.py: what it runs when, and that what can be tried runs."""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def run_all(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("common", "run_all"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("run_all")


def asked(run_all: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> set[str]:
    monkeypatch.setattr(sys, "argv", ["run_all.py", *arguments])
    return {benchmark.script for benchmark in run_all.choose_benchmarks(run_all.parse_arguments())}


def test_every_benchmark_is_run_by_the_one_command(run_all: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    helpers = {"common", "analysis_worker", "run_all", "zoo_libraries"}
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")} - helpers
    assert asked(run_all, monkeypatch, "--full", "--data", "PATH") == scripts
    trains = {benchmark.script for benchmark in run_all.BENCHMARKS if benchmark.trains}
    assert asked(run_all, monkeypatch, "--full") == scripts - trains
    assert asked(run_all, monkeypatch) < scripts - trains
    assert all((BENCHMARKS / f"{script}.py").read_text().count('"--data"') for script in trains)


def test_nothing_to_run_is_said(
    run_all: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        asked(run_all, monkeypatch, "--only", "zoo")
    assert "nothing is left to run" in capsys.readouterr().err


def test_a_busy_machine_is_refused(run_all: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 0.0, 0.0))
    monkeypatch.setattr(run_all.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--only", "widths"])
    with pytest.raises(SystemExit, match=r"1\.5 cores of this machine busy"):
        run_all.main()


def test_a_machine_that_becomes_quiet_is_waited_for(run_all: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = iter([1.5, 0.9, 0.4])
    waited: list[float] = []
    monkeypatch.setattr(os, "getloadavg", lambda: (next(loads), 0.0, 0.0))
    monkeypatch.setattr(run_all.time, "sleep", waited.append)
    run_all.wait_for_quiet()
    assert len(waited) == 2


@pytest.mark.slow
def test_benchmarks_run(run_all: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--try", "--only", "reconfigure", "dropback"])
    run_all.main()
    for name in ("reconfigure", "dropback_steps"):
        assert (tmp_path / "out" / "benchmarks" / f"{name}.md").stat().st_size > 100
        assert (tmp_path / "out" / "benchmarks" / f"{name}.json").stat().st_size > 100
