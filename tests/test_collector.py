"""The garbage collector rests while a model is traced, analysed and rewritten, and works again after."""

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Budget, passes
from fxprune.errors import AnalysisError

X = torch.randn(2, 3, 8, 8)
SEEN: list[bool] = []


class Looks(nn.Module):
    """Notes whether the collector works whenever Python runs here."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.last = nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(gc.isenabled())
        result: Tensor = self.last(self.conv(x))
        return result


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = gc.isenabled()
    yield
    if before:
        gc.enable()


def test_the_collector_rests_and_works_again() -> None:
    SEEN.clear()
    graph = fxprune.trace(Looks(), X)
    assert SEEN == [False]
    assert gc.isenabled()
    analysis = fxprune.analyze(graph, X)
    assert gc.isenabled()
    fxprune.rewrite(graph, analysis, passes.Magnitude(round_to=1).plan(analysis, Budget(channels=0.5)))
    assert gc.isenabled()


def test_it_works_again_after_an_error() -> None:
    with pytest.raises(AnalysisError):
        fxprune.analyze(Looks(), torch.randn(2, 5, 8, 8))
    assert gc.isenabled()


def test_a_collector_that_the_user_stopped_stays_so() -> None:
    gc.disable()
    fxprune.analyze(Looks(), X)
    assert not gc.isenabled()
