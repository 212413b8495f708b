"""Fit: the sizes that a graph has baked in, made to fit the compact model. The fitters stand in ops/.

A fitter sees a node just before it runs in the compact graph, with the values that its arguments have there, the shapes
before and after, and changes the node's arguments where they would give another shape than predicted.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import fx

from fxprune.channels.labels import Labels, label_along, stays_along
from fxprune.channels.names import Bools
from fxprune.channels.values import Value


class CompactRun(Protocol):
    """A compact graph while it runs for the first time, on tensors without data.

    Attributes:
        env: what each node that has run gives.
        before, after: what is known of each node's result by its name, in the original and in the compact model: a
            ``Value`` for a tensor, which has ``.shape`` and ``.labels``; lists and numbers as they are.
        stays: of each channel name, whether it stays.
    """

    env: dict[fx.Node, Any]
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    stays: Bools


Fit = Callable[[CompactRun, fx.Node], None]
FITTERS: dict[str, Fit] = {}  # ops/ fills it


def fitter(*targets: str) -> Callable[[Fit], Fit]:
    """Say how sizes in a call are fitted: decorates a function that changes a node's arguments where they are wrong.

    Args:
        targets: functions and methods by their names, ``"chunk"`` for ``torch.chunk`` and ``x.chunk``. Underscores
            around a name don't count. A later fitter takes the place of an earlier one.
    """

    def register(function: Fit) -> Fit:
        FITTERS.update(dict.fromkeys(targets, function))
        return function

    return register


def fit_node(run: CompactRun, node: fx.Node) -> None:
    """Fit one node of a compact graph. ``run`` is the interpreter that is about to run it."""
    FITTERS.get(name_of_target(node).strip("_"), keep_numbers)(run, node)


def name_of_target(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def value_of(run: CompactRun, arg: Any) -> Any:
    """What ``arg`` is when the compact graph runs."""
    return fx.map_arg(arg, lambda node: run.env[node])


def find_argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def set_argument(node: fx.Node, position: int, name: str, value: Any) -> None:
    """Set an argument that is given by position or by name."""
    if len(node.args) > position:
        node.args = (*node.args[:position], value, *node.args[position + 1 :])
    else:
        node.kwargs = {**node.kwargs, name: value}


def keep_numbers(run: CompactRun, node: fx.Node) -> None:
    """A number computed from a pruned size enters arithmetic on tensors with its original value."""
    if not isinstance(run.after[node.name], Value):
        return
    for arg in node.all_input_nodes:
        before = run.before.get(arg.name)
        if isinstance(before, (int, float)) and run.env[arg] != before:
            put_number(node, arg, before)


def put_number(node: fx.Node, arg: fx.Node, number: float) -> None:
    """Give ``node`` a number for one of its arguments."""
    node.args = fx.map_arg(node.args, lambda operand: number if operand is arg else operand)
    node.kwargs = fx.map_arg(node.kwargs, lambda operand: number if operand is arg else operand)


def fit_argument(run: CompactRun, old: Sequence[Any], expected: Sequence[int], may_infer: bool) -> tuple[Any, ...]:
    """The sizes ``old`` with those that differ from ``expected`` replaced."""
    values = [value_of(run, size) for size in old]
    # Next to a size of 0, torch can't tell what -1 stands for.
    ambiguous = any(want == 0 and value != -1 for value, want in zip(values, expected, strict=True))
    may_infer = may_infer and not ambiguous and -1 not in values
    new: list[Any] = []
    for size, value, want in zip(old, values, expected, strict=True):
        if value == want or (value == -1 and not ambiguous):
            new.append(size)
        elif may_infer and isinstance(size, fx.Node):
            new.append(-1)
            may_infer = False
        else:
            new.append(want)
    return tuple(new)


def old_value(run: CompactRun, bound: Any) -> Any:
    """The value that a bound has in the original graph."""
    return run.before[bound.name] if isinstance(bound, fx.Node) else bound


def moved_bound(run: CompactRun, before: Value, axis: int, bound: int | None) -> int | None:
    """Where ``bound`` of an axis lies when only what stays counts; None for no bound or an axis that stays whole."""
    kept = kept_along(run, before.labels, axis)
    if bound is None or kept is None or kept.all():
        return None
    size = before.shape[axis]
    bound = max(bound + size, 0) if bound < 0 else min(bound, size)
    return int(kept[:bound].sum())


def kept_along(run: CompactRun, labels: Labels, axis: int) -> Bools | None:
    """bool[size]: what stays along an axis, or None where nothing varies."""
    label = label_along(labels, axis)
    if label is None:
        return None
    return stays_along(run.stays[label], axis)
