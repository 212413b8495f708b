"""The command line keeps freed memory with its process; the library leaves the process as it is."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fxprune.cli import app, malloc
from fxprune.cli.malloc import find_glibc, keep_freed_memory

FAULTS = """
import itertools, json, resource, torch
from torch import nn
import fxprune
from fxprune.cli.malloc import keep_freed_memory

def run():  # takes and gives back 64 MiB
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def faults():  # the fewest, for the first runs inside find no room
    return min(after - before for before, after in itertools.pairwise(run() for _ in range(7)))

found = [faults()]
layer = nn.Linear(4, 4)
fxprune.bench(layer, layer, torch.ones(1, 4), batches=[1], backends=["eager"], seconds=0.01)
found.append(faults())
keep_freed_memory()
print(json.dumps([*found, faults()]))
"""


@pytest.mark.skipif(find_glibc() is None, reason="the C library is not glibc")
def test_only_a_process_that_asks_for_it_keeps_freed_memory() -> None:
    environment = {"PATH": "", "LD_LIBRARY_PATH": ""}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, check=True)
    before, after_bench, kept = json.loads(done.stdout)
    assert min(before, after_bench) > 100 > 10 * kept


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What the C library, a false one, was asked for."""
    asked: list[tuple[int, ...]] = []
    libc = SimpleNamespace(mallopt=lambda option, value: asked.append((option, value)))
    monkeypatch.setattr("fxprune.cli.malloc.find_glibc", lambda: libc)
    monkeypatch.setattr("fxprune.cli.malloc.os.environ", {})
    return asked


def test_the_program_asks_for_it(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fxprune", "--version"])
    with pytest.raises(SystemExit):
        app.main()
    assert calls == [(-4, 0), (-1, -1)]


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_MMAP_THRESHOLD_", "65536"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")]
)
def test_settings_of_the_user_are_left_alone(calls: list[tuple[int, ...]], name: str, value: str) -> None:
    malloc.os.environ[name] = value
    keep_freed_memory()
    assert not calls


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.cli.malloc.ctypes.CDLL", lambda _: object())
    assert find_glibc() is None
    keep_freed_memory()
