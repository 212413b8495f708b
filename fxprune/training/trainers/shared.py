"""Sessions under a trainer of another library, which saves the model, the optimizer and the random numbers itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fxprune.channels.analysis import analyze
from fxprune.errors import FileError, SessionError
from fxprune.graph.trace import trace
from fxprune.graph.traced import Model
from fxprune.plan import Plan
from fxprune.training.checkpoint import save_atomically
from fxprune.training.cut import reconfigure
from fxprune.training.run import Run
from fxprune.training.state import RunState, cut_as_saved, lacks_plan, state_of, take_over_state

FORMAT = "fxprune progress 2"
FIRST = "fxprune progress 1"  # had the names of the passes, and beside them what they remember


def run_progress(run: Run) -> dict[str, Any]:
    """What a run adds to the checkpoints of the trainer: plain data, and the tensors that passes remember."""
    return {"format": FORMAT, **state_of(run).to_plain()}


def resume_run(run: Run, state: RunState) -> None:
    """Bring a new run to where ``run_progress`` was called: cut the model, and give the passes what they remembered.

    Raises:
        SessionError: the run has other passes, or the model was cut otherwise.
        FileError: a pass can't take over what it remembered.
    """
    cut_as_saved(run, state)
    take_over_state(run, state)


def write_progress(run: Run, folder: str | Path) -> None:
    """Put ``run_progress`` into a folder of the trainer, as ``fxprune.pt``. One rank calls this."""
    save_atomically(run_progress(run), Path(folder) / "fxprune.pt")


def read_progress(folder: str | Path) -> RunState:
    """What ``write_progress`` wrote.

    Raises:
        FileError: it is not there, truncated, or another kind of file.
    """
    path = Path(folder) / "fxprune.pt"
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in any of a dozen ways
        raise FileError(
            f"can't read what a session wrote from {path}: {type(error).__name__}: {error}. Was the checkpoint saved "
            "without fxprune?"
        ) from error
    return parse_progress(data, path)


def parse_progress(data: Any, where: object) -> RunState:
    """The state in ``data``, or FileError unless it came from ``run_progress``."""
    if not isinstance(data, dict) or data.get("format") not in (FIRST, FORMAT):
        raise FileError(f"{where} does not hold what a session wrote ({FORMAT!r}); is it of another version?")
    try:
        if data["format"] == FIRST:
            pairs = zip(data["passes"], data["saved"], strict=True)
            data = data | {"passes": [{"name": name, "saved": saved} for name, saved in pairs]}
        return RunState.from_plain(data)
    except (FileError, LookupError, TypeError, ValueError) as error:
        raise FileError(f"{where} holds what a session wrote, but it is damaged: {error}") from error


def put_session(
    owner: nn.Module, part: str, example_inputs: Any, plan: Plan | None, optimizers: Sequence[Optimizer] = ()
) -> Model:
    """Replace a part of ``owner`` by its trace, which shares its parameters, and carry out ``plan`` on it, in place."""
    names = [name for name, _ in owner.named_modules() if name]
    if part not in names:
        raise SessionError(f"{type(owner).__name__} has no module {part!r}; it has {', '.join(names[:20]) or 'none'}")
    module = owner.get_submodule(part)
    graph = trace(module, example_inputs)
    if plan is not None and lacks_plan(graph, plan):
        analysis = analyze(graph, example_inputs, **plan.options)
        reconfigure(graph, analysis, plan, optimizers, outer=set(owner.parameters()))
    owner.set_submodule(part, graph)
    return graph
