"""OptimalBrainSurgeon: what is lost after the others have made up for it, against least squares by brute force."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import passes
from fxprune.errors import PlanError, RestoreError
from fxprune.passes.criteria.optimal_brain_surgeon import RIDGE, _Read, remove_in_turn


def lost_without(gone: list[int], covariance: Tensor, weight: Tensor) -> float:
    """The variance of ``weight @ x`` that the best linear map of the inputs that are left can't give."""
    left = [number for number in range(len(covariance)) if number not in gone]
    across = covariance[gone][:, left]
    rest = covariance[gone][:, gone] - across @ torch.linalg.inv(covariance[left][:, left]) @ across.mT
    return float((weight[:, gone] @ rest * weight[:, gone]).sum())


def draw(seed: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    return mixed @ mixed.mT + 0.1 * torch.eye(inputs), weight


@pytest.mark.parametrize("places", [1, 2])
def test_channels_go_one_after_the_other_by_what_is_lost(places: int) -> None:
    """Two readers of one group; a channel has one input of each, or two."""
    drawn = [draw(seed, 5 * places + 1, 4) for seed in (0, 1)]  # the last input is of another group
    rows = torch.arange(5 * places).view(5, places)
    scores = remove_in_turn(5, [_Read(torch.linalg.inv(covariance), weight, rows) for covariance, weight in drawn])
    gone, before, least, expected = list[int](), 0.0, 0.0, np.zeros(5)
    while len(gone) < 5:
        totals = {
            channel: sum(lost_without(rows[[*gone, channel]].flatten().tolist(), *both) for both in drawn)
            for channel in set(range(5)) - set(gone)
        }
        channel = min(totals, key=totals.__getitem__)
        least = max(least, totals[channel] - before)
        before, expected[channel] = totals[channel], least
        gone.append(channel)
    np.testing.assert_allclose(scores, expected, rtol=1e-10)


@pytest.mark.parametrize("convolution", [False, True])
def test_of_two_channels_that_are_alike_one_stays(convolution: bool) -> None:
    torch.manual_seed(0)
    writer = nn.Conv2d(3, 8, 3) if convolution else nn.Linear(6, 8)
    with torch.no_grad():
        writer.weight[4:] = writer.weight[:4]
        writer.bias[4:] = writer.bias[:4]
    reader = nn.Conv2d(8, 4, 3) if convolution else nn.Linear(8, 4)
    model = nn.Sequential(writer, nn.ReLU(), reader).double()
    x = torch.randn(64, *([3, 7, 7] if convolution else [6]), dtype=torch.float64)
    analysis = fxprune.analyze(model, x[:2])
    criterion = passes.OptimalBrainSurgeon(x, round_to=1)
    (kept,) = criterion.plan(analysis, fxprune.Budget(channels=0.5)).keep.values()
    assert sorted(channel % 4 for channel in kept) == [0, 1, 2, 3]


def test_the_score_is_of_what_the_layer_reads() -> None:
    """The covariance over all batches, with the ridge, against the rows themselves."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    x = torch.randn(30, 6, dtype=torch.float64)
    rows = model[:2](x).detach()
    covariance = (rows - rows.mean(0)).mT @ (rows - rows.mean(0)) / 30
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    scores = remove_in_turn(
        5, [_Read(torch.linalg.inv(covariance), model[2].weight.detach(), torch.arange(5)[:, None])]
    )
    (measured,) = passes.OptimalBrainSurgeon([x[:10], x[10:20], x[20:]]).score(fxprune.analyze(model, x[:2])).values()
    np.testing.assert_allclose(measured / measured.sum(), scores / scores.sum(), rtol=1e-10)


def test_depthwise_readers_are_not_looked_at() -> None:
    """The layer behind the depthwise one is; the group goes through both."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)).double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    assert [len(score) for score in passes.OptimalBrainSurgeon(x).score(fxprune.analyze(model, x)).values()] == [8]


def test_data_that_the_model_cannot_read_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    analysis = fxprune.analyze(model, torch.randn(2, 6))
    with pytest.raises(PlanError, match=r"model\(x\) fails on this data: RuntimeError.*7"):
        passes.OptimalBrainSurgeon(torch.randn(2, 7)).score(analysis)
    with pytest.raises(RestoreError, match="data has no batches"):
        passes.OptimalBrainSurgeon([]).score(analysis)
