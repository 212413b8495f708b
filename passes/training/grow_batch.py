"""GrowBatch: PruneTrain's dynamic mini-batch. The memory that cuts set free takes more samples a step."""

from dataclasses import dataclass

from fxprune.errors import PlanError
from fxprune.rewrite.param_map import ParamMap
from fxprune.training.distributed import largest_over_ranks
from fxprune.training.passes import Memory, TrainingPass
from fxprune.training.session import Session
from fxprune.training.undo import schedulers_of

RULES = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}
RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # the last three are what schedulers keep in a group
LISTS = ("base_lrs", "max_lrs", "min_lrs")  # and what they keep themselves


@dataclass(frozen=True)
class GrowBatch(TrainingPass):
    """Lym et al., "PruneTrain" (2019), section on dynamic mini-batch adjustment.

    After a cut a sample takes less memory, so ``session.batch_size`` is raised as far as ``memory`` allows, and the
    learning rates with it: those of the optimizer, and of the schedulers and further optimizers that the session knows
    (``session.register``). The loop makes its next loader with ``session.batch_size``.

    Attributes:
        memory: bytes that weights, gradients, the optimizer's state and the values of a forward pass may take on one
            rank. None: what they take at the first step.
        granularity: a batch grows to a multiple of this.
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
        if not isinstance(self.rule, str) or self.rule not in RULES:
            raise PlanError(f"rule={self.rule!r} is not known; use one of {', '.join(map(repr, RULES))}")
        if self.memory is not None and not (isinstance(self.memory, (int, float)) and self.memory > 0):
            raise PlanError(f"memory={self.memory!r} must be positive: bytes, or None for what is used at the start")
        for name in ("granularity", "maximum"):
            value = getattr(self, name)
            if name == "maximum" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError(f"{name}={value!r} must be a positive integer")
        if not (isinstance(self.highest_lr, (int, float)) and self.highest_lr >= 1):
            raise PlanError(f"highest_lr={self.highest_lr!r} must be at least 1")

    def prepare(self, session: Session, memory: Memory) -> None:
        """Remember the memory of the start.

        Raises:
            PlanError: the session was not told the first batch size.
        """
        if session.batch_size is None:
            raise PlanError("GrowBatch needs the first batch size: Session(..., batch_size=128)")
        if "memory" not in memory.saved:
            memory.saved["memory"] = self.memory or bytes_of_step(session)
            memory.saved["scaled"] = 1.0

    def after_step(self, session: Session, memory: Memory) -> None:
        """The optimizer's state is there from the first step on, and counts too."""
        if session.step == 1 and self.memory is None:
            memory.saved["memory"] = max(memory.saved["memory"], bytes_of_step(session))

    def after_cut(self, session: Session, memory: Memory, param_map: ParamMap) -> None:
        """Raise the batch size and the learning rates."""
        before = session.batch_size
        if before is None:
            return
        fixed, each = session.memory()
        # Of the rank that can take least: all ranks keep the same batch.
        room = -largest_over_ranks(-(memory.saved["memory"] - fixed) / each)
        room = min(room, self.maximum or room)
        batch = max(before, int(room // self.granularity) * self.granularity)
        factor = min((batch / before) ** RULES[self.rule], self.highest_lr / memory.saved["scaled"])
        memory.saved["scaled"] *= factor
        session.batch_size = batch
        scale_rates(session, factor)


def bytes_of_step(session: Session) -> float:
    """Bytes that a step takes on this rank as things are."""
    fixed, each = session.memory()
    return fixed + each * (session.batch_size or 1)


def scale_rates(session: Session, factor: float) -> None:
    """Multiply every learning rate of the model's optimizers and of their schedulers that the session knows."""
    optimizers = session._optimizers()
    for group in (group for each in optimizers for group in each.param_groups):
        for name in RATES:
            if name in group:
                group[name] *= factor
    for scheduler in schedulers_of(session.registered.values()):
        if not any(scheduler.optimizer is each for each in optimizers):
            continue
        for name in LISTS:
            if hasattr(scheduler, name):
                setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])
        if hasattr(scheduler, "eta_min"):
            scheduler.eta_min *= factor
