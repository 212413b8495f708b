"""The laws over random networks of Python, and what those have found, each as small as it gets."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import (
    OPTIMIZERS,
    graph_is_model,
    pruned_again,
    pruning_composes,
    random_plan,
    slice_commutes_with_a_step,
    slice_is_zero,
)
from models import randomize
from python_networks import Network, network_from_seed
from torch import Tensor, nn

import fxprune
from fxprune import Plan
from fxprune.errors import PlanError, TraceError
from fxprune.graph.inputs import bind_inputs
from fxprune.graph.trace import trace_whole


def hold_the_laws(network: Network) -> None:
    """All laws on one network, each under a random plan. What fails is to be seen in ``network.source``."""
    seed = network.seed
    model, example = randomize(network.build(), seed).double().eval(), network.inputs(4)
    graph = fxprune.trace(model, example)
    graph_is_model(graph, model, [example, network.inputs(5)])
    analysis = fxprune.analyze(graph, example)
    slice_is_zero(graph, example, analysis, random_plan(analysis, seed))
    optimizer = [*OPTIMIZERS.values()][seed % len(OPTIMIZERS)]
    slice_commutes_with_a_step(graph, example, analysis, random_plan(analysis, seed + 5), optimizer)
    pruning_composes(graph, example, analysis, random_plan(analysis, seed + 1, least=2), seed + 2)
    with contextlib.suppress(PlanError):  # other groups are found: refused, and never another model
        pruned_again(graph, example, analysis, random_plan(analysis, seed + 3), seed + 4)


@pytest.mark.parametrize("seed", range(8))
def test_random_python(seed: int) -> None:
    hold_the_laws(network_from_seed(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8, 408))
def test_more_random_python(seed: int) -> None:
    hold_the_laws(network_from_seed(seed))


def test_networks_are_made_again() -> None:
    assert network_from_seed(3) == network_from_seed(3)
    assert len(network_from_seed(3, length=2).source) < len(network_from_seed(3).source)


# ---------------------------------------------------------------------------------------------- what they found


class Found(nn.Module):
    """Layers, and a forward that is given."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.norm, self.table = nn.InstanceNorm2d(8, affine=True), nn.Parameter(torch.empty(1, 8, 4, 4))
        self.group, self.halves = nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(8, 8, 1, groups=2)
        self.gru, self.cell = nn.GRU(8, 6, batch_first=True), nn.GRUCell(6, 8)
        self.register_buffer("mean", torch.zeros(1))
        self.how = forward

    def forward(self, x: Tensor, mask: Any = None, *, scale: float = 1.0) -> Any:
        return self.how(self, x)


def writes_a_slice(m: Found, x: Tensor) -> Tensor:
    y = m.a(x) + 0
    y[:, :4] = y[:, :4].relu()
    return m.o(y)


