"""DropBack: at most k weights differ from what their seed gives, after every step, cut and checkpoint."""

import copy
import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import EVERY_OPTIMIZER, thinner
from models import Residual, conv_bn, head
from ranks import Ranks
from runs import Thin, assert_equal, nothing_changes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer

import fxprune
from fxprune import Session
from fxprune.errors import InitializeError, PlanError
from fxprune.files.start import start_of
from fxprune.passes import ClickTrain, DropBack, PruneTrain
from fxprune.passes.training.dropback._largest import about_largest, select_largest
from fxprune.training import distributed
from fxprune.training.memory import saved_values
from fxprune.training.trainers.shared import parse_progress, resume_run, run_progress

EXAMPLE = torch.zeros(2, 3, 8, 8)
Make = Callable[[Iterable[nn.Parameter]], Optimizer]
MOMENTUM: Make = EVERY_OPTIMIZER["momentum"]  # with weight decay


def plain(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return SGD(parameters, lr=0.05)


def network(seed: int = 3) -> nn.Module:
    model = nn.Sequential(conv_bn(3, 8), Residual(8, 8), Residual(8, 8), head(8))
    return fxprune.initialize(model.train(), seed)


def begin(dropback: DropBack | None, make: Make = plain, *further: Any, **options: Any) -> Session:
    model = network()
    passes = [*further, dropback] if dropback else further
    return Session(model, EXAMPLE, make(model.parameters()), passes, progress=False, **options)


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)


def backward(session: Session, number: int) -> float:
    x, y = batch(number)
    session.optimizer.zero_grad()
    loss = F.cross_entropy(session.model(x), y)
    loss.backward()
    return loss.item()


def train(session: Session, steps: int, first: int = 0) -> list[float]:
    losses = []
    for number in range(first, first + steps):
        losses.append(backward(session, number))
        session.optimizer.step()
    session.optimizer.zero_grad()
    return losses


def weights(session: Session) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in session.graph.named_parameters()}


def changed(session: Session) -> dict[str, Tensor]:
    """Where a weight differs from the start value that is made anew."""
    begin = start_of(session.graph)
    return {name: p.detach() != begin.values(name).to(p.dtype) for name, p in session.graph.named_parameters()}


