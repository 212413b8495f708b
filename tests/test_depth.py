"""Depth: which residual branches may go whole, and budgets that take them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from criteria import CRITERIA
from laws import OPTIMIZERS, cuts_commute_with_steps, random_plan
from models import MODELS, prepare, randomize
from test_budget import Given, counted
from torch import Tensor, nn

import fxprune
from fxprune import Analysis, Budget, Plan, passes
from fxprune.budget.depth import costs_of_layers
from fxprune.errors import BudgetError, FileError, PlanError

X = torch.randn(2, 3, 32, 32)


def analysed(make: Callable[[], nn.Module]) -> Analysis:
    return fxprune.analyze(randomize(make(), 0).eval(), X)


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10
    )


# ------------------------------------------------------------------------------------------------ branches


class Net(nn.Module):
    """A residual branch of two convolutions, the tail of which is given."""

    def __init__(self, tail: Callable[[Tensor], Tensor], affine: bool = True) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm, self.head, self.tail = nn.BatchNorm2d(8, affine=affine), nn.Conv2d(8, 4, 1), tail

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.tail(self.norm(self.b(torch.relu(self.a(x))))))


class Shared(Net):
    """What ends the branch is called once more."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.stem(x))
        return self.head(x + self.b(torch.relu(self.a(x))))


class Watched(Net):
    """What the branch gives is an output too."""

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        y = self.b(torch.relu(self.a(x)))
        return self.head(x + y), y


