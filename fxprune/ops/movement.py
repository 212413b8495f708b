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
from fxprune.channels.tensor import Call, ChannelTensor, as_operand, freeze_unknown, register_rule

VIEWS = (
    "t transpose permute expand squeeze unsqueeze movedim swapaxes split split_with_sizes unsafe_split "
    "unsafe_split_with_sizes"
)


@register_rule(*VIEWS.split())
def view_of_names(call: Call) -> Any:
    """The operator itself, on labels spread over the full shape without copying."""
    value, *rest = call.args
    shape = as_operand(value).shape
    labels = as_operand(value).labels
    if isinstance(call.out, Tensor):
        moved = [squash_names(call.func(spread_label(label, shape), *rest, **call.kwargs)) for label in labels]
        lost = [label for label, its in zip(labels, moved, strict=True) if not its.size]
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
            (cut_from(call, whole, parts[part], axis) for whole, parts in zip(labels, parts_of, strict=True)),
        )
        for part in range(count)
    ]


def cut_from(call: Call, whole: Label, part: Label, axis: int) -> Label:
    """``part``, a stretch of ``whole`` along ``axis``. A single position has no name there any more: it must stay."""
    if whole.shape[axis] > 1 and part.shape[axis] == 1:
        if len(varying_axes(whole)) > 1:
            pin_axes(call.names, whole, [axis], "cut to one position")
        else:
            call.names.freeze(part, "cut to one position")
    return part


@register_rule("view", "_unsafe_view", "reshape", "_reshape_copy", "view_copy", "flatten", "unflatten")
def view(call: Call) -> Labels:
    value = as_operand(call.args[0])
    before, after = ([size or 1 for size in shape] for shape in (value.shape, call.shape))
    if math.prod(before) != math.prod(after):
        freeze_labels(call.names, value.labels, "reshaped while empty")
        return ()
    return settle_labels(call.names, (reshape_label(label, before, after) for label in value.labels))


@register_rule("select", "unbind")
def select(call: Call) -> Any:
    """One position of an axis is addressed: the axis keeps its size."""
    value, axis = call.args[0], call.arg("dim", 0)
    axis %= value.ndim
    labels = (pin_axes(call.names, label, [axis], "addressed by index") for label in as_operand(value).labels)
    moved = settle_labels(call.names, (label.squeeze(axis) for label in labels))
    return moved if isinstance(call.out, Tensor) else [moved] * len(call.out)


@register_rule("slice", "narrow")
def slice_(call: Call) -> Labels:
    value, axis = call.args[0], call.arg("dim", 0)
    axis %= value.ndim
    labels = as_operand(value).labels
    if call.arg("step", 1) != 1:
        labels = settle_labels(
            call.names, (pin_axes(call.names, label, [axis], "sliced with a step") for label in labels)
        )
    moved = [
        squash_names(call.func(spread_label(label, value.shape), *call.args[1:], **call.kwargs)) for label in labels
    ]
    return settle_labels(call.names, (cut_from(call, *pair, axis) for pair in zip(labels, moved, strict=True)))


@register_rule("flip")
def flip(call: Call) -> Labels:
    return tuple(
        squash_names(call.func(torch.from_numpy(label), call.args[1])) for label in as_operand(call.args[0]).labels
    )


@register_rule("roll")
def roll(call: Call) -> Labels:
    value = as_operand(call.args[0])
    axes = [axis % len(value.shape) for axis in call.arg("dims") or range(len(value.shape))]
    return settle_labels(call.names, (pin_axes(call.names, label, axes, "rolled") for label in value.labels))


@register_rule("repeat")
def repeat(call: Call) -> Labels:
    times = call.args[1]
    labels = [align_label(label, len(times)) for label in as_operand(call.args[0]).labels]
    return settle_labels(
        call.names,
        (np.tile(label, [n if label.shape[axis] > 1 else 1 for axis, n in enumerate(times)]) for label in labels),
    )


@register_rule("unfold")
def unfold(call: Call) -> Labels:
    value, axis = call.args[0], call.args[1] % call.args[0].ndim
    labels = (pin_axes(call.names, label, [axis], "unfolded") for label in as_operand(value).labels)
    return settle_labels(call.names, (label[..., None] for label in labels))


