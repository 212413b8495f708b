"""PruneTrain: the penalty beside its formula, what a cut takes, and training until channels die."""

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import masked
from models import randomize
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, RMSprop

import fxprune
from fxprune import Budget, Plan, Session
from fxprune.errors import FxpruneError, PlanError, SessionError
from fxprune.passes import PruneTrain
from fxprune.passes.training._lasso import Slices
from fxprune.passes.training._lasso import sum_norms as fast_lasso
from fxprune.passes.training._norms import at_least_float32
from fxprune.passes.training._target import measure_costs

TAU = 1e-4


class Block(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, cout // cin, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.short = nn.Sequential()
        if cin != cout:
            self.short = nn.Sequential(nn.Conv2d(cin, cout, 1, 2, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.short(x))


def resnet20(width: int = 8) -> nn.Sequential:
    widths = [width, width, width, width, 2 * width, 2 * width, 2 * width, 4 * width, 4 * width, 4 * width]
    blocks = [Block(cin, cout) for cin, cout in itertools.pairwise(widths)]
    stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def conv_bn(cin: int, cout: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(cin, cout, k, stride, k // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout), nn.ReLU())


def chain() -> nn.Sequential:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)]
    return nn.Sequential(conv_bn(3, 6), conv_bn(6, 8), conv_bn(8, 5), *head)


class Concat(nn.Module):
    """Two convolutions, side by side, then one over both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(4, 5, 3, padding=1)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.last(torch.cat([self.left(x), self.right(x)], 1))


def small(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    model = randomize(make(), 0).to(dtype).train()
    return model, torch.randn(4, 3, 8, 8, dtype=dtype)


def session_of(
    model: nn.Module,
    inputs: Tensor,
    pruner: PruneTrain | None = None,
    optimizer: Optimizer | None = None,
    **options: Any,
) -> Session:
    sgd = optimizer or SGD(model.parameters(), lr=1e-4, momentum=0.9)
    return Session(model, inputs, sgd, [pruner or PruneTrain(interval=1)], progress=False, **options)


def plan_of(session: Session) -> Plan:
    pruner, memory = session.passes[0], session.memories[0]
    assert isinstance(pruner, PruneTrain)
    return pruner.plan(session, memory)


def one_step(session: Session, inputs: Tensor) -> tuple[float, float]:
    """A step on the mean square of the output; the task's loss and the penalty."""
    task = session.model(inputs).square().mean()
    penalty = session.penalty(task)
    session.optimizer.zero_grad()
    (task + penalty).backward()
    session.optimizer.step()
    session.optimizer.zero_grad()
    return task.item(), penalty.item()


def unscaled(session: Session) -> float:
    """P."""
    return fast_lasso(session.memories[0].penalized).item()


# ------------------------------------------------------------------------------------------- the penalty


def norms(weight: Tensor, axis: int, of: Callable[[int], Any] = lambda position: position) -> Tensor:
    """The sum over channels of sqrt(sum w^2 + 1e-8), by a loop; ``of(position)`` is the channel there."""
    squares: dict[Any, Tensor] = {}
    for position in range(weight.shape[axis]):
        squares[of(position)] = squares.get(of(position), 0) + weight.select(axis, position).square().sum()
    return torch.stack([(square + 1e-8).sqrt() for square in squares.values()]).sum()


def of_flatten(m: Any) -> Tensor:
    first, second, hidden, last = m[0].weight, m[2].weight, m[5].weight, m[7].weight
    columns = norms(hidden, 1, lambda position: position // 16)
    return norms(first, 0) + norms(second, 1) + norms(second, 0) + columns + norms(hidden, 0) + norms(last, 1)


def of_groups(m: Any) -> Tensor:
    first, grouped, last = m[0].weight, m[2].weight, m[4].weight
    before = norms(first, 0, lambda p: p % 4) + norms(grouped, 1)  # the same position in both groups goes together
    return before + norms(grouped, 0, lambda p: p % 6) + norms(last, 1, lambda p: p % 6)


def of_concat(m: Any) -> Tensor:
    branches = norms(m.left.weight, 0) + norms(m.right.weight, 0) + norms(m.left.weight, 1) + norms(m.right.weight, 1)
    return norms(m.stem.weight, 0) + branches + norms(m.last.weight, 1)


def of_residual(m: Any) -> Tensor:
    hidden = (m[1].conv1, m[1].conv2, m[2].conv1, m[2].conv2, m[2].short[0])
    inside = sum(norms(conv.weight, axis) for conv in hidden for axis in (0, 1))
    return norms(m[0].weight, 0) + inside + norms(m[5].weight, 1)


def of_mobile(m: Any) -> Tensor:
    return (
        norms(m[0][0].weight, 0)
        + sum(norms(m[at][0].weight, axis) for at in (1, 3) for axis in (0, 1))
        + norms(m[6].weight, 1)
    )


def mobile() -> nn.Sequential:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)]
    return nn.Sequential(conv_bn(3, 6), conv_bn(6, 12, 1), conv_bn(12, 12, groups=12), conv_bn(12, 5, 1), *head)


FORMULAS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Tensor]]] = {
    "flatten": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(96, 7), nn.ReLU(), nn.Linear(7, 3)),
        ),
        of_flatten,
    ),
    "groups": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2), nn.ReLU(), nn.Conv2d(12, 2, 1))
        ),
        of_groups,
    ),
    "concat": (Concat, of_concat),
    "residual": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 4, 3, 1, 1), Block(4, 4), Block(4, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(8, 3),
        ),
        of_residual,
    ),
    "mobile": (mobile, of_mobile),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_penalty_and_its_gradient_are_the_formula(name: str) -> None:
    make, formula = FORMULAS[name]
    model, inputs = small(make)
    session = session_of(model, inputs)
    task = torch.tensor(2.0, dtype=torch.float64)
    penalty = session.penalty(task)
    coefficient = session.memories[0].lambda_
    expected = formula(model)
    assert unscaled(session) == pytest.approx(expected.item(), rel=1e-12)
    assert penalty.item() == pytest.approx(0.2 / 0.8 * 2.0, rel=1e-10)
    penalty.backward()
    actual = {name: p.grad for name, p in model.named_parameters()}
    gradients = torch.autograd.grad(expected * coefficient, list(model.parameters()), allow_unused=True)
    for key, gradient in zip(actual, gradients, strict=True):
        assert (actual[key] is None) == (gradient is None), key
        if gradient is not None:
            torch.testing.assert_close(actual[key], gradient, rtol=1e-10, atol=1e-14, msg=key)


