"""ChannelTensor: a tensor without data whose positions carry channel names, and its dispatch.

A model runs on ChannelTensors as it runs on tensors. Each ATen operator arrives here, is run on meta tensors for its
shape, and is handed to the rule of its family for its labels. An operator without a rule freezes what it touches.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from fxprune.channels.labels import Label, Labels, Operand, condense_label, freeze_labels, varying_axes
from fxprune.channels.names import Names
from fxprune.graph.shapes import shape_of_result
from fxprune.graph.traced import Mode


@dataclass(frozen=True)
class Term:
    """``scale`` times the number of kept positions of each factor: a part of what the eval graph costs."""

    scale: int
    factors: Labels
    node: str


@dataclass(frozen=True)
class Norm:
    """A normalization whose statistics run over channels that may be pruned: no pruning of them is exact."""

    mode: Mode  # of the graph that it stands in
    node: str
    label: Label
    axes: tuple[int, ...]  # the normalized ones


@dataclass
class NameRun:
    """What one or more runs of a model on names bring to light."""

    mode: Mode = Mode.EVAL  # of the graph that is being run
    real: bool = False  # tensors have data: for Python that looks at values
    statistic: bool = False  # the node that is being run takes one that may run over channels
    heads: str = "whole"
    groups: str = "auto"
    policies: dict[str, str] = field(default_factory=dict)  # contraction -> "whole" or "within": see choose
    names: Names = field(default_factory=Names)
    flops: list[Term] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    grids: list[Label] = field(default_factory=list)  # labels along several axes: what stays must be a rectangle
    batch_norm_scales: set[str] = field(default_factory=set)
    unknown: dict[str, str] = field(default_factory=dict)  # operator without a rule -> first node that calls it
    used: set[str] = field(default_factory=set)
    calls: dict[Any, Any] = field(default_factory=dict)  # of modules, by what they were given; see ChannelRunner
    _seen: set[tuple[int, tuple[tuple[int, int], ...]]] = field(default_factory=set)

    def remember(self, label: Label) -> None:
        """Note a label that varies along several axes, so that what stays of it is made a rectangle in the end."""
        axes = varying_axes(label)
        if len(axes) < 2:
            return
        start = label.__array_interface__["data"][0]
        key = (start, tuple(sorted((label.strides[axis], label.shape[axis]) for axis in axes)))
        if key not in self._seen:
            self._seen.add(key)
            self.grids.append(label)


class ChannelTensor(Tensor):
    """A meta tensor with labels. ``source`` says in words what it is where it has no names.

    ``zero``: in the original whose parameters are masked it is zero in every channel that goes. A weight is, and what a
    layer makes with it; a sigmoid of that is not. In a run on real data the tensor inside has data.
    """

    data_: Tensor
    labels: Labels
    run: NameRun
    source: str
    parameter: str | None
    zero: bool
    steering: ClassVar[Any] = None  # watches over plain Python while that, not a graph, calls functions: see steered.py

    @staticmethod
    def __new__(
        cls,
        data: Tensor,
        labels: Labels,
        run: NameRun,
        source: str = "a constant",
        parameter: str | None = None,
        zero: bool = True,
    ) -> Self:
        """``labels`` have as many axes as ``data``; ``parameter`` is the name of a parameter or buffer."""
        self = torch.Tensor._make_wrapper_subclass(
            cls, data.shape, strides=data.stride(), dtype=data.dtype, device=data.device
        )
        self.data_, self.labels, self.run, self.source, self.parameter = data, labels, run, source, parameter
        self.zero = zero
        for label in labels:
            run.remember(label)
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Functions that torch would take apart on the way, but that have a rule as a whole, go straight to it."""
        with torch._C.DisableTorchFunctionSubclass():
            if cls.steering is not None:
                return cls.steering.call(func, args, kwargs or {})
            return carry_out(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Every operator that no function above took whole."""
        if cls.steering is not None and not cls.steering.inside:
            return cls.steering.call(func, args, kwargs or {})
        return apply_operator(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ChannelTensor({tuple(self.shape)}, varies along {[varying_axes(label) for label in self.labels]})"


def carry_out(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call a function of torch: as a whole where there is a rule for that, or in other steps than torch takes."""
    if func in WHOLE:
        return apply_operator(WHOLE[func], *positional_arguments(WHOLE[func], args, kwargs))
    return STEPS.get(func, func)(*args, **kwargs)


def positional_arguments(
    func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Sequence[Any], dict[str, Any]]:
    """Arguments as torch's dispatcher hands them on: by position, as far as there is no gap."""
    args, kwargs = list(args), dict(kwargs)
    for name in list(argument_names(func))[len(args) :]:
        if name not in kwargs:
            break
        args.append(kwargs.pop(name))
    return args, kwargs


def apply_operator(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operator on meta tensors for its shape, and hand it to its rule for its labels."""
    tensors = channel_tensors((*args, *kwargs.values()))
    run = tensors[0].run
    if run.real:
        out = func(*without_names(args, real=True), **without_names(kwargs, real=True))
    else:
        if "device" in kwargs:
            kwargs = kwargs | {"device": torch.device("meta")}
        out = result_of(func, without_names(args), without_names(kwargs))
    zero = name_of(func) in KEEPS_ZERO and all(tensor.zero for tensor in tensors)
    call = Call(run, func, args, kwargs, out, tensors, zero)
    run.used.update(tensor.parameter for tensor in tensors if tensor.parameter is not None)
    labels = rule_of(func)(call)
    if func._schema.is_mutable:
        return call.mutated(labels)
    source = call.unknown or tensors[0].source
    if isinstance(out, Tensor):
        return ChannelTensor(out, labels, run, source, zero=call.zero)
    if isinstance(out, (tuple, list)):
        several = labels if isinstance(labels, list) else [labels] + [()] * (len(out) - 1)
        return type(out)(
            ChannelTensor(part, part_labels, run, source, zero=call.zero and part.dtype.is_floating_point)
            if isinstance(part, Tensor)
            else part
            for part, part_labels in zip(
                out, several, strict=True
            )  # an index is no zero, even where it points to zeros
        )
    return out


def result_of(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The result on meta tensors; without a call of the operator where its shape is plain to see."""
    shape = None if kwargs else shape_of_result(name_of(func), args)
    if shape is None or (func._schema.is_mutable and shape != args[0].shape):
        return func(*args, **kwargs)
    first = args[0] if isinstance(args[0], Tensor) else args[0][0]
    return first if func._schema.is_mutable else torch.empty(shape, dtype=first.dtype, device="meta")


@dataclass(slots=True)
class Call:
    """One call of an ATen operator: what a rule sees. ``out`` is the result on meta tensors.

    ``zero`` says of the result what it says of a ChannelTensor. It is False unless the operator's rule ``keeps_zero``
    and all operands are zero; the rule may set it.
    """

    run: NameRun
    func: OpOverload
    args: Sequence[Any]
    kwargs: dict[str, Any]
    out: Any
    tensors: list[ChannelTensor]
    zero: bool
    unknown: str = ""

    @property
    def names(self) -> Names:
        """The names of the run."""
        return self.run.names

    @property
    def shape(self) -> torch.Size:
        """The shape of the (first) result."""
        out = self.out if isinstance(self.out, Tensor) else self.out[0]
        return out.shape

    def arg(self, name: str, default: Any = None) -> Any:
        """The argument that the operator's schema calls ``name``."""
        position, its_default = argument_names(self.func).get(name, (len(self.args), None))
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default if its_default is None else its_default)

    def mutated(self, labels: Any) -> Any:
        """The first argument after an in-place operator."""
        target = self.args[0]
        assert isinstance(labels, tuple)
        if not isinstance(target, ChannelTensor):
            freeze_labels(self.names, labels, f"written into {name_of(self.func)}'s constant")
            return target
        # The target may be a view: names that it did not have before can't be told to its base.
        held = {axis for label in target.labels for axis in varying_axes(label)}
        freeze_labels(
            self.names,
            (label for label in labels if not set(varying_axes(label)) <= held),
            f"written into {target.source} by {name_of(self.func)}",
        )
        if tuple(self.shape) == tuple(target.shape):
            target.labels = tuple(label for label in labels if set(varying_axes(label)) <= held)
            target.zero = self.zero
        return target


States = Callable[[Any, ChannelTensor], Any]
ChannelRule = Callable[[Call], Any]  # -> the labels of the result, or a list with the labels of each result
# ops/ fills these tables.
RULES: dict[str, ChannelRule] = {}  # by the operator's name: see rule
KEEPS_ZERO: set[str] = set()  # the operators whose result is zero where all operands are
WHOLE: dict[Any, OpOverload] = {}  # function that torch would take apart -> operator with a rule for it as a whole
STEPS: dict[Any, Callable[..., Any]] = {}  # function -> the same in other steps than torch takes
STATES: dict[type[nn.Module], States] = {}  # layer that makes its first state itself -> that, with names
STATISTICS: set[Any] = set()  # functions that verify takes over what is kept: see norm_over_kept in rewrite/norms.py


def rule(*operators: str, keeps_zero: bool = False) -> Callable[[ChannelRule], ChannelRule]:
    """Say what operators do to channel names: decorates a function of a ``Call`` that gives the labels of the result.

    Of an operator with several results it gives a list, the labels of each. A later rule takes the place of an
    earlier one, fxprune's own too.

    Args:
        operators: by their names without overload: ``"convolution"`` for ``torch.ops.aten.convolution``,
            ``"mylib::myop"`` outside ATen. In-place forms have the rule of the name without the underscore.
        keeps_zero: the result is zero wherever all operands are. It counts in the original whose removed weights are
            zero: are then the result's channels zero that go? A rule that says nothing is believed to give something
            else there, which is never wrong: pruning less is possible. A rule may say it call by call, in
            ``call.zero``.
    """

    def register(function: ChannelRule) -> ChannelRule:
        RULES.update(dict.fromkeys(operators, function))
        KEEPS_ZERO.difference_update(operators)
        KEEPS_ZERO.update(operators if keeps_zero else ())
        _resolved.clear()
        return function

    return register


def states(*layers: type[nn.Module]) -> Callable[[States], States]:
    """Say what layers begin with when they are given one tensor only: decorates ``f(layer, x)``, a second argument.

    A layer would make it of zeros without names, which hold on to all channels that they meet.
    """

    def register(function: States) -> States:
        STATES.update(dict.fromkeys(layers, function))
        return function

    return register


@cache
def argument_names(func: OpOverload) -> dict[str, tuple[int, Any]]:
    """For each argument in the operator's schema its position and default."""
    return {argument.name: (at, argument.default_value) for at, argument in enumerate(func._schema.arguments)}


@cache
def name_of(func: OpOverload) -> str:
    """The operator's name as rules know it: "add" for ``aten.add_.Tensor``, "lib::op" outside ATen."""
    namespace, _, name = func._schema.name.partition("::")
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return name if namespace == "aten" else f"{namespace}::{name}"


_resolved: dict[OpOverload, ChannelRule] = {}


def rule_of(func: OpOverload) -> ChannelRule:
    """The rule of an operator: its own, its family's when torch tags it as pointwise, or the one that freezes."""
    if func not in _resolved:
        pointwise = RULES["pointwise"] if torch.Tag.pointwise in func.tags else freeze_unknown
        _resolved[func] = RULES.get(name_of(func), pointwise)
    return _resolved[func]


def mark_norm(call: Call, label: Label, axes: tuple[int, ...]) -> None:
    """Note that the statistics of a norm over ``axes`` change when channels of ``label`` go."""
    if any(label.shape[axis] > 1 for axis in axes):
        call.run.norms.append(Norm(call.run.mode, call.names.node, condense_label(label), axes))


def freeze_unknown(call: Call) -> Any:
    """Freeze every channel that an operator without a rule touches."""
    operator = str(call.func).removesuffix(".default")
    call.zero = False
    call.unknown = f"the result of unknown operator {operator}"
    if any(tensor.labels for tensor in call.tensors):
        call.run.unknown.setdefault(operator, call.names.node)
    for tensor in call.tensors:
        freeze_labels(call.names, tensor.labels, f"unknown operator {operator}")
    if isinstance(call.out, (tuple, list)):
        return [()] * len(call.out)
    return call.args[0].labels if call.func._schema.is_mutable and isinstance(call.args[0], ChannelTensor) else ()


def channel_tensors(args: Iterable[Any]) -> list[ChannelTensor]:
    """The ChannelTensors among ``args``, in order; lists are looked into."""
    tensors: list[ChannelTensor] = []
    for arg in args:
        if isinstance(arg, ChannelTensor):
            tensors.append(arg)
        elif isinstance(arg, (list, tuple)):
            tensors += channel_tensors(arg)
    return tensors


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor like ``tensor`` without data."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def without_names(value: Any, real: bool = False) -> Any:
    """``value`` with each tensor in it replaced by one without names; on meta, unless ``real``."""
    if isinstance(value, ChannelTensor):
        return value.data_
    if isinstance(value, Tensor):
        return value if real or value.is_meta else on_meta(value)
    if isinstance(value, (list, tuple)) and not all(isinstance(item, int) for item in value):
        return type(value)(without_names(item, real) for item in value)
    if isinstance(value, dict):
        return {key: without_names(item, real) for key, item in value.items()}
    return value


def as_operand(value: Any) -> Operand:
    """Any argument of an operator as an Operand; numbers have no axes."""
    if isinstance(value, ChannelTensor):
        return Operand(value.labels, value.data_.shape, value.source, value.zero)
    return Operand((), value.shape if isinstance(value, Tensor) else ())