def count(masks: dict[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def size(session: Session) -> int:
    return sum(p.numel() for p in session.graph.parameters())


def budget(session: Session) -> int:
    return session.memories[-1].budget


def assert_same_weights(a: Session, b: Session) -> None:
    assert_equal("weights", dict(a.graph.state_dict()), dict(b.graph.state_dict()))


# ---------------------------------------------------------------------------------------- the budget is kept


@pytest.mark.parametrize("make", ["sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop", "adam fused", "nadam"])
@pytest.mark.parametrize("k", [0.2, 1 / 24, 7, 0])
def test_at_most_k_weights_differ_after_every_step(make: str, k: float) -> None:
    session = begin(DropBack(k), EVERY_OPTIMIZER[make])
    expected = k if isinstance(k, int) else int(k * size(session))
    for step in range(4):
        train(session, 1, step)
        assert count(changed(session)) == expected  # all others are bit by bit what the seed gives
    assert session.passes[0].report(session, session.memories[0]) == {"tracked": expected}


@pytest.mark.parametrize("options", [{"rule": "quantile"}, {"select_every": 3}, {"freeze": 1}, {"tracked_state": True}])
@pytest.mark.parametrize("make", ["sgd", "momentum", "adamw"])
def test_options_keep_the_budget_too(make: str, options: dict[str, Any]) -> None:
    session = begin(DropBack(0.2, **options), EVERY_OPTIMIZER[make])
    for step in range(7):
        train(session, 1, step)
        assert 0 < count(changed(session)) <= budget(session)
        if step == 4:
            session.epoch_end()


def test_bfloat16_autocast_keeps_the_budget() -> None:
    session = begin(DropBack(0.2), MOMENTUM)
    for step in range(4):
        x, y = batch(step)
        session.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(session.model(x), y)
        loss.backward()
        session.optimizer.step()
        assert count(changed(session)) == budget(session)
    assert all(p.dtype == torch.float32 for p in session.graph.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_other_dtypes(dtype: torch.dtype) -> None:
    model = fxprune.initialize(network().to(dtype), 3)
    session = Session(model, EXAMPLE.to(dtype), SGD(model.parameters(), lr=0.1), [DropBack(0.2)], progress=False)
    for step in range(3):
        x, y = batch(step)
        session.optimizer.zero_grad()
        F.cross_entropy(session.model(x.to(dtype)).float(), y).backward()
        session.optimizer.step()
        assert 0 < count(changed(session)) <= budget(session)
    assert dtype == torch.bfloat16 or count(changed(session)) == budget(session)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_a_gpu_keeps_the_budget(autocast: bool, tmp_path: Path) -> None:
    model = network().cuda()
    session = Session(model, EXAMPLE.cuda(), MOMENTUM(model.parameters()), [DropBack(0.2)], progress=False)
    for step in range(4):
        x, y = (tensor.cuda() for tensor in batch(step))
        session.optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(session.model(x), y)
        loss.backward()
        session.optimizer.step()
        begin = start_of(session.graph)
        differ = {name: p.detach().cpu() != begin.values(name) for name, p in session.graph.named_parameters()}
        assert count(differ) == budget(session)
    fxprune.save(session.graph, tmp_path / "model.safetensors")
    again = fxprune.load(tmp_path / "model.safetensors", network())
    for name, p in session.graph.named_parameters():
        assert torch.equal(again.get_parameter(name), p.detach().cpu())


def test_channels_last() -> None:
    model = network().to(memory_format=torch.channels_last)
    session = Session(model, EXAMPLE, plain(model.parameters()), [DropBack(0.2)], progress=False)
    twin = begin(DropBack(0.2))
    train(session, 3), train(twin, 3)
    assert count(changed(session)) == budget(session)
    for name, p in weights(session).items():
        torch.testing.assert_close(p, weights(twin)[name], rtol=1e-4, atol=1e-5)


def test_the_model_may_change_its_memory_format_on_the_way() -> None:
    session, twin = begin(DropBack(0.2), MOMENTUM), begin(DropBack(0.2), MOMENTUM)
    for trained in (session, twin):
        train(trained, 2)
    session.graph.to(memory_format=torch.channels_last)
    train(session, 2, 2), train(twin, 2, 2)
    assert count(changed(session)) == budget(session)
    for name, p in weights(session).items():
        torch.testing.assert_close(p, weights(twin)[name], rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------- algorithm 1


def top(scores: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """The k largest of all scores, ties to the first, zeros never."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[torch.argsort(flat, descending=True, stable=True)[:k]] = True
    mask &= flat > 0
    parts = mask.split([score.numel() for score in scores.values()])
    return {name: part.reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def test_the_choices_are_those_of_algorithm_1() -> None:
    """Accumulated updates of tracked weights, this step's of the others; the top k of all of them."""
    session = begin(DropBack(0.1))
    k, lr = budget(session), 0.05
    begins = weights(session)
    total = {name: torch.zeros_like(p) for name, p in begins.items()}
    tracked = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in begins.items()}
    moved = 0
    for step in range(8):
        backward(session, step)
        gradients = {name: p.grad.clone() for name, p in session.graph.named_parameters()}
        before = weights(session)
        session.optimizer.step()
        total = {name: torch.where(tracked[name], total[name], 0.0) - lr * gradients[name] for name in total}
        # Scores in the weights' own rounding, which decides between accumulated sums that are nearly alike.
        after = {name: before[name].add(gradients[name], alpha=-lr) for name in total}
        rounded = {name: (after[name] - begins[name]).abs() for name in total}
        for name in total:
            torch.testing.assert_close(rounded[name], total[name].abs(), rtol=1e-4, atol=1e-6)
        chosen = top(rounded, k)
        moved += count({name: chosen[name] & ~tracked[name] for name in chosen}) if step else 0
        tracked = chosen
        masks = session.memories[0].masks
        for name, mask in tracked.items():
            assert torch.equal(masks[name], mask), (step, name)
            expected = torch.where(mask, after[name], begins[name])
            assert torch.equal(session.graph.get_parameter(name), expected), (step, name)
    assert moved > 0


@pytest.mark.parametrize("make", EVERY_OPTIMIZER)
def test_with_a_budget_for_all_weights_training_is_what_it_was(make: str) -> None:
    kinds = {"decay_in_score": True} if make == "lion" else {}
    session, dense = begin(DropBack(1.0, **kinds), EVERY_OPTIMIZER[make]), begin(None, EVERY_OPTIMIZER[make])
    assert train(session, 4) == train(dense, 4)
    assert_same_weights(session, dense)
    assert_equal("state", session.optimizer.state_dict(), dense.optimizer.state_dict())


def test_with_no_budget_nothing_moves() -> None:
    session = begin(DropBack(0), MOMENTUM)
    before = weights(session)
    train(session, 3)
    assert_equal("weights", weights(session), before)


def test_biases_and_norms_are_in_the_budget() -> None:
    session = begin(DropBack(40))
    train(session, 5)
    moved = {name for name, mask in changed(session).items() if mask.any()}
    assert moved & {name for name in moved if name.endswith("bias")}
    assert any(session.graph.get_parameter(name).ndim == 1 for name in moved)


def test_parameters_that_do_not_train_are_left_out() -> None:
    model = network()
    still = model[0][0].weight.requires_grad_(False)
    with torch.no_grad():
        still.add_(1.0)
    session = Session(
        model, EXAMPLE, plain(p for p in model.parameters() if p.requires_grad), [DropBack(0.5)], progress=False
    )
    train(session, 2)
    trained = {name: mask for name, mask in changed(session).items() if session.graph.get_parameter(name).requires_grad}
    assert count(trained) == budget(session) == (size(session) - still.numel()) // 2


def test_groups_of_parameters_share_the_budget() -> None:
    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        held = list(parameters)
        return SGD([{"params": held[:3], "lr": 0.05}, {"params": held[3:], "lr": 0.05}], lr=1.0)

    session, single = begin(DropBack(0.1), make), begin(DropBack(0.1))
    train(session, 4), train(single, 4)
    assert_same_weights(session, single)


# ---------------------------------------------------------------------------------- ties, and the quantile rule


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_are_those_of_a_stable_sort(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 9, (500,), generator=generator).float()
    out = torch.empty(500, dtype=torch.bool)
    for k in (0, 1, 17, 250, 499, 500):
        select_largest(numbers, k, out)
        assert torch.equal(out, top({"": numbers}, k)[""]), k


def test_what_is_not_a_number_is_the_largest() -> None:
    numbers = torch.tensor([1.0, math.nan, 3.0, 0.0, 2.0])
    out = torch.empty(5, dtype=torch.bool)
    select_largest(numbers, 2, out)
    assert out.tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_the_quantile_rule_comes_close_from_below(share: float) -> None:
    numbers = torch.randn(1 << 21).abs()
    numbers[: 1 << 20] *= 10  # layers have scales of their own
    out, k = torch.empty(len(numbers), dtype=torch.bool), int(share * len(numbers))
    counts = []
    for turn in range(20):
        about_largest(numbers, k, out, turn=turn)
        counts.append(int(out.sum()))
        assert numbers[out].min() > numbers[~out].max()
    assert max(counts) <= k
    assert min(counts) > k * (1 - 5 * math.sqrt((1 - share) / (share * len(numbers) / 17)))  # standard deviations
    assert sum(count == k for count in counts) <= 4  # else it was exact all the time, and saved nothing


def test_a_sample_that_misleads_breaks_no_budget() -> None:
    numbers = torch.rand(1 << 21)
    numbers[::17] /= 1000  # what turn 0 looks at
    out, exact = torch.empty(len(numbers), dtype=torch.bool), torch.empty(len(numbers), dtype=torch.bool)
    about_largest(numbers, 100_000, out, turn=0)
    select_largest(numbers, 100_000, exact)
    assert torch.equal(out, exact)
    about_largest(numbers, 100_000, out, turn=1)
    assert 90_000 < out.sum() < 100_000


# ---------------------------------------------------------------------------------------------- options


def test_between_choices_the_tracked_weights_stay() -> None:
    session = begin(DropBack(0.1, select_every=3))
    seen = []
    for step in range(7):
        train(session, 1, step)
        seen.append(session.memories[0].marks.clone())
    same = [torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert same == [True, True, False, True, True, False]


@pytest.mark.parametrize("make", ["sgd", "momentum", "adam"])
def test_frozen_weights_need_no_gradients_elsewhere(make: str) -> None:
    dropback = DropBack(0.1, freeze=1)
    session, masked = begin(dropback, EVERY_OPTIMIZER[make]), begin(dropback, EVERY_OPTIMIZER[make])
    for trained in (session, masked):
        train(trained, 3)
        trained.epoch_end()
    frozen = session.memories[0].marks.clone()
    for step in range(3, 9):
        train(session, 1, step)
        backward(masked, step)
        for name, mask in masked.memories[0].masks.items():
            masked.graph.get_parameter(name).grad.mul_(mask)
        masked.optimizer.step()
        assert_same_weights(session, masked)
        assert torch.equal(session.memories[0].marks, frozen)
    assert count(changed(session)) <= budget(session)


def test_start_values_that_decay_leave_zeros() -> None:
    session = begin(DropBack(0.1, start_decay=0.9))
    for step in range(3):
        train(session, 1, step)
        assert count(changed(session)) <= budget(session)
        assert start_of(session.graph).factor == pytest.approx(0.9 ** (step + 1))
    train(session, 250, 3)
    zeros = sum(int((p == 0).sum()) for p in session.graph.parameters())
    assert zeros >= size(session) - budget(session)
    assert 0 < count({name: p != 0 for name, p in weights(session).items()}) <= budget(session)


def test_the_decay_of_start_values_does_not_choose() -> None:
    """The score is the change by the gradient: not that the start value moved."""
    slow, plain_session = begin(DropBack(0.1, start_decay=0.5)), begin(DropBack(0.1))
    for trained in (slow, plain_session):
        train(trained, 1)
    assert torch.equal(slow.memories[0].marks, plain_session.memories[0].marks)


@pytest.mark.parametrize("make", ["momentum", "adamw", "adam fused"])
def test_start_values_made_anew_are_those_kept(make: str) -> None:
    kept, anew = (
        begin(DropBack(0.2), EVERY_OPTIMIZER[make]),
        begin(DropBack(0.2, regenerate=True), EVERY_OPTIMIZER[make]),
    )
    assert train(kept, 4) == train(anew, 4)
    assert_same_weights(kept, anew)
    assert (anew.memories[0].start, anew.memories[0].scores) == ({}, None)


DECAYS: dict[str, Make] = {
    "sgd": lambda p: SGD(p, lr=0.05, weight_decay=0.1),
    "sgd maximize": lambda p: SGD(p, lr=0.05, weight_decay=0.1, maximize=True),
    "momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    # With a small eps all first steps of Adam are alike.
    "adamw": lambda p: AdamW(p, lr=1e-2, eps=1.0, weight_decay=0.5),
    "adam": lambda p: Adam(p, lr=1e-2, eps=1.0, weight_decay=0.1),
}


@pytest.mark.parametrize("make", DECAYS)
def test_weight_decay_does_not_choose(make: str) -> None:
    """At the first step, with nothing tracked, the choice is that of the same optimizer without decay."""

    def without(parameters: Iterable[nn.Parameter]) -> Optimizer:
        optimizer = DECAYS[make](parameters)
        optimizer.param_groups[0]["weight_decay"] = 0.0
        return optimizer

    spared, bare, inside = (
        begin(DropBack(0.1), DECAYS[make]),
        begin(DropBack(0.1), without),
        begin(DropBack(0.1, decay_in_score=True), DECAYS[make]),
    )
    for trained in (spared, bare, inside):
        train(trained, 1)
    tracked = [trained.memories[0].marks for trained in (spared, bare, inside)]
    assert (tracked[0] != tracked[1]).sum() <= 4  # rounding, where two scores are nearly alike
    assert (tracked[2] != tracked[1]).sum() > 10
    for name, p in spared.graph.named_parameters():
        torch.testing.assert_close(p, bare.graph.get_parameter(name), rtol=1e-5, atol=1e-6)


def test_weight_decay_does_not_choose_where_a_closure_makes_the_gradients() -> None:
    plainly, closed = begin(DropBack(0.1), DECAYS["sgd"]), begin(DropBack(0.1), DECAYS["sgd"])
    train(plainly, 3)
    for number in range(3):
        closed.optimizer.step(lambda number=number: backward(closed, number))
    assert_same_weights(plainly, closed)


def test_tracked_weights_decay() -> None:
    session = begin(DropBack(0.1), DECAYS["sgd"])
    train(session, 2)
    masks = {name: mask.clone() for name, mask in session.memories[0].masks.items()}
    before = weights(session)
    backward(session, 2)
    for p in session.graph.parameters():
        p.grad.zero_()
    session.optimizer.step()
    for name, p in session.graph.named_parameters():
        stays = masks[name] & session.memories[0].masks[name]
        torch.testing.assert_close(p[stays], before[name][stays] * (1 - 0.05 * 0.1), rtol=1e-5, atol=1e-8)
    assert count(changed(session)) <= budget(session)


# -------------------------------------------------------------------------- the optimizer's state of k weights


def held_bytes(optimizer: Optimizer) -> int:
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize(("make", "kinds"), [("momentum", 1), ("adam", 3), ("adamw", 2), ("rmsprop", 2)])
def test_state_of_tracked_weights_only(make: str, kinds: int) -> None:
    session = begin(DropBack(0.1, tracked_state=True), EVERY_OPTIMIZER[make])
    for step in range(4):
        train(session, 1, step)
        saved = session.memories[0].state
        assert sum(values.numel() for state in saved.values() for values in state.values()) == kinds * budget(session)
        assert held_bytes(session.optimizer) <= 4 * 8 * len(session.optimizer.state)


@pytest.mark.parametrize("make", ["momentum", "adamw"])
def test_kept_state_outlives_a_cut_that_leaves_no_more_than_the_budget(make: str) -> None:
    session = begin(DropBack(0.6, tracked_state=True), EVERY_OPTIMIZER[make])
    train(session, 3)
    kept = {name: mask.clone() for name, mask in session.memories[0].masks.items()}
    plan = thinner(session.analysis, 0, 0.5)
    _, param_map = fxprune.rewrite(session.graph, session.analysis, plan)
    session.reconfigure(plan)
    assert size(session) <= budget(session) < sum(mask.numel() for mask in kept.values())
    packed = copy.deepcopy(session.memories[0].state)
    session.passes[0].after_backward(session, session.memories[0])
    for name, p in session.graph.named_parameters():
        tracked = param_map.slice(name, kept[name])
        for key, values in packed[name].items():
            state = session.optimizer.state[p][key]
            assert torch.equal(state[tracked], values)
            assert not state[~tracked].any()
    train(session, 2)
    assert session.memories[0].marks.all()


def test_momentum_goes_with_its_weight_and_begins_at_zero() -> None:
    session = begin(DropBack(0.1, tracked_state=True), lambda p: SGD(p, lr=0.05, momentum=0.9))
    begins, momentum, lr = weights(session), {}, 0.05
    momentum = {name: torch.zeros_like(p) for name, p in begins.items()}
    for step in range(6):
        backward(session, step)
        before = weights(session)
        momentum = {name: 0.9 * m + session.graph.get_parameter(name).grad for name, m in momentum.items()}
        session.optimizer.step()
        chosen = top(
            {name: (before[name] - lr * m - begins[name]).abs() for name, m in momentum.items()}, budget(session)
        )
        momentum = {name: m * chosen[name] for name, m in momentum.items()}
        differ = sum(int((chosen[name] != mask).sum()) for name, mask in session.memories[0].masks.items())
        assert differ <= 2  # rounding
        for name, state in session.memories[0].state.items():
            mask = session.memories[0].masks[name]
            if torch.equal(mask, chosen[name]):
                torch.testing.assert_close(state["momentum_buffer"], momentum[name][mask])
            else:
                return


# ------------------------------------------------------------------------------------- cuts, checkpoints


@pytest.mark.parametrize("make", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("options", [{}, {"tracked_state": True}, {"select_every": 2}, {"start_decay": 0.99}])
def test_the_budget_is_kept_through_cuts(make: str, options: dict[str, Any]) -> None:
    session = begin(DropBack(0.2, **options), EVERY_OPTIMIZER[make], Thin(), verify=True)
    k = budget(session)
    names = {p: name for name, p in session.graph.named_parameters()}
    for epoch in range(3):
        for step in range(3):
            train(session, 1, 10 * epoch + step)
            assert 0 < count(changed(session)) <= k
        kept, before = changed(session), weights(session)
        state = {names[p]: dict(values_of) for p, values_of in session.optimizer.state.items()}
        masks = {name: mask.clone() for name, mask in session.memories[-1].masks.items()}
        packed = copy.deepcopy(session.memories[-1].state or {})
        plan = thinner(session.analysis, session.epoch)
        _, param_map = fxprune.rewrite(session.graph, session.analysis, plan)
        assert session.epoch_end().removed > 0
        for name, p in session.graph.named_parameters():
            assert torch.equal(p, param_map.slice(name, before[name]))
            assert torch.equal(changed(session)[name], param_map.slice(name, kept[name]))
            for key, values in packed.get(name, {}).items():
                dense = torch.zeros_like(before[name]).masked_scatter_(masks[name], values)
                expected = param_map.slice(name, dense)[param_map.slice(name, masks[name])]
                assert torch.equal(session.memories[-1].state[name][key], expected)
        assert session.memories[-1].settled is False
        assert budget(session) == k
        assert state or make == "sgd"


def test_a_step_after_a_cut_is_that_of_algorithm_1() -> None:
    session = begin(DropBack(0.1), plain)
    train(session, 3)
    session.reconfigure(thinner(session.analysis, 0))
    begins = {name: start_of(session.graph).values(name) for name, _ in session.graph.named_parameters()}
    before = weights(session)
    backward(session, 9)
    after = {name: p.detach().add(p.grad, alpha=-0.05) for name, p in session.graph.named_parameters()}
    session.optimizer.step()
    chosen = top({name: (after[name] - begins[name]).abs() for name in after}, budget(session))
    for name, p in session.graph.named_parameters():
        assert torch.equal(p, torch.where(chosen[name], after[name], begins[name]))
        assert not torch.equal(p, before[name]) or not chosen[name].any()


class Steered(nn.Module):
    """Plain Python that looks at values calls the parts, which have graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv_bn(3, 8), nn.Sequential(Residual(8, 8), head(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.body(x if x.sum() > 0 else x.flip(0))


def test_models_that_plain_python_steers(tmp_path: Path) -> None:
    model = fxprune.initialize(Steered().train(), 3)
    example = torch.randn(2, 3, 8, 8)
    session = Session(model, example, MOMENTUM(model.parameters()), [Thin(), DropBack(0.2)], progress=False)
    for epoch in range(2):
        train(session, 3, 10 * epoch)
        assert count(changed(session)) == budget(session)
        assert session.epoch_end().removed > 0
    fxprune.save(session.graph, tmp_path / "model.safetensors")
    again = fxprune.load(tmp_path / "model.safetensors", Steered().train())
    assert_equal("state", dict(again.state_dict()), dict(session.graph.state_dict()))
    x, _ = batch(0)
    assert torch.equal(again(x), session.model(x))


def test_prunetrain_beside_dropback() -> None:
    """Start values that decay let channels reach zero, where PruneTrain finds them."""
    pruner = PruneTrain(ratio=0.6, interval=1, threshold=1e-3, proximal=True)
    session = begin(DropBack(0.15, start_decay=0.9), lambda p: SGD(p, lr=0.1), pruner, verify=True)
    removed = 0
    for epoch in range(4):
        for step in range(30):
            x, y = batch(30 * epoch + step)
            session.optimizer.zero_grad()
            task = F.cross_entropy(session.model(x), y)
            (task + session.penalty(task)).backward()
            session.optimizer.step()
            assert count(changed(session)) <= budget(session)
        removed += session.epoch_end().removed
    assert removed > 0


@pytest.mark.parametrize("make", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize(
    "options",
    [{}, {"tracked_state": True}, {"select_every": 3}, {"freeze": 1}, {"start_decay": 0.9}, {"rule": "quantile"}],
)
def test_a_run_goes_on_bit_equal(make: str, options: dict[str, Any], tmp_path: Path) -> None:
    dropback = DropBack(0.2, **options)
    uninterrupted = begin(dropback, EVERY_OPTIMIZER[make], Thin(interval=2))
    train(uninterrupted, 4)
    uninterrupted.epoch_end()
    train(uninterrupted, 1, 4)
    uninterrupted.epoch_end()
    train(uninterrupted, 1, 5)
    uninterrupted.save(tmp_path / "run.pt")
    fresh = network(seed=8)  # its weights do not matter, and neither does its seed
    resumed = Session.load(
        tmp_path / "run.pt", fresh, EXAMPLE, EVERY_OPTIMIZER[make](fresh.parameters()), progress=False
    )
    assert_same_weights(resumed, uninterrupted)
    assert resumed.passes == uninterrupted.passes
    for first in (6, 10):
        assert train(resumed, 4, first) == train(uninterrupted, 4, first)
        assert_same_weights(resumed, uninterrupted)
        assert resumed.epoch_end().removed == uninterrupted.epoch_end().removed
    for trained in (resumed, uninterrupted):
        trained.passes[-1].before_save(trained, trained.memories[-1])
    assert_equal("memory", *(saved_values(session.memories[-1]) for session in (resumed, uninterrupted)))


def test_a_checkpoint_loads_into_a_model_that_was_not_initialised(tmp_path: Path) -> None:
    session = begin(DropBack(0.2), MOMENTUM)
    train(session, 3)
    session.save(tmp_path / "run.pt")
    model = nn.Sequential(conv_bn(3, 8), Residual(8, 8), Residual(8, 8), head(8)).train()
    again = Session.load(tmp_path / "run.pt", model, EXAMPLE, MOMENTUM(model.parameters()), progress=False)
    assert train(again, 2, 3) == train(session, 2, 3)


@pytest.mark.parametrize("options", [{}, {"start_decay": 0.9}, {"tracked_state": True}])
def test_a_trainer_goes_on_with_its_own_checkpoint_of_the_weights(options: dict[str, Any]) -> None:
    first = begin(DropBack(0.2, **options), MOMENTUM)
    train(first, 3)
    second = begin(DropBack(0.2, **options), MOMENTUM)
    second.graph.load_state_dict(first.graph.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    resume_run(second, parse_progress(copy.deepcopy(run_progress(first)), "a copy"))
    assert train(second, 3, 3) == train(first, 3, 3)
    assert_same_weights(second, first)


def test_a_session_goes_on_from_a_sparse_file(tmp_path: Path) -> None:
    session = begin(DropBack(0.2))
    train(session, 3)
    fxprune.save(session.graph, tmp_path / "model.safetensors")
    model = fxprune.load(tmp_path / "model.safetensors", network(seed=1))
    again = Session(model, EXAMPLE, plain(model.parameters()), [DropBack(0.2)], progress=False)
    assert train(again, 3, 3) == train(session, 3, 3)


def test_a_cut_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    session = begin(DropBack(0.2, tracked_state=True), MOMENTUM)
    train(session, 3)

    def fails(*_: Any) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(DropBack, "prepare", fails)
    with nothing_changes(session), pytest.raises(MemoryError):
        session.reconfigure(thinner(session.analysis, 0))
    monkeypatch.undo()
    twin = begin(DropBack(0.2, tracked_state=True), MOMENTUM)
    train(twin, 3)
    assert train(session, 2, 3) == train(twin, 2, 3)


# ------------------------------------------------------------------------------------------------ refused


def shared(rank: int, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Each rank has a part of every batch; cuts, a file. No norm: ranks train as one."""
    model: nn.Module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), head(8)).double().train()
    model, dense = fxprune.initialize(model, 3), copy.deepcopy(model)
    wrapped = DistributedDataParallel(model) if distributed.count_ranks() > 1 else model
    passes = [Thin(2), DropBack(0.2, **options)]
    session = Session(wrapped, EXAMPLE.double(), plain(model.parameters()), passes, progress=False)
    part = slice(distributed.own_rank(), None, distributed.count_ranks())
    for number in range(4):
        x, y = batch(number)
        session.optimizer.zero_grad()
        F.cross_entropy(session.model(x[part].double()), y[part]).backward()
        session.optimizer.step()
        session.epoch_end()
    session.save(Path(folder) / "run.pt")
    wrapped = DistributedDataParallel(dense) if distributed.count_ranks() > 1 else dense
    again = Session.load(Path(folder) / "run.pt", wrapped, EXAMPLE.double(), plain(dense.parameters()), progress=False)
    assert_equal("loaded", dict(again.graph.state_dict()), dict(session.graph.state_dict()))
    return {"state": dict(session.graph.state_dict()), "changed": changed(session), "budget": budget(session)}


@pytest.mark.parametrize("options", [{}, {"rule": "quantile"}, {"select_every": 2, "start_decay": 0.9}], ids=str)
def test_ranks_choose_together(ranks: Ranks, options: dict[str, Any], tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    results = ranks(2, tmp_path / "store", shared, str(tmp_path / "two"), options)
    assert_equal("ranks", results[0], results[1])
    alone = shared(0, str(tmp_path / "one"), options)
    assert count(alone["changed"]) <= alone["budget"]
    for name, mask in alone["changed"].items():
        assert torch.equal(mask, results[0]["changed"][name]), name
        torch.testing.assert_close(results[0]["state"][name], alone["state"][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, "budget=0.0 must be a count of weights, or a fraction"),
        ({"budget": 1.5}, "budget=1.5 must be a count"),
        ({"budget": -3}, "budget=-3 must be a count"),
        ({"budget": True}, "budget=True must be a count"),
        ({"budget": "5"}, "budget='5' must be a count"),
        ({"rule": "fast"}, "rule='fast' is not known; use 'exact' or 'quantile'"),
        ({"select_every": 0}, "select_every=0 must be a positive integer"),
        ({"freeze": 1.5}, "freeze=1.5 must be a positive integer"),
        ({"start_decay": 1.1}, "start_decay=1.1 must be a number at least 0 and at most 1"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        DropBack(**{"budget": 0.1, **options})


def test_a_model_without_a_seed_is_refused() -> None:
    model = nn.Sequential(conv_bn(3, 8), head(8))
    with pytest.raises(InitializeError, match=r"how 5 parameters started, such as 0.0.weight: call fxprune.initialize"):
        Session(model, EXAMPLE, plain(model.parameters()), [DropBack(0.1)], progress=False)


def test_a_budget_that_is_too_large_is_refused() -> None:
    with pytest.raises(PlanError, match=r"budget=1000000 is more than the \d+ weights that train in this model"):
        begin(DropBack(1_000_000))


def test_a_pass_behind_it_is_refused() -> None:
    model = network()
    with pytest.raises(PlanError, match=r"DropBack must be the last pass of a session.*Thin is"):
        Session(model, EXAMPLE, plain(model.parameters()), [DropBack(0.1), Thin()], progress=False)


def test_clicktrain_beside_it_is_refused() -> None:
    with pytest.raises(
        PlanError, match="DropBack puts weights back to their start values, ClickTrain sets them to zero"
    ):
        begin(DropBack(0.1), plain, ClickTrain())
    begin(DropBack(0.1, start_decay=0.9), plain, ClickTrain())


def test_an_optimizer_that_decays_in_its_own_way_is_refused() -> None:
    class Own(SGD.__mro__[1]):  # an Optimizer
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1, "weight_decay": 0.1})

    with pytest.raises(PlanError, match="does not know how Own decays weights"):
        begin(DropBack(0.1), Own)
    begin(DropBack(0.1, decay_in_score=True), Own)


def test_weights_that_were_loaded_are_refused_at_the_first_step() -> None:
    model = network()
    model.load_state_dict(network(seed=4).state_dict())
    session = Session(model, EXAMPLE, plain(model.parameters()), [DropBack(0.1)], progress=False)
    with pytest.raises(
        InitializeError, match=r"\d+ weights differ from their start value at the first step, and the budget is \d+"
    ):
        train(session, 1)


def test_weights_that_something_else_moved_are_refused_after_a_cut() -> None:
    session = begin(DropBack(0.1))
    train(session, 2)
    with torch.no_grad():
        session.graph.get_parameter("0.0.weight").add_(0.1)
    session.reconfigure(thinner(session.analysis, 0))
    with pytest.raises(InitializeError, match=r"\d+ weights of 0.0.weight that are not tracked differ"):
        train(session, 1)
