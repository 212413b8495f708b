"""The session in a training loop: losses, schedulers, AMP, accumulation, passes, and what it refuses."""

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import thinner
from models import MODELS, cast, prepare
from runs import Thin, begin, nothing_changes, traced, train
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune import Plan, Session, passes
from fxprune.errors import AnalysisError, FxpruneError, MigrationError, PlanError, SessionError
from fxprune.training.memory import Memory, derived_field
from fxprune.training.run import Run, TrainingPass
from fxprune.training.when import Decision


def none_of(session: Session) -> Plan:
    """The plan that removes nothing."""
    return Plan({}, session.analysis.sizes, session.analysis.options)


# ----------------------------------------------------------------------------- a cut of nothing is nothing


def epochs(model: nn.Module, optimizer: Optimizer, shape: torch.Size) -> Iterator[float]:
    """Two epochs over shuffled random data; yields the loss of each step."""
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(24, *shape[1:]), torch.randn(24))
    model.train()
    for _ in range(2):
        for x, y in DataLoader(data, batch_size=4, shuffle=True):
            loss = (model(x).flatten(1).mean(1) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()


@pytest.mark.parametrize(
    "make", [lambda p: SGD(p, lr=1e-2, momentum=0.9, weight_decay=1e-3), lambda p: Adam(p, lr=1e-3)]
)
@pytest.mark.parametrize(
    "name", ["residual", "inception", "dropout", "stochastic_depth", "shared_conv", "vit", "batch_norm_mlp"]
)
def test_a_cut_of_no_channels_leaves_every_loss_as_it_is(name: str, make: Callable[[Any], Optimizer]) -> None:
    model, inputs = prepare(MODELS[name], dtype=torch.float32)
    dense, inputs = copy.deepcopy(model), cast(inputs, torch.float32)
    dense_optimizer = make(dense.parameters())
    expected = list(epochs(dense, dense_optimizer, inputs[0].shape))

    optimizer = make(model.parameters())
    with Session(model, inputs, optimizer, progress=False) as session:
        losses = []
        for step, loss in enumerate(epochs(session.model, optimizer, inputs[0].shape)):
            losses.append(loss)
            if step in (0, 5):
                optimizer.zero_grad()
                session.reconfigure(none_of(session))
    assert losses == expected
    assert len(losses) == 12
    for tensor, original in zip(session.graph.state_dict().values(), dense.state_dict().values(), strict=True):
        assert torch.equal(tensor, original)


# ----------------------------------------------------------------------------------------- schedulers

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "multi step": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.1),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.8)], milestones=[4]
    ),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_go_on(kind: str) -> None:
    metrics = [3.0, 2.0, 2.5, 1.0, 1.5, 1.6, 1.7, 1.8, 0.5]
    rates: list[list[tuple[float, float]]] = []
    for cuts in (False, True):
        session, inputs = begin(make=lambda p: SGD(p, lr=1e-3, momentum=0.9), steps=0, passes=[Thin(2)] if cuts else [])
        optimizer = session.optimizer
        scheduler = SCHEDULERS[kind](optimizer)
        seen = []
        for metric in metrics:
            train(session, inputs)
            session.epoch_end()
            scheduler.step(*[metric] if kind == "plateau" else [])
            seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        rates.append(seen)
        assert sum(bool(epoch.removed) for epoch in session.log) == (4 if cuts else 0)
        assert [epoch.lr for epoch in session.log][1:] == [lr for lr, _ in seen][:-1]
    assert rates[0] == rates[1]
    assert len({lr for lr, _ in rates[0]}) > 2


# ------------------------------------------------------------------------------------------------ AMP