@register_rule("cat", "concat", "concatenate")
def cat(call: Call) -> Labels:
    parts = [as_operand(value) for value in call.args[0] if tuple(value.shape) != (0,)]
    ndim = len(call.shape)
    axis = call.arg("dim", 0) % ndim
    across = [label_along(part.labels, axis) for part in parts]
    rest = [
        Operand(
            tuple(label for label in part.labels if label is not mine),
            [1 if at == axis else size for at, size in enumerate(part.shape)],
            part.source,
        )
        for part, mine in zip(parts, across, strict=True)
    ]
    if all(label is None for label in across):
        return join_labels(call.names, rest, ndim)
    named = [
        label if label is not None else fresh_tensor(call, axis, part.shape, f"concatenated with {part.source}")
        for label, part in zip(across, parts, strict=True)
    ]
    others = {at for label in named for at in varying_axes(label)} - {axis}
    shape = [call.shape[at] if at in others else 1 for at in range(ndim)]
    named = [np.broadcast_to(label, [*shape[:axis], label.shape[axis], *shape[axis + 1 :]]) for label in named]
    whole = np.concatenate(named, axis)
    return settle_labels(call.names, [whole, *join_labels(call.names, rest, ndim)])


@register_rule("stack")
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


@register_rule("constant_pad_nd")
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


@register_rule("index", "index_select", "embedding", "gather", "take_along_dim")
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
    for each in indices:
        if isinstance(each, ChannelTensor):
            freeze_labels(call.names, each.labels, "used as an index")
    addressed = [axis for axis, each in enumerate(indices) if each is not None]
    if any(getattr(each, "dtype", None) in (torch.bool, torch.uint8) for each in indices):
        return freeze_unknown(call)  # type: ignore[no-any-return]
    labels = []
    for label in as_operand(value).labels:
        label = pin_axes(call.names, label, addressed, "addressed by index")
        zeros = [None if each is None else torch.zeros([1] * each.ndim, dtype=torch.int64) for each in indices]
        if kind == "index_select":
            labels.append(label)
        else:
            labels.append(torch.ops.aten.index.Tensor(torch.from_numpy(label), zeros).numpy())
    return settle_labels(call.names, labels)


@register_rule("pixel_shuffle")
def pixel_shuffle(call: Call) -> Labels:
    """Names that would vary over the image are merged: the r x r channels of a pixel go together."""
    value, factor = as_operand(call.args[0]), call.args[1]
    *batch, channels, height, width = value.shape
    split = (*batch, channels // factor**2, factor**2, height, width)
    labels = (reshape_label(label, value.shape, split) for label in value.labels)
    merged = (pin_axes(call.names, label, [len(batch) + 1], "pixel shuffle") for label in labels)
    return settle_labels(call.names, (label.squeeze(len(batch) + 1) for label in merged))


@register_rule("pixel_unshuffle")
def pixel_unshuffle(call: Call) -> Labels:
    value, factor = as_operand(call.args[0]), call.args[1]
    batch = value.shape[:-3]
    labels = []
    for label in value.labels:
        label = pin_axes(call.names, label, [len(batch) + 1, len(batch) + 2], "pixel unshuffle")
        labels.append(label.repeat(factor**2, len(batch)) if label.shape[-3] > 1 else label)
    return settle_labels(call.names, labels)


@register_rule("im2col")
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


@register_rule("col2im")
def col2im(call: Call) -> Labels:
    """The opposite of ``im2col``: what belongs to one channel goes together."""
    value, window = as_operand(call.args[0]), math.prod(call.args[2])
    *batch, columns, positions = value.shape
    split = (*batch, columns // window, window, positions)
    labels = [reshape_label(label, value.shape, split) for label in value.labels]
    labels = [pin_axes(call.names, label, [len(batch) + 1, len(batch) + 2], "a window's position") for label in labels]
    return settle_labels(call.names, labels)


@register_rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: Call) -> Labels:
    value, groups = as_operand(call.args[0]), call.args[1]
    batch, channels, *space = value.shape
    split = (batch, groups, channels // groups, *space)
    labels = [reshape_label(label, value.shape, split).swapaxes(1, 2) for label in value.labels]
    for label in labels:
        call.run.remember(label)
    swapped = (batch, channels // groups, groups, *space)
    return settle_labels(call.names, (condense_label(reshape_label(label, swapped, value.shape)) for label in labels))


@register_rule("glu")
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
