"""Allocators: the widths are those of their formulas, and a criterion says which channels they are."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from criteria import CRITERIA
from models import MODELS, prepare
from torch import nn

import fxprune
from fxprune import Analysis, Budget, passes
from fxprune.budget.cost import Channels, cost_of
from fxprune.errors import PlanError

ALLOCATORS = {"Uniform": passes.Uniform, "ErdosRenyi": passes.ErdosRenyi, "PreCrop": passes.PreCrop}
X = torch.randn(2, 3, 16, 16)


def analysed(name: str) -> Analysis:
    model, inputs = prepare(MODELS[name])
    return fxprune.analyze(model, inputs)


def chain(*widths: int, pool: bool = True) -> Analysis:
    """Convolutions of these widths, the map halved behind each."""
    layers: list[nn.Module] = []
    for before, width in itertools.pairwise((3, *widths)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), *[nn.MaxPool2d(2)] * pool]
    return fxprune.analyze(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)), X)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_by_says_which_channels_stay_and_nothing_more(name: str) -> None:
    analysis = analysed("residual_projection")
    budget = Budget(flops=0.5, tolerance=0.3)
    first = ALLOCATORS[name](round_to=1).plan(analysis, budget)
    assert all(kept == tuple(range(len(kept))) for kept in first.keep.values())
    chosen = ALLOCATORS[name](by=passes.Magnitude(), round_to=1).plan(analysis, budget)
    assert chosen.widths == first.widths
    for group, scores in passes.Magnitude().score(analysis).items():
        best = np.sort(np.argsort(-scores, kind="stable")[: chosen.widths[group]])
        assert tuple(best) == chosen.keep.get(group, tuple(range(analysis.sizes[group])))


@pytest.mark.parametrize("name", ["chain", "residual_projection", "densenet"])
def test_uniform_is_a_local_criterion(name: str) -> None:
    analysis = analysed(name)
    budget = Budget(flops=0.6, tolerance=0.3)
    uniform = passes.Uniform(by=passes.Magnitude(), round_to=1).plan(analysis, budget)
    assert uniform == passes.Magnitude(scope="local", round_to=1).plan(analysis, budget)
    shares = [width / analysis.sizes[group] for group, width in uniform.widths.items()]
    assert max(shares) - min(shares) <= max(1 / size for size in analysis.sizes.values())


def test_erdos_renyi_gives_small_layers_a_larger_share() -> None:
    analysis = chain(16, 64, 256)
    plan = passes.ErdosRenyi(round_to=1, minimum=0).plan(analysis, Budget(params=0.1, tolerance=0.2))
    shapes = [(16, 3, 3, 3), (64, 16, 3, 3), (256, 64, 3, 3)]
    densities = [sum(shape) / math.prod(shape) for shape in shapes]
    shares = [width / analysis.sizes[group] for group, width in plan.widths.items()]
    assert shares[0] == 1  # its density is above 1, so it stays whole
    assert shares[1] / shares[2] == pytest.approx(densities[1] / densities[2], rel=0.1)
    assert shares[2] < shares[1] < 1


@pytest.mark.parametrize("name", ["chain", "residual_projection", "densenet", "depthwise_separable", "grouped"])
@pytest.mark.parametrize("kind", ["flops", "params", "memory"])
def test_slopes_are_the_derivatives_of_the_cost(name: str, kind: str) -> None:
    """The cost is a polynomial of degree 2 in each width, so that the central difference is exact."""
    analysis = analysed(name)
    channels = Channels.of(analysis)
    cost = cost_of(analysis, kind, channels)
    widths = np.array(list(analysis.sizes.values())) - 1
    place = np.arange(len(channels.group)) - np.searchsorted(channels.group, channels.group)
    assert (widths > 0).all()
    assert not cost.uneven
    for number, slope in enumerate(cost.slopes(widths)):
        one = np.arange(len(widths)) == number
        more, less = (cost(place < (widths + step * one)[channels.group]) for step in (1, -1))
        assert slope == pytest.approx((more - less) / 2)


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.8])
def test_precrop_finds_the_best_widths(budget: float) -> None:
    """Beside all that there are: sum of log density over the layers, as large as it can be under the budget."""
    analysis = chain(8, 8, 12, pool=False)
    channels = Channels.of(analysis)
    cost = cost_of(analysis, "flops", channels)
    sizes = np.array(list(analysis.sizes.values()))
    place = np.arange(len(channels.group)) - np.searchsorted(channels.group, channels.group)

    def density(widths: Any) -> float:
        shares = [1.0, *np.array(widths) / sizes, 1.0]
        return sum(math.log(before * after) for before, after in itertools.pairwise(shares))

    dense = cost(place < sizes[channels.group])
    every = itertools.product(*(range(1, size + 1) for size in sizes))
    best = max(density(w) for w in every if cost(place < np.array(w)[channels.group]) <= budget * dense)
    plan = passes.PreCrop(round_to=1, minimum=0).plan(analysis, Budget(flops=budget, tolerance=0.2))
    reached = density(list(plan.widths.values()))
    assert reached >= best - 2 * math.log(8 / 7)  # one channel less of one of the smaller groups
    uniform = passes.Uniform(round_to=1, minimum=0).plan(analysis, Budget(flops=budget, tolerance=0.2))
    assert reached >= density(list(uniform.widths.values()))


class Stage(nn.Module):
    """Two residual blocks: their sum lives on six axes of weights, what is inside a block on two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 96, 3, padding=1), nn.Linear(96, 5)
        self.into = nn.ModuleList([nn.Conv2d(96, 96, 3, padding=1) for _ in range(2)])
        self.back = nn.ModuleList([nn.Conv2d(96, 96, 3, padding=1) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        for into, back in zip(self.into, self.back, strict=True):
            x = x + back(into(x).relu())
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("kind", ["flops", "params"])
@pytest.mark.parametrize("residual", [False, True])
def test_precrop_evens_out_what_the_groups_cost(kind: str, residual: bool) -> None:
    """The condition of the best widths: groups that are cut cost the same for each axis, those that are whole less."""
    analysis = fxprune.analyze(Stage(), X) if residual else chain(64, 96, 128, 64)
    plan = passes.PreCrop(cost=kind, round_to=1, minimum=0).plan(analysis, Budget(**{kind: 0.3}))
    widths = np.array(list(plan.widths.values()))
    slopes = cost_of(analysis, kind, Channels.of(analysis)).slopes(widths)
    axes = np.array([6, 2, 2] if residual else [2] * len(widths))
    load = widths * slopes / axes
    cut = widths < np.array(list(analysis.sizes.values()))
    assert cut.sum() >= 2
    assert load[cut].max() / load[cut].min() < 1.1
    assert (load[~cut] <= load[cut].max() * 1.05).all()


@pytest.mark.parametrize("name", ALLOCATORS)
def test_widths_need_no_data_and_no_chance(name: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 48, 3), nn.ReLU(), nn.Conv2d(48, 4, 1))
    analysis = fxprune.analyze(model, X)
    state = torch.get_rng_state()
    first, second = (ALLOCATORS[name]().plan(analysis, Budget(flops=0.5, tolerance=0.2)) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: passes.Uniform(by="magnitude"), "by='magnitude' can't rank channels: give a criterion"),
        (lambda: passes.PreCrop(scope="local"), "scope='local' leaves PreCrop nothing to say: that is passes.Uniform"),
        (lambda: passes.PreCrop(cost="latency"), "cost='latency' is not known; use 'flops', 'params' or 'memory'"),
        (lambda: passes.Uniform(weights="new"), "weights='new' is not known; use 'keep', 'reinit' or 'rescale'"),
    ],
)
def test_options_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()


def test_every_allocator_is_among_the_criteria() -> None:
    assert set(ALLOCATORS) <= set(CRITERIA)
