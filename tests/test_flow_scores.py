"""GraSP, SynFlow and Combined beside plain loops over what they are defined by."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune import passes
from fxprune.errors import PlanError

X, Y = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 2, 3, 0, 1])


def small() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
    )  # fmt: skip
    nn.init.normal_(model[1].weight)
    return model.double()


READERS = {"0": "3.weight", "3": "7.weight"}  # of each group


def gradient_norm(model: nn.Module, changed: str, weight: Tensor) -> float:
    """|g|^2 of the loss with another weight."""
    parameters = dict(model.named_parameters()) | {changed: weight.clone().requires_grad_()}
    loss = F.cross_entropy(torch.func.functional_call(model.train(), parameters, (X,)), Y)
    return sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(parameters.values())))


def test_grasp_is_the_slope_of_the_gradient_norm() -> None:
    model, step = small(), 1e-5
    scores = passes.GraSP((X, Y), F.cross_entropy).score(fxprune.analyze(copy.deepcopy(model).eval(), X))
    for group, reader in READERS.items():
        weight = model.get_parameter(reader).detach()
        for channel, score in enumerate(scores[group]):
            direction = torch.zeros_like(weight)
            direction[:, channel] = weight[:, channel]
            ends = [gradient_norm(model, reader, weight + sign * step * direction) for sign in (1, -1)]
            assert score == pytest.approx((ends[0] - ends[1]) / (4 * step), rel=1e-5, abs=1e-9)  # d|g|^2 = 2 w (H g)


def test_grasp_leaves_the_model_alone() -> None:
    model = small().float().half()
    analysis = fxprune.analyze(model, X.half())
    before = copy.deepcopy(analysis.graph.state_dict())
    scores = passes.GraSP((X.half(), Y), F.cross_entropy).score(analysis)
    assert all(np.isfinite(score).all() and score.any() for score in scores.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in analysis.graph.state_dict().items())
    assert all(parameter.grad is None for parameter in analysis.graph.parameters())


def test_synflow_is_what_flows_through_a_channel() -> None:
    """R is linear in what a channel gives where all is positive: it falls by the channel's score without it."""
    model = small()
    scores = passes.SynFlow().score(fxprune.analyze(model, X))
    for tensor in model.state_dict().values():
        tensor.abs_()

    def flow() -> float:
        return model.eval()(torch.ones_like(X)).sum().item()

    total = flow()
    for group, reader in READERS.items():
        weight = model.get_parameter(reader)
        for channel, score in enumerate(scores[group]):
            kept = weight.detach().clone()
            with torch.no_grad():
                weight[:, channel] = 0
            assert score == pytest.approx(total - flow(), rel=1e-10)
            with torch.no_grad():
                weight.copy_(kept)


def test_synflow_does_not_overflow_in_deep_networks() -> None:
    layers = [layer for _ in range(60) for layer in (nn.Linear(64, 64), nn.ReLU())]
    for layer in layers[::2]:
        nn.init.normal_(layer.weight)  # |w| of rows sum to about 50: 50^60 is beyond float32
    scores = passes.SynFlow().score(fxprune.analyze(nn.Sequential(*layers), torch.randn(2, 64)))
    assert all(np.isfinite(score).all() and (score > 1e40).all() for score in scores.values())


@pytest.mark.parametrize("shares", [(1, 0, 0), (0, 2, 0), (0, 0, 1), (1, 2, 3)])
def test_combined_is_the_sum_of_scores_over_their_means(shares: tuple[float, float, float]) -> None:
    analysis = fxprune.analyze(small(), X)
    parts = [
        passes.SingleShot((X, Y), F.cross_entropy, compute_aware=False),
        passes.GraSP((X, Y), F.cross_entropy),
        passes.SynFlow(),
    ]
    expected = np.zeros(9)
    for share, part in zip(shares, parts, strict=True):
        flat = np.concatenate(list(part.score(analysis).values()))
        expected += share * flat / np.abs(flat).mean()
    combined = passes.Combined((X, Y), F.cross_entropy, shares=shares).score(analysis)
    np.testing.assert_allclose(np.concatenate(list(combined.values())), expected)


@pytest.mark.parametrize("shares", [(1, 1), (1, -1, 1), 1, ("1", 1, 1)])
def test_shares_that_are_none(shares: object) -> None:
    with pytest.raises(PlanError, match=r"shares=.* must be three numbers of at least 0"):
        passes.Combined((X, Y), F.cross_entropy, shares=shares)  # type: ignore[arg-type]


class Once(torch.autograd.Function):
    """An operator without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("derivative for once is not implemented")
        return gradient * 2


def test_a_loss_that_cannot_be_differentiated_twice() -> None:
    analysis = fxprune.analyze(small(), X)
    with pytest.raises(PlanError, match="second derivatives, which this model does not have: derivative for once is"):
        passes.GraSP((X, Y), lambda output, y: F.cross_entropy(Once.apply(output), y)).score(analysis)
