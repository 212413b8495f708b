"""Criteria that look at data: in half precision, on several ranks, with a bar on a terminal."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from criteria import CRITERIA, IN_FLOAT32, WITH_DATA
from ranks import Ranks
from test_distributed import Net, batch, mine
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fxprune
from fxprune import Budget, passes
from fxprune.errors import FxpruneError, PlanError

HALF = Budget(channels=0.5, tolerance=0.2)


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y)


def made(name: str, data: Any, loss: Any = cross_entropy) -> passes.Criterion:
    """A criterion of that name with these data; round_to=1 lets it show what it thinks."""
    match name.split():
        case ["Activation", statistic]:
            return passes.Activation(data, statistic, round_to=1)
        case ["OptimalBrainSurgeon"]:
            return passes.OptimalBrainSurgeon(data, round_to=1)
        case [method]:
            criterion: passes.Criterion = getattr(passes, method)(data, loss, round_to=1)
            return criterion
    raise AssertionError(name)


# ------------------------------------------------------------------------------------------ half precision


def small() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(24 * 16, 4),
    )  # fmt: skip
    return model, torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in WITH_DATA if name not in IN_FLOAT32])
def test_autocast_is_taken_up(name: str, dtype: torch.dtype) -> None:
    """The scores are those of float32, but for the precision; and are really taken in ``dtype``."""
    model, x, y = small()
    analysis = fxprune.analyze(model, x)
    expected = made(name, (x, y)).score(analysis)
    with torch.autocast("cpu", dtype):
        measured = made(name, (x, y)).score(analysis)
    for group, scores in expected.items():
        assert measured[group].dtype == np.float64
        assert not np.array_equal(measured[group], scores)
        assert np.abs(measured[group] - scores).mean() < 0.1 * scores.mean()


def test_second_derivatives_are_those_of_float32_under_autocast() -> None:
    model, x, y = small()
    analysis = fxprune.analyze(model, x)
    expected = passes.GraSP((x, y), cross_entropy).score(analysis)
    with torch.autocast("cpu", torch.bfloat16):
        measured = passes.GraSP((x, y), cross_entropy).score(analysis)
    assert all(np.array_equal(measured[group], scores) for group, scores in expected.items())


@pytest.mark.parametrize("name", ["Taylor", "Fisher", "SingleShot"])
@pytest.mark.parametrize("factor", [1e-5, 1e4])
def test_float16_neither_loses_nor_overflows(name: str, factor: float) -> None:
    """Gradients 1e-5 as large are 0 in float16; those of a loss 1e4 times as large, scaled up, are infinite."""
    model, x, y = small()
    analysis = fxprune.analyze(model, x)
    with torch.autocast("cpu", torch.float16):
        expected = made(name, (x, y)).score(analysis)
        measured = made(name, (x, y), lambda output, y: factor * F.cross_entropy(output, y)).score(analysis)
    for group, scores in expected.items():
        shares, expected_shares = measured[group] / measured[group].mean(), scores / scores.mean()
        assert np.abs(shares - expected_shares).mean() < 0.1


# ----------------------------------------------------------------------------------------------- the ranks


def scores_of(name: str, data: Any) -> Any:
    """Scores and plan on the network of the distributed tests."""
    criterion = made(name, data)
    analysis = fxprune.analyze(Net(), batch(0, 0)[0])
    return criterion.score(analysis), criterion.plan(analysis, HALF).keep


def shares(rank: int, name: str, several: bool) -> Any:
    """On each rank: either a batch of its own, or its share of one batch."""
    return scores_of(name, [batch(0, rank)] if several else [batch(0, 0, mine())])


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_ranks_agree_on_the_mean_of_what_is_not_linear_in_the_data(ranks: Ranks, tmp_path: Path, name: str) -> None:
    first, second = ranks(2, tmp_path / "store", shares, name, False)
    alone = scores_of(name, [batch(0, 0)])
    assert first[1] == second[1]
    assert all(np.array_equal(first[0][group], second[0][group]) for group in alone[0])


@pytest.mark.parametrize("name", [name for name in WITH_DATA if name not in IN_FLOAT32])
def test_ranks_agree_on_the_mean_over_all_their_data(ranks: Ranks, tmp_path: Path, name: str) -> None:
    """Batches on several ranks are as many on one; a gate's gradient, an activation too, is that of the whole batch."""
    several = name in ("Taylor", "Fisher")
    first, second = ranks(2, tmp_path / "store", shares, name, several)
    expected = scores_of(name, [batch(0, 0), batch(0, 1)] if several else [batch(0, 0)])
    for scores, keep in (first, second):
        assert keep == expected[1]
        for group, values in expected[0].items():
            np.testing.assert_allclose(scores[group], values, rtol=1e-9)
    assert all(np.array_equal(first[0][group], second[0][group]) for group in first[0])


def one_has_none(rank: int) -> str:
    try:
        scores_of("Taylor", [batch(0, 0)] if rank else [])
    except FxpruneError as error:
        return str(error)
    return "no error"


def test_a_rank_without_data_is_an_error_on_all(ranks: Ranks, tmp_path: Path) -> None:
    messages = ranks(2, tmp_path / "store", one_has_none)
    assert "Taylor got no batches" in messages[0]
    assert "failed on some: rank 0: PlanError: Taylor got no batches" in messages[1]


def while_it_trains(rank: int) -> Any:
    """The scores of a model that DistributedDataParallel wraps; it trains on as before."""
    model = DistributedDataParallel(Net())
    x, y = batch(0, 0, mine())
    gradients = []
    for scored in (False, True):
        if scored:
            passes.Taylor((x, y), cross_entropy).score(fxprune.analyze(model.module, x))
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    return all(torch.equal(before, after) for before, after in zip(*gradients, strict=True))


def test_scoring_does_not_disturb_a_wrapped_model(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2, tmp_path / "store", while_it_trains) == [True, True]


def drawn(rank: int) -> list[Tensor]:
    """New weights on ranks whose random numbers differ."""
    model = Net()
    torch.manual_seed(rank)
    compact = fxprune.prune(model, batch(0, 0)[0], passes.Uniform(weights="reinit", round_to=1), budget=HALF)
    return [parameter.detach() for parameter in compact.parameters()]


def test_new_weights_are_the_same_on_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks(2, tmp_path / "store", drawn)
    assert all(torch.equal(weight, expected) for weight, expected in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------------------ progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("name", WITH_DATA)
def test_a_bar_on_a_terminal_and_nothing_elsewhere(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    model, x, y = small()
    analysis = fxprune.analyze(model, x)
    made(name, [(x, y)] * 3).score(analysis)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    made(name, [(x, y)] * 3).score(analysis)
    assert {"Combined": "SingleShot"}.get(name, name.split()[0]) in sys.stderr.getvalue()  # that has one for each part


def test_what_fails_in_a_loop_takes_the_bar_away(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    model, x, y = small()
    analysis = fxprune.analyze(model, x)
    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in range(2):  # a bar that is left behind would be in the way of the next
        with pytest.raises(PlanError, match="got a Tensor in it"):
            passes.Taylor([(x, y), (x, y), x], cross_entropy).score(analysis)


def test_every_criterion_with_data_is_here() -> None:
    assert {name for name, make in CRITERIA.items() if hasattr(make([torch.zeros(1)]), "data")} == set(WITH_DATA)
