"""SingleShot and the marginal costs that it divides by."""

import copy
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import MODELS, prepare
from torch import Tensor, nn
from torchvision.models import resnet18

import fxprune
from fxprune import Budget, Plan, cost, passes
from fxprune.errors import PlanError


class Gated(nn.Module):
    """Two convolutions with norms and a linear layer; with a gate on each channel before the norms, after, or none."""

    gates_before: bool | None = None

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 16, 5)
        self.gates = [torch.ones(1, size, 1, 1, dtype=torch.float64, requires_grad=True) for size in (6, 8)]

    def forward(self, x: Tensor) -> Tensor:
        for conv, bn, gate in ((self.conv1, self.bn1, self.gates[0]), (self.conv2, self.bn2, self.gates[1])):
            if self.gates_before is None:
                x = bn(conv(x)).relu()
            else:
                x = bn(conv(x) * gate).relu() if self.gates_before else bn(conv(x)).relu() * gate
        return self.fc(x.flatten(1))


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 4, 4, generator=generator), torch.randint(0, 5, (8,), generator=generator)


def plain() -> Gated:
    torch.manual_seed(0)
    model = Gated()
    for bn in (model.bn1, model.bn2):
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    return model.double()


def test_gates_are_what_autograd_says_of_gates_behind_the_norm() -> None:
    model = plain()
    x, y = batch()
    scores = passes.SingleShot((x.double(), y), F.cross_entropy, compute_aware=False).score(
        fxprune.analyze(model, x.double())
    )
    model.gates_before = False
    expected = torch.autograd.grad(F.cross_entropy(model(x.double()), y), model.gates)
    for name, gradient in zip(("conv1", "conv2"), expected, strict=True):
        np.testing.assert_allclose(scores[name], gradient.flatten().abs().numpy(), rtol=1e-8)


def test_a_gate_before_the_norm_would_be_noise() -> None:
    model = plain()
    x, y = batch()
    scores = passes.SingleShot((x.double(), y), F.cross_entropy, compute_aware=False).score(
        fxprune.analyze(model, x.double())
    )
    model.gates_before = True
    before = torch.autograd.grad(F.cross_entropy(model(x.double()), y), model.gates)
    for name, gradient in zip(("conv1", "conv2"), before, strict=True):
        assert np.median(scores[name]) > 1e3 * gradient.abs().median().item()


@pytest.mark.parametrize(
    "name", ["chain", "residual_projection", "densenet", "depthwise_separable", "grouped", "vgg_flatten"]
)
@pytest.mark.parametrize("kind", ["flops", "params"])
def test_marginal_costs_are_brute_force(name: str, kind: str) -> None:
    model, inputs = prepare(MODELS[name])
    graph = fxprune.trace(model, inputs).eval()
    analysis = fxprune.analyze(graph, inputs)
    found = cost.marginal(analysis, kind)

    def count(model: nn.Module) -> float:
        return cost.flops(model, inputs) if kind == "flops" else cost.params(model)

    for group in analysis.groups.values():
        for channel in (0, group.size - 1):
            keep = {group.name: [each for each in range(group.size) if each != channel]}
            if not keep[group.name]:
                continue
            compact, _ = fxprune.rewrite(graph, analysis, Plan(keep, analysis.sizes, analysis.options))
            assert found[group.name][channel] == count(graph) - count(compact.eval()), group.name


def test_compute_awareness_spares_cheap_channels() -> None:
    model = plain()
    x, y = batch()
    analysis = fxprune.analyze(model, x.double())
    blind = passes.SingleShot((x.double(), y), F.cross_entropy, compute_aware=False).score(analysis)
    aware = passes.SingleShot((x.double(), y), F.cross_entropy).score(analysis)
    flops = cost.marginal(analysis, "flops")
    for name in analysis.groups:
        np.testing.assert_allclose(aware[name] * flops[name], blind[name])


@pytest.mark.parametrize("kept", [0.25, 0.5, 0.8])
def test_the_target_is_met_exactly(kept: float) -> None:
    x, y = batch()
    analysis = fxprune.analyze(plain(), x.double())
    criterion = passes.SingleShot((x.double(), y), F.cross_entropy, minimum=0.0, round_to=1)
    plan = criterion.plan(analysis, Budget(channels=kept))
    assert sum(plan.widths.values()) == math.floor(kept * 14)
    assert min(plan.widths.values()) >= 1


def test_the_caller_keeps_model_statistics_and_random_numbers() -> None:
    model = resnet18(weights=None, num_classes=5)
    x = torch.randn(4, 3, 32, 32)
    calls = []

    def loss(output: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return F.cross_entropy(output, y)

    analysis = fxprune.analyze(model, x)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    loader: Any = [(x, torch.randint(0, 5, (4,))) for _ in range(3)]
    state = torch.get_rng_state()
    plan = passes.SingleShot(loader, loss).plan(analysis, Budget(flops=0.5))
    assert len(calls) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())

    compact, param_map = fxprune.rewrite(analysis.graph, analysis, plan)
    fxprune.verify(analysis.graph, compact, param_map, x)
    assert compact.fc.weight.shape[0] == 5
    assert cost.flops(compact, x) <= 0.5 * cost.flops(model, x)
    stage = {len(compact.get_submodule(f"layer2.{block}.conv2").weight) for block in (0, 1)}
    assert len(stage) == 1


def test_zero_initialised_branches_are_named() -> None:
    model = resnet18(weights=None)
    for module in model.modules():
        if isinstance(module, nn.Module) and hasattr(module, "bn2"):
            nn.init.zeros_(module.bn2.weight)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    with pytest.warns(UserWarning, match=r"does not feel 8 of 12 groups \(layer1.0.conv1.*zero_init_residual"):
        passes.SingleShot((x, y), F.cross_entropy).score(fxprune.analyze(model, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        passes.SingleShot((x, y), F.cross_entropy).score(fxprune.analyze(resnet18(weights=None), x))


def test_no_batch_is_an_error() -> None:
    x, _ = batch()
    with pytest.raises(PlanError, match="SingleShot got no batch"):
        passes.SingleShot([], F.cross_entropy).score(fxprune.analyze(plain(), x.double()))
