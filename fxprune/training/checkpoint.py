"""Checkpoints of a session: plain data and tensors in one file, written atomically, read without running its code."""

import random
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from fxprune.atomic import replace_file
from fxprune.channels.analysis import analyze
from fxprune.errors import FileError, FxpruneError, require_type
from fxprune.files.model import check_state, without_aliases
from fxprune.files.sparse import pack_sparse, start_in, unpack_sparse
from fxprune.files.start import Start, start_of
from fxprune.graph.trace import trace
from fxprune.plan import Plan
from fxprune.rewrite.param_map import ParamMap, check_owned
from fxprune.rewrite.rewrite import rewrite
from fxprune.training import distributed
from fxprune.training.log import Log
from fxprune.training.passes import TrainingPass

if TYPE_CHECKING:
    from fxprune.training.session import Session

FORMAT = "fxprune session 1"


@runtime_checkable
class Stateful(Protocol):
    """What can be saved beside the model: schedulers, scalers, averaged models."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take over what ``state_dict`` returned."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read and found sound."""

    data: dict[str, Any]
    plan: Plan
    passes: tuple[TrainingPass, ...]
    options: dict[str, Any]
    start: Start | None  # of the model before any cut


def write_checkpoint(session: "Session", path: str | Path) -> None:
    """Write a checkpoint: on the first rank; the others wait, and all have the same outcome.

    Raises:
        FileError: nothing can be written there, or a pass has options or memories that are not plain data.
    """
    require_type(path, (str, Path), "path", FileError)
    states = distributed.gather_values(random_state())  # every rank has random numbers of its own
    failed = ""
    if distributed.own_rank() == 0:
        try:
            save_atomically(checkpoint_contents(session, states), Path(path))
        except Exception as error:  # what can't be pickled fails in as many ways; the other ranks wait for the outcome
            failed = str(error) if isinstance(error, FileError) else f"can't write a checkpoint to {path}: {error}"
    failed = distributed.gather_values(failed)[0]
    if failed:
        raise FileError(failed)


def checkpoint_contents(session: "Session", random_states: list[Any]) -> dict[str, Any]:
    """Everything that goes into the file."""
    for training_pass, memory in session._pairs():
        training_pass.before_save(session, memory)
    state, aliases = without_aliases(dict(session.graph.state_dict()))
    state, sparse = pack_sparse(state, start_of(session.graph))
    record = session.graph.meta.get("fxprune")
    plan = Plan.from_json(record["plan"]) if record else Plan({}, session.analysis.sizes, session.analysis.options)
    return {
        "format": FORMAT,
        "plan": plan.to_json(),
        "model": state,
        "aliases": aliases,
        "start": sparse,
        "optimizer": {"kind": type(session.optimizer).__name__, **session.optimizer.state_dict()},
        "passes": [
            {"name": type(each).__name__, "options": options_of(each), "saved": memory.saved}
            for each, memory in zip(session.passes, session.memories, strict=True)
        ],
        "registered": {name: thing.state_dict() for name, thing in session.registered.items()},
        "epoch": session.epoch,
        "step": session.step,
        "batch_size": session.batch_size,
        "log": session.log.to_json(),
        "random": random_states,
    }


def options_of(training_pass: TrainingPass) -> dict[str, Any]:
    """The fields of a pass."""
    if not is_dataclass(training_pass):
        raise FileError(f"{type(training_pass).__name__} is no dataclass, so its options can't be saved")
    return asdict(training_pass)


def save_atomically(data: dict[str, Any], path: Path) -> None:
    """Write the file, and put it into its place once it can be read again."""
    with replace_file(path, "a checkpoint") as partial:
        torch.save(data, partial)
        try:
            torch.load(partial, map_location="meta", weights_only=True)
        except Exception as error:
            raise FileError(
                f"can't write a checkpoint to {path}: something in it is not plain data and would not load again: "
                f"{error}"
            ) from error


