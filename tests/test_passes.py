"""Criteria: each score beside a plain loop over the slices of every channel."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from criteria import CRITERIA, WITHOUT_VALUES, batch
from criteria import cross_entropy as loss
from laws import zero_removed
from models import MODELS, prepare, randomize
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fxprune
from fxprune import Analysis, Budget, Plan, passes
from fxprune.budget.budget import Bounds
from fxprune.budget.solve import solve_budget
from fxprune.budget.sums import Sums
from fxprune.errors import PlanError

HALF = Budget(channels=0.5, tolerance=0.2)


def analysed(name: str, dtype: torch.dtype = torch.float64) -> tuple[Analysis, Any]:
    model, inputs = prepare(MODELS[name], dtype=dtype)
    return fxprune.analyze(model, inputs), inputs


def by_hand(analysis: Analysis, of_slice: Callable[[str, Tensor], float], over: Any = None) -> dict[str, list[float]]:
    """The sum, over every slice of every parameter that a channel has, of a number of that slice."""
    tensors = over or dict(analysis.graph.named_parameters())
    result = {}
    for name, group in analysis.groups.items():
        result[name] = [0.0] * group.size
        for member in group.members:
            if member.parameter in tensors:
                for position, channel in zip(member.index, member.channel, strict=True):
                    weights = tensors[member.parameter].detach().select(member.axis, int(position))
                    result[name][channel] += of_slice(member.parameter, weights)
    return result


def assert_shares(analysis: Analysis, actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Scores as shares of their group, times the number of weights that the group lives on."""
    assert set(actual) == set(expected)
    for name, scores in actual.items():
        layers = [m for m in analysis.groups[name].members if len(analysis.shapes[m.parameter]) > 1]
        share = len(layers) * np.array(expected[name]) / np.sum(expected[name])
        np.testing.assert_allclose(scores, share, rtol=1e-6, err_msg=name)


# --------------------------------------------------------------------------------------------- magnitude


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("name", ["residual_projection", "vgg_flatten", "shufflenet", "tied_parameter"])
def test_magnitude_is_the_share_of_the_whole_group(name: str, p: float) -> None:
    analysis, _ = analysed(name)
    weights = {key: w for key, w in analysis.graph.named_parameters() if w.ndim > 1}
    powers = by_hand(analysis, lambda _, w: w.abs().pow(p).sum().item(), weights)
    assert_shares(analysis, passes.Magnitude(p=p).score(analysis), powers)


