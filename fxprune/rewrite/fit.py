"""Fit: the sizes that a graph has baked in, made to fit the compact model. One short function an operator family.

A fitter sees a node just before it runs in the compact graph, with the values that its arguments have there, the shapes
before and after, and changes the node's arguments where they would give another shape than predicted.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.channels.labels import Labels, label_along, stays_along
from fxprune.channels.names import Bools
from fxprune.channels.values import Value

FITTERS: dict[str, Callable[[Any, fx.Node], None]] = {}


def register_fitter(*targets: str) -> Callable[[Callable[[Any, fx.Node], None]], Callable[[Any, fx.Node], None]]:
    """Register the fitter of functions and methods by their names."""

    def register(function: Callable[[Any, fx.Node], None]) -> Callable[[Any, fx.Node], None]:
        FITTERS.update(dict.fromkeys(targets, function))
        return function

    return register


def fit_node(run: Any, node: fx.Node) -> None:
    """Fit one node of a compact graph. ``run`` is the interpreter that is about to run it."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    FITTERS.get(name.strip("_"), keep_numbers)(run, node)


def value_of(run: Any, arg: Any) -> Any:
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


def keep_numbers(run: Any, node: fx.Node) -> None:
    """A number computed from a pruned size enters arithmetic on tensors with its original value."""
    if not isinstance(run.after[node.name], Value):
        return
    for arg in node.all_input_nodes:
        before = run.before.get(arg.name)
        if isinstance(before, (int, float)) and run.env[arg] != before:
            put_number(node, arg, before)


def put_number(node: fx.Node, arg: fx.Node, number: float) -> None:
    """Give ``node`` a number for one of its arguments."""
    node.args = fx.map_arg(node.args, lambda each: number if each is arg else each)
    node.kwargs = fx.map_arg(node.kwargs, lambda each: number if each is arg else each)


@register_fitter(
    "view", "reshape", "expand", "unflatten", "broadcast_to", "zeros", "ones", "new_zeros", "new_ones", "empty"
)
def sizes(run: Any, node: fx.Node) -> None:
    """Sizes that stand in the call. One that was computed and comes out wrong becomes -1, so that it stays dynamic."""
    target = run.after[node.name].shape
    name = node.target if isinstance(node.target, str) else node.target.__name__
    start = 0 if name in ("zeros", "ones", "empty") else 1
    if name == "unflatten":
        axis = value_of(run, find_argument(node, 1, "dim"))
        old = find_argument(node, 2, "sizes", node.kwargs.get("unflattened_size"))
        count = len(value_of(run, old))
        rank = len(target) - count + 1
        wanted = target[axis % rank : axis % rank + count]
        key = "sizes" if "sizes" in node.kwargs else "unflattened_size"
        set_argument(node, 2, key, fit_argument(run, old, wanted, True))
        return
    given: Any = node.args[start:]
    packed = len(given) == 1 and not isinstance(value_of(run, given[0]), int)
    if not given:
        return
    old = given[0] if packed else given
    if isinstance(old, fx.Node):
        if tuple(run.env[old]) != tuple(target):
            node.args = (*node.args[:start], tuple(target))
        return
    new = fit_argument(run, old, target, name in ("view", "reshape"))
    node.args = (*node.args[:start], new) if packed else (*node.args[:start], *new)


def fit_argument(run: Any, old: Sequence[Any], wanted: Sequence[int], may_infer: bool) -> tuple[Any, ...]:
    """The sizes ``old`` with those that differ from ``wanted`` replaced."""
    values = [value_of(run, size) for size in old]
    # Next to a size of 0, torch can't tell what -1 stands for.
    ambiguous = any(want == 0 and value != -1 for value, want in zip(values, wanted, strict=True))
    may_infer = may_infer and not ambiguous and -1 not in values
    new: list[Any] = []
    for size, value, want in zip(old, values, wanted, strict=True):
        if value == want or (value == -1 and not ambiguous):
            new.append(size)
        elif may_infer and isinstance(size, fx.Node):
            new.append(-1)
            may_infer = False
        else:
            new.append(want)
    return tuple(new)


@register_fitter("chunk", "split", "split_with_sizes", "tensor_split")
def parts(run: Any, node: fx.Node) -> None:
    """Parts that became unequal are given by their sizes."""
    value, expected = find_argument(node, 0, "input"), run.after[node.name]
    position = 2
    axis = value_of(run, find_argument(node, position, "dim", 0)) % len(expected[0].shape)
    wanted = [part.shape[axis] for part in expected]
    if wanted == [part.shape[axis] for part in run.before[node.name]]:
        return
    node.op, node.target = "call_function", torch.split
    node.args, node.kwargs = (value, wanted, axis), {}


@register_fitter("getitem")
def item(run: Any, node: fx.Node) -> None:
    """Slices of an axis that lost positions: the bounds move by what went before them."""
    source, index = find_argument(node, 0, "input"), find_argument(node, 1, "index")
    before = run.before[source.name]
    if not isinstance(before, Value) or not isinstance(run.after[node.name], Value):
        return
    entries = list(index) if isinstance(index, tuple) else [index]
    values = [value_of(run, entry) if not isinstance(entry, slice) else entry for entry in entries]
    taken = sum(1 for v in values if v is not None and v is not Ellipsis)
    axis, new = 0, list[Any]()
    for entry, value in zip(entries, values, strict=True):
        if isinstance(entry, slice):
            bounds = [old_value(run, bound) for bound in (entry.start, entry.stop)]
            moved = [moved_bound(run, before, axis, bound) for bound in bounds]
            pairs = zip((entry.start, entry.stop), bounds, moved, strict=True)
            start, stop = (given if after is None or after == now else after for given, now, after in pairs)
            new.append(slice(start, stop, entry.step))
        else:
            new.append(entry)
        if value is Ellipsis:
            axis += len(before.shape) - taken
        elif value is not None:
            axis += value.ndim if isinstance(value, Tensor) and value.dtype == torch.bool else 1
    node.args = (source, tuple(new) if isinstance(index, tuple) else new[0])


