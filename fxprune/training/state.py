"""Where a run is, as plain data and tensors: what the checkpoints of sessions and of trainers have in common."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fxprune.errors import FileError, SessionError
from fxprune.graph.traced import Model
from fxprune.plan import Plan
from fxprune.training import distributed
from fxprune.training.log import Log
from fxprune.training.memory import check_values, load_values, saved_values
from fxprune.training.reconfigure import cut_run
from fxprune.training.run import Run


@dataclass(frozen=True)
class PassState:
    """The name of a pass, and what it remembers: plain data and tensors by name."""

    name: str
    saved: Mapping[str, Any]


@dataclass(frozen=True)
class RunState:
    """How far a run is, what was cut, and what its passes remember. Weights and optimizers are not in it."""

    plan: Plan
    passes: tuple[PassState, ...]
    epoch: int
    step: int
    batch_size: int | None
    epochs: int | None
    log: Log

    def to_plain(self) -> dict[str, Any]:
        """The state as plain data and tensors."""
        return {
            "plan": self.plan.to_json(),
            "passes": [{"name": part.name, "saved": dict(part.saved)} for part in self.passes],
            "epoch": self.epoch,
            "step": self.step,
            "batch_size": self.batch_size,
            "epochs": self.epochs,
            "log": self.log.to_json(),
        }

    @classmethod
    def from_plain(cls, data: Any) -> "RunState":
        """The opposite of ``to_plain``; what else is in ``data`` is left out.

        Raises:
            FileError: something is not what it should be.
            LookupError, TypeError: something is missing, or not even of its kind.
        """
        plan = Plan.from_json(data["plan"])
        numbers = {"epoch": data["epoch"], "step": data["step"], "batch_size": data["batch_size"]}
        numbers["epochs"] = data.get("epochs")  # files of older versions lack it
        for name, value in numbers.items():
            if not (type(value) is int and 0 <= value < 2**48) and not (
                name in ("batch_size", "epochs") and value is None
            ):
                raise FileError(f"it is damaged: its {name} is {value!r:.60}, which is no such number")
        for part in data["passes"]:
            if not isinstance(part, dict):
                raise FileError(f"it is damaged: {part!r:.60} stands where a dict should be")
            if not isinstance(part["saved"], dict):
                raise FileError("it is damaged: what a pass remembers is no dictionary")
        passes = tuple(PassState(part["name"], part["saved"]) for part in data["passes"])
        return cls(plan, passes, **numbers, log=Log.from_json(data["log"]))


def state_of(run: Run) -> RunState:
    """Where ``run`` is now."""
    for training_pass, memory in run.pairs():
        training_pass.before_save(run, memory)
    return RunState(
        plan=plan_of(run.graph) or Plan({}, run.analysis.sizes, run.analysis.options),
        passes=tuple(PassState(type(p).__name__, saved_values(memory)) for p, memory in run.pairs()),
        epoch=run.epoch,
        step=run.step,
        batch_size=run.batch_size,
        epochs=run.epochs,
        log=Log(run.log),
    )


def check_fits(run: Run, state: RunState) -> bool:
    """Whether the plan of ``state`` has still to be carried out on ``run``.

    Raises:
        FileError: a pass can't take over what was remembered.
        SessionError: the run has other passes, or its model was cut otherwise.
    """
    names = [type(training_pass).__name__ for training_pass in run.passes]
    saved_names = [part.name for part in state.passes]
    if saved_names != names:
        raise SessionError(f"the checkpoint is of a session with the passes {saved_names}, this one has {names}")
    for memory, part in zip(run.memories, state.passes, strict=True):
        check_values(memory, part.saved)
    return lacks_plan(run.graph, state.plan)


def cut_as_saved(run: Run, state: RunState) -> None:
    """Cut a new run as far as ``state`` is cut; raises as ``check_fits`` does, and then nothing is changed."""
    with distributed.all_or_none():
        lacks_cut = check_fits(run, state)
    if lacks_cut:
        cut_run(run, state.plan)


def take_over_state(run: Run, state: RunState) -> None:
    """Give the passes of a run, which is cut as ``state`` says, what they remembered; and set its counters."""
    with distributed.all_or_none():
        for (training_pass, memory), part in zip(run.pairs(), state.passes, strict=True):
            load_values(memory, part.saved)
            run.prepare_pass(training_pass, memory)
    run.epoch, run.step, run.batch_size = state.epoch, state.step, state.batch_size
    run.epochs = run.epochs or state.epochs
    run.log = Log(state.log)


def lacks_plan(graph: Model, plan: Plan) -> bool:
    """Whether ``plan`` has still to be carried out on ``graph``.

    Raises:
        SessionError: another one was.
    """
    current = plan_of(graph)
    if current is not None and current.keep and current != plan:
        raise SessionError(
            "the checkpoint is of a wider or otherwise cut model than this one is now. Load it into a new, dense model."
        )
    return bool(plan.keep) and current != plan


def plan_of(graph: Model) -> Plan | None:
    """What was cut from a traced model so far."""
    record = graph.meta.get("fxprune")
    return Plan.from_json(record["plan"]) if record else None
