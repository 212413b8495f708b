"""A cut in the middle of training: law 2 for every optimizer, the same objects after it, all or nothing."""

import copy
import itertools
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from laws import (
    EVERY_OPTIMIZER,
    Lion,
    assert_all_close,
    assert_same_training,
    cuts_commute_with_steps,
    detached,
    outcome,
    sliced,
    thinner,
    zero_removed,
)
from models import MODELS, prepare
from runs import Thin, begin, nothing_changes, objects, traced, train
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Muon, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxprune
from fxprune import Analysis, Plan, Session
from fxprune.errors import FxpruneError, MigrationError, PlanError, SessionError, VerificationError
from fxprune.rewrite.branches import emptied_groups
from fxprune.training.memory import derived_field
from fxprune.training.run import Run, TrainingPass

RECONFIGURE, REWRITE = (sys.modules[f"fxprune.{name}"] for name in ("training.cut", "rewrite.rewrite"))
PRUNABLE = [name for name, case in MODELS.items() if case.prunable]


# ---------------------------------------------------------------------------------------------- law 2

SHAPES = ["residual_projection", "inception", "depthwise_separable", "shared_conv"]


@pytest.mark.parametrize("optimizer", EVERY_OPTIMIZER)
@pytest.mark.parametrize("name", SHAPES)
def test_cuts_commute_with_steps_of_every_optimizer(name: str, optimizer: str) -> None:
    graph, inputs = traced(name)
    cuts_commute_with_steps(graph, inputs, EVERY_OPTIMIZER[optimizer], steps=2 if name == "residual_projection" else 1)


@pytest.mark.parametrize("optimizer", [pytest.param("gentle momentum", marks=pytest.mark.slow), "adamw"])
@pytest.mark.parametrize("name", [name for name in PRUNABLE if name not in SHAPES])
def test_cuts_commute_with_steps_of_every_network(name: str, optimizer: str) -> None:
    graph, inputs = traced(name)
    makers = EVERY_OPTIMIZER | {"gentle momentum": lambda p: SGD(p, lr=1e-4, momentum=0.9, weight_decay=1e-2)}
    cuts_commute_with_steps(graph, inputs, makers[optimizer], mode=not MODELS[name].random, steps=1)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("name", ["residual", "residual_projection"])
def test_whole_branches_go_between_steps(name: str, optimizer: str, dropped: bool) -> None:
    """The first cut empties a residual branch, with its constant or all but it; two ordinary ones follow."""

    def plan(analysis: Analysis, cut: int) -> Plan:
        if cut:
            return thinner(analysis, cut)
        able = next(
            gone for group in analysis.groups if (gone := emptied_groups(analysis, {group}, constants=not dropped))
        )
        gone = sorted(able)
        return Plan(dict.fromkeys(gone, ()), analysis.sizes, analysis.options, gone if dropped else ())

    graph, inputs = traced(name)
    cuts_commute_with_steps(graph, inputs, EVERY_OPTIMIZER[optimizer], plan=plan)


def test_a_constant_that_stays_is_the_same_parameter() -> None:
    session, inputs = begin()
    session.model(*inputs).square().mean().backward()
    session.optimizer.step()
    shift = session.graph.get_parameter("1.bn.bias")
    sizes = session.analysis.sizes
    session.reconfigure(Plan({"1.conv1.0": ()}, sizes, session.analysis.options))
    assert session.graph.get_parameter("1.bn.bias") is shift
    before = shift.detach().clone()
    train(session, inputs)
    assert not torch.equal(shift, before)
    held = [p for group in session.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in session.graph.parameters()}


