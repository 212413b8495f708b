"""Groups: classes of names that live on the same parameter axes, read off after a run."""

import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fxprune.channels.names import Bools, Ints, Names, Reason
from fxprune.channels.tensor import NameRun
from fxprune.channels.values import Value

AxisMark = tuple[str, int, int]  # a parameter or buffer, one of its axes, and a checksum of the channels there


@dataclass(frozen=True)
class Member:
    """The positions of a group on one axis of one parameter or buffer.

    ``index[i]`` is a position on the axis, ``channel[i]`` the channel of the group that it belongs to; both
    int64[positions], ``index`` sorted.
    """

    parameter: str
    axis: int
    index: Ints = field(compare=False)
    channel: Ints = field(compare=False)


@dataclass(frozen=True)
class Group:
    """Channels that live on the same parameter axes. ``inexact``: a norm runs over them, so no pruning is exact."""

    name: str
    size: int
    members: tuple[Member, ...]
    inexact: bool
    roots: Ints = field(repr=False, compare=False)  # int64[size]: the name that stands for each channel

    def __str__(self) -> str:
        axes = " · ".join(fold_names(f"{member.parameter}[{member.axis}]" for member in self.members))
        return f"{self.name}: {self.size} {self.noun}{' (inexact)' if self.inexact else ''} on {axes}"

    @property
    def noun(self) -> str:
        """What its channels are called: those of several positions on each axis are heads, say, or flattened maps."""
        positions = min((len(member.index) for member in self.members), default=self.size) // self.size
        return "channels" if positions < 2 else f"channels of {positions} positions each (such as attention heads)"


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


def layers_of(group: Group) -> list[str]:
    """The paths of the layers that the channels of a group go through, norms included."""
    return list(dict.fromkeys(member.parameter.rpartition(".")[0] for member in group.members))


def fold_names(names: Iterable[str]) -> list[str]:
    """Names; those that differ in numbers between dots only are one with a ``*``, where there are three or more."""
    folded: dict[str, list[str]] = {}
    for name in names:
        folded.setdefault(".".join("*" if part.isdecimal() else part for part in name.split(".")), []).append(name)
    rows = ([f"{pattern} ({len(alike)} times)"] if len(alike) > 2 else alike for pattern, alike in folded.items())
    return list(itertools.chain.from_iterable(rows))


def settle_grids(run: NameRun) -> None:
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
            if any(is_uniform(roots, axis).all() for axis in range(roots.ndim)):
                continue
            best = max(range(roots.ndim), key=lambda axis: classes_after(roots, axis))
            slabs = np.moveaxis(roots, best, 0).reshape(roots.shape[best], -1)
            run.names.merge(slabs, slabs[:, :1])
            changed = True


def is_uniform(roots: Ints, axis: int) -> Bools:
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


def freeze_leftovers(run: NameRun, axes: Mapping[tuple[str, int], Axis], values: Iterable[Value]) -> None:
    """Freeze what no operator touched, what only buffers know, and classes that are a whole axis or a whole value."""
    names = run.names
    names.node = ""
    roots = names.find(np.arange(len(names)))
    for label in {id(label): label for value in values for label in value.labels}.values():
        classes = roots[label]
        if (classes == classes.flat[0]).all():
            names.freeze(label, "it is all of a value")
    for axis in axes.values():
        if axis.parameter not in run.used:
            names.freeze(axis.names, "unused")
    produced = names.produced(roots)
    for axis in axes.values():
        if axis.weak and not (known := produced[axis.names]).all():
            names.freeze(axis.names[~known], "a buffer that no layer produces")
        classes = roots[axis.names]
        if (classes == classes[0]).all():
            names.freeze(classes[:1], f"all of {axis.parameter}[{axis.axis}] hangs together")


