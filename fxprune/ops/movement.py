"""Movement: operators that only move positions. The same operator runs on the names, so it is exact by construction.

Four need care: cat and stack (what has no names beside what has), pad (new positions), index (addressed axes).
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.channels.labels import (
    Label,
    Labels,
    Operand,
    align_label,
    condense_label,
    freeze_labels,
    join_labels,
    label_along,
    narrow_label,
    on_axis,
    pin_axes,
    reshape_label,
    settle_labels,
    spread_label,
    squash_names,
    varying_axes,
)
from fxprune.channels.tensor import Call, ChannelTensor, as_operand, freeze_unknown, rule
from fxprune.channels.values import Value
from fxprune.graph.shapes import Shape, plain_shape
from fxprune.ops.pointwise import same_shape
from fxprune.rewrite.attributes import attributes
from fxprune.rewrite.fit import (
    CompactRun,
    find_argument,
    fit_argument,
    fitter,
    kept_along,
    moved_bound,
    old_value,
    set_argument,
    value_of,
)
from fxprune.rewrite.kinds import mark_kind

VIEWS = (
    "t transpose permute expand squeeze unsqueeze movedim swapaxes split split_with_sizes unsafe_split "
    "unsafe_split_with_sizes"
)
mark_kind(
    "move",
    *(torch.reshape, "reshape", "view", torch.permute, "permute", torch.transpose, "transpose"),
    *(torch.chunk, "chunk", torch.split, "split", operator.getitem, "squeeze", "unsqueeze"),
)
mark_kind("free move", torch.cat, torch.flatten, "flatten", nn.Flatten)


@rule(*VIEWS.split(), keeps_zero=True)
def view_of_names(call: Call) -> Any:
    """The operator itself, on labels spread over the full shape without copying."""
    value, *rest = call.args
    shape = as_operand(value).shape
    labels = as_operand(value).labels
    if isinstance(call.out, Tensor):
        moved = [squash_names(call.func(spread_label(label, shape), *rest, **call.kwargs)) for label in labels]
        lost = [label for label, after in zip(labels, moved, strict=True) if not after.size]
        freeze_labels(call.names, lost, "moved while empty")
        return settle_labels(call.names, (label for label in moved if label.size))
    axis, count = call.arg("dim", 0) % len(shape), len(call.out)
    parts_of = [
        [squash_names(part) for part in call.func(spread_label(label, shape), *rest, **call.kwargs)]
        if label.shape[axis] > 1
        else [label] * count
        for label in labels
    ]
    return [
        settle_labels(
            call.names,
            (cut_from(call, source, parts[part], axis) for source, parts in zip(labels, parts_of, strict=True)),
        )
        for part in range(count)
    ]


def cut_from(call: Call, source: Label, part: Label, axis: int) -> Label:
    """``part``, a stretch of ``source`` along ``axis``. A single position has no name there any more: it must stay."""
    if source.shape[axis] > 1 and part.shape[axis] == 1:
        if len(varying_axes(source)) > 1:
            pin_axes(call.names, source, [axis], "cut to one position")
        else:
            call.names.freeze(part, "cut to one position")
    return part


@fitter("squeeze")
def fit_squeeze(run: CompactRun, node: fx.Node) -> None:
    """Without a dim every axis of size 1 goes: those that were of size 1 before the cut."""
    source = find_argument(node, 0, "input")
    before, after = run.before[source.name].shape, run.env[source].shape
    if len(node.args) == 1 and not node.kwargs and 1 in after and after != before:
        node.args = (source, tuple(axis for axis, size in enumerate(before) if size == 1))


@fitter("expand", "broadcast_to", "new_zeros", "new_ones")
def fit_expand(run: CompactRun, node: fx.Node) -> None:
    fit_sizes(run, node, 1)


@fitter("zeros", "ones", "empty")
def fit_creation(run: CompactRun, node: fx.Node) -> None:
    fit_sizes(run, node, 0)


def fit_sizes(run: CompactRun, node: fx.Node, start: int, may_infer: bool = False) -> None:
    """The sizes of the result stand in the call, from argument ``start`` on: one by one, or as one tuple."""
    target = run.after[node.name].shape
    sizes: Any = node.args[start:]
    if not sizes:
        return
    packed = len(sizes) == 1 and not isinstance(value_of(run, sizes[0]), int)
    old = sizes[0] if packed else sizes
    if isinstance(old, fx.Node):
        new: Any = old if tuple(run.env[old]) == tuple(target) else tuple(target)
    else:
        new = fit_argument(run, old, target, may_infer)
    node.args = (*node.args[:start], new) if packed else (*node.args[:start], *new)


@fitter("chunk", "split", "split_with_sizes", "tensor_split")
def fit_parts(run: CompactRun, node: fx.Node) -> None:
    """Parts that became unequal, or would follow a size that gets smaller elsewhere, are given by their sizes."""
    value, expected = find_argument(node, 0, "input"), run.after[node.name]
    axis = value_of(run, find_argument(node, 2, "dim", 0)) % len(expected[0].shape)
    sizes = [part.shape[axis] for part in expected]
    computed = [arg for arg in node.all_input_nodes if isinstance(run.before.get(arg.name), int)]
    follows = any(run.env[arg] != run.before[arg.name] for arg in computed)
    if sizes == [part.shape[axis] for part in run.before[node.name]] and not follows:
        return
    node.op, node.target = "call_function", torch.split
    node.args, node.kwargs = (value, sizes, axis), {}


@rule("view", "_unsafe_view", "reshape", "_reshape_copy", "view_copy", "flatten", "unflatten", keeps_zero=True)
def view(call: Call) -> Labels:
    value = as_operand(call.args[0])
    before, after = ([size or 1 for size in shape] for shape in (value.shape, call.shape))
    if math.prod(before) != math.prod(after):
        freeze_labels(call.names, value.labels, "reshaped while empty")
        return ()
    return settle_labels(call.names, (reshape_label(label, before, after) for label in value.labels))


@fitter("view", "reshape")
def fit_view(run: CompactRun, node: fx.Node) -> None:
    fit_sizes(run, node, 1, may_infer=True)


@fitter("unflatten")
def fit_unflatten(run: CompactRun, node: fx.Node) -> None:
    """The sizes of one axis's parts."""
    target = run.after[node.name].shape
    axis = value_of(run, find_argument(node, 1, "dim"))
    old = find_argument(node, 2, "sizes", node.kwargs.get("unflattened_size"))
    count = len(value_of(run, old))
    rank = len(target) - count + 1
    sizes = target[axis % rank : axis % rank + count]
    key = "sizes" if "sizes" in node.kwargs else "unflattened_size"
    set_argument(node, 2, key, fit_argument(run, old, sizes, True))