def test_muon_beside_adamw_goes_on() -> None:
    """Muon's update depends on the whole matrix and is computed in bfloat16: its momentum is held to the law."""
    graph, inputs = traced("vgg_flatten")
    model = copy.deepcopy(graph).requires_grad_()
    twin = copy.deepcopy(model)

    def both(of: nn.Module) -> tuple[Optimizer, Optimizer]:
        matrices = [p for p in of.parameters() if p.ndim == 2]
        return Muon(matrices, lr=1e-3), AdamW([p for p in of.parameters() if p.ndim != 2], lr=1e-3, eps=1e-4)

    (muon, adamw), (its_muon, its_adamw) = both(model), both(twin)
    session = Session(model, inputs, adamw, progress=False)
    session.register(muon=muon)
    for seed in range(2):
        for network in (model, twin):
            outcome(network, inputs, True, {}, seed)
        for optimizer in (muon, adamw, its_muon, its_adamw):
            optimizer.step()
    model.zero_grad()
    kept = session.reconfigure(thinner(session.analysis, 0, 0.5))
    zero_removed(twin, kept)
    for name, parameter in twin.named_parameters():
        if parameter in its_muon.state:
            its_muon.state[parameter]["momentum_buffer"][kept.removed(name, parameter)] = 0
    for network in (model, twin):
        outcome(network, inputs, True, {}, 3)
    for optimizer in (adamw, its_adamw, muon, its_muon):
        optimizer.step()
    names = [name for name, p in model.named_parameters() if p.ndim == 2]
    actual, expected = dict(model.named_parameters()), dict(twin.named_parameters())
    for name in names:
        momentum = muon.state[actual[name]]["momentum_buffer"]
        expected_momentum = its_muon.state[expected[name]]["momentum_buffer"]
        assert_all_close("momentum", {name: momentum}, sliced(kept, {name: expected_momentum}))
    remaining = [name for name in actual if name not in names]
    assert_all_close(
        "parameter",
        detached({name: actual[name] for name in remaining}),
        sliced(kept, detached({name: expected[name] for name in remaining})),
    )
    outcome(model, inputs, True, {}, 4)
    muon.step()


