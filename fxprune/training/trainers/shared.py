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
from fxprune.training.log import Log
from fxprune.training.session import Session

FORMAT = "fxprune progress 1"


def session_progress(session: Session) -> dict[str, Any]:
    """What a session adds to the checkpoints of the trainer: plain data, and the tensors that passes remember."""
    for training_pass, memory in session._pairs():
        training_pass.before_save(session, memory)
    return {
        "format": FORMAT,
        "plan": (plan_of(session.graph) or Plan({}, session.analysis.sizes, session.analysis.options)).to_json(),
        "passes": [type(each).__name__ for each in session.passes],
        "saved": [memory.saved for memory in session.memories],
        "epoch": session.epoch,
        "step": session.step,
        "batch_size": session.batch_size,
        "log": session.log.to_json(),
    }


def resume_session(session: Session, data: dict[str, Any]) -> None:
    """Bring a new session to where ``progress`` was called: cut the model, and give the passes what they remembered.

    Raises:
        SessionError: the session has other passes, or the model was cut otherwise.
    """
    passes = [type(each).__name__ for each in session.passes]
    if data["passes"] != passes:
        raise SessionError(f"the checkpoint is of a session with the passes {data['passes']}, this one has {passes}")
    plan = Plan.from_json(data["plan"])
    if lacks_plan(session.graph, plan):
        session._reconfigure(plan)
    for training_pass, memory, saved in zip(session.passes, session.memories, data["saved"], strict=True):
        memory.saved = saved
        training_pass.prepare(session, memory)
    session.epoch, session.step, session.batch_size = data["epoch"], data["step"], data["batch_size"]
    session.log = Log.from_json(data["log"])


def write_progress(session: Session, folder: str | Path) -> None:
    """Put ``progress`` into a folder of the trainer, as ``fxprune.pt``. One rank calls this."""
    save_atomically(session_progress(session), Path(folder) / "fxprune.pt")


def read_progress(folder: str | Path) -> dict[str, Any]:
    """What ``write`` wrote.

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
    return check_progress(data, path)


def check_progress(data: Any, where: object) -> dict[str, Any]:
    """``data``, or FileError unless it came from ``progress``."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FileError(f"{where} does not hold what a session wrote ({FORMAT!r}); is it of another version?")
    return data


def put_session(
    owner: nn.Module, part: str, example_inputs: Any, plan: Plan | None, optimizers: Sequence[Optimizer] = ()
) -> Model:
    """Replace a part of ``owner`` by its trace, which shares its parameters, and carry out ``plan`` on it, in place."""
    names = [name for name, _ in owner.named_modules() if name]
    if part not in names:
        raise SessionError(f"{type(owner).__name__} has no module {part!r}; it has {', '.join(names[:20]) or 'none'}")
    given = owner.get_submodule(part)
    graph = trace(given, example_inputs)
    if plan is not None and lacks_plan(graph, plan):
        options = {key: value for key, value in plan.options.items() if key in ("heads", "groups")}
        analysis = analyze(graph, example_inputs, **options)
        reconfigure(graph, analysis, plan, optimizers, others=set(owner.parameters()))
    owner.set_submodule(part, graph)
    return graph


def lacks_plan(graph: Model, plan: Plan) -> bool:
    """Whether ``plan`` has still to be carried out on ``graph``.

    Raises:
        SessionError: another one was.
    """
    own = plan_of(graph)
    if own is not None and own.keep and own != plan:
        raise SessionError(
            "the checkpoint is of a wider or otherwise cut model than this one is now. Load it into a new, dense model."
        )
    return bool(plan.keep) and own != plan


def plan_of(graph: Model) -> Plan | None:
    """What was cut from a traced model so far."""
    record = graph.meta.get("fxprune")
    return Plan.from_json(record["plan"]) if record else None
