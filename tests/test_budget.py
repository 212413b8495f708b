"""Budgets: what is asked for is what the compact model really costs, or an error names what can be had."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from criteria import CRITERIA
from laws import random_plan
from models import MODELS, prepare, randomize
from torch import Tensor, nn

import fxprune
from fxprune import Analysis, Budget, Plan, cost, passes
from fxprune.budget.cost import Channels, cost_of
from fxprune.budget.latency import Stairs, Tried, guess_between
from fxprune.errors import BudgetError, PlanError

KINDS = ["flops", "macs", "params", "channels", "memory"]
X = torch.randn(2, 3, 32, 32)


@cache
def zoo(name: str) -> Analysis:
    model = torchvision.models.get_model(name, weights=None)
    return fxprune.analyze(randomize(model, 0).eval(), X)


def tiny(name: str = "chain") -> Analysis:
    model, inputs = prepare(MODELS[name], dtype=torch.float32)
    return fxprune.analyze(model, inputs)


def cut(analysis: Analysis, plan: Plan) -> fxprune.TracedModule:
    return fxprune.rewrite(analysis.graph, analysis, plan)[0]


def counted(analysis: Analysis, plan: Plan, kind: str) -> float:
    """What the compact model costs, counted on it."""
    compact = cut(analysis, plan).eval()
    if kind in ("flops", "macs"):
        return cost.flops(compact, analysis.example_inputs) / (1 if kind == "flops" else 2)
    if kind == "params":
        return cost.params(compact)
    if kind == "channels":
        return sum(plan.widths.values())
    again = fxprune.analyze(compact, analysis.example_inputs)  # memory has no other counter
    channels = Channels.of(again)
    return cost_of(again, kind, channels)(np.ones(len(channels.group), dtype=bool))


# --------------------------------------------------------------------------------------- budgets are met


@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_is_met_as_counted_on_the_compact_model(model: str, kind: str) -> None:
    analysis = zoo(model)
    dense = counted(analysis, Plan({}, analysis.sizes), kind)
    for limit, asked in ((0.6, 0.6 * dense), (int(0.6 * dense), int(0.6 * dense))):
        plan = passes.Magnitude().plan(analysis, Budget(**{kind: limit}))
        assert 0.99 * asked <= counted(analysis, plan, kind) <= asked


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "Magnitude"])
@pytest.mark.parametrize("kind", ["flops", "params"])
def test_every_criterion_meets_it(criterion: str, kind: str) -> None:
    analysis = zoo("resnet18")
    dense = counted(analysis, Plan({}, analysis.sizes), kind)
    plan = CRITERIA[criterion]((X,)).plan(analysis, Budget(**{kind: 0.5}))
    assert 0.495 * dense <= counted(analysis, plan, kind) <= 0.5 * dense


def test_several_limits_hold_at_once() -> None:
    analysis = zoo("resnet18")
    dense = {kind: counted(analysis, Plan({}, analysis.sizes), kind) for kind in ("macs", "params", "memory")}
    plan = passes.Magnitude().plan(analysis, Budget(macs=0.5, params=0.3, memory=0.7))
    used = {kind: counted(analysis, plan, kind) / dense[kind] for kind in dense}
    assert used["macs"] <= 0.5
    assert used["params"] <= 0.3
    assert used["memory"] <= 0.7
    assert max(used["macs"] / 0.5, used["params"] / 0.3, used["memory"] / 0.7) >= 0.99


SAMPLE = ["chain", "vgg_flatten", "residual_projection", "densenet", "grouped", "depthwise_separable", "shufflenet"]
SAMPLE += ["se_conv", "unet", "glu"]


@pytest.mark.parametrize("name", [*SAMPLE, *(name for name in MODELS if "attention" in name or "swin" in name)])
def test_the_cost_function_is_what_the_counter_counts(name: str) -> None:
    """On the dense model, and on random plans: FLOPs by FlopCounterMode, parameters by counting them."""
    analysis = tiny(name)
    channels = Channels.of(analysis)
    plans = [Plan({}, analysis.sizes), *(random_plan(analysis, seed) for seed in range(4))]
    for plan in plans:
        kept = np.concatenate(
            [np.isin(range(size), plan.keep.get(g, range(size))) for g, size in analysis.sizes.items()]
        )
        for kind in ("flops", "params"):
            assert cost_of(analysis, kind, channels)(kept) == counted(analysis, plan, kind), (kind, plan)


class Attends(nn.Module):
    """A block of attention, in plain Python where ``steered``."""

    def __init__(self, steered: bool) -> None:
        super().__init__()
        self.steered = steered
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        """Shape [2, 128, 64] in and out."""
        if self.steered and x.sum() > 1e9:
            return x
        q, k, v = self.qkv(x).view(2, 128, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_attention_costs_the_same_where_python_steers() -> None:
    example = torch.randn(2, 128, 64)
    graph, steered = (fxprune.trace(Attends(steered).eval(), example) for steered in (False, True))
    projections, products = 2 * 128 * 64 * 256, 2 * 2 * 4 * 128 * 128 * 16
    assert cost.flops(graph, example) == cost.flops(steered, example) == 2 * (projections + products)


def test_memory_is_weights_and_values() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1, bias=False))
    analysis = fxprune.analyze(model, torch.randn(2, 3, 5, 5))
    memory = cost_of(analysis, "memory", Channels.of(analysis))
    weights, values = 4 * 3 + 2 * 4, 2 * 25 * (3 + 4 + 2)  # the ReLU works in place
    assert memory(np.ones(4, dtype=bool)) == 4 * (weights + values)


def test_flops_of_a_model_that_looks_at_values() -> None:
    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    assert cost.flops(Net(3, 4), torch.ones(2, 3)) == 2 * 2 * 3 * 4


def test_flops_of_a_model_with_a_buffer_that_is_not_saved() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)
            self.register_buffer("shift", torch.randn(4), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x + self.shift)

    assert cost.flops(Shifted(), torch.randn(3, 4)) == 2 * 3 * 4 * 2


def test_flops_of_a_model_whose_layers_share_a_weight() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder, self.fc = nn.Embedding(7, 4), nn.Embedding(7, 4), nn.Linear(4, 3)
            self.decoder.weight = self.encoder.weight

        def forward(self, words: Tensor) -> Tensor:
            return self.fc(self.encoder(words) + self.decoder(words))

    words = torch.tensor([[1, 5]])
    assert cost.flops(Tied(), words) == cost.flops(fxprune.trace(Tied(), words), words) == 2 * 2 * 4 * 3


# ------------------------------------------------------------------------------------------ out of reach


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["chain", "residual", "grouped", "vgg_flatten"])
def test_the_nearest_that_an_error_names_can_be_had(name: str, kind: str) -> None:
    analysis = tiny(name)
    with pytest.raises(
        BudgetError, match=rf"the budget {kind}=\d+ .* can't be met; .* nearest .* is {kind}=\d+"
    ) as miss:
        passes.Magnitude().plan(analysis, Budget(**{kind: 0.0001}))
    nearest = nearest_in(miss, kind)
    plan = passes.Magnitude().plan(analysis, Budget(**{kind: nearest}))
    assert counted(analysis, plan, kind) == nearest


def nearest_in(miss: Any, kind: str) -> int:
    match = re.search(rf"reached is {kind}=(\d+)", str(miss.value))
    assert match
    return int(match[1])


@pytest.mark.parametrize("fraction", [0.3, 0.45, 0.6, 0.75, 0.9])
def test_between_two_whole_channels(fraction: float) -> None:
    """A tiny model has few plans: where none is within 1 %, the error names one, which can be asked for."""
    analysis = tiny("residual")
    budget = Budget(params=fraction, tolerance=0.0001)
    try:
        plan = passes.Magnitude().plan(analysis, budget)
    except BudgetError as miss:
        match = re.search(r"reached is params=(\d+) .*: .* no plan was found within 0.01 % below it", str(miss))
        nearest = int(match[1]) if match else 0
        plan = passes.Magnitude().plan(analysis, Budget(params=nearest, tolerance=0.0001))
        assert counted(analysis, plan, "params") == nearest
    else:
        dense = cost.params(analysis.graph)
        assert counted(analysis, plan, "params") >= 0.9999 * fraction * dense


@pytest.mark.parametrize("kind", ["flops", "params"])
@pytest.mark.parametrize("name", ["residual", "inception", "densenet", "unet", "grouped", "vgg_flatten"])
def test_rounding_hides_no_plan(name: str, kind: str) -> None:
    """What can be met by single channels is met by default, by those that are not multiples where it must be."""
    analysis = tiny(name)
    for percent in range(20, 100, 4):
        try:
            passes.Magnitude(round_to=1).plan(analysis, Budget(**{kind: percent / 100}))
        except BudgetError:
            continue
        plan = passes.Magnitude(round_to=4).plan(analysis, Budget(**{kind: percent / 100}))
        dense = counted(analysis, Plan({}, analysis.sizes), kind)
        assert 0.99 * percent / 100 * dense <= counted(analysis, plan, kind) <= percent / 100 * dense


def test_out_of_reach_says_what_is_kept() -> None:
    with pytest.raises(BudgetError, match=r"is flops=\d+ \(100.0%\): 3 of 3 groups are kept whole, and minimum="):
        passes.Magnitude(keep=["*"]).plan(tiny(), Budget(flops=0.5))
    with pytest.raises(BudgetError, match=r"0 of 3 groups are kept whole and maximum= holds the others; raise it"):
        passes.Magnitude(maximum=0.5).plan(tiny(), Budget(params=0.9))
    with pytest.raises(BudgetError, match=r"nearest .* is flops=\d+ \(.*%\) and params=\d+ \(.*%\)"):
        passes.Magnitude().plan(tiny(), Budget(flops=0.5, params=0.001))


def test_a_budget_that_is_met_already() -> None:
    with pytest.raises(BudgetError, match=r"meets the budget params=100000 \(.*: it has params=2\d\d\d \(100.0%\)"):
        passes.Magnitude().plan(tiny(), Budget(params=100_000))
    with pytest.raises(BudgetError, match="already meets the budget flops="):
        passes.Magnitude().plan(tiny(), Budget(flops=1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "empty budget: give at least one of flops, macs"),
        ({"flops": "half"}, "flops='half' must be a number above 0"),
        ({"params": True}, "params=True must be a number above 0"),
        ({"flops": timedelta(seconds=1)}, r"flops=.*timedelta\(seconds=1\) must be a number above 0"),
        ({"macs": 0}, "macs=0 must be a number above 0"),
        ({"latency": -1.5}, "latency=-1.5 must be a number above 0"),
        ({"latency": timedelta(0)}, "latency=0.0 must be a number above 0"),
        ({"memory": float("nan")}, "memory=nan must be a number above 0"),
        ({"flops": 0.5, "tolerance": 0}, "tolerance=0 must be a number above 0 and below 1"),
    ],
)
def test_a_budget_that_makes_no_sense(arguments: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**arguments)


def test_numpy_numbers_are_numbers() -> None:
    analysis = tiny()
    expected = passes.Magnitude().plan(analysis, Budget(flops=0.5, tolerance=0.1))
    assert passes.Magnitude().plan(analysis, Budget(flops=np.float32(0.5), tolerance=0.1)) == expected


def test_scores_that_are_not_numbers() -> None:
    model, inputs = prepare(MODELS["chain"])
    model.get_parameter("1.0.weight").data[0] = float("nan")
    with pytest.raises(PlanError, match=r"scores of group '.+' are not numbers"):
        passes.Magnitude().plan(fxprune.analyze(model, inputs), Budget(flops=0.5))


# ------------------------------------------------------------------------------------------------ shares


def widths_of(analysis: Analysis, names: str, plan: Plan) -> tuple[int, int]:
    """The channels of the groups whose names match the expression ``names``: all of them, and those that stay."""
    named = [name for name in analysis.sizes if re.fullmatch(names, name)]
    return sum(analysis.sizes[name] for name in named), sum(plan.widths[name] for name in named)


def test_groups_that_a_pattern_names_keep_their_share() -> None:
    analysis = zoo("resnet18")
    plan = passes.Magnitude().plan(analysis, Budget(channels={"layer4.*": 0.5, "layer3.0": 160}))
    assert widths_of(analysis, r"layer4\..*", plan) == (1536, 768)
    assert widths_of(analysis, r"layer3\.0\..*", plan) == (512, 160)
    assert all(name.startswith(("layer4", "layer3.0")) for name in plan.keep)


def test_each_group_keeps_a_share_of_its_own_where_scores_are_compared_within_it() -> None:
    analysis = zoo("resnet18")
    plan = passes.Magnitude(scope="local").plan(analysis, Budget(channels={"layer4.*": 0.5}))
    assert {name: plan.widths[name] for name in plan.keep} == {
        "layer4.0.conv1": 256,
        "layer4.0.conv2": 256,
        "layer4.1.conv1": 256,
    }


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_limits_are_met_by_the_groups_that_no_pattern_names(share: float) -> None:
    analysis = zoo("resnet18")
    whole = counted(analysis, Plan({}, analysis.sizes), "flops")
    plan = passes.Magnitude().plan(analysis, Budget(flops=0.5, channels={"layer4.*": share}))
    assert 0.495 * whole <= counted(analysis, plan, "flops") <= 0.5 * whole
    assert widths_of(analysis, r"layer4\..*", plan) == (1536, 1536 * share)


def test_shares_may_save_more_than_a_limit_asks_for() -> None:
    analysis = zoo("resnet18")
    shares = {"layer4.*": 0.5}
    criterion = passes.Magnitude(scope="local")
    assert criterion.plan(analysis, Budget(channels=shares, flops=0.99)) == criterion.plan(
        analysis, Budget(channels=shares)
    )
    with pytest.raises(BudgetError, match=r"3 have their share of channels=, and minimum="):
        passes.Magnitude().plan(analysis, Budget(channels=shares, flops=0.0001))


def test_heads_and_mlps_apart() -> None:
    analysis = fxprune.analyze(vit(), X)
    criterion = passes.Magnitude(scope="local")
    plan = criterion.plan(analysis, Budget(channels={"*.self_attention": 0.75, "*.mlp": 0.25}))
    assert {plan.widths[name] for name in plan.keep if "attention" in name} == {3}
    assert {plan.widths[name] for name in plan.keep if "mlp" in name} == {16}
    assert len(plan.keep) == 4


def vit() -> nn.Module:
    """Two layers of 4 heads and 64 channels in the MLP."""
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64
    )


@pytest.mark.parametrize(
    ("shares", "options", "message"),
    [
        ({"layer5.*": 0.5}, {}, r"channels=\{'layer5\.\*': 0\.5\} names no group of this model"),
        ({"layer1.0.conv2": 0.5}, {}, r"channels=\{'layer1\.0\.conv2': 0\.5\} names layers, .* in 'conv1' and"),
        (
            {"layer4": 0.5, "*.conv1": 0.25},
            {},
            r"channels= names group 'layer4\.0\.conv1' twice, by 'layer4' and by '\*\.conv1'",
        ),
        ({"layer4": 0.05}, {}, r"76\.8 of 1536 channels may stay, and the nearest is 156\..* 0 are .* minimum= holds"),
        ({"layer4": 0.5}, {"keep": "layer4"}, r"nearest is 1536\. Of 3 groups 3 are kept whole"),
        ({"layer4": 0.75}, {"maximum": 0.5}, r"1152 of 1536 channels may stay, and the nearest is 768.* maximum="),
        ({"layer4": 5000}, {}, r"channels=\{'layer4': 5000\} asks for more .* 1536 channels"),
        ({}, {}, r"channels=\{\} must name groups"),
        ({4: 0.5}, {}, r"channels=\{4: 0\.5\} must name groups"),
        ({"layer4": None}, {}, r"channels\['layer4'\]=None must be a number above 0"),
        ({"layer4": 1.5}, {}, r"channels\['layer4'\]=1\.5 is neither a fraction nor a count"),
    ],
)
def test_shares_that_make_no_sense(shares: Any, options: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        passes.Magnitude(**options).plan(zoo("resnet18"), Budget(channels=shares))


def test_a_plan_says_what_it_was_made_for(tmp_path: Any) -> None:
    plan = passes.Random(scope="isomorphic").plan(tiny(), Budget(params=0.7, channels={"0.0": 0.5}, tolerance=0.1))
    plan.save(tmp_path / "plan.json")
    told = {"budget": "params=0.7, channels={'0.0': 0.5}, tolerance=0.1", "scope": "isomorphic"}
    assert Plan.load(tmp_path / "plan.json").source == plan.source == told


# ------------------------------------------------------------------------------------------------ bounds


def test_local_removes_the_same_share_everywhere() -> None:
    analysis = zoo("resnet18")
    plan = passes.Magnitude(scope="local", round_to=1).plan(analysis, Budget(channels=0.5))
    shares = [width / analysis.sizes[name] for name, width in plan.widths.items()]
    assert max(shares) - min(shares) < 0.03
    spread = passes.Magnitude(scope="global", round_to=1).plan(analysis, Budget(channels=0.5)).widths
    shares = [width / analysis.sizes[name] for name, width in spread.items()]
    assert max(shares) - min(shares) > 0.05


def test_isomorphic_removes_the_same_share_of_each_kind_of_group_and_compares_within_it() -> None:
    analysis = zoo("resnet18")
    scores = {name: np.full(size, float(number)) for number, (name, size) in enumerate(analysis.sizes.items())}
    plan = Given(scores, scope="isomorphic", minimum=0, round_to=1).plan(analysis, Budget(channels=0.5, tolerance=0.1))
    inside = [name for name in analysis.sizes if re.fullmatch(r"layer.\..\.conv1", name)]
    assert sum(plan.widths[name] for name in inside) == pytest.approx(sum(analysis.sizes[n] for n in inside) / 2, abs=8)
    *first, last_but_one, last = [plan.widths[name] for name in inside]  # the earlier, the lower the score
    assert set(first) == {1}
    assert 430 < last_but_one < 460
    assert last == 512
    alone = ["conv1", "layer4.0.conv2"]  # the first and the last stage are like no other
    assert [plan.widths[name] / analysis.sizes[name] for name in alone] == pytest.approx([0.5, 0.5], abs=0.02)


@dataclass(frozen=True)
class Given(passes.Criterion):
    """Scores that are given."""

    scores: Any

    def score(self, analysis: Analysis) -> Any:
        return self.scores


def test_minimum_and_maximum() -> None:
    analysis = zoo("resnet18")
    plan = passes.Random(minimum=0.4, maximum=0.75, round_to=1).plan(analysis, Budget(flops=0.4))
    for name, width in plan.widths.items():
        assert 0.4 <= width / analysis.sizes[name] <= 0.75


@pytest.mark.parametrize("name", [*SAMPLE, "attention", "prelu"])
def test_no_layer_is_ever_empty(name: str) -> None:
    analysis = tiny(name) if name in MODELS else tiny()
    least = {"flops": 0.0001}
    with pytest.raises(BudgetError) as miss:
        passes.Random(minimum=0).plan(analysis, Budget(**least))
    plan = passes.Random(minimum=0).plan(analysis, Budget(flops=nearest_in(miss, "flops")))
    assert set(plan.widths.values()) == {1}
    compact = cut(analysis, plan)
    assert all(parameter.numel() for parameter in compact.parameters())


@pytest.mark.parametrize(("round_to", "multiple"), [("auto", 16), (8, 8), (32, 32), (1, 1)])
def test_widths_are_multiples(round_to: Any, multiple: int) -> None:
    """All but a few that use up the budget; by a quarter of the group at most, a sixteenth if nobody asked for it."""
    analysis = zoo("resnet18")
    parts = 16 if round_to == "auto" else 4
    plan = passes.Magnitude(round_to=round_to).plan(analysis, Budget(flops=0.5))
    uneven = [name for name, width in plan.widths.items() if width % min(multiple, analysis.sizes[name] // parts)]
    assert len(uneven) <= 3
    loose = passes.Magnitude(round_to=round_to).plan(analysis, Budget(flops=0.5, tolerance=0.5))
    assert all(width % min(multiple, analysis.sizes[name] // parts) == 0 for name, width in loose.widths.items())


def test_small_widths_are_multiples_too_unless_the_budget_is_too_small_for_them() -> None:
    analysis = zoo("resnet18")
    widths = passes.Magnitude(round_to=16).plan(analysis, Budget(flops=0.08, tolerance=0.5)).widths
    assert all(width % 16 == 0 for width in widths.values())
    widths = passes.Magnitude(round_to=16).plan(analysis, Budget(flops=0.02)).widths
    assert min(widths.values()) < 16


def test_auto_on_half_precision_rounds_as_the_device_likes() -> None:
    from fxprune.budget.solver import round_widths

    model = torchvision.models.resnet18(weights=None)
    assert set(round_widths(fxprune.analyze(model, X), "auto")) == {4, 8, 16}
    assert set(round_widths(fxprune.analyze(model, X), 12)) == {12}


def test_auto_leaves_narrow_groups_free_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Groups of 16, 32 and 512 channels: multiples of 1, 2 and 16."""
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 512), nn.Linear(512, 3)
    )
    analysis = fxprune.analyze(model, torch.randn(2, 8))
    with caplog.at_level("INFO", "fxprune"):
        widths = passes.Magnitude().plan(analysis, Budget(params=0.5, tolerance=0.2)).widths
    assert caplog.messages == ["widths are multiples of 1 in 1, of 2 in 1, of 16 in 1 of 3 groups"]
    assert [width % multiple for width, multiple in zip(widths.values(), (1, 2, 16), strict=True)] == [0, 0, 0]


