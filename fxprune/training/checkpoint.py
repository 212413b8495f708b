"""Checkpoints of a session: plain data and tensors in one file, written atomically, read without running its code."""

import random
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

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
from fxprune.hints import check_fields
from fxprune.rewrite.param_map import check_owned
from fxprune.rewrite.rewrite import rewrite
from fxprune.training import distributed
from fxprune.training.resumption import check_optimizer
from fxprune.training.run import Run, TrainingPass
from fxprune.training.state import RunState, cut_as_saved, state_of, take_over_state

FORMAT = "fxprune session 1"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read and found sound."""

    data: dict[str, Any]
    state: RunState
    passes: tuple[TrainingPass[Any], ...]
    options: dict[str, Any]
    start: Start | None  # of the model before any cut


def write_checkpoint(run: Run, path: str | Path) -> None:
    """Write a checkpoint: on the first rank; the others wait, and all have the same outcome.

    Raises:
        FileError: nothing can be written there, or a pass has options or memories that are not plain data.
    """
    require_type(path, (str, Path), "path", FileError)
    states = distributed.gather_values(random_state())  # every rank has random numbers of its own
    failed = ""
    if distributed.own_rank() == 0:
        try:
            save_atomically(checkpoint_contents(run, states), Path(path))
        except Exception as error:  # what can't be pickled fails in as many ways; the other ranks wait for the outcome
            failed = str(error) if isinstance(error, FileError) else f"can't write a checkpoint to {path}: {error}"
    failed = distributed.gather_values(failed)[0]
    if failed:
        raise FileError(failed)


def checkpoint_contents(run: Run, random_states: list[Any]) -> dict[str, Any]:
    """Everything that goes into the file."""
    data = state_of(run).to_plain()
    for part, training_pass in zip(data["passes"], run.passes, strict=True):
        part["options"] = options_of(training_pass)
    weights, aliases = without_aliases(dict(run.graph.state_dict()))
    weights, sparse = pack_sparse(weights, start_of(run.graph))
    return data | {
        "format": FORMAT,
        "model": weights,
        "aliases": aliases,
        "start": sparse,
        "optimizer": {"kind": type(run.optimizer).__name__, **run.optimizer.state_dict()},
        "registered": {name: thing.state_dict() for name, thing in run.registered.items()},
        "random": random_states,
    }


def options_of(training_pass: TrainingPass[Any]) -> dict[str, Any]:
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
    passes: Sequence[TrainingPass[Any]] | None,
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
        state = RunState.from_plain(data)
        graph = trace(model, example_inputs)
        compact, param_map = rewrite(graph, analyze(graph, example_inputs, **state.plan.options), state.plan)
        start = start_in(data["start"], graph) if data["start"] is not None else None
        if start is not None:
            data["model"] = unpack_sparse(data["model"], data["start"], start.after(param_map))
        data["model"] |= {name: data["model"][first] for name, first in data["aliases"].items()}
        check_state(compact, data["model"])
        check_owned(optimizer, set(graph.parameters()))
        check_optimizer(optimizer, data["optimizer"], compact, param_map)
        check_rest(data)
        chosen = tuple(passes) if passes is not None else tuple(map(pass_of, data["passes"]))
        names = [part.name for part in state.passes]
        if [type(training_pass).__name__ for training_pass in chosen] != names:
            raise FileError(f"it has the passes {names}, not those that were given")
    except (FxpruneError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, (LookupError, TypeError)) else str(error)
        raise FileError(f"{path} does not fit this {type(model).__name__} and its optimizer: {reason}") from error
    return Saved(
        data, state, chosen, {**state.plan.options, "batch_size": state.batch_size, "epochs": state.epochs}, start
    )


def check_rest(data: dict[str, Any]) -> None:
    """Raise an error unless random states and what was registered can be taken over."""
    for value in (*data["registered"].values(), *data["random"]):
        if not isinstance(value, dict):
            raise FileError(f"it is damaged: {value!r:.60} stands where a dict should be")
    before = random_state()
    try:
        for state in data["random"]:
            set_random_state(state)
    finally:
        set_random_state(before)


def pass_of(saved: dict[str, Any]) -> TrainingPass[Any]:
    """The pass that a checkpoint describes."""
    kind = TrainingPass.known.get(saved["name"])
    if kind is None:
        raise FileError(f"it has a pass {saved['name']!r}, which is not known here: import it first, or give passes=")
    if is_dataclass(kind):
        check_fields(kind, saved["options"])
    return kind(**saved["options"])


def restore_run(run: Run, saved: Saved, path: str | Path) -> None:
    """Put a checkpoint that ``read_checkpoint`` found sound into a new run.

    Raises:
        FileError: a pass can't take over what it remembered. Nothing is changed.
    """
    data = saved.data
    try:
        cut_as_saved(run, saved.state)
    except FileError as error:
        raise FileError(f"{path} does not fit the passes: {error}") from error
    run.graph.load_state_dict(data["model"])
    load_optimizer(run.optimizer, data["optimizer"])
    take_over_state(run, saved.state)
    run.unclaimed = data["registered"]
    if distributed.own_rank() < len(data["random"]):  # of more ranks than before, the new ones keep their own
        set_random_state(data["random"][distributed.own_rank()])


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load a state into ``optimizer``; numbers keep their dtype, which torch would make that of the parameter."""
    optimizer.load_state_dict({key: saved[key] for key in ("state", "param_groups")})
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for at, state in saved["state"].items():
        loaded = optimizer.state[held[at]]
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and loaded[key].dtype != value.dtype:
                loaded[key] = value.to(loaded[key].device)


def random_state() -> dict[str, Any]:
    """The state of the random number generators of torch, Python and numpy, as plain data."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *(float(number) for number in rest)),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set what ``random_state`` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), int(position), int(has_gauss), gauss))
