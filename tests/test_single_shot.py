"""SingleShot and the marginal costs that it divides by."""

import copy
import math
import warnings
from collections.abc import Iterator
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


def scores_and_gates(before_norm: bool) -> Iterator[tuple[Any, Tensor]]:
    """The scores of each convolution's channels, and the gradients of gates on one side of its norm."""
    model, (x, y) = plain(), batch()
    x = x.double()
    scores = passes.SingleShot((x, y), F.cross_entropy, compute_aware=False).score(fxprune.analyze(model, x))
    model.gates_before = before_norm
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), model.gates)
    yield from zip((scores["conv1"], scores["conv2"]), gradients, strict=True)


def test_gates_are_what_autograd_says_of_gates_behind_the_norm() -> None:
    for scores, gradient in scores_and_gates(before_norm=False):
        np.testing.assert_allclose(scores, gradient.flatten().abs().numpy(), rtol=1e-8)


def test_the_caller_s_mode_changes_no_score() -> None:
    model, (x, y) = plain(), batch()
    x = x.double()
    scores = [
        passes.SingleShot((x, y), F.cross_entropy).score(fxprune.analyze(copy.deepcopy(model).train(mode), x))
        for mode in (True, False)
    ]
    assert all(np.array_equal(scores[0][name], scores[1][name]) for name in scores[0])
    alone = F.cross_entropy(model.eval()(x), y) - F.cross_entropy(model.train()(x), y)
    assert abs(alone.item()) > 1e-3, "the modes differ here"


def test_a_gate_before_the_norm_would_be_noise() -> None:
    for scores, gradient in scores_and_gates(before_norm=True):
        assert np.median(scores) > 1e3 * gradient.abs().median().item()


@pytest.mark.parametrize(
    "name", ["chain", "residual_projection", "densenet", "depthwise_separable", "grouped", "vgg_flatten"]
)
@pytest.mark.parametrize("kind", ["flops", "params"])
def test_marginal_costs_are_brute_force(name: str, kind: str) -> None:
    model, inputs = prepare(MODELS[name])
    graph = fxprune.trace(model, inputs).eval()
    analysis = fxprune.analyze(graph, inputs)
    costs = cost.marginal(analysis, kind)

    def count(model: nn.Module) -> float:
        return cost.flops(model, inputs) if kind == "flops" else cost.params(model)

    for group in analysis.groups.values():
        for channel in (0, group.size - 1):
            keep = {group.name: [position for position in range(group.size) if position != channel]}
            if not keep[group.name]:
                continue
            compact, _ = fxprune.rewrite(graph, analysis, Plan(keep, analysis.sizes, analysis.options))
            assert costs[group.name][channel] == count(graph) - count(compact.eval()), group.name


def test_compute_awareness_spares_cheap_channels() -> None:
    model = plain()
    x, y = batch()
    analysis = fxprune.analyze(model, x.double())
    blind = passes.SingleShot((x.double(), y), F.cross_entropy, compute_aware=False).score(analysis)
    aware = passes.SingleShot((x.double(), y), F.cross_entropy).score(analysis)
    flops = cost.marginal(analysis, "flops")
    for name in analysis.groups:
        np.testing.assert_allclose(aware[name] * flops[name], blind[name])


def test_without_the_cost_the_resolution_does_not_matter() -> None:
    """The scores are those of the data; ``example_inputs``, which set the FLOPs, may have another size."""
    model = resnet18(weights=None, num_classes=5)
    data = torch.randn(4, 3, 32, 32), torch.randint(0, 5, (4,))
    small, large = (fxprune.analyze(model, torch.randn(1, 3, size, size)) for size in (32, 96))
    blind, again = (
        passes.SingleShot(data, F.cross_entropy, compute_aware=False).score(analysis) for analysis in (small, large)
    )
    assert all(np.array_equal(blind[name], again[name]) for name in blind)
    aware, plain = (passes.SingleShot(data, F.cross_entropy).score(analysis) for analysis in (small, large))
    assert not any(np.allclose(aware[name], plain[name]) for name in aware)


