"""What a training pass is: small hooks that stand in a Session, with state that saves and loads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fxprune.plan import Plan
from fxprune.rewrite.param_map import ParamMap

if TYPE_CHECKING:
    from fxprune.training.session import Session


@dataclass
class Memory:
    """What a pass remembers in one session.

    Attributes:
        saved: numbers, text and tensors by name; goes into checkpoints.
        derived: whatever follows from the model; made anew after every cut and never saved.
    """

    saved: dict[str, Any] = field(default_factory=dict)
    derived: dict[str, Any] = field(default_factory=dict)


class TrainingPass:
    """A pruning method that works while the model trains. A frozen dataclass: its fields are its options.

    The pass itself never changes; what it remembers stands in the ``Memory`` that each hook is given.
    """

    known: ClassVar[dict[str, type["TrainingPass"]]] = {}  # by name, to find them again when a checkpoint is loaded

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        TrainingPass.known[cls.__name__] = cls

    def prepare(self, session: "Session", memory: Memory) -> None:
        """Derive from the model what the other hooks need. Called at the start, after loading and after every cut."""

    def penalty(self, session: "Session", memory: Memory, task: Tensor) -> Tensor | None:
        """What to add to the task loss (a scalar), or None."""

    def after_backward(self, session: "Session", memory: Memory) -> None:
        """Called before each step of the optimizer, when the gradients are complete."""

    def after_step(self, session: "Session", memory: Memory) -> None:
        """Called after each step of the optimizer."""

    def after_epoch(self, session: "Session", memory: Memory) -> Plan | None:
        """Called at the end of each epoch; the plan to carry out, if any."""

    def after_cut(self, session: "Session", memory: Memory, param_map: ParamMap) -> None:
        """Called after a cut, before ``prepare``: slice what is shaped like a parameter."""

    def close(self, session: "Session", memory: Memory) -> None:
        """Called when the session closes: take off what was put on the model."""

    def before_save(self, session: "Session", memory: Memory) -> None:
        """Called before a checkpoint is written: put into ``memory.saved`` what isn't there at other times."""

    def report(self, session: "Session", memory: Memory) -> Mapping[str, float]:
        """Numbers for the log."""
        return {}
