"""Movement: operators that only move positions. The same operator runs on the names, so it is exact by construction.

Four need care: cat and stack (what has no names beside what has), pad (new positions), index (addressed axes).
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.channels.labels import (
    Label,
    Labels,
    Operand,
    align,
    along,
    condense,
    freeze,
    join,
    narrow,
    on_axis,
    pin,
    reshape,
    settle,
    spread,
    squash,
    varying,
)
from fxprune.channels.tensor import Call, ChannelTensor, operand, rule, unknown

VIEWS = (
    "t transpose permute expand squeeze unsqueeze movedim swapaxes split split_with_sizes unsafe_split "
    "unsafe_split_with_sizes"
)


@rule(*VIEWS.split())
def view_of_names(call: Call) -> Any:
    """The operator itself, on labels spread over the full shape without copying."""
    value, *rest = call.args
    shape = operand(value).shape
    labels = operand(value).labels
    if isinstance(call.out, Tensor):
        moved = [squash(call.func(spread(label, shape), *rest, **call.kwargs)) for label in labels]
        lost = [label for label, its in zip(labels, moved, strict=True) if not its.size]
        freeze(call.names, lost, "moved while empty")
        return settle(call.names, (label for label in moved if label.size))
    axis, count = call.arg("dim", 0) % len(shape), len(call.out)
    parts_of = [
        [squash(part) for part in call.func(spread(label, shape), *rest, **call.kwargs)]
        if label.shape[axis] > 1
        else [label] * count
        for label in labels
    ]
    return [
        settle(
            call.names,
            (cut_from(call, whole, parts[part], axis) for whole, parts in zip(labels, parts_of, strict=True)),
        )
        for part in range(count)
    ]


def cut_from(call: Call, whole: Label, part: Label, axis: int) -> Label:
    """``part``, a stretch of ``whole`` along ``axis``. A single position has no name there any more: it must stay."""
    if whole.shape[axis] > 1 and part.shape[axis] == 1:
        if len(varying(whole)) > 1:
            pin(call.names, whole, [axis], "cut to one position")
        else:
            call.names.freeze(part, "cut to one position")
    return part


@rule("view", "_unsafe_view", "reshape", "_reshape_copy", "view_copy", "flatten", "unflatten")
def view(call: Call) -> Labels:
    value = operand(call.args[0])
    before, after = ([size or 1 for size in shape] for shape in (value.shape, call.shape))
    if math.prod(before) != math.prod(after):
        freeze(call.names, value.labels, "reshaped while empty")
        return ()
    return settle(call.names, (reshape(label, before, after) for label in value.labels))


@rule("select", "unbind")
def select(call: Call) -> Any:
    """One position of an axis is addressed: the axis keeps its size."""
    value, axis = call.args[0], call.arg("dim", 0)
    axis %= value.ndim
    labels = (pin(call.names, label, [axis], "addressed by index") for label in operand(value).labels)
    moved = settle(call.names, (label.squeeze(axis) for label in labels))
    return moved if isinstance(call.out, Tensor) else [moved] * len(call.out)


@rule("slice", "narrow")
def slice_(call: Call) -> Labels:
    value, axis = call.args[0], call.arg("dim", 0)
    axis %= value.ndim
    labels = operand(value).labels
    if call.arg("step", 1) != 1:
        labels = settle(call.names, (pin(call.names, label, [axis], "sliced with a step") for label in labels))
    moved = [squash(call.func(spread(label, value.shape), *call.args[1:], **call.kwargs)) for label in labels]
    return settle(call.names, (cut_from(call, *pair, axis) for pair in zip(labels, moved, strict=True)))


@rule("flip")
def flip(call: Call) -> Labels:
    return tuple(squash(call.func(torch.from_numpy(label), call.args[1])) for label in operand(call.args[0]).labels)


@rule("roll")
def roll(call: Call) -> Labels:
    value = operand(call.args[0])
    axes = [axis % len(value.shape) for axis in call.arg("dims") or range(len(value.shape))]
    return settle(call.names, (pin(call.names, label, axes, "rolled") for label in value.labels))


@rule("repeat")
def repeat(call: Call) -> Labels:
    times = call.args[1]
    labels = [align(label, len(times)) for label in operand(call.args[0]).labels]
    return settle(
        call.names,
        (np.tile(label, [n if label.shape[axis] > 1 else 1 for axis, n in enumerate(times)]) for label in labels),
    )


@rule("unfold")
def unfold(call: Call) -> Labels:
    value, axis = call.args[0], call.args[1] % call.args[0].ndim
    labels = (pin(call.names, label, [axis], "unfolded") for label in operand(value).labels)
    return settle(call.names, (label[..., None] for label in labels))


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Labels:
    parts = [operand(value) for value in call.args[0] if tuple(value.shape) != (0,)]
    ndim = len(call.shape)
    axis = call.arg("dim", 0) % ndim
    across = [along(part.labels, axis) for part in parts]
    rest = [
        Operand(
            tuple(label for label in part.labels if label is not mine),
            [1 if at == axis else size for at, size in enumerate(part.shape)],
            part.source,
        )
        for part, mine in zip(parts, across, strict=True)
    ]
    if all(label is None for label in across):
        return join(call.names, rest, ndim)
    named = [
        label if label is not None else fresh(call, axis, part.shape, f"concatenated with {part.source}")
        for label, part in zip(across, parts, strict=True)
    ]
    others = {at for label in named for at in varying(label)} - {axis}
    shape = [call.shape[at] if at in others else 1 for at in range(ndim)]
    named = [np.broadcast_to(label, [*shape[:axis], label.shape[axis], *shape[axis + 1 :]]) for label in named]
    whole = np.concatenate(named, axis)
    return settle(call.names, [whole, *join(call.names, rest, ndim)])


@rule("stack")
def stack(call: Call) -> Labels:
    axis = call.arg("dim", 0) % len(call.shape)
    parts = [operand(value) for value in call.args[0]]
    raised = [
        Operand(
            tuple(np.expand_dims(label, axis) for label in part.labels),
            [*part.shape[:axis], 1, *part.shape[axis:]],
            part.source,
        )
        for part in parts
    ]
    return join(call.names, raised, len(call.shape))


@rule("constant_pad_nd")
def pad(call: Call) -> Labels:
    """New positions along an axis with names get free names of their own, so that a zero-padded shortcut prunes."""
    value, amounts = operand(call.args[0]), call.args[1]
    ndim = len(value.shape)
    labels = list(value.labels)
    for axis in range(ndim - 1, ndim - 1 - len(amounts) // 2, -1):
        before, after = amounts[2 * (ndim - 1 - axis) : 2 * (ndim - 1 - axis) + 2]
        labels = [
            extend(call, label, axis, before, after) if label.shape[axis] > 1 and (before or after) else label
            for label in labels
        ]
    call.zero = call.zero and not call.arg("value")
    return settle(call.names, labels)


def extend(call: Call, label: Label, axis: int, before: int, after: int) -> Label:
    """Pad ``label`` along ``axis`` with fresh names; negative amounts crop."""
    start, stop = max(-before, 0), label.shape[axis] - max(-after, 0)
    pieces = [cut_from(call, label, narrow(label, axis, start, stop - start), axis)]
    for amount, position in ((before, 0), (after, len(pieces))):
        if amount > 0:
            shape = list(label.shape)
            shape[axis] = amount
            names = call.names.fresh(math.prod(shape))
            pieces.insert(position if position == 0 else len(pieces), names.reshape(shape))
    return np.concatenate(pieces, axis)


def fresh(call: Call, axis: int, shape: Any, why: str) -> Label:
    """Frozen names along ``axis`` for a value that has none."""
    names = call.names.fresh(shape[axis])
    call.names.freeze(names, why)
    return on_axis(names, axis, len(shape))


@rule("index", "index_select", "embedding", "gather", "take_along_dim")
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
        return unknown(call)  # type: ignore[no-any-return]
    for each in indices:
        if isinstance(each, ChannelTensor):
            freeze(call.names, each.labels, "used as an index")
    addressed = [axis for axis, each in enumerate(indices) if each is not None]
    if any(getattr(each, "dtype", None) in (torch.bool, torch.uint8) for each in indices):
        return unknown(call)  # type: ignore[no-any-return]
    labels = []
    for label in operand(value).labels:
        label = pin(call.names, label, addressed, "addressed by index")
        zeros = [None if each is None else torch.zeros([1] * each.ndim, dtype=torch.int64) for each in indices]
        if kind == "index_select":
            labels.append(label)
        else:
            labels.append(torch.ops.aten.index.Tensor(torch.from_numpy(label), zeros).numpy())
    return settle(call.names, labels)


@rule("pixel_shuffle")
def pixel_shuffle(call: Call) -> Labels:
    """Names that would vary over the image are merged: the r x r channels of a pixel go together."""
    value, factor = operand(call.args[0]), call.args[1]
    *batch, channels, height, width = value.shape
    split = (*batch, channels // factor**2, factor**2, height, width)
    labels = (reshape(label, value.shape, split) for label in value.labels)
    merged = (pin(call.names, label, [len(batch) + 1], "pixel shuffle") for label in labels)
    return settle(call.names, (label.squeeze(len(batch) + 1) for label in merged))


@rule("pixel_unshuffle")
def pixel_unshuffle(call: Call) -> Labels:
    value, factor = operand(call.args[0]), call.args[1]
    batch = value.shape[:-3]
    labels = []
    for label in value.labels:
        label = pin(call.names, label, [len(batch) + 1, len(batch) + 2], "pixel unshuffle")
        labels.append(label.repeat(factor**2, len(batch)) if label.shape[-3] > 1 else label)
    return settle(call.names, labels)


@rule("im2col")
def im2col(call: Call) -> Labels:
    """float[..., channels, height, width] -> float[..., channels * window, positions]."""
    value, window = operand(call.args[0]), math.prod(call.args[1])
    axis = len(value.shape) - 3
    labels = [pin(call.names, label, [axis + 1, axis + 2], "a spatial axis") for label in value.labels]
    labels = [label.squeeze(-1) for label in labels]
    return settle(
        call.names,
        (label.repeat(window, axis) if label.shape[axis] > 1 else label for label in labels),
    )


@rule("col2im")
def col2im(call: Call) -> Labels:
    """The opposite of ``im2col``: what belongs to one channel goes together."""
    value, window = operand(call.args[0]), math.prod(call.args[2])
    *batch, columns, positions = value.shape
    split = (*batch, columns // window, window, positions)
    labels = [reshape(label, value.shape, split) for label in value.labels]
    labels = [pin(call.names, label, [len(batch) + 1, len(batch) + 2], "a window's position") for label in labels]
    return settle(call.names, labels)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: Call) -> Labels:
    value, groups = operand(call.args[0]), call.args[1]
    batch, channels, *space = value.shape
    split = (batch, groups, channels // groups, *space)
    labels = [reshape(label, value.shape, split).swapaxes(1, 2) for label in value.labels]
    for label in labels:
        call.run.remember(label)
    swapped = (batch, channels // groups, groups, *space)
    return settle(call.names, (condense(reshape(label, swapped, value.shape)) for label in labels))


@rule("glu")
def glu(call: Call) -> Labels:
    value = operand(call.args[0])
    axis = call.arg("dim", -1) % len(value.shape)
    half = value.shape[axis] // 2
    halves = [
        Operand(
            tuple(
                cut_from(call, label, narrow(label, axis, start, half), axis) if label.shape[axis] > 1 else label
                for label in value.labels
            ),
            call.shape,
            value.source,
        )
        for start in (0, half)
    ]
    return join(call.names, halves, len(call.shape))
