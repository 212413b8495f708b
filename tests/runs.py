"""Training runs for the tests of the session: begun, continued, copied and compared, bit for bit."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from laws import EVERY_OPTIMIZER, thinner
from models import MODELS, prepare
from torch import Tensor, nn

import fxprune
from fxprune import Plan, Session, TracedModule
from fxprune.errors import PlanError
from fxprune.training.memory import Memory, held_values, saved_fields
from fxprune.training.run import Run, TrainingPass


@dataclass(frozen=True)
class Thin(TrainingPass):
    """Cut an arbitrary ``part`` of each group every ``interval`` epochs."""

    interval: int = 1
    part: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.part < 1:
            raise PlanError(f"part={self.part!r} must lie between 0 and 1")

    def after_epoch(self, run: Run, memory: Memory) -> Plan | None:
        if (run.epoch + 1) % self.interval:
            return None
        return thinner(run.analysis, run.epoch, self.part)


@cache
def traced(name: str) -> tuple[TracedModule, Any]:
    """A case's trace and inputs, made once: nothing may change them."""
    model, inputs = prepare(MODELS[name])
    return fxprune.trace(model, inputs), inputs


def begin(name: str = "residual", make: Any = None, steps: int = 2, **options: Any) -> tuple[Session, Any]:
    """A session over a copy of a case, after a few steps."""
    graph, inputs = traced(name)
    model = copy.deepcopy(graph).requires_grad_().train()
    optimizer = (make or EVERY_OPTIMIZER["momentum"])(model.parameters())
    session = Session(model, inputs, optimizer, **{"progress": False, **options})
    train(session, inputs, steps)
    return session, inputs


def train(session: Session, inputs: Any, steps: int = 1) -> list[float]:
    """A few steps; the loss of each, exactly."""
    losses = []
    for _ in range(steps):
        loss = session.model(*inputs).square().mean()
        session.optimizer.zero_grad()
        loss.backward()
        session.optimizer.step()
        losses.append(loss.item())
    session.optimizer.zero_grad()
    return losses


def objects(session: Session) -> dict[str, Any]:
    """Everything that a loop may hold on to."""
    graph, optimizer = session.graph, session.optimizer
    return {
        "model": session.model,
        "graph": graph,
        "optimizer": optimizer,
        **{f"module {name}": module for name, module in graph.named_modules(remove_duplicate=False)},
        **{f"parameter {name}": p for name, p in graph.named_parameters(remove_duplicate=False)},
        **{f"buffer {name}": b for name, b in graph.named_buffers(remove_duplicate=False)},
        "groups": optimizer.param_groups,
        **{f"group {at}": group for at, group in enumerate(optimizer.param_groups)},
        **{f"held {at}": p for at, p in enumerate(p for g in optimizer.param_groups for p in g["params"])},
    }


def snapshot(session: Session) -> dict[str, Any]:
    """Everything of a run, copied."""
    models = {"model": session.graph} | {
        name: thing for name, thing in session.registered.items() if isinstance(thing, nn.Module)
    }
    return copy.deepcopy(
        {
            "state": {name: model.state_dict() for name, model in models.items()},
            "text": {name: str(model) for name, model in models.items()},
            "code": [graph.python_code("self").src for graph in session.graph.distinct_graphs().values()],
            "modes": [module.training for module in session.graph.modules()],
            "meta": session.graph.meta,
            "gradients": [p.grad for p in session.graph.parameters()],
            "optimizer": session.optimizer.state_dict(),
            "analysis": str(session.analysis),
            "memories": [remembered_values(memory) for memory in session.memories],
            "counters": (session.epoch, session.step, session.batch_size, session._pending, session._waiting),
            "log": session.log.to_json(),
        }
    )


def remembered_values(memory: Any) -> dict[str, Any]:
    """What a pass remembers: what is saved as it is, and of the rest whether it is there."""
    saved = saved_fields(memory).values()
    return {
        name: value if name in {part.name for part in saved} else type(value)
        for name, value in held_values(memory).items()
    }


def assert_equal(title: str, actual: Any, expected: Any) -> None:
    """Two trees hold the same, tensors bit for bit and in the same memory format."""
    assert type(actual) is type(expected), title
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype, title
        assert actual.stride() == expected.stride(), title
        assert torch.equal(actual, expected), title
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), title
        for key, value in expected.items():
            assert_equal(f"{title} {key}", actual[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), title
        for at, (item, expected_item) in enumerate(zip(actual, expected, strict=True)):
            assert_equal(f"{title} {at}", item, expected_item)
    else:
        assert actual == expected, title


@contextmanager
def nothing_changes(session: Session) -> Iterator[None]:
    """The block leaves the whole run as it was, bit for bit, and the same objects."""
    before, held = snapshot(session), objects(session)
    yield
    assert_equal("run", snapshot(session), before)
    after = objects(session)
    assert list(after) == list(held)
    assert all(after[key] is held[key] for key in held)