MUTATIONS = ["state dropped", "state of other channels", "weights of other channels", "buffers of other channels"]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_law_can_fail(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, inputs = traced("residual_projection")
    sliced_state, become = fxprune.ParamMap.sliced_state, RECONFIGURE.become_compact

    def dropped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return {parameter: {} for parameter in sliced_state(self, *args, **kwargs)}

    def rolled(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = sliced_state(self, *args, **kwargs)
        return {p: {key: value.roll(1, 0) for key, value in values.items()} for p, values in states.items()}

    def roll(kind: str) -> Callable[[Any, Any], None]:
        def broken(model: Any, compact: Any) -> None:
            tensors = [tensor for tensor in getattr(compact, kind)() if tensor.ndim]
            for tensor in tensors:
                tensor.data = tensor.data.roll(1, 0)
            become(model, compact)

        return broken

    match mutation:
        case "state dropped":
            monkeypatch.setattr(fxprune.ParamMap, "sliced_state", dropped)
        case "state of other channels":
            monkeypatch.setattr(fxprune.ParamMap, "sliced_state", rolled)
        case "weights of other channels":
            monkeypatch.setattr(RECONFIGURE, "become_compact", roll("parameters"))
        case "buffers of other channels":
            monkeypatch.setattr(RECONFIGURE, "become_compact", roll("buffers"))
    with pytest.raises(AssertionError, match=r"[01] cuts, step 1: |^parameter 0\.0\.weight"):
        cuts_commute_with_steps(graph, inputs, EVERY_OPTIMIZER["momentum"])


# --------------------------------------------------------------------------- state that can't be sliced


class Squared(SGD):
    """Keeps a preconditioner of the rows, beside torch's momentum."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None and parameter.ndim > 1:
                rows = parameter.grad.flatten(1)
                self.state[parameter]["left"] = rows @ rows.T
        return super().step(closure)


def test_a_preconditioner_is_refused_or_reset() -> None:
    session, inputs = begin("residual", lambda p: Squared(p, lr=1e-3))
    with nothing_changes(session), pytest.raises(MigrationError, match=r"state 'left' of [\w.]+ can't be sliced: "):
        session.reconfigure(thinner(session.analysis, 0))
    session, inputs = begin("residual", lambda p: Squared(p, lr=1e-3), reset_state=True)
    kept = session.reconfigure(thinner(session.analysis, 0))
    states = {name: session.optimizer.state.get(p, {}) for name, p in session.graph.named_parameters()}
    for name, state in states.items():
        if len(kept[name]) > 1:  # sums over columns stay what they are when columns go
            assert bool(state) == (kept[name][0] is None), f"{name} has {list(state)}"
    losses = train(session, inputs, 3)
    assert losses[-1] < losses[0]


def test_lbfgs_is_refused() -> None:
    graph, inputs = traced("residual")
    model = copy.deepcopy(graph).requires_grad_()
    optimizer = LBFGS(model.parameters(), lr=1e-3, max_iter=2)
    with Session(model, inputs, optimizer, progress=False, reset_state=True) as session:

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = session.model(*inputs).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        optimizer.zero_grad()
        with nothing_changes(session), pytest.raises(MigrationError, match="LBFGS keeps one flat history"):
            session.reconfigure(thinner(session.analysis, 0))
        optimizer.step(closure)


def test_a_registered_optimizer_is_held_to_the_same() -> None:
    session, _ = begin("vgg_flatten", lambda p: SGD(list(p)[:2], lr=1e-2))
    squared = Squared(list(session.graph.parameters())[2:], lr=1e-3)
    session.register(second=squared)
    outcome(session.graph, traced("vgg_flatten")[1], True, {})
    squared.step()
    session.graph.zero_grad()
    with nothing_changes(session), pytest.raises(MigrationError, match="'left'"):
        session.reconfigure(thinner(session.analysis, 0))
    foreign = SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    session.register(second=foreign)  # of another model: it stays as it is
    session.reconfigure(thinner(session.analysis, 0))


def test_the_map_of_a_cut_in_place_moves_no_optimizer() -> None:
    session, _ = begin()
    kept = session.reconfigure(thinner(session.analysis, 0))
    late = SGD(session.graph.parameters(), lr=1.0)
    with pytest.raises(MigrationError, match=r"session\.register\(name=optimizer\) before the cut"):
        kept.migrate(late)


# ---------------------------------------------------------------------------------------- same objects


@pytest.mark.parametrize("name", ["residual_projection", "shared_conv", "tied_parameter", "vit", "auxiliary_head"])
def test_everything_stays_the_same_object(name: str) -> None:
    session, inputs = begin(name, steps=0)
    before = objects(session)
    sizes = {key: tensor.shape for key, tensor in session.graph.state_dict().items()}
    for seed in range(2):
        session.reconfigure(thinner(session.analysis, seed))
        after = objects(session)
        assert list(after) == list(before)
        assert all(after[key] is before[key] for key in before)
    assert any(tensor.shape != sizes[key] for key, tensor in session.graph.state_dict().items())
    outcome(session.graph, inputs, True, {})
    for parameter in session.graph.parameters():
        assert parameter.grad is None or parameter.grad.shape == parameter.shape


def test_the_model_that_was_given_shares_the_parameters() -> None:
    model, inputs = prepare(MODELS["residual"])
    session = Session(model, inputs, SGD(model.parameters(), lr=1e-2), progress=False)
    session.reconfigure(thinner(session.analysis, 0))
    assert all(a is b for a, b in zip(model.parameters(), session.graph.parameters(), strict=True))


def test_hooks_go_on_firing() -> None:
    session, inputs = begin()
    fired: dict[str, list[Any]] = {}

    def note(event: str) -> Callable[..., None]:
        return lambda *values: fired.setdefault(event, []).append(shapes_in(values[-1]))

    conv = session.graph.get_submodule("1.conv1.0")
    weight = conv.get_parameter("weight")
    conv.register_forward_hook(note("forward"))
    conv.register_forward_pre_hook(note("pre"))
    conv.register_full_backward_hook(note("backward"))
    conv.register_full_backward_pre_hook(note("backward pre"))
    weight.register_hook(note("gradient"))
    weight.register_post_accumulate_grad_hook(note("accumulated"))
    session.model.register_forward_hook(note("model"))
    train(session, inputs)
    kept = session.reconfigure(thinner(session.analysis, 0))
    train(session, inputs)
    assert {event: len(calls) for event, calls in fired.items()} == dict.fromkeys(
        ("forward", "pre", "backward", "backward pre", "gradient", "accumulated", "model"), 2
    )
    rows, columns, *_ = kept["1.conv1.0.weight"]
    assert rows is not None
    assert columns is not None
    assert fired["gradient"][1] == fired["accumulated"][1] == [(len(rows), len(columns), 3, 3)]
    assert fired["forward"][1][0][1] == len(rows) < fired["forward"][0][0][1]
    assert fired["model"][0] == fired["model"][1]


def shapes_in(value: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in torch.utils._pytree.tree_leaves(value) if isinstance(tensor, Tensor)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_loss_that_lives_on_does_no_harm(dtype: torch.dtype) -> None:
    graph, inputs = traced("residual")
    model, inputs = copy.deepcopy(graph).requires_grad_().train().to(dtype), tuple(x.to(dtype) for x in inputs)
    session = Session(model, inputs, SGD(model.parameters(), lr=1e-3, momentum=0.9), progress=False)
    losses = []
    for seed in range(3):
        for _ in range(2):
            loss = session.model(*inputs).square().mean()
            losses.append(loss)
            session.optimizer.zero_grad()
            loss.backward(retain_graph=True)
            session.optimizer.step()
        session.reconfigure(thinner(session.analysis, seed))
        assert all(p.dtype == dtype for p in model.parameters())
    assert len(losses) == 6


def test_channels_last_stays() -> None:
    graph, inputs = traced("residual_projection")
    model = copy.deepcopy(graph).requires_grad_().train().to(memory_format=torch.channels_last)
    inputs = tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)
    session = Session(model, inputs, SGD(model.parameters(), lr=1e-2, momentum=0.9), progress=False)
    train(session, inputs, 2)
    session.reconfigure(thinner(session.analysis, 0))
    train(session, inputs)
    images = [p for p in model.parameters() if p.ndim == 4]
    images += [state["momentum_buffer"] for p, state in session.optimizer.state.items() if p.ndim == 4]
    assert len(images) > 8
    assert all(image.is_contiguous(memory_format=torch.channels_last) for image in images)
    assert any(not image.is_contiguous() for image in images)
    assert session.graph.get_submodule("0.0")(*inputs).is_contiguous(memory_format=torch.channels_last)


def test_channels_last_stays_in_three_dimensions() -> None:
    graph, inputs = traced("conv3d")
    model = copy.deepcopy(graph).requires_grad_().to(memory_format=torch.channels_last_3d)
    session = Session(model, inputs, SGD(model.parameters(), lr=1e-2), progress=False)
    session.reconfigure(thinner(session.analysis, 0))
    volumes = [p for p in model.parameters() if p.ndim == 5]
    assert volumes
    assert all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in volumes)


def test_parameters_that_do_not_train_are_cut() -> None:
    graph, inputs = traced("residual")
    model = copy.deepcopy(graph).requires_grad_().train()
    fixed = model.get_submodule("0").requires_grad_(False)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2, momentum=0.9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    session = Session(model, inputs, optimizer, progress=False)
    kept = session.reconfigure(thinner(session.analysis, 0))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, kept.slice(name, before[name]))
    assert not any(p.requires_grad for p in fixed.parameters())
    train(session, inputs, 2)
    assert torch.equal(fixed.get_parameter("0.weight"), kept.slice("0.0.weight", before["0.0.weight"]))


def test_an_optimizer_of_a_part_and_groups_of_their_own() -> None:
    graph, inputs = traced("residual")
    model = copy.deepcopy(graph).requires_grad_().train()
    head, body = list(model.get_submodule("4").parameters()), list(model.get_submodule("1").parameters())
    optimizer = SGD([{"params": body, "lr": 1e-3}, {"params": head, "lr": 1e-1, "momentum": 0.5}], lr=1e-2)
    session = Session(model, inputs, optimizer, progress=False)
    train(session, inputs, 2)
    model.zero_grad()
    session.reconfigure(thinner(session.analysis, 0))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-1]
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], body, strict=True))
    stem = model.get_submodule("0").get_parameter("0.weight").detach().clone()
    first = [p.detach().clone() for p in (*body, *head)]
    train(session, inputs)
    assert torch.equal(stem, model.get_submodule("0").get_parameter("0.weight"))
    assert all(not torch.equal(p, before) for p, before in zip((*body, *head), first, strict=True))


def test_a_list_made_before_the_cut_clips_gradients() -> None:
    session, inputs = begin()
    parameters = list(session.graph.parameters())
    session.reconfigure(thinner(session.analysis, 0))
    session.model(*inputs).square().mean().mul(1e4).backward()
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    assert norm > 10
    flat = torch.cat([p.grad.flatten() for p in session.graph.parameters() if p.grad is not None])
    assert flat.norm().item() == pytest.approx(1, rel=1e-4)
    session.optimizer.step()


def test_gradients_that_were_used_are_cut_too() -> None:
    """``zero_grad`` may come after the cut, and other parameters than the optimizer's may hold gradients."""
    session, inputs = begin()
    session.model(*inputs).square().mean().backward()
    session.optimizer.step()
    before = {name: p.grad.clone() for name, p in session.graph.named_parameters() if p.grad is not None}
    kept = session.reconfigure(thinner(session.analysis, 0))
    assert before
    for name, parameter in session.graph.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, kept.slice(name, before[name]))


@pytest.mark.parametrize("use_buffers", [False, True])
def test_copies_are_cut_along(use_buffers: bool) -> None:
    session, inputs = begin()
    ema = AveragedModel(session.model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    teacher = copy.deepcopy(session.model)
    session.register(ema=ema, teacher=teacher)
    train(session, inputs, 2)
    ema.update_parameters(session.model)
    train(session, inputs, 2)
    ema.update_parameters(session.model)
    members = {"ema": ema.module, "teacher": teacher}
    before = {role: {k: t.clone() for k, t in member.state_dict().items()} for role, member in members.items()}
    tensors = [*ema.parameters(), *ema.buffers()]
    kept = session.reconfigure(thinner(session.analysis, 0))
    for role, member in members.items():
        state = member.state_dict()
        assert list(state) == list(before[role])
        assert all(torch.equal(tensor, kept.slice(name, before[role][name])) for name, tensor in state.items())
        assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in state.values() if t.ndim)
    assert all(a is b for a, b in zip(tensors, (*ema.parameters(), *ema.buffers()), strict=True))
    tensors_of_model = {id(t) for t in session.graph.state_dict(keep_vars=True).values()}
    assert not tensors_of_model & {id(t) for t in tensors}
    train(session, inputs)
    ema.update_parameters(session.model)
    assert ema(*inputs).shape == teacher(*inputs).shape == session.model(*inputs).shape
    assert ema.eval()(*inputs).shape == session.model(*inputs).shape


def test_the_memory_of_what_was_removed_is_free() -> None:
    session, _ = begin()
    held = [*session.graph.parameters(), *session.graph.buffers()]
    states = [state["momentum_buffer"] for state in session.optimizer.state.values()]
    before = sum(tensor.untyped_storage().nbytes() for tensor in held)
    session.reconfigure(thinner(session.analysis, 0, 0.5))
    states = [state["momentum_buffer"] for state in session.optimizer.state.values()]
    for tensor in (*held, *states):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) < 0.5 * before