@rule("select", "unbind", keeps_zero=True)
def select(call: Call) -> Any:
    """One position of an axis is addressed: the axis keeps its size."""
    value, axis = call.args[0], call.arg("dim", 0)
    axis %= value.ndim
    labels = (pin_axes(call.names, label, [axis], "addressed by index") for label in as_operand(value).labels)
    moved = settle_labels(call.names, (label.squeeze(axis) for label in labels))
    return moved if isinstance(call.out, Tensor) else [moved] * len(call.out)


@rule("slice", "narrow", keeps_zero=True)
def slice_(call: Call) -> Labels:
    value, axis = call.args[0], call.arg("dim", 0)
    axis %= value.ndim
    labels = as_operand(value).labels
    if call.arg("step", 1) != 1:
        labels = settle_labels(
            call.names, (pin_axes(call.names, label, [axis], "sliced with a step") for label in labels)
        )
    if not call.shape[axis]:  # nothing is left that could have a name along it
        return tuple(label for label in labels if label.shape[axis] == 1)
    moved = [
        squash_names(call.func(spread_label(label, value.shape), *call.args[1:], **call.kwargs)) for label in labels
    ]
    return settle_labels(call.names, (cut_from(call, *pair, axis) for pair in zip(labels, moved, strict=True)))


@fitter("getitem", "setitem")
def fit_item(run: CompactRun, node: fx.Node) -> None:
    """Slices of an axis that lost positions: the bounds move by what went before them."""
    args: tuple[Any, ...] = node.args
    source, index, *written = args
    before = run.before[source.name]
    if not isinstance(before, Value) or not (written or isinstance(run.after[node.name], Value)):
        return
    entries = list(index) if isinstance(index, tuple) else [index]
    values = [value_of(run, entry) if not isinstance(entry, slice) else entry for entry in entries]
    taken = sum(1 for value in values if value is not None and value is not Ellipsis)
    axis, new = 0, list[Any]()
    for entry, value in zip(entries, values, strict=True):
        if isinstance(entry, slice):
            start, stop = (fit_bound(run, before, axis, bound) for bound in (entry.start, entry.stop))
            new.append(slice(start, stop, entry.step))
        else:
            new.append(entry)
        if value is Ellipsis:
            axis += len(before.shape) - taken
        elif value is not None:
            axis += value.ndim if isinstance(value, Tensor) and value.dtype == torch.bool else 1
    node.args = (source, tuple(new) if isinstance(index, tuple) else new[0], *written)