def read_checkpoint(
    path: str | Path,
    model: nn.Module,
    example_inputs: Any,
    optimizer: Optimizer,
    passes: Sequence[TrainingPass] | None,
) -> Saved:
    """Read a checkpoint and see that it fits ``model`` and ``optimizer``. Neither is changed.

    Raises:
        FileError: it can't be read, or does not fit.
    """
    require_type(path, (str, Path), "path", FileError)
    if not Path(path).is_file():
        raise FileError(f"there is no file {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in any of a dozen ways
        line = next(iter(str(error).splitlines()), "")
        raise FileError(
            f"can't read a checkpoint from {path}: {type(error).__name__}: {line}. Is it truncated, or another kind of "
            "file?"
        ) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FileError(f"{path} is not a checkpoint that Session.save wrote ({FORMAT!r})")
    try:
        plan = Plan.from_json(data["plan"])
        options = {key: value for key, value in plan.options.items() if key in ("heads", "groups")}
        graph = trace(model, example_inputs)
        compact, param_map = rewrite(graph, analyze(graph, example_inputs, **options), plan)
        start = start_in(data["start"], graph) if data["start"] is not None else None
        if start is not None:
            data["model"] = unpack_sparse(data["model"], data["start"], start.after(param_map))
        data["model"] |= {name: data["model"][first] for name, first in data["aliases"].items()}
        check_state(compact, data["model"])
        check_owned(optimizer, set(graph.parameters()))
        check_optimizer(optimizer, data["optimizer"], param_map)
        check_rest(data)
        found = tuple(passes) if passes is not None else tuple(map(pass_of, data["passes"]))
        names = [each["name"] for each in data["passes"]]
        if [type(each).__name__ for each in found] != names:
            raise FileError(f"it has the passes {names}, not those that were given")
    except (FxpruneError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        what = f"{type(error).__name__}: {error}" if isinstance(error, (LookupError, TypeError)) else str(error)
        raise FileError(f"{path} does not fit this {type(model).__name__} and its optimizer: {what}") from error
    return Saved(data, plan, found, options | {"batch_size": data["batch_size"]}, start)


def check_optimizer(optimizer: Optimizer, state: dict[str, Any], param_map: ParamMap) -> None:
    """Raise FileError unless the saved state is of an optimizer like ``optimizer``, cut as ``param_map`` says."""
    kind = type(optimizer).__name__
    if state["kind"] != kind:
        raise FileError(f"the optimizer is {kind}, the file's {state['kind']}")
    mine = [sum(not param_map.is_gone(p) for p in group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in state["param_groups"]]
    if mine != theirs:
        raise FileError(f"the optimizer has {mine} parameters in its groups, the file {theirs}")
    if not all(isinstance(its, dict) for its in state["state"].values()):
        raise FileError("the optimizer's state in the file is damaged")


def check_rest(data: dict[str, Any]) -> None:
    """Raise an error unless log, counters, random states and what was registered can be taken over."""
    Log.from_json(data["log"])
    numbers = [data["epoch"], data["step"], *[data["batch_size"]] * (data["batch_size"] is not None)]
    kinds = [(numbers, int), (data["passes"], dict), (data["registered"].values(), dict), (data["random"], dict)]
    for values, kind in kinds:
        for value in values:
            if not isinstance(value, kind):
                raise FileError(f"it is damaged: {value!r:.60} stands where a {kind.__name__} should be")
    if not all(isinstance(each["saved"], dict) for each in data["passes"]):
        raise FileError("it is damaged: what a pass remembers is no dictionary")
    before = random_state()
    try:
        for state in data["random"]:
            set_random_state(state)
    finally:
        set_random_state(before)


def pass_of(saved: dict[str, Any]) -> TrainingPass:
    """The pass that a checkpoint describes."""
    kind = TrainingPass.known.get(saved["name"])
    if kind is None:
        raise FileError(f"it has a pass {saved['name']!r}, which is not known here: import it first, or give passes=")
    return kind(**saved["options"])


def restore_session(session: "Session", saved: Saved) -> None:
    """Put a checkpoint that ``read`` found sound into a new session."""
    data = saved.data
    if saved.plan.keep:
        session._reconfigure(saved.plan)
    session.graph.load_state_dict(data["model"])
    load_optimizer(session.optimizer, data["optimizer"])
    for training_pass, memory, its in zip(session.passes, session.memories, data["passes"], strict=True):
        memory.saved = its["saved"]
        training_pass.prepare(session, memory)
    session.epoch, session.step, session.batch_size = data["epoch"], data["step"], data["batch_size"]
    session.log = Log.from_json(data["log"])
    session._unclaimed = data["registered"]
    if distributed.own_rank() < len(data["random"]):  # of more ranks than before, the new ones keep their own
        set_random_state(data["random"][distributed.own_rank()])


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load a state into ``optimizer``; numbers keep their dtype, which torch would make that of the parameter."""
    optimizer.load_state_dict({key: saved[key] for key in ("state", "param_groups")})
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for at, state in saved["state"].items():
        mine = optimizer.state[held[at]]
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and mine[key].dtype != value.dtype:
                mine[key] = value.to(mine[key].device)


def random_state() -> dict[str, Any]:
    """The state of the random number generators of torch, Python and numpy, as plain data."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *(float(each) for each in rest)),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set what ``random_state`` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), int(position), int(has_gauss), gauss))