def test_depthwise_weights_biases_and_norms_do_not_count() -> None:
    model, inputs = small(mobile)
    session = session_of(model, inputs)
    before = unscaled(session)
    dense = {"0.0.weight", "1.0.weight", "3.0.weight", "6.weight"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in dense:
                parameter.normal_()
        assert unscaled(session) == before
        model[1][0].weight.mul_(2)
    assert unscaled(session) > before * 1.1


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2, 2), (3, 4, 1, 1)])
def test_the_gradient_in_double_precision(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, shape[2:] or 1), nn.Conv2d(3, 2, 1))
    if len(shape) == 2:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2))
    model.double()
    inputs = torch.randn((2, 3, 8, 8)[: len(shape)], dtype=torch.float64)
    weights = session_of(model, inputs).memories[0].penalized
    with torch.no_grad():
        model[1].weight[1].zero_()  # where only the 1e-8 keeps the norm from zero
        model[1].weight[2].fill_(1e-6)

    def of(*tensors: Tensor) -> Tensor:
        slices: dict[Tensor, list[Slices]] = dict(zip(tensors, weights.values(), strict=True))
        return fast_lasso(slices)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(of, tuple(weights), eps=1e-8, atol=1e-3, rtol=1e-3, nondet_tol=0.0)
    with torch.no_grad():
        model[1].weight.normal_()
    assert torch.autograd.gradgradcheck(of, tuple(weights))


def test_autocast_and_a_gradient_scaler() -> None:
    model, inputs = small(resnet20, torch.float32)
    session = session_of(model, inputs, PruneTrain(0.2, interval=1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    with torch.autocast("cpu", torch.bfloat16):
        task = session.model(inputs).float().square().mean()
        penalty = session.penalty(task)
    assert penalty.dtype == torch.float32
    assert math.isfinite(session.memories[0].lambda_)
    assert (penalty / (task + penalty)).item() == pytest.approx(0.2, rel=1e-6)
    assert session.penalty(task).item() == pytest.approx(penalty.item(), rel=1e-6), "autocast makes no difference"
    scaler.scale(penalty).backward()
    scaler.unscale_(session.optimizer)
    weight = model[2].conv1.weight
    (expected,) = torch.autograd.grad((norms(weight, 0) + norms(weight, 1)), weight)
    torch.testing.assert_close(weight.grad, expected * session.memories[0].lambda_, rtol=1e-5, atol=1e-9)
    scaler.step(session.optimizer)
    assert session.step == 1
    session.epoch_end()


def test_a_model_in_bfloat16_is_summed_in_float32() -> None:
    model, inputs = small(resnet20, torch.bfloat16)
    session = session_of(model, inputs)
    penalty = session.penalty(torch.tensor(1.0, dtype=torch.bfloat16))
    assert penalty.dtype == torch.float32
    assert unscaled(session) == pytest.approx(unscaled(session_of(*small(resnet20))), rel=1e-2)
    penalty.backward()
    assert model[2].conv1.weight.grad.dtype == torch.bfloat16
    session.epoch_end()


# ------------------------------------------------------------------------------------------------ lambda


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5])
def test_lambda_is_set_once(ratio: float, tmp_path: Path) -> None:
    model, inputs = small(resnet20)
    session = session_of(model, inputs, PruneTrain(ratio, interval=1))
    assert session.memories[0].lambda_ is None
    initial = unscaled(session)
    task, penalty = one_step(session, inputs)
    coefficient = session.memories[0].lambda_
    assert penalty / (task + penalty) == pytest.approx(ratio, rel=1e-6)
    assert coefficient == pytest.approx(ratio * task / ((1 - ratio) * initial), rel=1e-9)
    with torch.no_grad():
        model[1].conv1.weight[:3] = 0
        model[1].conv2.weight[:, :3] = 0
    task, penalty = one_step(session, inputs)
    assert penalty / (task + penalty) != pytest.approx(ratio, rel=1e-6)
    assert session.epoch_end().removed == 3
    one_step(session, inputs)
    assert session.memories[0].lambda_ == coefficient
    session.save(tmp_path / "run.pt")
    fresh = small(resnet20)[0]
    loaded = Session.load(tmp_path / "run.pt", fresh, inputs, SGD(fresh.parameters(), lr=1e-4, momentum=0.9))
    assert loaded.memories[0].lambda_ == coefficient
    assert loaded.passes == session.passes
    assert unscaled(loaded) == unscaled(session)
    assert one_step(loaded, inputs) == one_step(session, inputs)