def fit_bound(run: CompactRun, before: Value, axis: int, bound: Any) -> Any:
    """``bound`` as it is written, or a number where it must not be what it was.

    One that is computed from sizes stays only while nothing changes: of a later cut, its value before would be unknown.
    """
    old = old_value(run, bound)
    moved = moved_bound(run, before, axis, old)
    new = old if moved is None else moved
    return bound if value_of(run, bound) == old == new else new


@fitter("narrow")
def fit_narrow(run: CompactRun, node: fx.Node) -> None:
    """A start and a length."""
    before = run.before[find_argument(node, 0, "input").name]
    axis = value_of(run, find_argument(node, 1, "dim")) % len(before.shape)
    length = run.after[node.name].shape[axis]
    set_argument(node, 2, "start", fit_bound(run, before, axis, find_argument(node, 2, "start")))
    if value_of(run, find_argument(node, 3, "length")) != length:
        set_argument(node, 3, "length", length)


@rule("flip", keeps_zero=True)
def flip(call: Call) -> Labels:
    return tuple(
        squash_names(call.func(torch.from_numpy(label), call.args[1])) for label in as_operand(call.args[0]).labels
    )


@rule("roll", keeps_zero=True)
def roll(call: Call) -> Labels:
    value = as_operand(call.args[0])
    axes = [axis % len(value.shape) for axis in call.arg("dims") or range(len(value.shape))]
    return settle_labels(call.names, (pin_axes(call.names, label, axes, "rolled") for label in value.labels))


plain_shape("roll")(same_shape)


@rule("repeat", keeps_zero=True)
def repeat(call: Call) -> Labels:
    times = call.args[1]
    labels = [align_label(label, len(times)) for label in as_operand(call.args[0]).labels]
    return settle_labels(
        call.names,
        (np.tile(label, [n if label.shape[axis] > 1 else 1 for axis, n in enumerate(times)]) for label in labels),
    )


@rule("unfold", keeps_zero=True)
def unfold(call: Call) -> Labels:
    value, axis = call.args[0], call.args[1] % call.args[0].ndim
    labels = (pin_axes(call.names, label, [axis], "unfolded") for label in as_operand(value).labels)
    return settle_labels(call.names, (label[..., None] for label in labels))


@rule("cat", "concat", "concatenate", keeps_zero=True)
def cat(call: Call) -> Labels:
    parts = [as_operand(value) for value in call.args[0] if tuple(value.shape) != (0,)]
    ndim = len(call.shape)
    axis = call.arg("dim", 0) % ndim
    across = [label_along(part.labels, axis) for part in parts]
    rest = [
        Operand(
            tuple(label for label in part.labels if label is not named),
            [1 if at == axis else size for at, size in enumerate(part.shape)],
            part.source,
        )
        for part, named in zip(parts, across, strict=True)
    ]
    if all(label is None for label in across):
        return join_labels(call.names, rest, ndim)
    pieces = [
        label if label is not None else fresh_tensor(call, axis, part.shape, f"concatenated with {part.source}")
        for label, part in zip(across, parts, strict=True)
    ]
    shared_axes = {at for label in pieces for at in varying_axes(label)} - {axis}
    shape = [call.shape[at] if at in shared_axes else 1 for at in range(ndim)]
    pieces = [np.broadcast_to(label, [*shape[:axis], label.shape[axis], *shape[axis + 1 :]]) for label in pieces]
    joined = np.concatenate(pieces, axis)
    return settle_labels(call.names, [joined, *join_labels(call.names, rest, ndim)])


