"""GrowBatch: PruneTrain's dynamic mini-batch. The memory that cuts set free takes more samples a step."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from fxprune.distributed import largest
from fxprune.errors import PlanError
from fxprune.param_map import ParamMap
from fxprune.session import Session
from fxprune.training import Memory, TrainingPass

RULES = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}
RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # the last three are what schedulers keep in a group


@dataclass(frozen=True)
class GrowBatch(TrainingPass):
    """Lym et al., "PruneTrain" (2019), section on dynamic mini-batch adjustment.

    After a cut a sample takes less memory, so ``session.batch_size`` is raised as far as ``memory`` allows, in steps of
    ``granularity``, and the learning rate with it. The loop makes its next loader with ``session.batch_size``. The
    schedulers that the session knows (``session.register``) are scaled too.

    Attributes:
        memory: bytes that weights, gradients, the optimizer's state and the values of a forward pass may take on one
            rank. None: what they take at the start.
        granularity: samples that a batch grows by, or a multiple of it.
        maximum: samples a batch holds at most.
        rule: how the rate follows the batch: "linear", "sqrt" or "none".
        highest_lr: the rate grows at most to this many times its first value.
    """

    memory: float | None = None
    granularity: int = 32
    maximum: int | None = None
    rule: str = "linear"
    highest_lr: float = 8.0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise PlanError(f"rule={self.rule!r} is not known; use one of {', '.join(map(repr, RULES))}")
        if self.memory is not None and not self.memory > 0:
            raise PlanError(f"memory={self.memory!r} must be positive: bytes, or None for what is used at the start")
        for name in ("granularity", "maximum"):
            value = getattr(self, name)
            if (value is not None or name == "granularity") and (not isinstance(value, int) or value < 1):
                raise PlanError(f"{name}={value!r} must be a positive integer")
        if not self.highest_lr >= 1:
            raise PlanError(f"highest_lr={self.highest_lr!r} must be at least 1")

    def prepare(self, session: Session, memory: Memory) -> None:
        """Remember the memory of the start, or grow the batch after a cut."""
        if session.batch_size is None:
            raise PlanError("GrowBatch needs the first batch size: Session(..., batch_size=128)")
        fixed, each = session.memory()
        if "memory" not in memory.saved:
            memory.saved["memory"] = self.memory or fixed + each * session.batch_size
            memory.saved["scaled"] = 1.0

    def after_cut(self, session: Session, memory: Memory, param_map: ParamMap) -> None:
        """Raise the batch size and the learning rates."""
        before = session.batch_size
        if before is None:
            return
        fixed, each = session.memory()
        # Of the rank that can take least: all ranks keep the same batch.
        room = -largest(-(memory.saved["memory"] - fixed) / each)
        wanted = int(room // self.granularity) * self.granularity
        batch = max(before, min(wanted, self.maximum or wanted))
        factor = min((batch / before) ** RULES[self.rule], self.highest_lr / memory.saved["scaled"])
        memory.saved["scaled"] *= factor
        session.batch_size = batch
        scale(session, factor)


def scale(session: Session, factor: float) -> None:
    """Multiply every learning rate of the optimizer and of the schedulers that the session knows."""
    for group in session.optimizer.param_groups:
        for name in RATES:
            if name in group:
                group[name] *= factor
    for scheduler in schedulers(session.registered.values()):
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]


def schedulers(things: Iterable[Any]) -> list[LRScheduler]:
    """The schedulers among ``things``, and those that they hold."""
    found = []
    for thing in things:
        if isinstance(thing, LRScheduler):
            inner = schedulers(getattr(thing, "_schedulers", ()))
            found += inner or [thing]
    return found