def keeps(pattern: str, model: str = "resnet18") -> set[str]:
    """The groups that stay whole for ``keep=pattern``."""
    analysis = zoo(model) if model == "resnet18" else tiny(model)
    plan = passes.Magnitude(round_to=1, keep=pattern, maximum=0.9).plan(analysis, Budget(channels=0.7, tolerance=0.2))
    return set(analysis.sizes) - set(plan.keep)


def test_keep_patterns() -> None:
    assert keeps("layer1.0.conv1") == {"layer1.0.conv1"}
    assert keeps("layer1.0.conv1.weight") == {"layer1.0.conv1"}
    assert keeps("layer1.0.bn1") == {"layer1.0.conv1"}  # the channels of a norm are those of its convolution
    assert keeps("layer1.0.conv1.weight[1]") == {"conv1"}  # the other axis: what goes in
    assert keeps("layer1.0.conv1[1]") == {"conv1"}
    assert keeps("layer1.0.conv2") == {"conv1"}  # the whole residual stage
    assert keeps("layer*.1.conv1") == {f"layer{i}.1.conv1" for i in (1, 2, 3, 4)}
    assert keeps("layer4") == keeps("layer4.*") == {"layer4.0.conv1", "layer4.0.conv2", "layer4.1.conv1"}
    assert keeps("fc") == set()  # the classes are frozen anyway