@plain_shape("cat", torch.cat)
def cat_shape(tensors: Sequence[Tensor], axis: int = 0) -> Shape | None:
    first, *following = (list(tensor.shape) for tensor in tensors)
    if not -len(first) <= axis < len(first):
        return None
    for shape in following:
        if len(shape) != len(first):
            return None
        first[axis] += shape[axis]
        shape[axis] = first[axis]
        if shape != first:
            return None
    return tuple(first)


@rule("stack", keeps_zero=True)
def stack(call: Call) -> Labels:
    axis = call.arg("dim", 0) % len(call.shape)
    parts = [as_operand(value) for value in call.args[0]]
    raised = [
        Operand(
            tuple(np.expand_dims(label, axis) for label in part.labels),
            [*part.shape[:axis], 1, *part.shape[axis:]],
            part.source,
        )
        for part in parts
    ]
    return join_labels(call.names, raised, len(call.shape))


@rule("constant_pad_nd", keeps_zero=True)
def pad(call: Call) -> Labels:
    """New positions along an axis with names get free names of their own, so that a zero-padded shortcut prunes."""
    value, amounts = as_operand(call.args[0]), call.args[1]
    ndim = len(value.shape)
    labels = list(value.labels)
    for axis in range(ndim - 1, ndim - 1 - len(amounts) // 2, -1):
        before, after = amounts[2 * (ndim - 1 - axis) : 2 * (ndim - 1 - axis) + 2]
        labels = [
            extend_label(call, label, axis, before, after) if label.shape[axis] > 1 and (before or after) else label
            for label in labels
        ]
    call.zero = call.zero and not call.arg("value")
    return settle_labels(call.names, labels)


@fitter("pad")
def fit_pad(run: CompactRun, node: fx.Node) -> None:
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


def extend_label(call: Call, label: Label, axis: int, before: int, after: int) -> Label:
    """Pad ``label`` along ``axis`` with fresh names; negative amounts crop."""
    start, stop = max(-before, 0), label.shape[axis] - max(-after, 0)
    pieces = [cut_from(call, label, narrow_label(label, axis, start, stop - start), axis)]
    for amount, position in ((before, 0), (after, len(pieces))):
        if amount > 0:
            shape = list(label.shape)
            shape[axis] = amount
            names = call.names.fresh(math.prod(shape))
            pieces.insert(position if position == 0 else len(pieces), names.reshape(shape))
    return np.concatenate(pieces, axis)


def fresh_tensor(call: Call, axis: int, shape: Any, why: str) -> Label:
    """Frozen names along ``axis`` for a value that has none."""
    names = call.names.fresh(shape[axis])
    call.names.freeze(names, why)
    return on_axis(names, axis, len(shape))


@rule("index", "index_select", "embedding", "gather", "take_along_dim", keeps_zero=True)
def index(call: Call) -> Labels:
    """Addressed axes are frozen whole: a removed row would shift all later ones without any shape telling."""
    kind = call.func._schema.name.partition("::")[2]
    value = call.args[0]
    if kind == "embedding":
        indices: list[Any] = [call.args[1]]
    elif kind == "index":
        indices = list(call.args[1])
    elif kind == "index_select":
        indices = [None] * (call.args[1] % value.ndim) + [call.args[2]]
    else:
        return freeze_unknown(call)  # type: ignore[no-any-return]
    for entry in indices:
        if isinstance(entry, ChannelTensor):
            freeze_labels(call.names, entry.labels, "used as an index")
    addressed = [axis for axis, entry in enumerate(indices) if entry is not None]
    if any(getattr(entry, "dtype", None) in (torch.bool, torch.uint8) for entry in indices):
        return freeze_unknown(call)  # type: ignore[no-any-return]
    labels = []
    for label in as_operand(value).labels:
        label = pin_axes(call.names, label, addressed, "addressed by index")
        zeros = [None if entry is None else torch.zeros([1] * entry.ndim, dtype=torch.int64) for entry in indices]
        if kind == "index_select":
            labels.append(label)
        else:
            labels.append(torch.ops.aten.index.Tensor(torch.from_numpy(label), zeros).numpy())
    return settle_labels(call.names, labels)


@attributes(nn.Embedding)
def embedding_attributes(layer: Any, input: Shape, out: Shape) -> dict[str, Any]:
    return {"num_embeddings": layer.weight.shape[0], "embedding_dim": layer.weight.shape[1]}


@rule("pixel_shuffle", keeps_zero=True)
def pixel_shuffle(call: Call) -> Labels:
    """Names that would vary over the image are merged: the r x r channels of a pixel go together."""
    value, factor = as_operand(call.args[0]), call.args[1]
    *batch, channels, height, width = value.shape
    split = (*batch, channels // factor**2, factor**2, height, width)
    labels = (reshape_label(label, value.shape, split) for label in value.labels)
    pinned = [len(batch) + 1, len(batch) + 2, len(batch) + 3]
    merged = (pin_axes(call.names, label, pinned, "pixel shuffle") for label in labels)
    return settle_labels(call.names, (label.squeeze(len(batch) + 1) for label in merged))


@rule("pixel_unshuffle", keeps_zero=True)
def pixel_unshuffle(call: Call) -> Labels:
    value, factor = as_operand(call.args[0]), call.args[1]
    batch = value.shape[:-3]
    labels = []
    for label in value.labels:
        label = pin_axes(call.names, label, [len(batch) + 1, len(batch) + 2], "pixel unshuffle")
        labels.append(label.repeat(factor**2, len(batch)) if label.shape[-3] > 1 else label)
    return settle_labels(call.names, labels)


@rule("im2col", keeps_zero=True)
def im2col(call: Call) -> Labels:
    """float[..., channels, height, width] -> float[..., channels * window, positions]."""
    value, window = as_operand(call.args[0]), math.prod(call.args[1])
    axis = len(value.shape) - 3
    labels = [pin_axes(call.names, label, [axis + 1, axis + 2], "a spatial axis") for label in value.labels]
    labels = [label.squeeze(-1) for label in labels]
    return settle_labels(
        call.names,
        (label.repeat(window, axis) if label.shape[axis] > 1 else label for label in labels),
    )


@rule("col2im", keeps_zero=True)
def col2im(call: Call) -> Labels:
    """The opposite of ``im2col``: what belongs to one channel goes together."""
    value, window = as_operand(call.args[0]), math.prod(call.args[2])
    *batch, columns, positions = value.shape
    split = (*batch, columns // window, window, positions)
    labels = [reshape_label(label, value.shape, split) for label in value.labels]
    labels = [pin_axes(call.names, label, [len(batch) + 1, len(batch) + 2], "a window's position") for label in labels]
    return settle_labels(call.names, labels)


@rule("channel_shuffle", "native_channel_shuffle", keeps_zero=True)
def channel_shuffle(call: Call) -> Labels:
    value, groups = as_operand(call.args[0]), call.args[1]
    batch, channels, *space = value.shape
    split = (batch, groups, channels // groups, *space)
    labels = [reshape_label(label, value.shape, split).swapaxes(1, 2) for label in value.labels]
    for label in labels:
        call.run.remember(label)
    swapped = (batch, channels // groups, groups, *space)
    return settle_labels(call.names, (condense_label(reshape_label(label, swapped, value.shape)) for label in labels))


@fitter("channel_shuffle")
def fit_channel_shuffle(run: CompactRun, node: fx.Node) -> None:
    """The groups of which something stays."""
    groups = old_value(run, find_argument(node, 1, "groups"))
    kept = kept_along(run, run.before[find_argument(node, 0, "input").name].labels, 1)
    if kept is not None:
        set_argument(node, 1, "groups", int(kept.reshape(groups, -1).any(1).sum()))


@rule("glu", keeps_zero=True)
def glu(call: Call) -> Labels:
    value = as_operand(call.args[0])
    axis = call.arg("dim", -1) % len(value.shape)
    half = value.shape[axis] // 2
    halves = [
        Operand(
            tuple(
                cut_from(call, label, narrow_label(label, axis, start, half), axis) if label.shape[axis] > 1 else label
                for label in value.labels
            ),
            call.shape,
            value.source,
        )
        for start in (0, half)
    ]
    return join_labels(call.names, halves, len(call.shape))