def writes_a_slice_by_a_size(m: Found, x: Tensor) -> Tensor:
    y = m.a(x) + 0
    y[:, y.shape[1] // 2 :] = y[:, y.shape[1] // 2 :].sigmoid()
    return m.o(y)


def halves_by_a_size(m: Found, x: Tensor) -> Tensor:
    y = m.a(x)
    half = y.shape[1] // 2
    return m.o(m.b(torch.cat([y[:, half:].tanh(), y.narrow(1, 0, half)], 1)))


def normalizes_a_table(m: Found, x: Tensor) -> Tensor:
    y = m.norm(m.a(x).mean((2, 3), keepdim=True) + m.table)
    return m.o((y + m.norm(y)).mean((2, 3), keepdim=True))


def steps_through_a_gru(m: Found, x: Tensor) -> Tensor:
    steps, _ = m.gru(m.a(x).mean(-1).transpose(1, 2))
    state = m.a(x).mean((2, 3))
    for step in steps.unbind(1)[:2]:
        state = m.cell(step, state)
    return m.o(state[..., None, None])


def starts_a_gru_where_python_looks(m: Found, x: Tensor) -> Tensor:
    if x.sum().item() > 1e9:
        raise ValueError
    steps, _ = m.gru(m.a(x).mean(-1).transpose(1, 2))
    return m.o(m.cell(steps[:, 0])[..., None, None])


def groups_an_image(m: Found, x: Tensor) -> Tensor:
    if x.sum().item() > 1e9:
        raise ValueError
    return m.group(x), m.o(m.a(x))


def moves_an_average(m: Found, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.mean.lerp_(x.abs().mean(), 0.1)
    return m.o(m.a(x))


def moves_an_average_in_python(m: Found, x: Tensor) -> Tensor:
    if x.sum().item() > 1e9:
        raise ValueError
    return moves_an_average(m, x)


def returns_a_shape(m: Found, x: Tensor) -> Any:
    return {"y": [m.o(m.a(x))], "shape": tuple(x.shape[1:])}


def has_defaults_in_both_modes(m: Found, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.a(x)
    return m.o(m.b(y) if m.training else y)


def shuffles_a_table(m: Found, x: Tensor) -> Tensor:
    y = m.a(x).mean((2, 3), keepdim=True) + m.table
    return m.o(F.pixel_unshuffle(F.pixel_shuffle(y, 2), 2))


FOUND = [
    *(writes_a_slice, writes_a_slice_by_a_size, halves_by_a_size, steps_through_a_gru),
    starts_a_gru_where_python_looks,
    *(groups_an_image, moves_an_average, moves_an_average_in_python, returns_a_shape, has_defaults_in_both_modes),
    shuffles_a_table,
]


@pytest.mark.parametrize("forward", FOUND)
def test_found(forward: Callable[..., Any]) -> None:
    model = randomize(Found(forward)).double().eval()
    x, more = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randn(5, 3, 8, 8, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    graph = fxprune.trace(model, x)
    analysis = fxprune.analyze(graph, x)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    graph_is_model(graph, model, [x, more])
    assert analysis.groups
    for seed in range(3):
        slice_is_zero(graph, x, analysis, random_plan(analysis, seed))
        pruning_composes(graph, x, analysis, random_plan(analysis, seed, least=2), seed + 1)
        pruned_again(graph, x, analysis, random_plan(analysis, seed), seed + 1)


def test_instance_norm_over_positions_that_go() -> None:
    model, x = randomize(Found(normalizes_a_table)).double().eval(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    graph = fxprune.trace(model, x)
    analysis = fxprune.analyze(graph, x)
    assert {"table", "table:1"} <= analysis.sizes.keys()
    slice_is_zero(graph, x, analysis, random_plan(analysis, 0, least=2))


def test_a_graph_that_writes_another_buffer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize(Found(moves_an_average)).double().eval()
    original = Tensor.lerp_
    recorded = []

    def lerp(self: Tensor, other: Tensor, weight: float) -> Tensor:  # the graph's is another than the model's
        recorded.append(weight)
        return original(self, other, weight if len(recorded) % 2 else 0.2)

    monkeypatch.setattr(Tensor, "lerp_", lerp)
    with pytest.raises(TraceError, match="in eval mode buffer mean is another afterwards"):
        trace_whole(model, bind_inputs(torch.randn(4, 3, 8, 8, dtype=torch.float64)))


class Pyramid(nn.Module):
    """A part that gives a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.a(x)
        return [y, self.b(y)]


class Appends(nn.Module):
    """Python writes into the list that a part gives."""

    def __init__(self) -> None:
        super().__init__()
        self.pyramid, self.o = Pyramid(), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = self.pyramid(x)
        if levels[0].sum().item() > 1e9:
            raise ValueError
        levels.append(levels[-1] + 1)
        return [self.o(level) for level in levels]


def test_python_writes_into_what_a_region_gives() -> None:
    model, x = randomize(Appends()).double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = fxprune.trace(model, x)
    analysis = fxprune.analyze(graph, x)
    slice_is_zero(graph, x, analysis, random_plan(analysis, 0))


def goes_in_halves(m: Found, x: Tensor) -> Tensor:
    return m.o(m.halves(m.a(x)))


def test_one_channel_of_each_half_stays_one_channel() -> None:
    """After a cut that leaves one place in each half, nothing in the model holds the halves together."""
    model, x = randomize(Found(goes_in_halves)).double().eval(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for _ in range(3):
        analysis = fxprune.analyze(model, x, groups="within")
        keep = {name: range(max(1, size // 2)) for name, size in analysis.sizes.items()}
        model, _ = fxprune.rewrite(fxprune.trace(model, x), analysis, Plan(keep, analysis.sizes, analysis.options))
    assert model.a.weight.shape[0] == 2
    assert "a" not in fxprune.analyze(model, x, groups="within").sizes
