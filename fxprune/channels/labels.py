"""Labels: which channel each position of a value belongs to.

A label is an int64 tensor of names with as many axes as the value; an axis along which names do not vary has size 1, so
a label costs O(channels) whatever the size of the image. A value carries a few labels, one for each independent
family of names, and no two of them vary along the same axis. Here stands what every operator family does with labels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.channels.names import Names

Label = Tensor
Labels = tuple[Label, ...]
Shape = Sequence[int]


@dataclass(frozen=True)
class Operand:
    """A value as an operator meets it: its labels, its shape, and what to call it where it has no names."""

    labels: Labels
    shape: Shape
    source: str = "a constant"


def varying(label: Label) -> list[int]:
    """The axes along which the names of ``label`` vary."""
    return [axis for axis, size in enumerate(label.shape) if size > 1]


def along(labels: Labels, axis: int) -> Label | None:
    """The label that varies along ``axis``; there is at most one."""
    return next((label for label in labels if label.shape[axis] > 1), None)


def spread(label: Label, shape: Shape) -> Label:
    """The label over the full shape of its value, as a view with stride 0 where the names do not vary."""
    return label.expand(*shape) if len(shape) else label


def squash(label: Label) -> Label:
    """The opposite of ``spread``: axes of stride 0 shrink to size 1."""
    stride = label.stride()
    shape = [1 if step == 0 else size for size, step in zip(label.shape, stride, strict=True)]
    return label.as_strided(shape, stride)


def condense(label: Label) -> Label:
    """Shrink to size 1 every axis along which all names are equal, whatever its stride."""
    for axis in varying(label):
        first = label.narrow(axis, 0, 1)
        if torch.equal(first.expand_as(label), label):
            label = first
    return label


def align(label: Label, ndim: int) -> Label:
    """Prepend axes of size 1, as broadcasting does, up to ``ndim`` axes."""
    return label[(None,) * (ndim - label.ndim)] if label.ndim < ndim else label


def merge(names: Names, a: Label, b: Label) -> Label:
    """Merge two labels of one value, position by position. Returns the label over the axes of both."""
    if a is b:
        return a
    shape = [max(sizes) for sizes in zip(a.shape, b.shape, strict=True)]
    names.merge(a.expand(shape).numpy(), b.expand(shape).numpy())
    return a if list(a.shape) == shape else squash(a.expand(shape))


def settle(names: Names, labels: Iterable[Label]) -> Labels:
    """Merge those labels of one value that vary along a common axis.

    A label that does not vary any more is dropped and its name frozen: it is all of a value.
    """
    settled: list[Label] = []
    for label in labels:
        axes = set(varying(label))
        if not axes:
            names.freeze(label.numpy(), "it is all of a value")
            continue
        for other in [kept for kept in settled if axes & set(varying(kept))]:
            settled = [kept for kept in settled if kept is not other]
            label = merge(names, other, label)
        settled.append(label)
    return tuple(settled)


def pin(names: Names, label: Label, axes: Iterable[int], why: str) -> Label:
    """No pruning may change the size of ``axes``. Returns the label without its names along them.

    A label that varies along other axes too has its names merged along ``axes``; one that varies only there is frozen.
    """
    pinned = [axis for axis in axes if label.shape[axis] > 1]
    if not pinned:
        return label
    first = label
    for axis in pinned:
        first = first.narrow(axis, 0, 1)
    if len(pinned) == len(varying(label)):
        names.freeze(label.numpy(), why)
    else:
        names.merge(label.numpy(), first.numpy())
    return first


def freeze(names: Names, labels: Iterable[Label], why: str) -> None:
    """Freeze every name of ``labels``."""
    for label in labels:
        names.freeze(label.numpy(), why)


def join(names: Names, operands: Sequence[Operand], ndim: int) -> Labels:
    """The labels of a pointwise function of ``operands``, which broadcast to ``ndim`` axes.

    Names that meet are merged. Where a label meets a value of full size that has no names there, it is pinned.
    """
    shapes = [(1,) * (ndim - len(operand.shape)) + tuple(operand.shape) for operand in operands]
    aligned = [tuple(align(label, ndim) for label in operand.labels) for operand in operands]
    joined: list[Label] = []
    for labels in aligned:
        for label in labels:
            axes = varying(label)
            for shape, theirs, other in zip(shapes, aligned, operands, strict=True):
                if theirs is labels:
                    continue
                bare = [axis for axis in axes if shape[axis] > 1 and along(theirs, axis) is None]
                if bare:
                    label = pin(names, label, bare, f"meets {other.source}")
            joined.append(label)
    return settle(names, joined)


def regroup(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Split a reshape into the smallest independent parts: (axes before, axes after) with equal products.

    >>> regroup((2, 12, 5), (2, 3, 4, 5))
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    parts: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        axes_before: list[int] = []
        axes_after: list[int] = []
        size_before = size_after = 1
        if i < len(before):
            size_before, axes_before, i = before[i], [i], i + 1
        if j < len(after) and (size_before != 1 or not axes_before or after[j] == 1):
            size_after, axes_after, j = after[j], [j], j + 1
        while size_before != size_after:
            if size_before < size_after:
                size_before, axes_before, i = size_before * before[i], [*axes_before, i], i + 1
            else:
                size_after, axes_after, j = size_after * after[j], [*axes_after, j], j + 1
        parts.append((axes_before, axes_after))
    return parts


def reshape(label: Label, before: Shape, after: Shape) -> Label:
    """The label of a value of shape ``before`` when it is viewed as ``after``."""
    if not any(size > 1 for size in label.shape):
        return label.reshape([1] * len(after))
    spreads, target, mixed = list(label.shape), [1] * len(after), False
    for axes_before, axes_after in regroup(before, after):
        if all(label.shape[axis] == 1 for axis in axes_before):
            continue
        mixed = mixed or len(axes_before) > 1 or len(axes_after) > 1
        for axis in axes_before:
            spreads[axis] = before[axis]
        for axis in axes_after:
            target[axis] = after[axis]
    label = label.expand(spreads).reshape(target)
    return condense(label) if mixed else label