def test_a_cut_inside_autocast_drops_the_casts_it_keeps() -> None:
    graph, inputs = traced("residual")
    model, inputs = copy.deepcopy(graph).requires_grad_().train().float(), tuple(x.float() for x in inputs)
    session = Session(model, inputs, SGD(model.parameters(), lr=1e-3), progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        for seed in range(2):
            train(session, inputs)
            session.reconfigure(thinner(session.analysis, seed))
        train(session, inputs)


# -------------------------------------------------------------------------------------- all or nothing


@dataclass
class Tally:
    cuts: int = 0
    widths: dict[str, int] = derived_field()


class Unlucky(TrainingPass[Tally]):
    """A pass whose hook of this name raises, but for the first time."""

    def __init__(self, hook: str) -> None:
        self.hook, self.calls = hook, 0

    def _call(self, hook: str) -> None:
        self.calls += hook == self.hook
        if hook == self.hook and self.calls > (hook == "prepare"):
            raise RuntimeError(f"{hook} failed")

    def begin(self, run: Run) -> Tally:
        return Tally()

    def prepare(self, run: Run, memory: Tally) -> None:
        self._call("prepare")
        assert not hasattr(memory, "widths")
        memory.widths = run.analysis.sizes

    def after_epoch(self, run: Run, memory: Tally) -> Plan | None:
        self._call("after_epoch")
        return thinner(run.analysis, 0)

    def after_cut(self, run: Run, memory: Tally, param_map: fxprune.ParamMap) -> None:
        memory.cuts += 1
        self._call("after_cut")

    def report(self, run: Run, memory: Tally) -> dict[str, float]:
        self._call("report")
        return {}


@pytest.mark.parametrize("hook", ["prepare", "after_epoch", "after_cut", "report"])
def test_a_pass_that_fails_changes_nothing(hook: str) -> None:
    twin, inputs = begin(passes=[Thin()])
    twin.register(ema=copy.deepcopy(twin.model))
    session, _ = begin(passes=[Thin(), Unlucky(hook)])
    session.register(ema=copy.deepcopy(session.model))
    for trained in (session, twin):
        trained.optimizer.zero_grad(set_to_none=False)
    for _ in range(2):
        with nothing_changes(session), pytest.raises(RuntimeError, match=f"{hook} failed"):
            session.epoch_end()
        assert train(session, inputs, 2) == train(twin, inputs, 2)


def no_state(session: Session) -> None:
    weight = session.graph.get_parameter("1.conv1.0.weight")
    session.optimizer.state[weight]["factors"] = torch.zeros(3)


def cut_copy(session: Session) -> None:
    copied = copy.deepcopy(session.graph)
    session.register(ema=copied)
    with Session(copied, session.example_inputs, SGD(copied.parameters(), lr=1.0), progress=False) as second:
        second.reconfigure(thinner(second.analysis, 9))


FAILURES: dict[str, tuple[Callable[[Session], None], type[Exception], str]] = {
    "state": (no_state, MigrationError, r"state 'factors' of 1\.conv1\.0\.weight can't be sliced: its shape is \(3,\)"),
    "copy": (
        cut_copy,
        SessionError,
        r"ema is no copy .*: its 0\.0\.weight has shape \(6, 3, 3, 3\), the model's \(8, 3",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("how", ["reconfigure", "epoch_end"])
def test_a_cut_that_is_refused_changes_nothing(how: str, failure: str) -> None:
    break_it, error, message = FAILURES[failure]
    session, inputs = begin(passes=[Thin()])
    twin, _ = begin()
    break_it(session)
    plan = thinner(session.analysis, 0)
    with nothing_changes(session), pytest.raises(error, match=message):
        _ = session.reconfigure(plan) if how == "reconfigure" else session.epoch_end()
    assert train(session, inputs, 2) == train(twin, inputs, 2)


def test_a_proof_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    session, inputs = begin(passes=[Thin()], verify=True)
    twin, _ = begin()
    rewrite = RECONFIGURE.rewrite

    def wrong(*args: Any) -> Any:
        compact, param_map = rewrite(*args)
        with torch.no_grad():
            compact.get_parameter("1.conv1.0.weight").neg_()
        return compact, param_map

    with monkeypatch.context() as patch:
        patch.setattr(RECONFIGURE, "rewrite", wrong)
        with nothing_changes(session), pytest.raises(VerificationError, match=r"1\.conv1\.0\.weight|output"):
            session.epoch_end()
        with nothing_changes(session), pytest.raises(VerificationError, match=r"1\.conv1\.0\.weight|output"):
            session.reconfigure(thinner(session.analysis, 0))
    assert train(session, inputs, 2) == train(twin, inputs, 2)
    session.epoch_end()
    assert session.log[-1].removed > 0


@pytest.mark.parametrize("module", ["rewrite.cut_tensor", "reconfigure.replace_data", "reconfigure.become_compact"])
@pytest.mark.parametrize("at", [0, 1, 9, 25])
def test_memory_that_runs_out_anywhere_changes_nothing(module: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    session, inputs = begin(passes=[Thin()])
    session.register(ema=copy.deepcopy(session.model))
    twin, _ = begin()
    where, name = {"rewrite": REWRITE, "reconfigure": RECONFIGURE}[module.partition(".")[0]], module.partition(".")[2]
    at = min(at, 1) if name == "become_compact" else at  # it is called once for the model and once for the copy
    real, calls = getattr(where, name), itertools.count()

    def failing(*args: Any) -> Any:
        if next(calls) == at:
            raise MemoryError(f"{name} failed")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, failing)
        with nothing_changes(session), pytest.raises(MemoryError, match=f"{name} failed"):
            session.epoch_end()
    assert train(session, inputs, 2) == train(twin, inputs, 2)
    session.epoch_end()
    assert session.log[-1].removed > 0


@pytest.mark.parametrize("plan", ["another model", "stale", "no plan"])
def test_plans_of_other_models_are_refused(plan: str) -> None:
    session, _ = begin()
    stale = thinner(session.analysis, 0)
    stranger, _ = begin("inception", steps=0)
    session.reconfigure(stale)
    plans: dict[str, tuple[Any, type[FxpruneError], str]] = {
        "another model": (thinner(stranger.analysis, 0), PlanError, r"group '[\w.]+' is in one but not in the other"),
        "stale": (stale, PlanError, r"group '[\w.]+' has 6 channels, the plan expects 8"),
        "no plan": ({"0.0": [1]}, SessionError, r"plan must be a Plan, but it is \{'0\.0': \[1\]\} \(dict\)"),
    }
    chosen, error, message = plans[plan]
    with nothing_changes(session), pytest.raises(error, match=message):
        session.reconfigure(chosen)


def test_lion_and_other_optimizers_keep_what_is_no_tensor() -> None:
    session, inputs = begin("residual", Lion)
    for state in session.optimizer.state.values():
        state |= {"count": 3, "name": "lion", "beta": torch.tensor(0.5), "nothing": None}
    session.reconfigure(thinner(session.analysis, 0))
    for parameter, state in session.optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape
        assert (state["count"], state["name"], state["beta"].item(), state["nothing"]) == (3, "lion", 0.5, None)
    train(session, inputs)


def test_three_cuts_are_one() -> None:
    """Cut thrice with no step between is the composed plan, as ParamMaps compose."""
    session, _ = begin("inception", Adam)
    twin = copy.deepcopy(session.graph)
    twin_optimizer = copy.deepcopy(session.optimizer)
    twin_optimizer.param_groups[0]["params"] = list(twin.parameters())
    twin_optimizer.state.clear()
    for p, q in zip(session.graph.parameters(), twin.parameters(), strict=True):
        twin_optimizer.state[q] = copy.deepcopy(session.optimizer.state[p])
    kept = session.reconfigure(thinner(session.analysis, 0))
    for seed in (1, 2):
        kept = kept.then(session.reconfigure(thinner(session.analysis, seed)))
    assert_same_training(session.graph, session.optimizer, twin, twin_optimizer, kept)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", ["a signal", "an error"])
@pytest.mark.parametrize("at", [1, 5, 20])
def test_a_second_interrupt_waits_for_the_undo(
    number: signal.Signals, first: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control-C, and again while the model is put back: at any tensor. It comes when that is done."""
    session, inputs = begin("residual_projection", passes=[Thin()])
    calls = itertools.count(1)
    undo = sys.modules["fxprune.training.undo"]
    replace_data = undo.replace_data

    def interrupted(tensor: Tensor, new: Tensor) -> None:
        if next(calls) == at:
            signal.raise_signal(number)
        replace_data(tensor, new)

    def fail(*_: Any) -> None:
        if first == "an error":
            raise MemoryError("no room")
        signal.raise_signal(number)

    def handler(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, handler)
    try:
        with monkeypatch.context() as patch, nothing_changes(session):
            patch.setattr(undo, "replace_data", interrupted)
            patch.setattr(Thin, "after_cut", fail)
            with pytest.raises(KeyboardInterrupt):
                session.reconfigure(thinner(session.analysis, 0))
        assert next(calls) > at
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    session.reconfigure(thinner(session.analysis, 0))
    train(session, inputs)