@pytest.mark.parametrize("loss", [0.0, -1.0, math.nan, math.inf])
def test_lambda_needs_a_loss(loss: float) -> None:
    session = session_of(*small(chain))
    with pytest.raises(SessionError, match=f"must be a positive number; it is {loss!r}"):
        session.penalty(torch.tensor(loss))
    assert session.memories[0].lambda_ is None
    session.penalty(torch.tensor(1.0))


def test_a_penalty_that_is_never_asked_for_is_noticed() -> None:
    session = session_of(*small(chain), PruneTrain(interval=2))
    session.epoch_end()
    with pytest.warns(UserWarning, match=r"session\.penalty\(task\) has not been called yet"):
        session.epoch_end()


# --------------------------------------------------------------------------------------------- what goes


def kill(model: nn.Module, name: str, axis: int, channels: list[int], value: float = 0.0) -> None:
    with torch.no_grad():
        model.get_parameter(name).index_fill_(axis, torch.tensor(channels), value)


def test_what_is_dead_on_both_sides_goes_and_nothing_else() -> None:
    model, inputs = small(chain)
    kill(model, "0.0.weight", 0, [1, 4, 5])
    kill(model, "1.0.weight", 1, [0, 1, 4])  # 1 and 4 on both sides
    kill(model, "1.0.weight", 0, [2, 3])  # written by nobody
    kill(model, "2.0.weight", 1, [6])  # read by nobody
    kill(model, "2.0.weight", 0, [0], -0.9 * TAU)
    kill(model, "5.weight", 1, [0], 0.9 * TAU)
    kill(model, "2.0.weight", 0, [3])
    kill(model, "5.weight", 1, [3], 1.2 * TAU)  # hardly read, but read
    session = session_of(model, inputs, verify=True)
    assert plan_of(session).keep == {"0.0": (0, 2, 3, 5), "2.0": (1, 2, 3, 4)}


def test_negative_weights_are_weights() -> None:
    model, inputs = small(chain)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.copy_(-module.weight.abs() - 2 * TAU)
    assert plan_of(session_of(model, inputs)).keep == {}
    kill(model, "0.0.weight", 0, [2])
    assert plan_of(session_of(model, inputs)).keep == {}, "the reader's negative weights hold it"
    kill(model, "1.0.weight", 1, [2])
    assert plan_of(session_of(model, inputs)).keep == {"0.0": (0, 1, 3, 4, 5)}


def test_the_threshold_is_on_the_largest_weight() -> None:
    model, inputs = small(chain)
    for name, axis in (("0.0.weight", 0), ("1.0.weight", 1)):
        kill(model, name, axis, [0], 0.5)
        kill(model, name, axis, [1], 0.49)
    assert plan_of(session_of(model, inputs, PruneTrain(threshold=0.5))).keep["0.0"][0] == 0
    assert 1 not in plan_of(session_of(model, inputs, PruneTrain(threshold=0.5))).keep["0.0"]
    assert plan_of(session_of(model, inputs, PruneTrain(threshold=0.0))).keep == {}


def test_with_a_threshold_of_zero_what_is_zero_goes() -> None:
    model, inputs = small(chain)
    kill(model, "0.0.weight", 0, [1, 4])
    kill(model, "1.0.weight", 1, [1, 4])
    session = session_of(model, inputs, PruneTrain(threshold=0.0, interval=1))
    size = session.analysis.sizes["0.0"]
    assert len(plan_of(session).keep["0.0"]) == size - 2


def test_weights_that_are_not_numbers_are_not_dead() -> None:
    model, inputs = small(chain)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    assert plan_of(session_of(model, inputs)).keep == {}


STREAM = {  # which convolutions write to and read from each residual stage of resnet20, by hand
    "0.0": (["0.0", "1.conv2", "2.conv2", "3.conv2"], ["1.conv1", "2.conv1", "3.conv1", "4.conv1", "4.short.0"]),
    "4.conv2": (["4.conv2", "4.short.0", "5.conv2", "6.conv2"], ["5.conv1", "6.conv1", "7.conv1", "7.short.0"]),
    "7.conv2": (["7.conv2", "7.short.0", "8.conv2", "9.conv2"], ["8.conv1", "9.conv1", "12"]),
}


INSIDE = {f"{at}.conv1": ([f"{at}.conv1"], [f"{at}.conv2"]) for at in range(1, 10)}