def old_value(run: Any, bound: Any) -> Any:
    """The value that a bound has in the original graph."""
    return run.before[bound.name] if isinstance(bound, fx.Node) else bound


def moved_bound(run: Any, before: Value, axis: int, bound: int | None) -> int | None:
    """Where ``bound`` of an axis lies when only what stays counts; None for no bound or an axis that stays whole."""
    kept = kept_along(run, before.labels, axis)
    if bound is None or kept is None or kept.all():
        return None
    size = before.shape[axis]
    bound = max(bound + size, 0) if bound < 0 else min(bound, size)
    return int(kept[:bound].sum())


def kept_along(run: Any, labels: Labels, axis: int) -> Bools | None:
    """bool[size]: what stays along an axis, or None where nothing varies."""
    label = label_along(labels, axis)
    if label is None:
        return None
    return stays_along(run.stays[label], axis)


@register_fitter("narrow")
def narrow(run: Any, node: fx.Node) -> None:
    """A start and a length."""
    before = run.before[find_argument(node, 0, "input").name]
    axis = value_of(run, find_argument(node, 1, "dim")) % len(before.shape)
    start = old_value(run, find_argument(node, 2, "start"))
    moved = moved_bound(run, before, axis, start)
    if moved is not None:
        set_argument(node, 2, "start", moved)
        set_argument(node, 3, "length", run.after[node.name].shape[axis])


@register_fitter("pad")
def pad(run: Any, node: fx.Node) -> None:
    """Zeros appended to channels: as many as stay of them."""
    amounts = list(find_argument(node, 1, "pad"))
    before, after = run.before[find_argument(node, 0, "input").name], run.after[node.name]
    ndim = len(before.shape)
    for pair in range(len(amounts) // 2):
        axis = ndim - 1 - pair
        kept = kept_along(run, run.before[node.name].labels, axis)
        if kept is None or kept.all():
            continue
        front, back = (old_value(run, amounts[2 * pair + side]) for side in (0, 1))
        if front > 0:
            amounts[2 * pair] = int(kept[:front].sum())
        if back > 0:
            amounts[2 * pair + 1] = int(kept[len(kept) - back :].sum())
    assert len(after.shape) == ndim
    set_argument(node, 1, "pad", tuple(amounts))


@register_fitter("channel_shuffle")
def channel_shuffle(run: Any, node: fx.Node) -> None:
    """The groups of which something stays."""
    groups = old_value(run, find_argument(node, 1, "groups"))
    kept = kept_along(run, run.before[find_argument(node, 0, "input").name].labels, 1)
    if kept is not None:
        set_argument(node, 1, "groups", int(kept.reshape(groups, -1).any(1).sum()))


@register_fitter("squeeze")
def squeeze(run: Any, node: fx.Node) -> None:
    """Without a dim every axis of size 1 goes: those that were of size 1 before the cut."""
    before, after = (
        run.before[find_argument(node, 0, "input").name].shape,
        run.env[find_argument(node, 0, "input")].shape,
    )
    if len(node.args) == 1 and not node.kwargs and 1 in after and after != before:
        node.args = (node.args[0], tuple(axis for axis, size in enumerate(before) if size == 1))


@register_fitter("layer_norm", "rms_norm")
def layer_norm(run: Any, node: fx.Node) -> None:
    """The normalized shape is that of the trailing axes."""
    shape = value_of(run, find_argument(node, 1, "normalized_shape"))
    set_argument(node, 1, "normalized_shape", tuple(run.after[node.name].shape[-len(tuple(shape)) :]))


@register_fitter("group_norm")
def group_norm(run: Any, node: fx.Node) -> None:
    """Whole groups went; a single group stays one."""
    groups = old_value(run, find_argument(node, 1, "num_groups"))
    if groups > 1:
        per_group = run.before[node.name].shape[1] // groups
        set_argument(node, 1, "num_groups", run.after[node.name].shape[1] // per_group)


@register_fitter("conv1d", "conv2d", "conv3d")
def convolution(run: Any, node: fx.Node) -> None:
    """The groups that stay."""
    if old_value(run, find_argument(node, 6, "groups", 1)) != 1:
        source, weight = (run.env[find_argument(node, at, name)] for at, name in enumerate(("input", "weight")))
        set_argument(node, 6, "groups", source.shape[1 - weight.ndim] // weight.shape[1])


@register_fitter("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(run: Any, node: fx.Node) -> None:
    """The groups that stay."""
    if old_value(run, find_argument(node, 6, "groups", 1)) != 1:
        weight = run.env[find_argument(node, 1, "weight")]
        channels = run.after[node.name].shape[1 - weight.ndim]
        set_argument(node, 6, "groups", channels // weight.shape[1])


@register_fitter("scaled_dot_product_attention")
def attention(run: Any, node: fx.Node) -> None:
    """The default scale is that of the original head size."""
    query = run.before[find_argument(node, 0, "input").name].shape[-1]
    if node.kwargs.get("scale") is None and run.after[find_argument(node, 0, "input").name].shape[-1] != query:
        node.kwargs = {**node.kwargs, "scale": query**-0.5}