def test_a_channel_of_a_stream_counts_in_every_layer_that_it_goes_through() -> None:
    """Equal weights: what a channel is worth per FLOP is the same wherever it is, as the layers are."""
    model, inputs = prepare(MODELS["residual"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    analysis = fxprune.analyze(model, inputs)
    scores = passes.Magnitude().score(analysis)
    for name, group in analysis.groups.items():
        layers = sum(len(analysis.shapes[member.parameter]) > 1 for member in group.members)
        np.testing.assert_allclose(scores[name], layers / group.size)


@pytest.mark.parametrize("limit", ["flops", "params", "memory"])
def test_magnitude_compares_what_is_lost_for_what_is_saved(limit: str) -> None:
    """The plan is the one of the scores over the cost of each channel in what the budget limits."""
    analysis, _ = analysed("vgg_flatten")
    budget = Budget(**{limit: 0.6}, tolerance=0.3)
    costs = fxprune.cost.marginal(analysis, limit)
    priced = {name: scores / costs[name] for name, scores in passes.Magnitude().score(analysis).items()}
    expected = solve_budget(analysis, priced, budget, Bounds(round_to=1))
    assert passes.Magnitude(round_to=1).plan(analysis, budget) == expected


@pytest.mark.parametrize("elements", [1, 40])
def test_large_weights_are_summed_in_parts(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    analysis, _ = analysed("residual")
    at_once = passes.Magnitude().score(analysis)
    monkeypatch.setattr(Sums, "PART", elements)
    assert_shares(analysis, passes.Magnitude().score(analysis), at_once)


def test_magnitude_takes_the_smallest_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([3.0, 1.0, 4.0, 2.0]).reshape(4, 1, 1, 1))
    plan = passes.Magnitude(round_to=1).plan(fxprune.analyze(model, torch.randn(1, 3, 4, 4)), Budget(channels=0.5))
    assert plan.keep == {"0": (0, 2)}


@pytest.mark.parametrize("p", [0, -1.0, float("nan")])
def test_magnitude_needs_a_positive_exponent(p: float) -> None:
    with pytest.raises(PlanError, match=f"p={p!r} must be a positive number"):
        passes.Magnitude(p=p)


# ------------------------------------------------------------------------------------------ BatchNormScale


def test_batch_norm_scale_is_the_mean_absolute_scale() -> None:
    analysis, _ = analysed("residual")
    scales = {
        name: w for name, w in analysis.graph.named_parameters() if w.ndim == 1 and name in analysis.batch_norm_scales
    }
    sums = by_hand(analysis, lambda _, w: w.abs().item(), scales)
    absolute = passes.BatchNormScale(relative=False).score(analysis)
    relative = passes.BatchNormScale().score(analysis)
    assert list(relative) == list(absolute)
    for name, scores in absolute.items():
        np.testing.assert_allclose(relative[name], scores / scores.mean())
    assert set(absolute) == set(analysis.groups)
    for name, group in analysis.groups.items():
        count = sum(member.parameter in scales for member in group.members)
        np.testing.assert_allclose(absolute[name], np.array(sums[name]) / count)


def test_batch_norm_scale_leaves_groups_without_one_whole() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    plan = passes.BatchNormScale().plan(
        fxprune.analyze(randomize(model, 0), torch.randn(2, 3, 4, 4)), Budget(channels=0.75)
    )
    assert set(plan.keep) == {"0"}
    assert plan.widths == {"0": 4, "2": 8}


# ------------------------------------------------------------------------------------------------ Taylor


def taylor_by_hand(analysis: Analysis, data: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """|sum w dL/dw| of each channel, summed over batches."""
    total: dict[str, Any] = {name: 0 for name in analysis.groups}
    for x, y in data:
        model = copy.deepcopy(analysis.graph).requires_grad_()
        loss(model(x), y).backward()
        products = {name: p * p.grad for name, p in model.named_parameters() if p.grad is not None}
        sums = by_hand(analysis, lambda _, product: product.sum().item(), products)
        total = {name: total[name] + np.abs(sums[name]) for name in total}
    return total


@pytest.mark.parametrize("name", ["residual_projection", "vgg_flatten", "frozen_parameters"])
def test_taylor_is_the_first_order_change_of_the_loss(name: str) -> None:
    analysis, inputs = analysed(name)
    data = [batch(inputs, seed) for seed in range(3)]
    one, several, loader = data[0], data, DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    assert_shares(analysis, passes.Taylor(one, loss).score(analysis), taylor_by_hand(analysis, data[:1]))
    assert_shares(analysis, passes.Taylor(list(one), loss).score(analysis), taylor_by_hand(analysis, data[:1]))
    assert_shares(analysis, passes.Taylor(several, loss).score(analysis), taylor_by_hand(analysis, data))
    assert_shares(analysis, passes.Taylor(data[:2], loss).score(analysis), taylor_by_hand(analysis, data[:2]))
    assert_shares(analysis, passes.Taylor(loader, loss).score(analysis), taylor_by_hand(analysis, data))
    assert passes.Taylor(one, loss).plan(analysis, HALF).keep


@pytest.mark.parametrize("training", [False, True])
def test_taylor_changes_nothing(training: bool) -> None:
    analysis, inputs = analysed("dropout")
    analysis.graph.train(training)
    before = copy.deepcopy(analysis.graph.state_dict())
    numbers = torch.get_rng_state()
    score = passes.Taylor(DataLoader([batch(inputs)], batch_size=None, shuffle=True), loss).score  # type: ignore[arg-type]
    first = score(analysis)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert analysis.graph.training == training
    assert all(torch.equal(tensor, before[name]) for name, tensor in analysis.graph.state_dict().items())
    assert all(parameter.grad is None for parameter in analysis.graph.parameters())
    torch.randn(5)
    again = score(analysis)  # dropout or not: the scores do not depend on torch's random numbers
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_taylor_of_a_model_with_two_inputs_and_of_one_with_keywords() -> None:
    analysis, inputs = analysed("two_inputs")
    one = passes.Taylor((inputs, torch.tensor([0, 1])), loss).score(analysis)
    listed = passes.Taylor([(inputs, torch.tensor([0, 1]))], loss).score(analysis)
    assert all(np.array_equal(one[name], listed[name]) for name in one)
    analysis, inputs = analysed("keyword_input")
    assert passes.Taylor([(inputs, torch.tensor([0, 1]))], lambda out, y: out.square().sum()).plan(analysis, HALF).keep


@pytest.mark.parametrize(
    ("data", "of", "message"),
    [
        ([], loss, "Taylor got no batches"),
        ([torch.randn(2, 3, 8, 8)], loss, "got a Tensor in it"),
        ([(1, 2, 3)], loss, r"loss\(model\(x\), y\) fails on this data: TypeError"),
        (None, lambda output, y: output.detach().sum(), r"got tensor\(.*\)"),
        (None, lambda output, y: output, r"must give a scalar tensor with a gradient; got tensor\("),
        (None, lambda output, y: 3.5, "got 3.5"),
    ],
)
def test_taylor_says_what_is_wrong_with_its_data(data: Any, of: Any, message: str) -> None:
    analysis, inputs = analysed("chain")
    with pytest.raises(PlanError, match=f"(?s){message}"):
        passes.Taylor(batch(inputs) if data is None else data, of).score(analysis)


# ------------------------------------------------------------------------------------------------ Fisher


@pytest.mark.parametrize("name", ["residual_projection", "vgg_flatten"])
def test_fisher_is_half_the_squares_of_weight_times_gradient(name: str) -> None:
    analysis, inputs = analysed(name)
    data = [batch(inputs, seed) for seed in range(2)]
    total: dict[str, Any] = {group: 0 for group in analysis.groups}
    for x, y in data:
        model = copy.deepcopy(analysis.graph).requires_grad_()
        loss(model(x), y).backward()
        products = {key: p * p.grad for key, p in model.named_parameters() if p.grad is not None}
        sums = by_hand(analysis, lambda _, product: product.square().sum().item() / 2, products)
        total = {group: total[group] + np.array(sums[group]) for group in total}
    assert_shares(analysis, passes.Fisher(data, loss).score(analysis), total)


# --------------------------------------------------------------------------------------- GeometricMedian


@pytest.mark.parametrize("name", ["residual_projection", "vgg_flatten", "shufflenet", "tied_parameter"])
def test_geometric_median_is_the_sum_of_distances(name: str) -> None:
    analysis, _ = analysed(name)
    weights = {key: w.detach() for key, w in analysis.graph.named_parameters() if w.ndim > 1}
    expected = {}
    for group in analysis.groups.values():
        slices: list[list[Tensor]] = [[] for _ in range(group.size)]
        for member in group.members:
            if member.parameter in weights:
                for position, channel in zip(member.index, member.channel, strict=True):
                    slices[channel].append(weights[member.parameter].select(member.axis, int(position)).flatten())
        rows = [torch.cat(parts) for parts in slices]
        expected[group.name] = [sum((first - second).norm().item() for second in rows) for first in rows]
    assert_shares(analysis, passes.GeometricMedian().score(analysis), expected)


def test_geometric_median_takes_what_others_can_stand_for() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[1].weight.fill_(0.5)
        model[0].weight.copy_(torch.tensor([9.0, 3.0, 4.0, -8.0]).reshape(4, 1, 1, 1))
    plan = passes.GeometricMedian(round_to=1).plan(
        fxprune.analyze(model, torch.randn(1, 3, 4, 4)), Budget(channels=0.5)
    )
    assert plan.keep == {"0": (0, 3)}  # the large ones, but for their size: 3 and 4 lie between them


# -------------------------------------------------------------------------------------------- Activation


class Watched(nn.Module):
    """What its layers with weights read is at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)
        self.c, self.fc = nn.Conv2d(6, 8, 3), nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.read(x)[-1].flatten(1))

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = self.norm(self.a(x)).relu()
        second = first + self.b(first)
        return first, second, self.c(second).relu()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("statistic", ["mean", "variance"])
def test_activation_is_the_statistic_of_what_is_read(statistic: str, training: bool) -> None:
    model = randomize(Watched(), 0).double().train(training)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    analysis = fxprune.analyze(model, x)
    data = [(torch.randn(size, 3, 8, 8, dtype=torch.float64), 0) for size in (2, 3)]
    seen: dict[str, list[Tensor]] = {"a": [], "c": []}
    with torch.no_grad():
        for batch, _ in data:
            first, second, third = (value.transpose(0, 1).flatten(1) for value in copy.deepcopy(model).read(batch))
            seen["a"] += [first, second]
            seen["c"] += [third]
    values = {name: torch.cat(batches, 1) for name, batches in seen.items()}
    expected = {
        name: (batches.abs().mean(1) if statistic == "mean" else batches.var(1, correction=0)).numpy()
        for name, batches in values.items()
    }
    assert_shares(analysis, passes.Activation(data, statistic).score(analysis), expected)


@pytest.mark.parametrize(
    "name",
    ["mha_exact", "attention_gqa", "functional_conv", "depthwise_separable", "grouped", "densenet", "tied_parameter"],
)
def test_activation_of_dead_channels_is_zero(name: str) -> None:
    """Whatever the architecture: channels whose slices are all zero carry no signal, and are those that go."""
    model, inputs = prepare(MODELS[name])
    analysis = fxprune.analyze(model, inputs)
    scores = passes.Activation([(inputs, 0)]).score(analysis)
    dead = Plan({group: range(1, size) for group, size in analysis.sizes.items()}, analysis.sizes, analysis.options)
    _, param_map = fxprune.rewrite(analysis.graph, analysis, dead)
    masked = copy.deepcopy(analysis.graph)
    zero_removed(masked, param_map)
    again = passes.Activation([(inputs, 0)]).score(fxprune.analyze(masked, inputs))
    assert set(again) == set(scores)
    assert len(scores) >= len(analysis.groups) / 2
    for group, values in scores.items():
        assert values.any(), group
        assert again[group][0] == 0, group


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: passes.Activation([]).score, "Activation got no batches"),
        (lambda x: passes.Activation([(x[:, :2], 0)]).score, r"model\(x\) fails on this data: RuntimeError"),
        (lambda x: passes.Activation(x, "median"), "statistic='median' is not known; use 'mean' or 'variance'"),
    ],
)
def test_activation_says_what_is_wrong(make: Any, message: str) -> None:
    analysis, inputs = analysed("chain")
    with pytest.raises(PlanError, match=message):
        make(inputs[0])(analysis)


# ------------------------------------------------------------------------------------------------ Random


def test_random_is_a_function_of_the_seed() -> None:
    analysis, _ = analysed("residual")
    same, first, different = (passes.Random(seed).plan(analysis, HALF) for seed in (1, 1, 2))
    assert same == first
    assert same != different
    assert passes.Random(-1).plan(analysis, HALF) == passes.Random(-1).plan(analysis, HALF)


# -------------------------------------------------------------------------------------- all the criteria


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_frozen_models_of_any_precision(dtype: torch.dtype, name: str) -> None:
    model, inputs = prepare(MODELS["frozen_parameters"], dtype=dtype)
    compact = fxprune.prune(model, inputs, CRITERIA[name](inputs), budget=HALF)
    assert {parameter.dtype for parameter in compact.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in compact.parameters())
    assert compact(*inputs).shape == model(*inputs).shape


@pytest.mark.parametrize("name", CRITERIA)
def test_weights_without_values(name: str) -> None:
    analysis, inputs = analysed("chain")
    model = MODELS["chain"].make().to("meta")
    criterion = CRITERIA[name](inputs)
    if name in WITHOUT_VALUES:
        assert criterion.plan(fxprune.analyze(model, inputs), HALF) == criterion.plan(analysis, HALF)
    else:
        with pytest.raises(PlanError, match=r"on the meta device and have no values to score. Use passes.Random"):
            criterion.plan(fxprune.analyze(model, inputs), HALF)


class Steered(nn.Module):
    """Plain Python that looks at values calls the parts, which have graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.body(x if x.max() > 0 else x.flip(0)).mean((2, 3))


@pytest.mark.parametrize("name", CRITERIA)
def test_a_model_without_groups(name: str) -> None:
    inputs = (torch.randn(2, 4),)
    analysis = fxprune.analyze(nn.Linear(4, 2), inputs)
    assert CRITERIA[name](inputs).score(analysis) == {}
    with pytest.raises(PlanError, match="nothing in this model can be pruned"):
        CRITERIA[name](inputs).plan(analysis, HALF)


@pytest.mark.parametrize("name", CRITERIA)
def test_models_that_plain_python_steers(name: str) -> None:
    model = randomize(Steered(), 0).eval()
    inputs = (torch.randn(2, 3, 8, 8),)
    analysis = fxprune.analyze(model, inputs)
    assert "body.0" in analysis.sizes
    plan = CRITERIA[name](inputs).plan(analysis, Budget(params=0.7, tolerance=0.2))
    assert plan.widths["body.0"] < 16


def test_a_criterion_of_ones_own() -> None:
    class Last(passes.Criterion):
        def score(self, analysis: Analysis) -> dict[str, Any]:
            return {name: np.arange(group.size, dtype=float) for name, group in analysis.groups.items()}

    analysis, _ = analysed("chain")
    plan = Last(scope="local", round_to=1).plan(analysis, HALF)
    for name, kept in plan.keep.items():
        assert kept[-1] == analysis.sizes[name] - 1
