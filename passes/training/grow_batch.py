"""GrowBatch: PruneTrain's dynamic mini-batch. The memory that cuts set free takes more samples a step."""

from dataclasses import dataclass

from fxprune.errors import PlanError
from fxprune.options import allow_count, allow_number, allow_words, check_options
from fxprune.rewrite.param_map import ParamMap
from fxprune.training.distributed import largest_over_ranks
from fxprune.training.meter import step_memory
from fxprune.training.run import Run, TrainingPass
from fxprune.training.undo import schedulers_of

RULES = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}
RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # the last three are what schedulers keep in a group
LISTS = ("base_lrs", "max_lrs", "min_lrs")  # and what they keep themselves


@dataclass
class Room:
    """What GrowBatch remembers.

    Attributes:
        memory: bytes that a step may take on this rank.
        scaled: how many times its first value the learning rate is.
    """

    memory: float
    scaled: float = 1.0


@dataclass(frozen=True)
class GrowBatch(TrainingPass[Room]):
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
        check_options(
            self,
            PlanError,
            memory=allow_number(above=0, why=": bytes").or_none(),
            granularity=allow_count(),
            maximum=allow_count().or_none(),
            rule=allow_words(*RULES),
            highest_lr=allow_number(least=1),
        )

    def begin(self, run: Run) -> Room:
        """Remember the memory of the start.

        Raises:
            PlanError: the session was not told the first batch size.
        """
        if run.batch_size is None:
            raise PlanError("GrowBatch needs the first batch size: Session(..., batch_size=128)")
        return Room(self.memory or bytes_of_step(run))

    def after_step(self, run: Run, memory: Room) -> None:
        """The optimizer's state is there from the first step on, and counts too."""
        if run.step == 1 and self.memory is None:
            memory.memory = max(memory.memory, bytes_of_step(run))

    def after_cut(self, run: Run, memory: Room, param_map: ParamMap) -> None:
        """Raise the batch size and the learning rates."""
        before = run.batch_size
        if before is None:
            return
        fixed, per_sample = step_memory(run)
        # Of the rank that can take least: all ranks keep the same batch.
        room = -largest_over_ranks(-(memory.memory - fixed) / per_sample)
        room = min(room, self.maximum or room)
        batch = max(before, int(room // self.granularity) * self.granularity)
        factor = min((batch / before) ** RULES[self.rule], self.highest_lr / memory.scaled)
        memory.scaled *= factor
        run.batch_size = batch
        scale_rates(run, factor)


def bytes_of_step(run: Run) -> float:
    """Bytes that a step takes on this rank as things are."""
    fixed, per_sample = step_memory(run)
    return fixed + per_sample * (run.batch_size or 1)


def scale_rates(run: Run, factor: float) -> None:
    """Multiply every learning rate of the model's optimizers and of their schedulers that the session knows."""
    optimizers = run.optimizers()
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        for name in RATES:
            if name in group:
                group[name] *= factor
    for scheduler in schedulers_of(run.registered.values()):
        if not any(scheduler.optimizer is optimizer for optimizer in optimizers):
            continue
        for name in LISTS:
            if hasattr(scheduler, name):
                setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])
        if hasattr(scheduler, "eta_min"):
            scheduler.eta_min *= factor
