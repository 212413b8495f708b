"""Labels: which channel each position of a value belongs to.

A label is an int64 array of names with as many axes as the value; an axis along which names do not vary has size 1, so
a label costs O(channels) whatever the size of the image. A value carries a few labels, one for each independent
family of names, and no two of them vary along the same axis. Here stands what every operator family does with labels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from fxprune.channels.names import Bools, Ints, Names

Label = Ints
Labels = tuple[Label, ...]


@dataclass(frozen=True, slots=True)
class Operand:
    """A value as an operator meets it: its labels, its shape, what to call it where it has no names, and ``zero``."""

    labels: Labels
    shape: Sequence[int]
    source: str = "a constant"
    zero: bool = True  # as a ChannelTensor says it


def on_axis(names: Ints, axis: int, ndim: int) -> Label:
    """The label of a value with ``ndim`` axes whose positions along ``axis`` have these names."""
    return names.reshape([-1 if at == axis else 1 for at in range(ndim)])


def varying_axes(label: Label) -> list[int]:
    """The axes along which the names of ``label`` vary."""
    return [axis for axis, size in enumerate(label.shape) if size > 1]


def label_along(labels: Labels, axis: int) -> Label | None:
    """The label that varies along ``axis``; there is at most one."""
    return next((label for label in labels if label.shape[axis] > 1), None)


def stays_along(stays: Bools, axis: int) -> Bools:
    """bool[size]: along an axis, the positions of which something stays. ``stays`` is shaped like a label."""
    return np.asarray(np.moveaxis(stays, axis, 0).reshape(stays.shape[axis], -1).any(1))


def narrow_label(label: Label, axis: int, start: int, length: int) -> Label:
    """A stretch of the positions along ``axis``."""
    return label[(slice(None),) * axis + (slice(start, start + length),)]


def spread_label(label: Label, shape: Sequence[int]) -> torch.Tensor:
    """The label over the full shape of its value, as a view with stride 0 where the names do not vary.

    An axis that is empty, such as that of boxes where there are none, counts as one position, not to lose the names.
    """
    return torch.from_numpy(label).expand(*(size or 1 for size in shape)) if len(shape) else torch.from_numpy(label)


def squash_names(names: torch.Tensor) -> Label:
    """The opposite of ``spread``: axes of stride 0 shrink to size 1."""
    return names.numpy()[tuple(slice(0, 1 if step == 0 else None) for step in names.stride())]


def condense_label(label: Label) -> Label:
    """Shrink to size 1 every axis along which all names are equal, whatever its stride."""
    for axis in varying_axes(label):
        first = narrow_label(label, axis, 0, 1)
        if (first == label).all():
            label = first
    return label


def align_label(label: Label, ndim: int) -> Label:
    """Prepend axes of size 1, as broadcasting does, up to ``ndim`` axes."""
    return label[(None,) * (ndim - label.ndim)] if label.ndim < ndim else label


def settle_labels(names: Names, labels: Iterable[Label]) -> Labels:
    """Merge those labels of one value that vary along a common axis; one of them stays for both.

    A label that does not vary any more is dropped and its name frozen: it is all of a value.
    """
    labels = list(labels)
    if len(labels) == 1 and labels[0].size > 1:  # most values have one
        return tuple(labels)
    settled: dict[int, Label] = {}  # by axis
    for label in labels:
        axes = varying_axes(label)
        if not axes:
            names.freeze(label, "it is all of a value")
        crossing = {id(settled[axis]): settled[axis] for axis in axes if axis in settled}
        for crossed in crossing.values():
            if crossed is not label:
                names.merge(crossed, label)
                label = crossed
        if crossing:
            axes = varying_axes(label)
            settled = {axis: kept for axis, kept in settled.items() if id(kept) not in crossing}
        settled.update(dict.fromkeys(axes, label))
    return tuple({id(label): label for label in settled.values()}.values())


def pin_axes(names: Names, label: Label, axes: Iterable[int], why: str) -> Label:
    """No pruning may change the size of ``axes``. Returns the label without its names along them.

    A label that varies along other axes too has its names merged along ``axes``; one that varies only there is frozen.
    """
    first = label
    for axis in axes:
        if label.shape[axis] > 1:
            first = narrow_label(first, axis % label.ndim, 0, 1)
    if first.size == label.size:
        return label
    if first.size == 1:
        names.freeze(label, why)
    else:
        names.merge(label, first)
    return first


def freeze_labels(names: Names, labels: Iterable[Label], why: str) -> None:
    """Freeze every name of ``labels``."""
    for label in labels:
        names.freeze(label, why)


def join_labels(names: Names, operands: Sequence[Operand], ndim: int) -> Labels:
    """The labels of a pointwise function of ``operands``, which broadcast to ``ndim`` axes.

    Names that meet are merged. Where a label meets a value of full size that has no names there, it is pinned.
    """
    if len(operands) == 1 and len(operands[0].shape) == ndim:
        return operands[0].labels
    if any(gives_way(names, label) for operand in operands for label in operand.labels):
        operands = give_way(names, operands, ndim)
    bare: dict[int, str] = {}  # axis -> what has full size there and no names
    for operand in operands:
        missing = ndim - len(operand.shape)
        named = {axis for label in operand.labels for axis in varying_axes(label)}
        for axis, size in enumerate(operand.shape):
            if size > 1 and axis not in named:
                bare.setdefault(axis + missing, operand.source)
    joined = []
    for operand in operands:
        for label in operand.labels:
            label = align_label(label, ndim)
            met = {axis: bare[axis] for axis in varying_axes(label) if axis in bare}
            for source in dict.fromkeys(met.values()):
                label = pin_axes(names, label, [axis for axis in met if met[axis] == source], f"meets {source}")
            joined.append(label)
    return settle_labels(names, joined)


def gives_way(names: Names, label: Label) -> bool:
    """Whether a label gives way to grids: it has the names of a buffer."""
    return int(label.flat[0]) in names.yielding


def give_way(names: Names, operands: Sequence[Operand], ndim: int) -> Sequence[Operand]:
    """``operands`` without the labels of buffers that meet one that varies along another axis too: they stay whole.

    So the angles of rotary embeddings, a number for each feature of a head, do not tie the heads together.
    """
    grids = [
        set(axes)
        for value in operands
        for label in value.labels
        if len(axes := varying_axes(align_label(label, ndim))) > 1
    ]
    result = []
    for operand in operands:
        gone = [
            label
            for label in operand.labels
            if gives_way(names, label) and any(set(varying_axes(align_label(label, ndim))) < grid for grid in grids)
        ]
        freeze_labels(names, gone, "a buffer's, which meets a grid of channels")
        stay = tuple(label for label in operand.labels if not any(label is leaving for leaving in gone))
        result.append(replace(operand, labels=stay) if gone else operand)
    return result


@lru_cache(maxsize=4096)
def regroup_axes(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Split a reshape into the smallest independent parts: (axes before, axes after) with equal products.

    >>> regroup_axes((2, 12, 5), (2, 3, 4, 5))
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    # Both shapes number the same positions in the same order, so wherever the products of their leading sizes agree the
    # reshape falls apart: what stands before does not mix with what comes after. Names then mix only within a part, and
    # a label need only be spread along the axes of parts that split or join, not over the whole value.
    parts: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        axes_before: list[int] = []
        axes_after: list[int] = []
        size_before = size_after = 1
        if i < len(before):
            size_before, axes_before, i = before[i], [i], i + 1
        # An axis of size 1 that goes stands alone: put to its neighbour, it would make that look split.
        if j < len(after) and (size_before != 1 or not axes_before or after[j] == 1):
            size_after, axes_after, j = after[j], [j], j + 1
        while size_before != size_after:
            if size_before < size_after:
                size_before, axes_before, i = size_before * before[i], [*axes_before, i], i + 1
            else:
                size_after, axes_after, j = size_after * after[j], [*axes_after, j], j + 1
        parts.append((axes_before, axes_after))
    return parts


def reshape_label(label: Label, before: Sequence[int], after: Sequence[int]) -> Label:
    """The label of a value of shape ``before`` when it is viewed as ``after``."""
    spreads, target, mixed = list(label.shape), [1] * len(after), False
    for axes_before, axes_after in regroup_axes(tuple(before), tuple(after)):
        if all(label.shape[axis] == 1 for axis in axes_before):
            continue
        # Only where axes are split or joined must the names be written out in the order of positions.
        mixed = mixed or len(axes_before) > 1 or len(axes_after) > 1
        for axis in axes_before:
            spreads[axis] = before[axis]
        for axis in axes_after:
            target[axis] = after[axis]
    if mixed:
        return condense_label(np.broadcast_to(label, spreads).copy().reshape(target))
    return label.reshape(target)