@pytest.mark.parametrize("scaled", [False, True])
def test_autocast_and_a_gradient_scaler(scaled: bool) -> None:
    graph, inputs = traced("residual")
    model, inputs = copy.deepcopy(graph).requires_grad_().train().float(), cast(inputs, torch.float32)
    session = Session(model, inputs, SGD(model.parameters(), lr=1e-2, momentum=0.9), [Thin()], progress=False)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10, growth_interval=2)
    session.register(scaler=scaler)
    losses = []
    for _ in range(3):
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16):
                task = session.model(*inputs).float().square().mean()
                loss = task + session.penalty(task)
            session.optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(session.optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(session.optimizer)
            scaler.update()
            losses.append(task.item())
        assert session.epoch_end().removed > 0
    assert session.step == 12
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[3] < losses[0]
    assert losses[11] < losses[8]
    assert scaler.get_scale() == (2.0**16 if scaled else 1.0)


def test_a_step_that_the_scaler_skips_is_no_step() -> None:
    graph, inputs = traced("residual")
    model, inputs = copy.deepcopy(graph).requires_grad_().train().float(), cast(inputs, torch.float32)
    session = Session(model, inputs, SGD(model.parameters(), lr=1e-2), [Thin()], progress=False)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(session.model(*inputs).sum() * float("inf")).backward()
    scaler.step(session.optimizer)
    scaler.update()
    assert session.step == 0
    session.optimizer.zero_grad()
    assert session.epoch_end().removed > 0  # nothing waits: the gradients were dropped


def test_gradients_that_no_step_can_use_do_not_wait(tmp_path: Path) -> None:
    graph, inputs = traced("residual")
    model, inputs = copy.deepcopy(graph).requires_grad_().train().float(), cast(inputs, torch.float32)
    session = Session(model, inputs, SGD(model.parameters(), lr=1e-2), [Thin()], progress=False)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(session.model(*inputs).sum() * float("inf")).backward()
    scaler.step(session.optimizer)  # skipped, at the end of an epoch; zero_grad comes with the next step
    assert session.epoch_end().removed > 0
    session.save(tmp_path / "run.pt")


# --------------------------------------------------------------------------------------- accumulation


def half(session: Session, inputs: Any) -> None:
    """The first of two backward passes for one step."""
    session.model(*inputs).square().mean().backward()


def test_the_cut_waits_for_the_step() -> None:
    session, inputs = begin(passes=[Thin()])
    twin, _ = begin()
    for trained in (session, twin):
        half(trained, inputs)
    sizes = session.analysis.sizes
    record = session.epoch_end()
    assert record.notes == ("gradients wait for a step: the cut follows it",)
    assert (record.removed, session.analysis.sizes, session.epoch) == (0, sizes, 1)
    for trained in (session, twin):
        half(trained, inputs)
        trained.optimizer.step()
        trained.optimizer.zero_grad()
    assert session.analysis.sizes != sizes
    assert session.log[-1].removed == sum(sizes.values()) - sum(session.analysis.sizes.values())
    assert session.log[-1].cut_time > 0
    twin.reconfigure(thinner(twin.analysis, 0))
    assert train(session, inputs, 2) == train(twin, inputs, 2)
    session.reconfigure(thinner(session.analysis, 1))  # nothing waits any more


def test_no_cut_and_no_checkpoint_while_gradients_wait(tmp_path: Any) -> None:
    session, inputs = begin()
    plan = thinner(session.analysis, 0)
    half(session, inputs)
    with (
        nothing_changes(session),
        pytest.raises(SessionError, match=r"call optimizer\.step\(\) or"),
    ):
        session.reconfigure(plan)
    with pytest.raises(SessionError, match=r"are not saved: save after optimizer\.step"):
        session.save(tmp_path / "run.pt")
    assert not list(tmp_path.iterdir())
    session.optimizer.step()
    session.save(tmp_path / "run.pt")  # used, though not yet zeroed
    half(session, inputs)


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_were_dropped_do_not_wait(to_none: bool, tmp_path: Any) -> None:
    session, inputs = begin()
    half(session, inputs)
    session.optimizer.zero_grad(set_to_none=to_none)
    session.save(tmp_path / "run.pt")
    session.reconfigure(thinner(session.analysis, 0))
    train(session, inputs)


def test_a_plan_that_waits_is_not_lost_and_not_made_twice(tmp_path: Any) -> None:
    session, inputs = begin(passes=[Thin(2)])
    train(session, inputs)
    session.epoch_end()
    half(session, inputs)
    session.epoch_end()
    session.optimizer.zero_grad()
    with pytest.raises(SessionError, match="are not saved"):
        session.save(tmp_path / "run.pt")
    train(session, inputs)
    assert session.log[-1].removed > 0

    session, inputs = begin(passes=[Thin()])
    half(session, inputs)
    session.epoch_end()
    session.optimizer.zero_grad()
    session.reconfigure(thinner(session.analysis, 3))  # the user's own comes first
    train(session, inputs)
    assert session.log[-1].removed == 0


def test_a_cut_that_waited_and_is_refused_changes_nothing() -> None:
    session, inputs = begin(passes=[Thin()])
    twin, _ = begin()
    for trained in (session, twin):
        half(trained, inputs)
    session.epoch_end()
    weight = session.graph.get_parameter("1.conv1.0.weight")
    session.optimizer.state[weight]["factors"] = torch.zeros(3)
    sizes = session.analysis.sizes
    with pytest.raises(MigrationError, match="'factors'"):
        session.optimizer.step()
    twin.optimizer.step()
    assert session.analysis.sizes == sizes
    assert session.log[-1].removed == 0
    assert train(session, inputs, 2) == train(twin, inputs, 2)


def test_gradients_of_a_parameter_that_is_not_the_last_wait_too() -> None:
    graph, inputs = traced("unused_layer")
    model = copy.deepcopy(graph).requires_grad_()
    unused = {name for name, p in model.named_parameters()}
    session = Session(model, inputs, SGD(model.parameters(), lr=1e-2), progress=False)
    half(session, inputs)
    unused -= {name for name, p in model.named_parameters() if p.grad is not None}
    assert unused
    last = [name for name in dict(model.named_parameters()) if name in unused][-1]
    order = [p for name, p in model.named_parameters() if name != last] + [model.get_parameter(last)]
    session = Session(model, inputs, SGD(order, lr=1e-2), progress=False)
    half(session, inputs)
    with pytest.raises(SessionError, match="gradients wait"):
        session.reconfigure(thinner(session.analysis, 0))


# --------------------------------------------------------------------------------------------- passes


@dataclass
class Recorded:
    rows: int = 0
    made: bool = derived_field()


class Recorder(TrainingPass[Recorded]):
    """Writes down which hooks were called, and whether gradients were there."""

    def __init__(self, plan: Callable[[Run], Plan | None] = lambda run: None) -> None:
        self.calls: list[str] = []
        self.plan = plan

    def begin(self, run: Run) -> Recorded:
        self.calls.append("begin")
        return Recorded()

    def prepare(self, run: Run, memory: Recorded) -> None:
        self.calls.append("prepare")
        assert not hasattr(memory, "made")
        memory.made = True

    def penalty(self, run: Run, memory: Recorded, task: Tensor) -> Tensor | None:
        self.calls.append("penalty")
        return 2 * task

    def after_backward(self, run: Run, memory: Recorded) -> None:
        self.calls.append("backward")
        assert any(p.grad is not None for p in run.graph.parameters())

    def after_step(self, run: Run, memory: Recorded) -> None:
        self.calls.append("step")

    def after_epoch(self, run: Run, memory: Recorded) -> Plan | None:
        self.calls.append("epoch")
        return self.plan(run)

    def after_cut(self, run: Run, memory: Recorded, param_map: fxprune.ParamMap) -> None:
        self.calls.append("cut")
        kept = [index for axes in param_map.values() for index in axes if index is not None]
        memory.rows = sum(map(len, kept))

    def report(self, run: Run, memory: Recorded) -> dict[str, float]:
        return {"calls": float(len(self.calls))}


def test_hooks_of_a_pass_are_called_in_turn() -> None:
    recorder = Recorder(lambda session: thinner(session.analysis, 0))
    session, inputs = begin(steps=0, passes=[recorder])
    for _ in range(2):
        task = session.model(*inputs).square().mean()
        session.optimizer.zero_grad()
        (task + session.penalty(task)).backward()
        session.optimizer.step()
    record = session.epoch_end(accuracy=0.5)
    assert recorder.calls == ["begin", "prepare", *["penalty", "backward", "step"] * 2, "epoch", "cut", "prepare"]
    assert record.values == {"calls": 9.0, "accuracy": 0.5}
    assert session.memories[0].rows > 0
    assert (session.epoch, session.step) == (1, 2)


@pytest.mark.parametrize("named", [False, True])
def test_where_a_closure_makes_the_gradients_the_passes_see_them(named: bool) -> None:
    recorder = Recorder()
    session, inputs = begin(steps=0, passes=[recorder])

    def closure() -> Tensor:
        session.optimizer.zero_grad()
        task = session.model(*inputs).square().mean()
        (task + session.penalty(task)).backward()
        return task

    for _ in range(2):
        loss = session.optimizer.step(closure=closure) if named else session.optimizer.step(closure)
        assert isinstance(loss, Tensor)
    assert recorder.calls == ["begin", "prepare", *["penalty", "backward", "step"] * 2]


def test_penalties_add_up() -> None:
    session, inputs = begin(passes=[Recorder(), Thin(), Recorder()])
    task = session.model(*inputs).square().mean()
    assert session.penalty(task).item() == pytest.approx(4 * task.item())
    session, inputs = begin()
    zero = session.penalty(session.model(*inputs).sum())
    assert (zero.item(), zero.shape, zero.requires_grad) == (0.0, (), False)


def test_plans_of_several_passes_are_one() -> None:
    def first(session: Session) -> Plan:
        return Plan({"0.0": [0, 1, 2, 3], "2.conv1.0": [5]}, session.analysis.sizes, session.analysis.options)

    def second(session: Session) -> Plan:
        keep = {"0.0": [2, 3, 4], "2.conv1.0": [7], "1.conv1.0": [1, 2]}
        return Plan(keep, session.analysis.sizes, session.analysis.options)

    session, _ = begin(passes=[Recorder(first), Thin(99), Recorder(second)])
    before = session.analysis.sizes
    session.epoch_end()
    widths = {"0.0": 2, "2.conv1.0": 1, "1.conv1.0": 2}  # where nothing is in both, the first decides
    assert session.analysis.sizes == before | widths


def test_a_group_that_only_a_later_plan_empties_stays_whole() -> None:
    def first(session: Session) -> Plan:
        return Plan({"0.0": [0, 1, 2, 3]}, session.analysis.sizes, session.analysis.options)

    def second(session: Session) -> Plan:
        return Plan({"1.conv1.0": []}, session.analysis.sizes, session.analysis.options, ["1.conv1.0"])

    session, _ = begin(passes=[Recorder(first), Recorder(second)])
    before = session.analysis.sizes
    session.epoch_end()
    assert session.analysis.sizes == before | {"0.0": 4}


def test_somebody_decides_when_to_cut() -> None:
    asked = []

    def when(session: Session, plan: Plan, step_time: float, steps: int) -> Decision:
        asked.append((plan, step_time, steps))
        return Decision(len(asked) > 1, f"asked {len(asked)} times", 0.5)

    session, inputs = begin(passes=[Thin()], when=when, steps=3)
    assert [session.epoch_end().removed > 0 for _ in range(2)] == [False, True]
    assert [epoch.notes[0] for epoch in session.log] == ["asked 1 times", "asked 2 times"]
    assert [epoch.predicted for epoch in session.log] == [None, 0.5]
    assert asked[0][0].sizes == asked[1][0].sizes != session.analysis.sizes
    assert (asked[0][1] > 0, asked[0][2]) == (True, 3)
    train(session, inputs)


def test_a_closed_session_lets_go(capsys: pytest.CaptureFixture[str]) -> None:
    with begin(passes=[Thin()])[0] as session:
        inputs = session.example_inputs
    steps = session.step
    train(session, inputs, 2)
    assert session.step == steps
    for call in (session.epoch_end, lambda: session.reconfigure(none_of(session)), lambda: session.save("nowhere")):
        with nothing_changes(session), pytest.raises(SessionError, match="this session is closed"):
            call()
    assert capsys.readouterr().err == ""
    again = Session(session.model, inputs, session.optimizer, [Thin()], progress=False)
    assert again.model is session.model
    assert again.epoch_end().removed > 0


def test_an_optimizer_has_one_session_at_a_time() -> None:
    session, inputs = begin(passes=[Thin()])
    with nothing_changes(session), pytest.raises(SessionError, match=r"another session has this optimizer: close\(\)"):
        Session(session.model, inputs, session.optimizer, [Thin()])
    session.close()
    second = Session(session.model, inputs, session.optimizer, [Thin()], progress=False)
    session.close()  # a second time, which leaves the other one alone
    with pytest.raises(SessionError, match="another session"):
        Session(session.model, inputs, session.optimizer)
    assert second.epoch_end().removed > 0


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    session, _ = begin(passes=[Thin()], progress=True)
    session.epoch_end(accuracy=0.5)
    session.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert "epoch   1" in err
    assert "accuracy 0.5" in err
    assert f"-{session.log[-1].removed} channels" in err


def test_a_session_says_nothing_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    graph, inputs = traced("residual")
    model = copy.deepcopy(graph).requires_grad_()
    session = Session(model, inputs, SGD(model.parameters(), lr=1e-2), [Thin()])
    train(session, inputs)
    session.epoch_end()
    assert capsys.readouterr() == ("", "")


# --------------------------------------------------------------------------------------------- errors

SMALL = torch.zeros(1, 3, 8, 8, dtype=torch.float64)


def session_of(**changes: Any) -> Session:
    graph, inputs = traced("residual")
    model = changes.pop("model", copy.deepcopy(graph).requires_grad_())
    optimizer = changes.pop("optimizer", None) or SGD(model.parameters(), lr=1e-2)
    return Session(model, changes.pop("inputs", inputs), optimizer, **{"progress": False, **changes})


class Begins(TrainingPass[Any]):
    """Remembers what it is told to."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory

    def begin(self, run: Run) -> Any:
        return self.memory


REFUSED: dict[str, tuple[Callable[[], Any], type[FxpruneError], str]] = {
    "a criterion": (
        lambda: session_of(passes=[passes.Magnitude(p=2)]),
        SessionError,
        r"Magnitude\(minimum=0\.1.* can't stand in a session: it needs training passes",
    ),
    "a class": (
        lambda: session_of(passes=[passes.PruneTrain]),
        SessionError,
        r"<class '.*PruneTrain'> can't stand in a session",
    ),
    "another model's optimizer": (
        lambda: session_of(optimizer=SGD(nn.Linear(7, 5).parameters(), lr=1.0)),
        MigrationError,
        r"a parameter of shape \(5, 7\) that is not in the model",
    ),
    "no optimizer": (
        lambda: session_of(optimizer="sgd"),
        SessionError,
        r"optimizer must be a Optimizer, but it is 'sgd' \(str\)",
    ),
    "a pass that is not in a list": (
        lambda: session_of(passes=passes.PruneTrain()),
        SessionError,
        r"passes must be a Sequence, but it is PruneTrain\(",
    ),
    "a part of a sample": (
        lambda: session_of(batch_size=128.0),
        SessionError,
        r"batch_size=128\.0 must be a positive integer: samples a step",
    ),
    "a batch of nothing": (lambda: session_of(batch_size=0), SessionError, "batch_size=0 must be a positive integer"),
    "no policy": (lambda: session_of(when=3), SessionError, r"when=3 must be a function .*, or None"),
    "no writer": (lambda: session_of(writer="runs"), SessionError, "writer='runs' must have add_scalar"),
    "a flag": (lambda: session_of(verify="yes"), SessionError, "verify='yes' must be True or False"),
    "another flag": (lambda: session_of(reset_state=1), SessionError, "reset_state=1 must be True or False"),
    "no flag": (lambda: session_of(progress=0.5), SessionError, r"progress=0\.5 must be True or False, or None"),
    "nothing around": (lambda: session_of(around="net"), SessionError, "around='net' must be the module that has"),
    "no memory": (
        lambda: session_of(passes=[Begins({"cuts": 0})]),
        SessionError,
        r"Begins\.begin must return what the pass remembers, a dataclass .*; it returned \{'cuts': 0\}",
    ),
    "a frozen memory": (
        lambda: session_of(passes=[Begins(Thin())]),
        SessionError,
        r"a dataclass that is not frozen; it returned Thin\(",
    ),
    "no model": (
        lambda: session_of(model=lambda x: x, optimizer=SGD(nn.Linear(7, 5).parameters(), lr=1.0)),
        SessionError,
        r"model must be a Module, but it is <function .* \(function\)",
    ),
    "DataParallel": (
        lambda: session_of(model=nn.DataParallel(nn.Linear(2, 2))),
        SessionError,
        "DataParallel splits the model in a way that can't be cut",
    ),
    "other inputs": (
        lambda: session_of(inputs=torch.zeros(2, 5, 8, 8, dtype=torch.float64)),
        AnalysisError,
        "node _0_0 does not run on channel names, given the shapes .*: RuntimeError",
    ),
    "a loss for each sample": (lambda: session_of().penalty(torch.zeros(3)), SessionError, r"got tensor\(\[0., 0., 0."),
    "a number": (lambda: session_of().penalty(0.5), SessionError, r"with one element; got 0\.5"),  # type: ignore[arg-type]
    "something without state": (
        lambda: session_of().register(ema=3),
        SessionError,
        "ema=3 has no state_dict and load_state_dict",
    ),
    "a copy of another model": (
        lambda: session_of().register(teacher=copy.deepcopy(traced("inception")[0])),
        SessionError,
        r"teacher is no copy of the model as it is now: its [\w.]+ has shape",
    ),
    "ratio": (lambda: passes.PruneTrain(ratio=1.5), PlanError, r"ratio=1\.5 must be a number above 0 and below 1"),
    "no ratio": (lambda: passes.PruneTrain(ratio=0), PlanError, "ratio=0 must be a number above 0 and below 1"),
    "interval": (lambda: passes.PruneTrain(interval=0), PlanError, "interval=0 must be a positive integer"),
    "a broken interval": (lambda: passes.PruneTrain(interval=2.5), PlanError, r"interval=2\.5 must be a positive"),  # type: ignore[arg-type]
    "minimum": (lambda: passes.PruneTrain(minimum=-1), PlanError, "minimum=-1 must be a positive integer"),
    "round_to": (lambda: passes.PruneTrain(round_to=True), PlanError, "round_to=True must be a positive integer"),
    "threshold": (lambda: passes.PruneTrain(threshold=-1.0), PlanError, r"threshold=-1\.0 must be a number at least 0"),
    "a threshold that is none": (
        lambda: passes.PruneTrain(threshold=float("nan")),
        PlanError,
        "threshold=nan must be a number at least 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_session_refuses(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


def test_a_session_that_is_refused_leaves_no_hooks() -> None:
    graph, inputs = traced("residual")
    model = copy.deepcopy(graph).requires_grad_()
    optimizer = SGD(model.parameters(), lr=1e-2)

    class Failing(TrainingPass):
        def prepare(self, run: Run, memory: Memory) -> None:
            raise RuntimeError("no")

        def after_step(self, run: Run, memory: Memory) -> None:
            raise RuntimeError("still here")

    with pytest.raises(RuntimeError, match="no"):
        Session(model, inputs, optimizer, [Failing()], progress=False)
    model(*inputs).sum().backward()
    optimizer.step()


def test_prunetrain_cuts_in_a_loop() -> None:
    graph, inputs = traced("residual")
    model, inputs = copy.deepcopy(graph).requires_grad_().train().float(), cast(inputs, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        prunetrain = passes.PruneTrain(ratio=0.9, interval=2, threshold=0.3)
        session = Session(model, inputs, SGD(model.parameters(), lr=5e-2, momentum=0.9), [prunetrain], progress=False)
        for _ in range(4):
            for _ in range(10):
                task = session.model(*inputs).square().mean()
                session.optimizer.zero_grad()
                (task + session.penalty(task)).backward()
                session.optimizer.step()
            session.epoch_end()
    removed = [epoch.removed for epoch in session.log]
    assert (removed[0], removed[2]) == (0, 0)
    assert removed[1] > 0
    assert len({epoch.values["lambda"] for epoch in session.log}) == 1
