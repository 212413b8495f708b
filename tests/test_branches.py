"""Residual branches that a plan empties: they go whole, with or without the constant that they still add."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import OPTIMIZERS, agree, assert_same_map, assert_same_state, random_plan, slice_commutes_with_a_step
from models import randomize
from torch import Tensor, nn, optim
from torchvision.models import efficientnet_b0, mobilenet_v2, regnet_y_400mf, resnet18, resnet50, swin_t, vit_b_16

import fxprune
from fxprune import Analysis, Plan, TracedModule
from fxprune.errors import PlanError
from fxprune.passes import PruneTrain
from fxprune.rewrite.branches import ConstantNorm, emptied_groups


class Block(nn.Module):
    """A residual block with biases and an in-place sum."""

    def __init__(self, width: int, stride: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, stride, 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=bias)
        self.bn2 = nn.BatchNorm2d(width, momentum=None if bias else 0.1)
        self.down = nn.Conv2d(width, width, 1, stride) if stride > 1 else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.down(x)
        return self.relu(out)


def plain(bias: bool = False) -> nn.Module:
    blocks = [Block(6, bias=bias), Block(6, stride=2, bias=bias), Block(6, bias=bias)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), *blocks, *head)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "plain": (plain, 8),
    "biased": (lambda: plain(bias=True), 8),
    "resnet18": (lambda: resnet18(weights=None), 64),
    "mobilenet_v2": (lambda: mobilenet_v2(weights=None), 64),
    "efficientnet_b0": (lambda: efficientnet_b0(weights=None), 64),
    "regnet_y_400mf": (lambda: regnet_y_400mf(weights=None), 64),
    "swin_t": (lambda: swin_t(weights=None), 64),
}
SLOW = ["efficientnet_b0", "regnet_y_400mf", "swin_t"]
KEEP_A_CONSTANT = ["plain", "biased", "resnet18", "mobilenet_v2", "regnet_y_400mf"]


def analysed(name: str) -> tuple[TracedModule, Analysis, Tensor]:
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    model = make().double()
    randomize(model, 0)
    inputs = torch.randn(2, 3, size, size, dtype=torch.float64)
    graph = fxprune.trace(model, inputs)
    return graph, fxprune.analyze(graph, inputs), inputs


def emptying(analysis: Analysis, dropped: bool, every: int = 2) -> Plan:
    """A plan that empties every second group that can be."""
    able = [name for name in analysis.groups if emptied_groups(analysis, {name}, constants=not dropped)]
    gone = sorted(emptied_groups(analysis, set(able[::every]), constants=not dropped))
    assert gone
    return Plan({name: () for name in gone}, analysis.sizes, analysis.options, gone if dropped else ())


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        pytest.param(name, dropped, marks=pytest.mark.slow if name in SLOW else ())
        for name in NETWORKS
        for dropped in (True, False)
        if dropped or name in KEEP_A_CONSTANT
    ],
)
def test_the_laws_hold_where_branches_go(name: str, dropped: bool) -> None:
    graph, analysis, inputs = analysed(name)
    plan = emptying(analysis, dropped)
    compact, param_map = fxprune.rewrite(graph, analysis, plan)
    # Stochastic depth draws numbers for fewer branches; the variance of a constant bias is rounding noise.
    if name not in ("swin_t", "efficientnet_b0", "biased"):
        agree(graph, compact, param_map, inputs)
    fxprune.verify(graph, compact, param_map, inputs)
    assert param_map.gone.isdisjoint(compact.state_dict())
    assert fxprune.cost.flops(compact, inputs) < fxprune.cost.flops(graph, inputs)

    between = analysis.after(plan, compact)
    later = random_plan(between, 1)
    second, second_map = fxprune.rewrite(compact, between, later)
    direct, direct_map = fxprune.rewrite(graph, analysis, plan.then(later))
    assert_same_state(second, direct)
    assert_same_map(param_map.then(second_map), direct_map, graph)
    fxprune.verify(compact, second, second_map, inputs)
    fxprune.verify(graph, direct, direct_map, inputs)
    copy.deepcopy(second)(inputs)


@pytest.mark.parametrize("name", ["plain", "biased"])
@pytest.mark.parametrize("dropped", [True, False])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_cutting_a_branch_commutes_with_a_step(name: str, dropped: bool, optimizer: str) -> None:
    graph, analysis, inputs = analysed(name)
    slice_commutes_with_a_step(graph, inputs, analysis, emptying(analysis, dropped), OPTIMIZERS[optimizer])


def test_a_second_cut_can_take_another_branch() -> None:
    graph, analysis, inputs = analysed("resnet18")
    first = Plan({"layer1.0.conv1": ()}, analysis.sizes, analysis.options)
    compact, first_map = fxprune.rewrite(graph, analysis, first)
    between = analysis.after(first, compact)
    second = Plan({"layer1.1.conv1": (), "layer3.0.conv1": ()}, between.sizes, between.options, ["layer3.0.conv1"])
    last, last_map = fxprune.rewrite(compact, between, second)
    fxprune.verify(graph, last, first_map.then(last_map), inputs)
    assert [path for path, module in last.named_modules() if isinstance(module, ConstantNorm)] == [
        "layer1.0.bn2",
        "layer1.1.bn2",
    ]
    assert "layer3.0.bn2.weight" not in last.state_dict()


def test_a_whole_block_leaves_graph_optimizer_and_state_dict() -> None:
    model = resnet50(weights=None)
    graph = fxprune.trace(model, torch.randn(2, 3, 32, 32))
    analysis = fxprune.analyze(graph, torch.randn(2, 3, 32, 32))
    sgd = optim.SGD(graph.parameters(), lr=0.1, momentum=0.9)
    graph(torch.randn(2, 3, 32, 32)).sum().backward()
    sgd.step()
    gone = sorted(emptied_groups(analysis, {"layer2.1.conv1"}, constants=False))
    assert gone == ["layer2.1.conv1", "layer2.1.conv2"]
    compact, param_map = fxprune.rewrite(graph, analysis, Plan(dict.fromkeys(gone, ()), analysis.sizes, {}, gone))
    param_map.migrate(sgd)
    assert not [key for key in compact.state_dict() if key.startswith("layer2.1.")]
    assert {id(p) for p in compact.parameters()} == {id(p) for g in sgd.param_groups for p in g["params"]}
    assert set(sgd.state) == set(compact.parameters())
    compact(torch.randn(2, 3, 32, 32)).sum().backward()
    sgd.step()


def test_a_plan_with_a_removed_branch_is_saved_and_loaded(tmp_path: Any) -> None:
    graph, analysis, inputs = analysed("plain")
    for dropped in (True, False):
        plan = emptying(analysis, dropped)
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == plan
        compact, _ = fxprune.rewrite(graph, analysis, plan)
        fxprune.save(compact, tmp_path / "compact.safetensors")
        again = fxprune.load(tmp_path / "compact.safetensors", plain().double())
        assert torch.equal(again.eval()(inputs), compact.eval()(inputs))


@pytest.mark.slow
@pytest.mark.parametrize("dropped", [True, False])
def test_a_model_without_a_branch_is_exported(tmp_path: Any, dropped: bool) -> None:
    graph, analysis, inputs = analysed("biased")
    compact, _ = fxprune.rewrite(graph, analysis, emptying(analysis, dropped))
    fxprune.export_onnx(copy.deepcopy(compact).float(), inputs.float(), tmp_path / "compact.onnx")


@pytest.mark.parametrize(
    ("name", "group", "message"),
    [
        ("resnet18", "conv1", r"at node add__2 .*not a residual branch"),
        ("resnet18", "layer4.0.conv2", r"at node (fc|flatten|avgpool).*not a residual branch"),
        ("mobilenet_v2", "features.2.conv.0.0", r"at node features_2_conv_3 .*not a residual branch"),
        (
            "efficientnet_b0",
            "features.2.1.block.0.0",
            r"branch can't be kept over node mul_3 .*stochastic_depth.py:",
        ),
    ],
)
def test_what_is_no_branch_is_refused(name: str, group: str, message: str) -> None:
    graph, analysis, _ = analysed(name)
    before = graph.code
    with pytest.raises(PlanError, match=message):
        fxprune.rewrite(graph, analysis, Plan({group: ()}, analysis.sizes, analysis.options))
    assert graph.code == before


def test_dropped_groups_must_keep_nothing() -> None:
    with pytest.raises(PlanError, match="group 'a' can't be dropped"):
        Plan({"a": (1,)}, {"a": 4}, {}, ["a"])


def test_transformers_lose_their_mlps() -> None:
    model = vit_b_16(weights=None, image_size=32).double()
    randomize(model, 0)
    inputs = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    graph = fxprune.trace(model, inputs)
    analysis = fxprune.analyze(graph, inputs)
    gone = ["encoder.layers.encoder_layer_3.mlp.0"]
    compact, param_map = fxprune.rewrite(graph, analysis, Plan({gone[0]: ()}, analysis.sizes, analysis.options, gone))
    fxprune.verify(graph, compact, param_map, inputs)


@pytest.mark.parametrize("branches", ["remove", "fold"])
def test_a_session_takes_branches_out(branches: str) -> None:
    torch.manual_seed(0)
    model = plain()
    sgd = optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    session = fxprune.Session(
        model,
        torch.randn(2, 3, 8, 8),
        sgd,
        [PruneTrain(interval=1, ratio=0.01, branches=branches)],
        verify=True,
        batch_size=4,
    )
    dead = model[3].conv1.weight, model[3].conv2.weight
    bias = model[3].bn2.bias
    for epoch in range(3):
        for _ in range(2):
            task = session.model(torch.randn(4, 3, 8, 8)).square().mean()
            (task + session.penalty(task)).backward()
            sgd.step()
            sgd.zero_grad()
        with torch.no_grad():
            for weight in dead:
                weight.zero_()
        session.epoch_end()
        held = {id(p) for group in sgd.param_groups for p in group["params"]}
        assert held == {id(p) for p in session.model.parameters()}
        assert set(map(id, sgd.state)) <= held
        assert epoch > 0 or session.log[0].removed >= 6
    assert (id(bias) in held) == (branches == "fold")
    assert all(id(weight) not in held for weight in dead)
