"""Memory stays with the process while something is timed, and only then."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fxprune.budget import malloc
from fxprune.budget.malloc import glibc, memory_kept

FAULTS = """
import itertools, json, resource, torch
from fxprune.budget.malloc import memory_kept

def run():  # takes and gives back 64 MiB
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def faults():  # the fewest, for the first runs inside find no room
    return min(after - before for before, after in itertools.pairwise(run() for _ in range(7)))

without = faults()
with memory_kept():
    print(json.dumps([without, faults()]))
"""


@pytest.mark.skipif(glibc() is None, reason="the C library is not glibc")
def test_a_run_inside_takes_no_memory_from_the_system() -> None:
    environment = {"PATH": "", "LD_LIBRARY_PATH": ""}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, check=True)
    without, inside = json.loads(done.stdout)
    assert without > 100 > 10 * inside


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What the C library, a false one, was asked for."""
    asked: list[tuple[int, ...]] = []
    libc = SimpleNamespace(
        mallopt=lambda option, value: asked.append((option, value)), malloc_trim=lambda pad: asked.append((pad,))
    )
    monkeypatch.setattr("fxprune.budget.malloc.glibc", lambda: libc)
    monkeypatch.setattr("fxprune.budget.malloc.os.environ", {})
    return asked


def test_after_an_error_too_the_usual_settings_hold(calls: list[tuple[int, ...]]) -> None:
    @memory_kept()
    def fails() -> None:
        assert calls == list(malloc.KEEPING.items())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert calls[2:] == [*malloc.USUAL.items(), (0,)]


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_MMAP_THRESHOLD_", "65536"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")]
)
def test_settings_of_the_user_are_left_alone(calls: list[tuple[int, ...]], name: str, value: str) -> None:
    malloc.os.environ[name] = value
    with memory_kept():
        pass
    assert not calls


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.budget.malloc.ctypes.CDLL", lambda _: object())
    assert glibc() is None
    with memory_kept():
        pass
