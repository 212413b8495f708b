"""Run: the state of a training run, and what a training pass is: small hooks that are given that state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, cast, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from typing_extensions import TypeVar

from fxprune.channels.analysis import Analysis
from fxprune.graph.traced import Model, is_traced, regions_of
from fxprune.plan import Plan
from fxprune.rewrite.param_map import ParamMap
from fxprune.rewrite.state_axes import optimizers_in
from fxprune.training.log import Log
from fxprune.training.memory import Memory, forget_derived

M = TypeVar("M", default=Memory)


@runtime_checkable
class Stateful(Protocol):
    """What can be saved beside the model: schedulers, scalers, averaged models."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take over what ``state_dict`` returned."""


@dataclass(eq=False, repr=False, kw_only=True)
class Run:
    """The state of a training run: what it trains, how far it is, and what belongs to it.

    Attributes:
        model: what the loop calls. The traced model, inside the DistributedDataParallel or torch.compile wrappers of
            the model that was given.
        graph: the traced model itself; its state_dict has the keys of the original.
        analysis: of the model as it is now.
        optimizer: the one that was given.
        example_inputs: of the model: a tensor, a tuple or dict of arguments, (args, kwargs), or a loader's batch.
        passes: the training passes, in the order in which they are called.
        memories: what each of them remembers.
        batch_size: samples a step on this rank, or None where nobody said; a pass may raise it.
        epochs: how many there will be, or None where nobody said.
        epoch: how many epochs have ended.
        step: how many steps the optimizer has made.
        log: one record an epoch. Print it, or ``log.plot(path)``.
        registered: what else belongs to the run, by name.
        unclaimed: the states of a checkpoint for what is not registered yet.
        wrappers: those around ``graph``, the outermost first.
        around: a larger module that has ``graph`` as a part, and its wrappers; else ``graph``, and none.
        reset_state: where the optimizer's state of a parameter can't be sliced, drop it instead of refusing.
        verify: prove each cut in float64 on the example inputs before it is made.
    """

    model: nn.Module
    graph: Model
    analysis: Analysis
    optimizer: Optimizer
    example_inputs: Any
    passes: "tuple[TrainingPass[Any], ...]" = ()
    memories: list[Any] = field(default_factory=list)
    batch_size: int | None = None
    epochs: int | None = None
    epoch: int = 0
    step: int = 0
    log: Log = field(default_factory=Log)
    registered: dict[str, Stateful] = field(default_factory=dict)
    unclaimed: dict[str, dict[str, Any]] = field(default_factory=dict)
    wrappers: list[nn.Module] = field(default_factory=list)
    around: tuple[list[nn.Module], nn.Module]
    reset_state: bool = False
    verify: bool = False

    def pairs(self) -> "list[tuple[TrainingPass[Any], Any]]":
        """Each pass with what it remembers."""
        return list(zip(self.passes, self.memories, strict=True))

    def prepare_pass(self, training_pass: "TrainingPass[M]", memory: M) -> None:
        """Let a pass derive anew what follows from the model."""
        forget_derived(memory)
        training_pass.prepare(self, memory)

    def optimizers(self) -> list[Optimizer]:
        """The optimizer, and the registered ones of parameters of this model; with those that they have within them."""
        parameters = set(self.graph.parameters())
        optimizers = [self.optimizer]
        for thing in self.registered.values():
            if isinstance(thing, Optimizer) and any(parameters & {*group["params"]} for group in thing.param_groups):
                optimizers.append(thing)
        return list(dict.fromkeys(part for optimizer in optimizers for part in optimizers_in(optimizer)))

    def copies(self) -> list[Model]:
        """The copies of the model that are registered, such as a moving average."""
        return [
            copied for thing in self.registered.values() for copied in find_copies(thing) if copied is not self.graph
        ]


def find_copies(thing: object) -> list[Model]:
    """The traced models in a module, or in an object that has modules as attributes."""
    leaves = [thing] if isinstance(thing, nn.Module) else pytree.tree_leaves(named_attributes(thing))
    modules = [leaf for leaf in leaves if isinstance(leaf, nn.Module)]
    traced = [part for module in modules for part in module.modules() if is_traced(part)]
    parts = {region for model in traced for region in regions_of(model).values() if region is not model}
    return [model for model in traced if model not in parts]


def named_attributes(thing: object) -> dict[str, Any]:
    """What ``thing`` holds by name."""
    return dict(getattr(thing, "__dict__", {}))


class TrainingPass(Generic[M]):
    """A pruning method that works while the model trains. A frozen dataclass: its fields are its options.

    The pass itself never changes. What it remembers is a dataclass ``M`` of its own, which ``begin`` makes and each
    hook is given; its fields go into checkpoints, but for those that are ``derived_field()``.

    Attributes:
        zeroes_weights: whether it holds weights at zero, so that no other pass may put other values there.
    """

    known: ClassVar[dict[str, type["TrainingPass[Any]"]]] = {}  # by name, to find them again in a checkpoint
    zeroes_weights: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        TrainingPass.known[cls.__name__] = cls

    def begin(self, run: Run) -> M:
        """What the pass remembers at first. Called once, before ``prepare``; refuses a model that won't do."""
        return cast(M, Memory())

    def prepare(self, run: Run, memory: M) -> None:
        """Derive from the model what the other hooks need. Called at the start, after loading and after every cut."""

    def penalty(self, run: Run, memory: M, task: Tensor) -> Tensor | None:
        """What to add to the task loss (a scalar), or None."""

    def after_backward(self, run: Run, memory: M) -> None:
        """Called before each step of the optimizer, when the gradients are complete."""

    def after_step(self, run: Run, memory: M) -> None:
        """Called after each step of the optimizer."""

    def after_epoch(self, run: Run, memory: M) -> Plan | None:
        """Called at the end of each epoch; the plan to carry out, if any."""

    def after_cut(self, run: Run, memory: M, param_map: ParamMap) -> None:
        """Called after a cut, before ``prepare``: slice what is shaped like a parameter."""

    def close(self, run: Run, memory: M) -> None:
        """Called when the session closes: take off what was put on the model."""

    def before_save(self, run: Run, memory: M) -> None:
        """Called before a checkpoint is written: set what isn't there at other times."""

    def report(self, run: Run, memory: M) -> Mapping[str, float]:
        """Numbers for the log."""
        return {}

    def notes(self, run: Run, memory: M) -> Sequence[str]:
        """Words for the log, after ``after_epoch``: what was left undone, and why."""
        return ()
