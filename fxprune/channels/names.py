"""Names: a union-find over integers that also remembers which classes may not be pruned, and why.

A name is an integer. Every position of every parameter axis starts with a name of its own; operators merge the names of
positions that must stay or go together. This file knows nothing about tensors' shapes or operators.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

FREE = np.iinfo(np.int64).max  # in place of the number of a freeze


@dataclass(frozen=True)
class Reason:
    """Why a class of names is frozen: ``text`` in words, ``node`` the graph node at which it happened."""

    text: str
    node: str

    def __str__(self) -> str:
        return f"{self.text} (at {self.node})" if self.node else self.text


class Names:
    """A growing set of names, partitioned into classes; each class is free, or frozen for a reason.

    What is merged, frozen and produced is noted first, and done for all notes at once when someone asks about classes:
    a run writes hundreds of notes and rarely asks.
    """

    def __init__(self) -> None:
        self.node = ""  # the graph node that is being run, for reasons
        self.yielding = range(0)  # names that give way where others form a grid: those of buffers
        self.reasons: list[Reason] = []
        self._known: dict[Reason, int] = {}
        self._count = 0
        self._parent: Ints = np.arange(1024)
        self._frozen: Ints = np.full(1024, FREE)  # per root: the first freeze of its class
        self._produced: Bools = np.zeros(1024, dtype=bool)  # per root: some contraction has it as output
        self._merge: list[tuple[Ints, Ints]] = []
        self._freeze: list[Ints] = []
        self._why: list[int] = []  # of each freeze so far: index into reasons
        self._produce: list[Ints] = []

    def __len__(self) -> int:
        return self._count

    def reserve(self, count: int) -> None:
        """Make room for ``count`` new names."""
        if self._count + count > len(self._parent):
            self._grow(max(self._count + count, 2 * len(self._parent)))

    def fresh(self, count: int) -> Ints:
        """Make ``count`` new names, each alone in its class. Returns int64[count]."""
        self.reserve(count)
        start, self._count = self._count, self._count + count
        return np.arange(start, self._count)

    def merge(self, a: Ints, b: Ints) -> None:
        """Merge the classes of ``a[i]`` and ``b[i]`` for each i. The arrays broadcast against each other."""
        if a.shape != b.shape:
            a, b = np.broadcast_arrays(a, b)
        self._merge.append((a.ravel(), b.ravel()))

    def freeze(self, names: Ints, text: str) -> None:
        """Freeze the classes of ``names``. The first reason that a class is given stands."""
        reason = Reason(text, self.node)
        number = self._known.setdefault(reason, len(self.reasons))
        if number == len(self.reasons):
            self.reasons.append(reason)
        self._freeze.append(names.ravel())
        self._why.append(number)

    def produce(self, names: Ints) -> None:
        """Mark the classes of ``names`` as the output of a contraction."""
        self._produce.append(names.ravel())

    def find(self, names: Ints) -> Ints:
        """The representative (the smallest name) of each name's class; same shape as ``names``."""
        self._do_what_is_noted()
        return self._roots(names)

    def frozen(self, names: Ints) -> Bools:
        """Whether each name's class is frozen; same shape as ``names``."""
        result: Bools = self._frozen[self.find(names)] != FREE
        return result

    def reason(self, name: int) -> Reason | None:
        """Why the class of ``name`` is frozen, or None when it is free."""
        number = int(self.reason_numbers(np.array([name]))[0])
        return self.reasons[number] if number >= 0 else None

    def reason_numbers(self, names: Ints) -> Ints:
        """For each name the index of its class's reason in ``reasons``, -1 where it is free."""
        freezes = self._frozen[self.find(names)]
        result: Ints = np.array([*self._why, -1])[np.minimum(freezes, len(self._why))]
        return result

    def produced(self, names: Ints) -> Bools:
        """Whether each name's class is the output of some contraction; same shape as ``names``."""
        return self._produced[self.find(names)]

    def _roots(self, names: Ints) -> Ints:
        roots = self._parent[names]
        while True:
            above = self._parent[roots]
            if (above == roots).all():
                return roots
            self._parent[names] = above
            roots = above

    def _do_what_is_noted(self) -> None:
        if self._merge:
            lefts, rights = zip(*self._merge, strict=True)
            self._unite(np.concatenate(lefts), np.concatenate(rights))
            self._merge.clear()
        if self._freeze:
            first = len(self._why) - len(self._freeze)
            reasons = np.repeat(np.arange(first, len(self._why)), [len(names) for names in self._freeze])
            np.minimum.at(self._frozen, self._roots(np.concatenate(self._freeze)), reasons)
            self._freeze.clear()
        if self._produce:
            self._produced[self._roots(np.concatenate(self._produce))] = True
            self._produce.clear()

    def _unite(self, a: Ints, b: Ints) -> None:
        while True:
            a, b = self._roots(a), self._roots(b)
            differ = a != b
            if not differ.any():
                return
            a, b = a[differ], b[differ]
            low, high = np.minimum(a, b), np.maximum(a, b)
            # Where one class meets several others at once the last assignment wins; the loop merges the rest.
            self._parent[high] = low
            marked = high[(self._frozen[high] != FREE) | self._produced[high]]
            if len(marked):
                roots = self._roots(marked)
                np.minimum.at(self._frozen, roots, self._frozen[marked])
                self._produced[roots[self._produced[marked]]] = True

    def _grow(self, size: int) -> None:
        old = len(self._parent)
        self._parent = np.concatenate([self._parent, np.arange(old, size)])
        self._frozen = np.concatenate([self._frozen, np.full(size - old, FREE)])
        self._produced = np.concatenate([self._produced, np.zeros(size - old, dtype=bool)])