def test_keep_names_the_output_of_a_transposed_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 12, 2), nn.Conv2d(12, 4, 1))
    analysis = fxprune.analyze(model, X)
    plan = passes.Magnitude(keep=["1"], round_to=1).plan(analysis, Budget(channels=0.8))
    assert plan.widths == {"0": 4, "1.weight:1" if "1.weight:1" in analysis.sizes else "1": 12}


def test_keep_of_the_pass_and_of_the_call_add_up() -> None:
    analysis = zoo("resnet18")
    plan = passes.Magnitude(keep="conv1").plan(analysis, Budget(flops=0.8), keep=["layer4.*"])
    assert {"conv1", "layer4.0.conv1", "layer4.0.conv2", "layer4.1.conv1"}.isdisjoint(plan.keep)


@pytest.mark.parametrize("pattern", ["layer5.*", "conv1.weight[7]", "relu", "conv1.weigth", "[0]"])
def test_a_pattern_that_matches_nothing(pattern: str) -> None:
    with pytest.raises(PlanError, match=rf"keep='{re.escape(pattern)}' matches no module, parameter or group"):
        keeps(pattern)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minimum": 0.5, "maximum": 0.25}, r"maximum=0\.25 must be a number at least 0\.5 and at most 1"),
        ({"minimum": -0.1}, r"minimum=-0\.1 must be a number at least 0 and at most 1"),
        ({"maximum": 1.5}, r"maximum=1\.5 must be a number at least 0\.1 and at most 1"),
        ({"scope": "layer"}, "scope='layer' is not known"),
        ({"round_to": 0}, "round_to=0 must be"),
        ({"round_to": 1.5}, "round_to=1.5 must be"),
        ({"round_to": "16"}, "round_to='16' must be"),
    ],
)
def test_bounds_that_make_no_sense(options: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        passes.Magnitude(**options)


# ----------------------------------------------------------------------------------------------- latency


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
    """A machine on which a forward pass takes a nanosecond a parameter, and a millisecond besides."""

    def taken(model: Any, example_inputs: Any = None) -> float:
        return 1e-3 + 1e-9 * cost.params(model)

    def seconds_of(models: dict[str, Any], inputs: Any, seconds: float) -> dict[str, list[float]]:
        return {name: [taken(model)] for name, model in models.items()}

    def by_module(models: dict[str, Any], inputs: Any, seconds: float) -> dict[str, dict[str, float]]:
        return {
            key: {path: 1e-9 * cost.params(layer) for path, layer in model.named_modules() if path}
            for key, model in models.items()
        }

    monkeypatch.setattr("fxprune.budget.latency.seconds_of", seconds_of)
    monkeypatch.setattr("fxprune.budget.latency.by_module", by_module)
    return taken


def test_a_latency_is_met(fake_clock: Callable[..., float]) -> None:
    analysis = zoo("resnet18")
    analysis.graph.train()
    dense = fake_clock(analysis.graph, X)
    for limit, asked in ((0.6, 0.6 * dense), (timedelta(seconds=0.5 * dense), 0.5 * dense)):
        plan = passes.Magnitude().plan(analysis, Budget(latency=limit))
        seconds = fake_clock(cut(analysis, plan), X)
        assert 0.95 * asked <= seconds <= asked
    assert analysis.graph.training
    analysis.graph.eval()


def test_a_latency_beside_other_limits(fake_clock: Callable[..., float]) -> None:
    analysis = zoo("resnet18")
    dense = cost.flops(analysis.graph, X)
    for latency, flops in ((0.6, 0.3), (0.3, 0.9), (1.0, 0.5)):
        compact = cut(analysis, passes.Magnitude().plan(analysis, Budget(latency=latency, flops=flops)))
        assert fake_clock(compact, X) <= latency * fake_clock(analysis.graph, X)
        assert cost.flops(compact, X) <= flops * dense


def test_a_latency_out_of_reach(fake_clock: Callable[..., float]) -> None:
    analysis = zoo("resnet18")
    with pytest.raises(BudgetError, match=r"latency of 0.0001 s can't be met: .* takes 0\.01\d+ s, .* plan 0\.00\d+ s"):
        passes.Magnitude().plan(analysis, Budget(latency=timedelta(seconds=1e-4)))
    with pytest.raises(BudgetError, match=r"already runs in 0\.\d+ s, within 10 s"):
        passes.Magnitude().plan(analysis, Budget(latency=10))


def test_a_latency_on_the_meta_device() -> None:
    with torch.device("meta"):
        analysis = fxprune.analyze(torchvision.models.resnet18(weights=None), torch.randn(1, 3, 32, 32))
    with pytest.raises(BudgetError, match="latency can't be measured on the meta device"):
        passes.Random().plan(analysis, Budget(latency=0.5))


def test_widths_stand_on_the_staircase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a kernel works on blocks of 48 channels, widths are multiples of 48."""

    def taken(layer: nn.Module) -> float:
        outputs, inputs = (-(-size // 48) for size in layer.weight.shape[:2])
        return 1e-5 * outputs * inputs

    def by_module(models: dict[str, Any], inputs: Any, seconds: float) -> dict[str, dict[str, float]]:
        return {
            key: {path: taken(layer) for path, layer in model.named_children() if isinstance(layer, nn.Conv2d)}
            for key, model in models.items()
        }

    def seconds_of(models: dict[str, Any], inputs: Any, seconds: float) -> dict[str, list[float]]:
        return {key: [sum(times.values())] for key, times in by_module(models, inputs, seconds).items()}

    monkeypatch.setattr("fxprune.budget.latency.by_module", by_module)
    monkeypatch.setattr("fxprune.budget.latency.seconds_of", seconds_of)
    layers = [nn.Conv2d(3 if at == 0 else 192, 192, 1) for at in range(4)]
    analysis = fxprune.analyze(nn.Sequential(*layers, nn.Conv2d(192, 4, 1)), torch.randn(1, 3, 4, 4))
    for criterion in (passes.Random(1), passes.Magnitude(round_to=1), passes.Magnitude(scope="local")):
        plan = criterion.plan(analysis, Budget(latency=0.6))
        assert all(width % 48 == 0 for width in plan.widths.values()), plan.widths
        before, after = (sum(map(taken, model.children())) for model in (analysis.graph, cut(analysis, plan)))
        assert 0.4 * before < after <= 0.6 * before


@pytest.mark.parametrize(
    ("times", "aim", "removed"),
    [((1.0, 0.5), 0.75, 150), ((1.0, 0.5), 0.99, 115), ((1.0, 0.5), 0.51, 185), ((0.6, 0.6), 0.5, 185)],
    ids=["in a line", "not at the start", "not at the end", "time that does not fall"],
)
def test_a_guess_lies_within_what_was_tried(times: tuple[float, float], aim: float, removed: int) -> None:
    assert guess_between(Tried(100, times[0]), Tried(200, times[1]), aim) == removed


def test_stairs() -> None:
    stairs = Stairs([16, 32, 48, 64], [1.0, 1.9, 3.0, 3.1])
    assert stairs.widths == [16, 32, 64], "48 saves hardly any time over 64"
    assert [stairs.round_up(width) for width in (1, 16, 17, 33, 64, 99)] == [16, 16, 32, 64, 64, 64]
    assert [stairs.seconds(width) for width in (16, 33)] == [1.0, 3.1]
    assert Stairs([16, 32, 48], [1.2, 0.6, 1.0]).widths == [32, 48], "the fall from 32 to 16 costs time"


def test_a_real_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.budget.latency.SECONDS", 0.02)
    model = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 64, 64, 3) for i in range(4)), nn.Conv2d(64, 4, 1))
    analysis = fxprune.analyze(model, torch.randn(4, 3, 32, 32))
    plan = passes.Magnitude().plan(analysis, Budget(latency=0.7))
    assert plan.keep


class Sorted(nn.Module):
    """Most of it is frozen: what is sorted has no channels."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.last = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.wide(x).sort(-1).values)


def test_a_budget_out_of_reach_says_what_is_frozen() -> None:
    model = nn.Sequential(Sorted(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    with pytest.raises(BudgetError, match=r"Besides, \d+ channels are frozen: normalized or ordered along \(\d+\), "):
        fxprune.prune(model, torch.randn(2, 8), passes.Magnitude(), budget=Budget(flops=0.2))
