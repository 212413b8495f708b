"""Values: what is known of each tensor in a graph, and how it is cut to the names that stay."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from fxprune.channels.labels import Label, Labels, stays_along, varying_axes
from fxprune.channels.names import Bools
from fxprune.errors import AnalysisError


@dataclass(frozen=True, slots=True)
class Value:
    """What is known of one tensor in the graph: its shape and the labels of its positions."""

    shape: tuple[int, ...]
    labels: Labels
    dtype: torch.dtype
    owner: bool  # False for views and results of in-place operators, which hold no memory of their own


class Stays(Protocol):
    """Says of each name whether it stays: bool[names], or anything that is indexed like it."""

    def __getitem__(self, label: Label, /) -> Bools: ...


class Cutter:
    """Cuts labels and values to the names that stay; a label shared by many values is cut once."""

    def __init__(self, stays: "Stays") -> None:
        self.stays = stays
        self._done: dict[int, tuple[Label, Label]] = {}

    def __call__(self, label: Label) -> Label:
        """The label without the positions that go."""
        if id(label) not in self._done:
            self._done[id(label)] = label, self.cut(label)
        return self._done[id(label)][1]

    def cut(self, label: Label) -> Label:
        """Positions that go are whole slabs: the analysis has seen to that."""
        kept = self.stays[label]
        if kept.all():
            return label
        axes = varying_axes(label)
        if len(axes) == 1:
            return label.compress(kept.ravel(), axes[0])
        for axis in axes:
            line = stays_along(kept, axis)
            label, kept = label.compress(line, axis), kept.compress(line, axis)
        if not kept.all():
            raise AnalysisError("what stays of a value is not a rectangle: please report this model")
        return label

    def value(self, value: Value) -> Value:
        """A value with its labels cut and its shape to match."""
        if not value.labels:
            return value
        labels = tuple(map(self, value.labels))
        shape = list(value.shape)
        for before, label in zip(value.labels, labels, strict=True):
            for axis in varying_axes(before):
                shape[axis] = label.shape[axis]
        return Value(tuple(shape), labels, value.dtype, value.owner)


def values_in(tree: Any) -> list[Value]:
    """The Values in ``tree``, in order."""
    if isinstance(tree, Value):
        return [tree]
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Value)]


def map_values(function: Callable[[Value], Value], values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with ``function`` applied to each Value in them."""
    return {
        name: function(tree) if isinstance(tree, Value) else pytree.tree_map_only(Value, function, tree)
        for name, tree in values.items()
    }