def read_groups(
    run: NameRun, axes: Sequence[Axis], known: Mapping[frozenset[AxisMark], str]
) -> tuple[list[Group], list[Frozen]]:
    """Classes that live on the same axes are a group; what is frozen is listed by axis and reason.

    ``known``: the names that groups had before a cut, by their places now.
    """
    if not axes:
        return [], []
    atoms = np.concatenate([axis.names for axis in axes])
    owner = np.repeat(np.arange(len(axes)), [axis.size for axis in axes])
    position = np.concatenate([np.arange(axis.size) for axis in axes])
    roots, reasons = run.names.find(atoms), run.names.reason_numbers(atoms)

    frozen = []
    for at in split_by_key(owner * (len(run.names.reasons) + 1) + reasons, np.flatnonzero(reasons >= 0)):
        axis, reason = axes[owner[at[0]]], run.names.reasons[reasons[at[0]]]
        frozen.append(Frozen(axis.parameter, axis.axis, position[at], reason))

    free = reasons < 0
    roots, owner, position = roots[free], owner[free], position[free]
    class_of, classes = renumber_classes(roots, len(run.names))
    group_of = same_axes(class_of, owner, len(axes))
    channel_of = np.zeros(len(classes), dtype=np.int64)
    numbers_of = [group for group in split_by_key(group_of, np.arange(len(classes)))]
    for group in numbers_of:
        channel_of[group] = np.arange(len(group))

    members: list[list[Member]] = [[] for _ in numbers_of]
    atom_group = group_of[class_of]
    for at in split_by_key(atom_group * len(axes) + owner, np.arange(len(owner))):
        axis = axes[owner[at[0]]]
        members[atom_group[at[0]]].append(Member(axis.parameter, axis.axis, position[at], channel_of[class_of[at]]))
    inexact = norm_classes(run)
    taken = set(known.values())
    groups = []
    for numbers, lives_on in zip(numbers_of, members, strict=True):
        group_roots = classes[numbers]
        name = known.get(frozenset(map(place_of, lives_on))) or unique_name(lives_on[0].parameter, taken)
        groups.append(
            Group(name, len(group_roots), tuple(lives_on), bool(np.isin(group_roots, inexact).any()), group_roots)
        )
    return groups, frozen


def place_of(member: Member) -> AxisMark:
    """Where a group lives, and in which order its channels are there."""
    return member.parameter, member.axis, zlib.crc32(member.channel.tobytes())


def cut_group(group: Group, kept: Sequence[int], places: Mapping[tuple[str, int], Ints]) -> Group:
    """A group that keeps the channels ``kept``, on the axes in ``places``: where each of their positions is then."""
    channels = np.asarray(kept, dtype=np.int64)
    after = np.full(group.size, -1)  # of each channel its new number, where it stays
    after[channels] = np.arange(len(channels))
    members = []
    for member in group.members:
        if (member.parameter, member.axis) in places:
            stays = after[member.channel] >= 0
            index = places[member.parameter, member.axis][member.index[stays]]
            members.append(replace(member, index=index, channel=after[member.channel[stays]]))
    return replace(group, size=len(channels), members=tuple(members), roots=group.roots[channels])


def tie_channels(names: Names, axes: Mapping[tuple[str, int], Axis], group: Group) -> None:
    """Merge what was one channel when the model was cut: in what is left of it, no more need hold it together."""
    first = np.full(group.size, -1)  # of each channel, the first of its names
    for member in group.members:
        axis = axes.get((member.parameter, member.axis))
        if axis is None or member.index.max(initial=-1) >= axis.size:  # one position has no name
            continue
        names_here = axis.names[member.index]
        fresh = first[member.channel] < 0
        first[member.channel[fresh]] = names_here[fresh]
        names.merge(names_here, first[member.channel])


def renumber_classes(roots: Ints, count: int) -> tuple[Ints, Ints]:
    """The number of each root among all that are there, in their order, and the roots by number."""
    present = np.zeros(count, dtype=bool)
    present[roots] = True
    return (np.cumsum(present) - 1)[roots], np.flatnonzero(present)


def same_axes(class_of: Ints, owner: Ints, count: int) -> Ints:
    """The number of each class's group, in the model's order: classes on the same axes have the same.

    ``class_of`` and ``owner`` (sorted) give the class and the axis of each atom.
    """
    # A class's signature is the set of axes it lives on, as a sum of one random number for each axis.
    weights = np.random.default_rng(0).integers(1 << 62, size=count)
    signature = np.zeros(int(class_of.max(initial=-1)) + 1, dtype=np.int64)
    bounds = np.searchsorted(owner, np.arange(count + 1))
    for weight, start, stop in zip(weights, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        classes = class_of[start:stop]
        signature[classes] = signature[classes] + weight  # a class that is there twice counts once
    _, first, group_of = np.unique(signature, return_index=True, return_inverse=True)
    rank = np.empty_like(first)
    rank[np.argsort(first)] = np.arange(len(first))  # classes are sorted by their smallest name
    return rank[group_of]


def split_by_key(keys: Ints, among: Ints) -> Iterator[Ints]:
    """The indices ``among`` those of ``keys``, split by their key: keys ascend, and so do the indices of each."""
    if not len(among):
        return
    order = among[np.argsort(keys[among], kind="stable")]
    cuts = np.flatnonzero(np.diff(keys[order])) + 1
    for start, stop in itertools.pairwise([0, *cuts.tolist(), len(order)]):
        yield order[start:stop]


def norm_classes(run: NameRun) -> Ints:
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