class Broadcast(Net):
    """The branch gives a number for each channel, and its input goes around it as such."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean((2, 3), keepdim=True)
        return self.head(x + self.b(torch.relu(self.a(x))).expand(-1, -1, 4, 4))


def plain(y: Tensor) -> Tensor:
    return y


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Net(plain), ["b"]),
        (Net(lambda y: 0.5 * torch.relu(y).transpose(2, 3)), ["b"]),
        (Net(torch.sigmoid), []),
        (Net(lambda y: y + 1), []),
        (Net(plain, affine=False), []),  # it takes its running mean off
        (Shared(plain), []),
        (Watched(plain), []),
        (Broadcast(plain), []),
    ],
)
def test_a_branch_may_go_if_it_gives_zero_without_its_own_parameters(model: nn.Module, expected: list[str]) -> None:
    analysis = fxprune.analyze(model.eval(), torch.randn(2, 3, 5, 5))
    assert list(analysis.layers) == expected


def test_branches_of_known_networks() -> None:
    blocks = [f"layer{stage}.{block}.conv2" for stage in range(1, 5) for block in range(2)]
    assert list(analysed(torchvision.models.resnet18).layers) == blocks
    names = [
        f"encoder.layers.encoder_layer_{i}.{end}" for i in range(3) for end in ("self_attention.out_proj", "mlp.3")
    ]
    assert list(analysed(vit).layers) == names


def test_a_block_takes_its_parameters_along() -> None:
    analysis = analysed(torchvision.models.resnet18)
    plan = Plan({}, analysis.sizes, analysis.options, layers=["layer2.1.conv2"])
    compact, param_map = fxprune.rewrite(analysis.graph, analysis, plan)
    gone = {name for name in analysis.shapes if name.startswith("layer2.1.")}
    assert param_map.gone == gone
    assert set(compact.state_dict()) == set(analysis.shapes) - gone
    assert "layer2.1.conv1" not in analysis.after(plan, compact).groups


def test_a_plan_that_takes_out_what_is_no_branch() -> None:
    analysis = analysed(torchvision.models.resnet18)
    plan = Plan({}, analysis.sizes, analysis.options, layers=["layer2.1.conv1"])
    for use in (analysis.after, lambda plan: fxprune.rewrite(analysis.graph, analysis, plan)):
        with pytest.raises(PlanError, match=r"branch of 'layer2\.1\.conv1', .*these are: layer1\.0\.conv2, layer1\.1"):
            use(plan)


# ------------------------------------------------------------------------------------------------- budgets


def test_the_branches_of_the_lowest_scores_go() -> None:
    analysis = analysed(vit)
    scores = {"layers": np.array([5.0, 1.0, 4.0, 0.0, 2.0, 3.0])}
    plan = Given(scores).plan(analysis, Budget(layers=0.5))
    names = list(analysis.layers)
    assert plan.layers == tuple(sorted(names[at] for at in (1, 3, 4)))
    assert Given(scores).plan(analysis, Budget(layers=4)).layers == tuple(sorted(names[at] for at in (1, 3)))
    held = Given(scores, keep="encoder.layers.encoder_layer_0").plan(analysis, Budget(layers=4))
    assert held.layers == tuple(sorted(names[at] for at in (3, 4)))
    inside = {name for name in analysis.sizes if ".mlp." in name and "_0." in name}
    assert inside == {name for name in inside if plan.keep[name] == ()}


@pytest.mark.parametrize("make", [torchvision.models.resnet18, vit])
@pytest.mark.parametrize("kind", ["flops", "params", "memory", "channels"])
def test_widths_meet_the_other_limits(make: Callable[[], nn.Module], kind: str) -> None:
    analysis = analysed(make)
    criterion = passes.Magnitude(round_to=1)
    shallow = criterion.plan(analysis, Budget(layers=0.67, **{kind: 0.99}))
    limit = int(0.7 * counted(analysis, shallow, kind))
    plan = criterion.plan(analysis, Budget(layers=0.67, tolerance=0.02, **{kind: limit}))
    assert plan.layers == shallow.layers
    assert len(plan.layers) == {8: 3, 6: 2}[len(analysis.layers)]
    assert 0.98 * limit <= counted(analysis, plan, kind) <= limit


def test_layers_may_save_more_than_a_limit_asks_for() -> None:
    analysis = analysed(vit)
    criterion = passes.Magnitude()
    plan = criterion.plan(analysis, Budget(layers=0.5, flops=0.99))
    assert plan.layers
    assert all(kept == () for kept in plan.keep.values())


def test_what_a_branch_costs() -> None:
    analysis = analysed(torchvision.models.resnet18)
    costs = costs_of_layers(analysis, "params")
    assert costs["layer1.0.conv2"] == 2 * (64 * 64 * 9 + 2 * 64)
    costs = costs_of_layers(analysis, "flops")
    assert costs["layer1.0.conv2"] == 2 * 2 * 2 * 64 * 64 * 9 * 8 * 8
    assert costs["layer2.0.conv2"] == 2 * 2 * 4 * 4 * 9 * 128 * (64 + 128)  # the shortcut stays


@pytest.mark.parametrize("name", CRITERIA)
def test_criteria_score_branches_or_say_that_they_cannot(name: str) -> None:
    analysis = analysed(torchvision.models.resnet18)
    criterion = CRITERIA[name]((X,))
    if type(criterion).scores_layers:
        assert len(criterion.plan(analysis, Budget(layers=0.5)).layers) == 4
        return
    with pytest.raises(PlanError, match=rf"layers=0\.5: {type(criterion).__name__} can't say what a whole branch"):
        criterion.plan(analysis, Budget(layers=0.5))


def test_taylor_sees_which_branch_the_loss_feels() -> None:
    model = randomize(torchvision.models.resnet18(num_classes=10), 0).eval()
    with torch.no_grad():
        model.layer3[1].bn2.weight.mul_(1e-3)
        model.layer3[1].bn2.bias.mul_(1e-3)
    batch = X, torch.tensor([1, 2])
    for criterion in (passes.Taylor, passes.Fisher):
        scorer = criterion(batch, nn.functional.cross_entropy)
        assert scorer.plan(fxprune.analyze(model, X), Budget(layers=7)).layers == ("layer3.1.conv2",)


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        ({"layers": 1.0}, {}, r"layers=1: 8 of 8 residual branches may stay, and that is all"),
        ({"layers": 9}, {}, r"layers=9: 9 of 8 residual branches may stay"),
        ({"layers": 0.25}, {"keep": ["layer1", "layer2"]}, r"layers=0\.25: 2 of 8 .*, but keep= holds 4"),
        ({"layers": 1.5}, {}, r"layers=1\.5 is neither a fraction nor a count"),
        ({"layers": 0.0}, {}, r"layers=0\.0 must be a number above 0"),
    ],
)
def test_layers_that_make_no_sense(budget: Any, options: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        passes.Magnitude(**options).plan(analysed(torchvision.models.resnet18), Budget(**budget))


def test_a_model_without_branches_and_scores_that_are_no_numbers() -> None:
    model, example = prepare(MODELS["chain"])
    with pytest.raises(BudgetError, match=r"layers=0\.5: this model has no residual branch"):
        passes.Magnitude().plan(fxprune.analyze(model, example), Budget(layers=0.5))
    analysis = analysed(vit)
    with pytest.raises(PlanError, match=r"score of the branch of '.*layer_0\.mlp\.3' is not a number"):
        Given({"layers": np.array([1, np.nan, 1, 1, 1, 1])}).plan(analysis, Budget(layers=0.5))


# -------------------------------------------------------------------------------------------- what follows


def test_plans_and_models_without_branches_are_saved_and_loaded(tmp_path: Path) -> None:
    analysis = analysed(vit)
    plan = passes.Magnitude().plan(analysis, Budget(layers=0.5, flops=0.4))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert f"the branch of {plan.layers[0]} goes whole" in str(plan)
    compact, _ = fxprune.rewrite(analysis.graph, analysis, plan)
    fxprune.save(compact, tmp_path / "compact.safetensors")
    again = fxprune.load(tmp_path / "compact.safetensors", vit())
    assert torch.equal(again.eval()(X), compact.eval()(X))
    text = (tmp_path / "plan.json").read_text().replace('"layers": [', '"layers": [1,')
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(FileError, match="dropped and layers lists of text"):
        Plan.load(tmp_path / "plan.json")


def test_prune_takes_branches_out_and_restores_the_rest() -> None:
    model = randomize(torchvision.models.resnet18(num_classes=10), 0).eval()
    data = [torch.randn(16, 3, 32, 32) for _ in range(4)]
    budget = Budget(layers=0.75, flops=0.4)
    compact = fxprune.prune(model, X, passes.Magnitude(), budget=budget, data=data)
    plain = fxprune.prune(model, X, passes.Magnitude(), budget=budget)
    assert fxprune.cost.flops(compact, X) <= 0.4 * fxprune.cost.flops(model, X)

    def error(small: nn.Module) -> float:
        with torch.no_grad():
            return float(sum((small.eval()(x) - model(x)).square().mean() for x in data))

    assert error(compact) < 0.5 * error(plain)


def test_a_session_takes_branches_out_step_by_step() -> None:
    model, example = prepare(MODELS["residual_projection"])

    def plan(analysis: Analysis, seed: int) -> Plan:
        return random_plan(analysis, seed, least=2, layers=True)

    cuts_commute_with_steps(fxprune.trace(model, example), example, OPTIMIZERS["momentum"], cuts=2, plan=plan)


def test_a_model_without_branches_is_summed_up_and_copied() -> None:
    analysis = analysed(torchvision.models.resnet18)
    plan = passes.Magnitude().plan(analysis, Budget(layers=0.5, flops=0.4))
    compact, _ = fxprune.rewrite(analysis.graph, analysis, plan)
    summary = fxprune.summarize(analysis, plan, compact).to_json()
    assert summary["totals"]["params"][1] == fxprune.cost.params(compact)
    assert torch.equal(copy.deepcopy(compact)(X), compact(X))


@pytest.mark.slow
def test_a_model_without_branches_is_exported(tmp_path: Path) -> None:
    analysis = analysed(vit)
    compact, _ = fxprune.rewrite(analysis.graph, analysis, passes.Random().plan(analysis, Budget(layers=0.5)))
    fxprune.export_onnx(compact, X, tmp_path / "compact.onnx")
