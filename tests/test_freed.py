"""What nobody uses any more is freed at once, not when the garbage collector comes: on a GPU its memory is missed."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Budget, passes

X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    """Does something else in train mode, so that it has two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        result: Tensor = self.last(x * 2 if self.training else x)
        return result


class Steered(nn.Module):
    """Its Python looks at values, so that only its part becomes a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Net()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.part(x) if x.sum() < 1e9 else x
        return result


@pytest.fixture(autouse=True)
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def weights(model: nn.Module) -> list["weakref.ref[Tensor]"]:
    return [weakref.ref(tensor) for tensor in model.parameters()]


def alive(tensors: list["weakref.ref[Tensor]"]) -> int:
    return sum(tensor() is not None for tensor in tensors)


def cut(model: nn.Module) -> Any:
    graph = fxprune.trace(model, X)
    analysis = fxprune.analyze(graph, X)
    plan = passes.Magnitude(round_to=1).plan(analysis, Budget(channels=0.5))
    return fxprune.rewrite(graph, analysis, plan)[0]


@pytest.mark.parametrize("make", [Net, Steered])
def test_model_graph_and_compact_model_go_when_they_are_dropped(make: Callable[[], nn.Module]) -> None:
    model = make()
    dense = weights(model)
    compact = cut(model)
    small = weights(compact)
    assert alive(dense) == len(dense)
    del model
    assert alive(dense) == 0
    assert alive(small) == len(small)
    del compact
    assert alive(small) == 0


def test_a_graph_knows_its_module_until_that_is_gone() -> None:
    traced = fxprune.trace(Net(), X)
    graph = traced.graph
    assert graph.owning_module is traced
    graph.lint()
    del traced
    assert graph.owning_module is None
    graph.lint()