def thinned(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A resnet20 in which random slices of every weight are near zero, and some channels of each group wholly."""
    model, inputs = small(resnet20, dtype)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for writers, readers in (STREAM | INSIDE).values():
            size = model.get_submodule(writers[0]).weight.shape[0]
            dead = torch.randperm(size, generator=draw)[: size // 3]
            for name, axis in [(name, 0) for name in writers] + [(name, 1) for name in readers]:
                more = torch.randperm(size, generator=draw)[: size // 4]  # in this layer only
                model.get_submodule(name).weight.index_fill_(axis, torch.cat([dead, more]), 0.7 * TAU)
                model.get_submodule(name).weight.index_fill_(axis, dead[:1], -0.7 * TAU)
    return model, inputs


def dense_channels(weight: Tensor, axis: int) -> set[int]:
    return {c for c in range(weight.shape[axis]) if weight.select(axis, c).abs().max() >= TAU}


def test_a_stage_keeps_the_union_of_what_its_layers_use() -> None:
    model, inputs = thinned()
    session = session_of(model, inputs, verify=True)
    plan = plan_of(session)
    dense = copy.deepcopy(model)
    param_map = session.reconfigure(plan)
    for stage, (writers, readers) in STREAM.items():
        union: set[int] = set()
        for name in writers:
            union |= dense_channels(dense.get_submodule(name).weight, 0)
        for name in readers:
            union |= dense_channels(dense.get_submodule(name).weight, 1)
        assert 0 < len(union) < len(dense.get_submodule(writers[0]).weight)
        assert plan.keep[stage] == tuple(sorted(union))
        for name, axis in [(name, 0) for name in writers] + [(name, 1) for name in readers]:
            assert param_map[f"{name}.weight"][axis].tolist() == sorted(union), name
            assert session.graph.get_parameter(f"{name}.weight").shape[axis] == len(union)
    assert set(plan.keep) == {*STREAM, *INSIDE}


def test_cutting_is_zeroing_what_is_below_the_threshold() -> None:
    model, inputs = thinned()
    assert all(norm.bias.abs().min() > 1e-3 for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))
    session = session_of(model, inputs)
    dense = copy.deepcopy(model)
    for writers, readers in (STREAM | INSIDE).values():
        axes = [(f"{name}.weight", 0) for name in writers] + [(f"{name}.weight", 1) for name in readers]
        used = set().union(*(dense_channels(model.get_parameter(name), axis) for name, axis in axes))
        dead = sorted(set(range(model.get_parameter(axes[0][0]).shape[0])) - used)
        assert dead
        for name, axis in axes:
            kill(dense, name, axis, dead)
    session.reconfigure(plan_of(session))
    for mode in (False, True):
        torch.testing.assert_close(session.graph.train(mode)(inputs), dense.train(mode)(inputs), rtol=1e-10, atol=1e-10)


def test_a_step_after_the_cut_is_the_dense_step() -> None:
    model, inputs = thinned()
    session, twin = (session_of(copy.deepcopy(model), inputs) for _ in range(2))
    for trained in (session, twin):
        one_step(trained, inputs)
    plan = plan_of(session)
    with torch.no_grad():  # what the cut will take is zero in both; its momentum is not
        for trained in (session, twin):
            param_map = fxprune.rewrite(trained.graph, trained.analysis, plan)[1]
            for parameter, zeroed in zip(
                trained.graph.parameters(), masked(trained.graph, param_map).parameters(), strict=True
            ):
                parameter.copy_(zeroed)
    param_map = session.reconfigure(plan)
    first, second = one_step(session, inputs), one_step(twin, inputs)
    assert first[0] == pytest.approx(second[0], rel=1e-12)
    assert first[1] < second[1], "a dead channel still counts sqrt(1e-8)"
    for name, parameter in session.graph.named_parameters():
        dense = twin.graph.get_parameter(name)
        torch.testing.assert_close(parameter, param_map.slice(name, dense), rtol=1e-10, atol=1e-12, msg=name)
        buffers = [run.optimizer.state[p]["momentum_buffer"] for run, p in ((session, parameter), (twin, dense))]
        torch.testing.assert_close(buffers[0], param_map.slice(name, buffers[1]), rtol=1e-10, atol=1e-12, msg=name)
    assert plan.keep


def test_depthwise_convolutions_follow_their_neighbours() -> None:
    model, inputs = small(mobile)
    session = session_of(model, inputs, verify=True)
    one_step(session, inputs)
    kill(model, "1.0.weight", 0, [0, 3, 4, 5])
    kill(model, "3.0.weight", 1, [3, 4, 5, 9])
    assert session.epoch_end().removed == 3
    depthwise = session.graph.get_submodule("2.0")
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (9, 9, 9)
    assert depthwise.weight.shape == (9, 1, 3, 3)
    one_step(session, inputs)


@pytest.mark.parametrize("round_to", [1, 3, 4, 100])
def test_rounding_keeps_more(round_to: int) -> None:
    model, inputs = small(chain)
    for name, axis in (("0.0.weight", 0), ("1.0.weight", 1)):
        kill(model, name, axis, [0, 2, 3, 5])
        kill(model, name, axis, [3], 1e-5)
    keep = plan_of(session_of(model, inputs, PruneTrain(round_to=round_to))).keep
    assert keep.get("0.0") == {1: (1, 4), 3: (1, 3, 4), 4: (0, 1, 3, 4), 100: None}[round_to]


def test_a_layer_keeps_a_minimum() -> None:
    model, inputs = small(chain)
    for name, axis in (("0.0.weight", 0), ("1.0.weight", 1)):
        kill(model, name, axis, list(range(6)))
        kill(model, name, axis, [3], 1e-5)
    assert plan_of(session_of(model, inputs)).keep == {"0.0": (3,)}
    assert plan_of(session_of(model, inputs, PruneTrain(minimum=2))).keep == {"0.0": (0, 3)}
    assert plan_of(session_of(model, inputs, PruneTrain(minimum=100))).keep == {}


# ---------------------------------------------------------------------------------------------- branches


def without_a_branch(branches: str) -> tuple[Session, nn.Module, Tensor]:
    """A session in which all of block 2's middle is zero, after the cut; and a copy of the model before it."""
    model, inputs = small(resnet20)
    session = session_of(model, inputs, PruneTrain(interval=1, branches=branches))
    one_step(session, inputs)
    for name in ("2.conv1.weight", "2.conv2.weight"):
        kill(model, name, 0, list(range(8)))
    dense = copy.deepcopy(model)
    session.epoch_end()
    return session, dense, inputs


def test_a_dead_branch_goes_from_graph_optimizer_and_state_dict() -> None:
    session, dense, inputs = without_a_branch("remove")
    assert not [key for key in session.graph.state_dict() if key.startswith("2.")]
    assert "2_" not in session.graph.code
    held = {id(p) for group in session.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in session.graph.parameters()}
    assert {id(p) for p in session.optimizer.state} == held
    with torch.no_grad():
        dense[2].bn2.bias.zero_()
        dense[2].bn2.running_mean.zero_()
    for mode in (False, True):
        torch.testing.assert_close(session.graph.train(mode)(inputs), dense.train(mode)(inputs), rtol=1e-9, atol=1e-9)
    one_step(session, inputs)
    assert session.epoch_end().removed == 0


def test_a_folded_branch_leaves_its_constant() -> None:
    session, dense, inputs = without_a_branch("fold")
    assert {key for key in session.graph.state_dict() if key.startswith("2.")} == {
        f"2.bn2.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    for mode in (False, True):
        torch.testing.assert_close(session.graph.train(mode)(inputs), dense.train(mode)(inputs), rtol=1e-9, atol=1e-9)
    one_step(session, inputs)
    session.epoch_end()


def test_a_kept_branch_keeps_one_channel() -> None:
    session, dense, inputs = without_a_branch("keep")
    assert session.analysis.sizes["2.conv1"] == 1
    for mode in (False, True):
        torch.testing.assert_close(session.graph.train(mode)(inputs), dense.train(mode)(inputs), rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------- the loop, and stability


def toy() -> nn.Sequential:
    layers = [(3, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*[conv_bn(cin, cout, stride=stride) for cin, cout, stride in layers], *head)


@pytest.mark.slow
def test_the_toy_network_loses_a_fifth_of_its_channels() -> None:
    torch.set_flush_denormal(True)
    prototypes = torch.randn(10, 3, 12, 12)
    model = toy()
    session = session_of(
        model,
        prototypes[:2],
        PruneTrain(ratio=0.5, interval=1),
        SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
    )
    correct = []
    with pytest.warns(UserWarning, match=r"learning rates above 0\.0\d+ keep dead channels swinging"):
        session.penalty(torch.tensor(2.3))
    for step in range(900):
        session.optimizer.param_groups[0]["lr"] = 0.1 if step < 540 else 0.01
        y = torch.randint(0, 10, (64,))
        output = session.model(prototypes[y] + torch.randn(64, 3, 12, 12))
        task = F.cross_entropy(output, y)
        session.optimizer.zero_grad()
        (task + session.penalty(task)).backward()
        session.optimizer.step()
        correct.append((output.argmax(1) == y).float().mean().item())
        if step % 100 == 99:
            session.optimizer.zero_grad()
            session.epoch_end()
    torch.set_flush_denormal(False)
    channels = [sum(epoch.widths.values()) for epoch in session.log] + [sum(session.analysis.sizes.values())]
    assert channels[0] == 208
    assert channels[5] == channels[0], "nothing goes before the rate falls"
    assert channels[-1] <= 0.8 * 208
    for before, after in itertools.pairwise(session.log):
        assert after.params <= before.params
        assert after.flops <= before.flops
        assert (after.flops < before.flops) == (before.removed > 0)
    assert sum(correct[-50:]) / 50 > 0.9


def mlp() -> nn.Sequential:
    hidden = [layer for _ in range(2) for layer in (nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU())]
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), *hidden, nn.Linear(32, 4))


def trained(pruner: PruneTrain, lr: float, steps: int = 300) -> Session:
    """An MLP that learns a function of two of eight numbers."""
    torch.manual_seed(0)
    model = mlp()
    session = session_of(model, torch.randn(4, 8), pruner, SGD(model.parameters(), lr=lr, momentum=0.9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(steps):
            x = torch.randn(32, 8)
            task = F.cross_entropy(session.model(x), (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0))
            session.optimizer.zero_grad()
            (task + session.penalty(task)).backward()
            session.optimizer.step()
    session.optimizer.zero_grad()
    return session


def test_the_proximal_step_gives_zeros_where_the_lasso_swings() -> None:
    swinging = trained(PruneTrain(ratio=0.85), lr=0.1)
    assert plan_of(swinging).keep == {}
    proximal = trained(PruneTrain(ratio=0.85, proximal=True), lr=0.1)
    assert proximal.memories[0] == swinging.memories[0]
    plan = plan_of(proximal)
    assert sum(plan.widths.values()) < 0.7 * sum(plan.sizes.values())
    for name, kept in plan.keep.items():
        gone = sorted(set(range(plan.sizes[name])) - set(kept))
        for member in proximal.analysis.groups[name].members:
            weight = (
                proximal.graph.get_parameter(member.parameter) if "running" not in member.parameter else torch.zeros(())
            )
            if weight.ndim > 1 and gone:
                assert not weight.index_select(member.axis, torch.tensor(gone)).any(), "exactly zero"
    proximal.reconfigure(plan)


def test_the_proximal_step_is_by_hand() -> None:
    model, inputs = small(chain)
    session = session_of(model, inputs, PruneTrain(ratio=0.5, proximal=True), SGD(model.parameters(), lr=0.5))
    assert session.penalty(torch.tensor(3.0)).item() == 0.0
    coefficient = session.memories[0].lambda_ = 1.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    session.optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    session.optimizer.step()
    for name, axes in {"0.0.weight": [0], "1.0.weight": [1, 0], "2.0.weight": [1, 0], "5.weight": [1]}.items():
        expected = before.pop(name)
        for axis in axes:
            for channel in range(expected.shape[axis]):
                piece = expected.select(axis, channel)
                piece *= max(0.0, 1 - 0.5 * coefficient / max(piece.norm().item(), 1e-300))
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-12, atol=0.0)
    for name, same in before.items():
        assert torch.equal(model.get_parameter(name), same), name
    assert not model[0][0].weight.isnan().any()


def test_the_proximal_step_needs_more_than_half_precision() -> None:
    model, inputs = small(chain, torch.bfloat16)
    with pytest.raises(PlanError, match="factors just below 1, which half precision rounds to 1"):
        session_of(model, inputs, PruneTrain(proximal=True))


def test_the_proximal_step_goes_by_the_rate_of_each_optimizer() -> None:
    model, inputs = small(chain)
    last = [model[5].weight]
    rest = [p for p in model.parameters() if p is not last[0]]
    session = session_of(model, inputs, PruneTrain(ratio=0.5, proximal=True), SGD(rest, lr=0.0))
    session.register(second=SGD(last, lr=1e3))
    session.penalty(torch.tensor(3.0))
    before = model[1][0].weight.clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    session.optimizer.step()
    assert torch.equal(model[1][0].weight, before)
    assert not last[0].any()


def test_the_penalty_alone_swings_above_the_limit_and_dies_below_it() -> None:
    peaks = []
    for factor in (0.9, 1.1, 2.0):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)).double()
        with torch.no_grad():
            model[1].weight.zero_()[0, 0] = 0.5 * TAU
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            session = session_of(
                model, torch.randn(2, 3, dtype=torch.float64), None, SGD(model.parameters(), lr=1e-4, momentum=0.9)
            )
            session.penalty(torch.tensor(1.0))
            session.optimizer.param_groups[0]["lr"] = factor * TAU * 1.9 / session.memories[0].lambda_
            path = []
            for _ in range(300):
                session.optimizer.zero_grad()
                session.penalty(torch.tensor(1.0)).backward()
                session.optimizer.step()
                path.append(model[1].weight[0, 0].abs().item())
        peaks.append(max(path[-20:]))
    assert peaks[:2] == pytest.approx([0.0, TAU * (1.1**2 - 1) ** 0.5], abs=0.01 * TAU)
    assert peaks[2] > TAU


def warned(make: Callable[[Iterator[nn.Parameter]], Optimizer], **options: Any) -> bool:
    model, inputs = small(chain)
    session = session_of(model, inputs, PruneTrain(**options), make(model.parameters()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            session.penalty(torch.tensor(1.0))
    assert len(caught) <= 1
    if caught:
        assert "PruneTrain(proximal=True)" in str(caught[0].message)
    return bool(caught)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_warning_comes_exactly_above_the_limit(momentum: float) -> None:
    session = session_of(*small(chain))
    session.penalty(torch.tensor(1.0))
    limit = TAU * (1 + momentum) / session.memories[0].lambda_
    assert not warned(lambda p: SGD(p, lr=0.999 * limit, momentum=momentum))
    assert warned(lambda p: SGD(p, lr=1.001 * limit, momentum=momentum))
    assert not warned(lambda p: SGD(p, lr=100 * limit, momentum=momentum), proximal=True)
    assert not warned(lambda p: Adam(p, lr=100 * limit))
    assert not warned(lambda p: RMSprop(p, lr=100 * limit, momentum=momentum))
    one, *rest = list(small(chain)[0].parameters())
    assert not rest[0].requires_grad or one.requires_grad
    groups = lambda p: SGD([{"params": [next(p)]}, {"params": list(p), "lr": 2 * limit}], lr=0.0, momentum=momentum)  # noqa: E731
    assert warned(groups), "any group counts"


# ------------------------------------------------------------------------------------- what can't be done


def test_a_frozen_model_is_refused() -> None:
    model, inputs = small(chain)
    head = model[5].bias
    optimizer = SGD([head], lr=1e-2)
    model.requires_grad_(False)
    head.requires_grad_()
    with pytest.raises(
        PlanError, match=r"each of the 3 groups of channels has a weight that does not train, as '0\.0'"
    ):
        session_of(model, inputs, None, optimizer)
    model.requires_grad_()
    session_of(model, inputs, None, optimizer)


def test_a_model_without_channels_to_prune_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten())
    with pytest.raises(PlanError, match=r"nothing to prune in this model; every channel is frozen: .*output"):
        session_of(model, torch.randn(2, 3, 4, 4))


def test_frozen_weights_hold_their_channels() -> None:
    model, inputs = small(chain)
    model[0].requires_grad_(False)
    kill(model, "1.0.weight", 1, [0, 1])
    kill(model, "1.0.weight", 0, [0, 1])
    kill(model, "2.0.weight", 1, [0, 1])
    session = session_of(model, inputs)
    assert plan_of(session).keep == {"1.0": (2, 3, 4, 5, 6, 7)}
    expected = (
        norms(model[1][0].weight, 0) + sum(norms(model[2][0].weight, a) for a in (0, 1)) + norms(model[5].weight, 1)
    )
    assert unscaled(session) == pytest.approx(expected.item(), rel=1e-12)


class Plus(nn.Module):
    """x plus a small network of x: nothing else can be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.ReLU(), nn.Conv2d(6, 3, 1, bias=False))
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((x + self.branch(x)).mean((2, 3)))


def test_a_run_that_has_nothing_left_goes_on(tmp_path: Path) -> None:
    model, inputs = small(Plus)
    session = session_of(model, inputs, PruneTrain(interval=1, threshold=1e3))
    one_step(session, inputs)
    assert session.epoch_end().removed == 6
    assert session.analysis.sizes == {}
    assert session.penalty(torch.tensor(1.0)).item() == 0.0
    assert session.epoch_end().removed == 0
    session.save(tmp_path / "run.pt")
    fresh = small(Plus)[0]
    loaded = Session.load(tmp_path / "run.pt", fresh, inputs, SGD(fresh.parameters(), lr=1e-4, momentum=0.9))
    assert loaded.memories[0] == session.memories[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, r"ratio=0\.0 must be a number above 0 and below 1"),
        ({"ratio": 1.0}, r"ratio=1\.0 must be a number above 0 and below 1"),
        ({"ratio": math.nan}, "ratio=nan must be a number above 0"),
        ({"ratio": "0.2"}, r"ratio='0\.2' must be a number"),
        ({"interval": 0}, "interval=0 must be a positive integer"),
        ({"interval": 2.5}, r"interval=2\.5 must be a positive integer"),
        ({"interval": True}, "interval=True must be a positive integer"),
        ({"minimum": 0}, "minimum=0 must be a positive integer"),
        ({"round_to": -8}, "round_to=-8 must be a positive integer"),
        ({"threshold": -1e-4}, r"threshold=-0\.0001 must be a number at least 0"),
        ({"threshold": math.nan}, "threshold=nan must be a number at least 0"),
        ({"threshold": None}, "threshold=None must be a number"),
        ({"branches": "cut"}, "branches='cut' is not known; use 'remove', 'fold' or 'keep'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PruneTrain(**options)


def test_float32_is_the_least() -> None:
    assert at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


# ------------------------------------------------------------------------------------------- a budget


class Vgg(nn.Sequential):
    """Four convolutions with norms and a classifier, for 8x8 pictures."""

    def __init__(self) -> None:
        def block(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        super().__init__(
            *block(3, 12), *block(12, 16), nn.MaxPool2d(2), *block(16, 24), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(24, 5),
        )  # fmt: skip


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda model: SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=2e-3),
    "RMSprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-3),
}


def train_to_budget(optimizer: str, epochs: int, pruner: PruneTrain, steps: int = 6) -> tuple[Session, list[float]]:
    """A run on random pictures, and how much each cut moved the outputs."""
    model, inputs = small(Vgg)
    targets = torch.arange(4) % 5
    session = session_of(model, inputs, pruner, OPTIMIZERS[optimizer](model), epochs=epochs)
    moved = []
    for _ in range(epochs):
        for _ in range(steps):
            task = F.cross_entropy(session.model(inputs), targets)
            session.optimizer.zero_grad()
            (task + session.penalty(task)).backward()
            session.optimizer.step()
        session.optimizer.zero_grad()
        before = session.model.eval()(inputs)
        session.epoch_end()
        moved.append((session.model(inputs) - before).abs().max().item())
        session.model.train()
    return session, moved


@pytest.mark.parametrize("kind", ["flops", "params", "channels"])
@pytest.mark.parametrize("epochs", [4, 9])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_budget_is_met_in_time_and_no_cut_moves_an_output(optimizer: str, epochs: int, kind: str) -> None:
    session, moved = train_to_budget(optimizer, epochs, PruneTrain(budget=Budget(**{kind: 0.5}), by=0.6))
    dense = fxprune.analyze(*small(Vgg))
    deadline = int(0.6 * epochs + 0.5)
    left = [measure_costs(analysis, Budget(**{kind: 0.5}))[kind] for analysis in (session.analysis, dense)]
    assert 0.4 <= left[0] / left[1] <= 0.5
    assert sum(epoch.removed > 0 for epoch in session.log) >= min(2, deadline - 1)
    assert not any(epoch.removed for epoch in session.log.epochs[deadline:])
    assert session.penalty(torch.ones(())) == 0, "the penalty ends with the budget"
    assert max(moved) < 1e-10


def test_without_the_pull_the_cuts_move_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PruneTrain, "_pull", lambda *_: None)
    assert max(train_to_budget("SGD", 4, PruneTrain(budget=Budget(flops=0.5)))[1]) > 1e-4


@pytest.mark.parametrize("round_to", [2, 4, 8])
def test_a_budget_is_met_with_widths_that_are_multiples(round_to: int) -> None:
    session, _ = train_to_budget("SGD", 4, PruneTrain(budget=Budget(flops=0.5), round_to=round_to))
    left = [
        measure_costs(analysis, Budget(flops=0.5))["flops"]
        for analysis in (session.analysis, fxprune.analyze(*small(Vgg)))
    ]
    assert 0.4 <= left[0] / left[1] <= 0.5


def test_a_budget_that_is_missed_is_told() -> None:
    with pytest.warns(UserWarning, match=r"the budget is missed: flops=\d+, \d+ allowed\. minimum=15, or another"):
        session, _ = train_to_budget("SGD", 4, PruneTrain(budget=Budget(flops=0.5), minimum=15))
    assert "the budget is missed" in session.log[1].notes[0]


def test_a_shorter_epoch_before_a_cut_is_told() -> None:
    model, inputs = small(Vgg)
    session = session_of(model, inputs, PruneTrain(budget=Budget(flops=0.7), by=2), OPTIMIZERS["SGD"](model))
    for steps in (10, 2):
        for _ in range(steps):
            one_step(session, inputs)
        with pytest.warns(UserWarning, match="cut 6 steps before zero") if steps == 2 else nullcontext():
            session.epoch_end()
    assert "6 steps before zero" in session.log[-1].notes[0]


def test_a_run_with_a_budget_goes_on_from_its_file(tmp_path: Path) -> None:
    def go(session: Session, epochs: int) -> Session:
        for _ in range(epochs):
            for _ in range(5):
                one_step(session, inputs)
            session.epoch_end()
        return session

    pruner = PruneTrain(budget=Budget(flops=0.5), by=0.75, interval=1)
    model, inputs = small(Vgg)
    session = go(session_of(model, inputs, pruner, OPTIMIZERS["SGD"](model), epochs=4), 2)
    session.save(tmp_path / "run.pt")
    uninterrupted = go(session, 2)
    again, _ = small(Vgg)
    resumed = go(Session.load(tmp_path / "run.pt", again, inputs, OPTIMIZERS["SGD"](again), progress=False), 2)
    assert resumed.passes == (pruner,)
    assert resumed.analysis.sizes == uninterrupted.analysis.sizes
    for name, value in uninterrupted.graph.state_dict().items():
        assert torch.equal(value, resumed.graph.state_dict()[name]), name


@pytest.mark.parametrize(
    ("pruner", "options", "message"),
    [
        (lambda: PruneTrain(budget=Budget(flops=0.5)), {}, r"by 0\.6 of the run, whose length it does not know"),
        (lambda: PruneTrain(budget=Budget(flops=0.5)), {"epochs": 2}, r"has 1 epochs .*, 0\.6 of 2, and needs 2"),
        (lambda: PruneTrain(budget=Budget(flops=1e-6)), {"epochs": 9}, "can't be met"),
        (lambda: PruneTrain(budget=Budget(latency=0.5)), {}, "not steered by latency"),
        (
            lambda: PruneTrain(budget=Budget(channels={"0.*": 0.5})),
            {},
            r"channels=\{'0\.\*': 0\.5\}.*: a training pass",
        ),
        (lambda: PruneTrain(budget=Budget(layers=0.5)), {}, r"layers=0\.5.*: a training pass"),
        (lambda: PruneTrain(budget=0.5), {}, r"budget=0\.5 must be a fxprune\.Budget"),  # type: ignore[arg-type]
        (lambda: PruneTrain(budget=Budget(flops=0.5), by=1), {}, "by=1 must be the share of the run"),
        (lambda: PruneTrain(most=0), {}, "most=0 must be a number above 0"),
    ],
)
def test_a_budget_that_has_no_chance(pruner: Callable[[], PruneTrain], options: dict[str, Any], message: str) -> None:
    with pytest.raises(FxpruneError, match=message):
        session_of(*small(Vgg), pruner(), **options)


def test_what_is_told_in_a_step_stands_in_the_log_once() -> None:
    model, inputs = small(Vgg)
    session = session_of(model, inputs, PruneTrain(budget=Budget(flops=0.5), by=9))
    session.memories[0].note = "the budget will be missed"
    assert session.epoch_end().notes == ("PruneTrain: the budget will be missed",)
    assert session.epoch_end().notes == ()


def test_a_cut_that_takes_nothing_says_why() -> None:
    model, inputs = small(chain)
    session = session_of(model, inputs, PruneTrain(interval=1))
    one_step(session, inputs)
    with pytest.warns(UserWarning, match=r"none of \d+ channels has all its weights below threshold=0\.0001"):
        record = session.epoch_end()
    assert "budget=" in record.notes[0]