def test_what_is_left_is_the_network_without_the_activations() -> None:
    model = plain().eval()
    x, y = batch()
    analysis = fxprune.analyze(model, x.double())
    plan = passes.SingleShot((x.double(), y), F.cross_entropy, round_to=1).plan(analysis, Budget(channels=0.5))
    compact, _ = fxprune.rewrite(analysis.graph, analysis, plan)
    model.gates_before = False
    with torch.no_grad():
        for gate, name in zip(model.gates, ("conv1", "conv2"), strict=True):
            gate[:, [channel for channel in range(gate.shape[1]) if channel not in plan.keep[name]]] = 0
        torch.testing.assert_close(compact.eval()(x.double()), model(x.double()), rtol=1e-10, atol=1e-10)


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
    forward: list[str] = []
    backward: list[str] = []

    def loss(output: Tensor, y: Tensor) -> Tensor:
        forward.append("once")
        output.register_hook(lambda grad: backward.append("once"))
        return F.cross_entropy(output, y)

    analysis = fxprune.analyze(model, x)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    loader: Any = [(x, torch.randint(0, 5, (4,))) for _ in range(3)]
    state = torch.get_rng_state()
    plan = passes.SingleShot(loader, loss).plan(analysis, Budget(flops=0.5))
    assert forward == backward == ["once"]
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
    message = r"does not feel 8 of 12 groups \(layer1.0.conv1.*of layer1.0.bn2.weight.*and 4 more are zero, as zero"
    with pytest.warns(UserWarning, match=message):
        passes.SingleShot((x, y), F.cross_entropy).score(fxprune.analyze(model, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        passes.SingleShot((x, y), F.cross_entropy).score(fxprune.analyze(resnet18(weights=None), x))


def test_silence_without_zero_norms_is_told_too() -> None:
    model = plain()
    nn.init.zeros_(model.fc.weight)
    x, y = batch()
    with pytest.warns(UserWarning, match=r"does not feel 2 of 2 groups \(conv1, conv2\).*Are weights on the way"):
        passes.SingleShot((x.double(), y), F.cross_entropy).score(fxprune.analyze(model, x.double()))


# ------------------------------------------------------------------------------------------ initial weights


class Wired(nn.Module):
    """A convolution of each kind, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 12, 2, stride=2)
        self.last, self.fc = nn.Conv2d(12, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.depthwise(self.norm(self.first(x)).relu())).relu()
        return self.fc(self.last(x).relu().mean((2, 3)))


X = torch.randn(2, 3, 8, 8)


def halved(weights: str) -> tuple[fxprune.TracedModule, fxprune.TracedModule, fxprune.ParamMap]:
    """The network, half of it under ``weights``, and what is kept."""
    criterion = passes.Uniform(weights=weights, round_to=1)
    graph = fxprune.trace(Wired(), X)
    analysis = fxprune.analyze(graph, X)
    compact, param_map = fxprune.rewrite(graph, analysis, criterion.plan(analysis, Budget(channels=0.5)))
    criterion.finish(graph, compact, param_map)
    return graph, compact, param_map


def test_rescale_makes_up_for_the_inputs_that_are_gone() -> None:
    graph, compact, param_map = halved("rescale")
    before = dict(graph.named_parameters())
    axes = {"up.weight": 0, "last.weight": 1, "fc.weight": 1}  # none reads the image's three, nor the depthwise one
    for name, weight in compact.named_parameters():
        sliced = param_map.slice(name, before[name].detach())
        factor = 1.0
        if name in axes:
            factor = math.sqrt(before[name].shape[axes[name]] / weight.shape[axes[name]])
            assert factor > 1.2
        torch.testing.assert_close(weight.detach(), sliced * factor)


def test_keep_keeps_and_reinit_draws_for_the_new_widths() -> None:
    graph, compact, param_map = halved("keep")
    for name, weight in compact.named_parameters():
        assert torch.equal(weight, param_map.slice(name, dict(graph.named_parameters())[name]))

    def drawn(seed: int) -> fxprune.TracedModule:
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        criterion = passes.SingleShot((X, torch.tensor([0, 1])), F.cross_entropy, weights="reinit", round_to=1)
        torch.manual_seed(seed)
        smaller = fxprune.prune(model, X, criterion, budget=Budget(channels=0.5))
        torch.set_rng_state(state)
        return smaller

    model = Wired()
    first, again, different = drawn(1), drawn(1), drawn(2)
    weights = [dict(network.named_parameters()) for network in (first, again, different)]
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name])
        assert torch.equal(weights[0][name], weights[2][name]) == name.startswith("norm."), name
    bound = 1 / math.sqrt(weights[0]["fc.weight"].shape[1])  # nn.Linear's, for the inputs that there are now
    assert 0.7 * bound < weights[0]["fc.weight"].abs().max() <= bound


def test_prune_changes_the_weights_after_the_proof() -> None:
    """Which compares the cut with the masked original: the model is that of the stages."""
    model = Wired()
    plain, rescaled = (
        fxprune.prune(model, X, passes.Uniform(weights=weights, round_to=1), budget=Budget(channels=0.5))
        for weights in ("keep", "rescale")
    )
    ratio = rescaled.fc.weight / plain.fc.weight
    assert (ratio > 1.2).all()
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.sqrt(6 / plain.fc.weight.shape[1])))


def test_reinit_where_a_module_can_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.PReLU(8), nn.Conv2d(8, 8, 1))
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(PlanError, match=r"can't start \S+ again: its module has no reset_parameters"):
        passes.Uniform(weights="reinit").finish(model, model, None)  # type: ignore[arg-type]


def test_no_batch_is_an_error() -> None:
    x, _ = batch()
    with pytest.raises(PlanError, match="SingleShot got no batch"):
        passes.SingleShot([], F.cross_entropy).score(fxprune.analyze(plain(), x.double()))
