"""Groups: classes of names that live on the same parameter axes, read off after a run."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fxprune.channels.names import Bools, Ints, Names, Reason
from fxprune.channels.tensor import Run
from fxprune.channels.values import Value


@dataclass(frozen=True)
class Member:
    """The positions of a group on one axis of one parameter or buffer.

    ``index[i]`` is a position on the axis, ``channel[i]`` the channel of the group that it belongs to; both
    int64[positions], ``index`` sorted.
    """

    parameter: str
    axis: int
    index: Ints
    channel: Ints


@dataclass(frozen=True)
class Group:
    """Channels that live on the same parameter axes. ``inexact``: a norm runs over them, so no pruning is exact."""

    name: str
    size: int
    members: tuple[Member, ...]
    inexact: bool
    roots: Ints = field(repr=False)  # int64[size]: the name that stands for each channel

    def __str__(self) -> str:
        axes = " · ".join(f"{member.parameter}[{member.axis}]" for member in self.members)
        return f"{self.name}: {self.size} channels{' (inexact)' if self.inexact else ''} on {axes}"


@dataclass(frozen=True)
class Frozen:
    """Positions of a parameter axis that may not go, and why. index: int64[positions], sorted."""

    parameter: str
    axis: int
    index: Ints
    reason: Reason


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter or buffer and the names of its positions. ``weak``: it belongs to a buffer."""

    parameter: str
    axis: int
    names: Ints
    weak: bool

    @property
    def size(self) -> int:
        """The length of the axis."""
        return len(self.names)


def settle_grids(run: Run) -> None:
    """Merge names until, on every label that varies along several axes, what may stay is always a rectangle.

    That holds when along one axis each slab is of one class. Where it does not, the axis is chosen that leaves most
    classes, and each of its slabs is merged.
    """
    grids = [label.squeeze() for label in run.grids]
    changed = True
    while changed:
        changed = False
        for grid in grids:
            roots = run.names.find(grid)
            if any(uniform(roots, axis).all() for axis in range(roots.ndim)):
                continue
            best = max(range(roots.ndim), key=lambda axis: classes_after(roots, axis))
            slabs = np.moveaxis(roots, best, 0).reshape(roots.shape[best], -1)
            run.names.merge(slabs, slabs[:, :1])
            changed = True


def uniform(roots: Ints, axis: int) -> Bools:
    """bool[size]: whether each slab along ``axis`` is of one class."""
    slabs = np.moveaxis(roots, axis, 0).reshape(roots.shape[axis], -1)
    result: Bools = (slabs == slabs[:, :1]).all(1)
    return result


def classes_after(roots: Ints, axis: int) -> int:
    """How many classes are left when each slab along ``axis`` is merged."""
    _, compact = np.unique(roots, return_inverse=True)
    slabs = np.moveaxis(compact.reshape(roots.shape), axis, 0).reshape(roots.shape[axis], -1)
    scratch = Names()
    scratch.fresh(int(compact.max()) + 1)
    scratch.merge(slabs, slabs[:, :1])
    return len(np.unique(scratch.find(slabs)))


def freeze_leftovers(run: Run, axes: Mapping[tuple[str, int], Axis], values: Iterable[Value]) -> None:
    """Freeze what no operator touched, what only buffers know, and classes that are a whole axis or a whole value."""
    names = run.names
    names.node = ""
    for label in {id(label): label for value in values for label in value.labels}.values():
        roots = names.find(label.ravel())
        if (roots == roots[0]).all():
            names.freeze(roots[:1], "it is all of a value")
    for axis in axes.values():
        if axis.parameter not in run.used:
            names.freeze(axis.names, "unused")
    for axis in axes.values():
        if axis.weak:
            names.freeze(axis.names[~names.produced(axis.names)], "a buffer that no layer produces")
        roots = names.find(axis.names)
        if (roots == roots[0]).all():
            names.freeze(roots[:1], f"all of {axis.parameter}[{axis.axis}] hangs together")


def read_groups(run: Run, axes: Sequence[Axis]) -> tuple[list[Group], list[Frozen]]:
    """Classes that live on the same axes are a group; what is frozen is listed by axis and reason."""
    if not axes:
        return [], []
    names = run.names
    atoms = np.concatenate([axis.names for axis in axes])
    owner = np.repeat(np.arange(len(axes)), [axis.size for axis in axes])
    position = np.concatenate([np.arange(axis.size) for axis in axes])
    roots, reasons = names.find(atoms), names.reason_numbers(atoms)
    frozen = []
    for axis, its in zip(axes, np.split(reasons, np.cumsum([axis.size for axis in axes])[:-1]), strict=True):
        for reason in set(its.tolist()) - {-1}:
            frozen.append(Frozen(axis.parameter, axis.axis, np.flatnonzero(its == reason), names.reasons[reason]))

    free = reasons < 0
    roots, owner, position = roots[free], owner[free], position[free]
    inexact = norm_classes(run)
    # A class's signature is the set of axes it lives on, as a sum of one random number for each axis.
    present = np.zeros(len(names), dtype=bool)
    present[roots] = True
    classes = np.flatnonzero(present)
    class_of = (np.cumsum(present) - 1)[roots]
    weights = np.random.default_rng(0).integers(1 << 62, size=len(axes))
    signature = np.zeros(len(classes), dtype=np.int64)
    for weight, its in zip(weights, np.split(class_of, np.searchsorted(owner, range(1, len(axes)))), strict=True):
        signature[its] = signature[its] + weight  # a class that is there twice counts once
    _, first, group_of = np.unique(signature, return_index=True, return_inverse=True)
    order = np.argsort(first)  # classes are sorted by their smallest name, so this is the model's order
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    group_of = rank[group_of]

    channel_of = np.zeros(len(classes), dtype=np.int64)
    sizes = np.bincount(group_of, minlength=len(order))
    sorted_classes = np.argsort(group_of, kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    channel_of[sorted_classes] = np.arange(len(classes)) - starts[group_of[sorted_classes]]

    atom_group = group_of[class_of]
    by_group = np.argsort(atom_group * len(axes) + owner, kind="stable")
    key = (atom_group * len(axes) + owner)[by_group]
    cuts = np.flatnonzero(np.diff(key)) + 1
    members: list[list[Member]] = [[] for _ in order]
    for part in np.split(by_group, cuts) if len(by_group) else []:
        axis = axes[owner[part[0]]]
        channel = channel_of[class_of[part]]
        members[atom_group[part[0]]].append(Member(axis.parameter, axis.axis, position[part], channel))
    groups = []
    taken: set[str] = set()
    for number, lives_on in enumerate(members):
        mine = classes[sorted_classes[starts[number] : starts[number + 1]]]
        name = unique_name(lives_on[0].parameter, taken)
        groups.append(Group(name, len(mine), tuple(lives_on), bool(np.isin(mine, inexact).any()), mine))
    return groups, frozen


def norm_classes(run: Run) -> Ints:
    """The classes over which some norm runs."""
    touched = [
        run.names.find(norm.label).ravel()
        for norm in run.norms
        if any(norm.label.shape[axis] > 1 for axis in norm.axes)
    ]
    return np.unique(np.concatenate(touched)) if touched else np.zeros(0, dtype=np.int64)


def unique_name(parameter: str, taken: set[str]) -> str:
    """A group is called after the first module it lives in; a second group there gets a number."""
    base = parameter.removesuffix(".weight")
    name = next(name for i in itertools.count() if (name := base if i == 0 else f"{base}:{i}") not in taken)
    taken.add(name)
    return name
