"""Names: a union-find over integers that also remembers which classes may not be pruned, and why.

A name is an integer. Every position of every parameter axis starts with a name of its own; operators merge the names of
positions that must stay or go together. This file knows nothing about tensors' shapes or operators.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Reason:
    """Why a class of names is frozen: ``text`` in words, ``node`` the graph node at which it happened."""

    text: str
    node: str

    def __str__(self) -> str:
        return f"{self.text} (at {self.node})" if self.node else self.text


class Names:
    """A growing set of names, partitioned into classes; each class is free, or frozen for a reason."""

    def __init__(self) -> None:
        self.node = ""  # the graph node that is being run, for reasons
        self.reasons: list[Reason] = []
        self._known: dict[Reason, int] = {}
        self._count = 0
        self._parent: Ints = np.arange(1024)
        self._reason: Ints = np.full(1024, -1)  # per root: index into reasons, -1 = free
        self._produced: Bools = np.zeros(1024, dtype=bool)  # per root: some contraction has it as output

    def __len__(self) -> int:
        return self._count

    def fresh(self, count: int) -> Ints:
        """Make ``count`` new names, each alone in its class. Returns int64[count]."""
        start, self._count = self._count, self._count + count
        if self._count > len(self._parent):
            self._grow(max(self._count, 2 * len(self._parent)))
        return np.arange(start, self._count)

    def find(self, names: Ints) -> Ints:
        """The representative (the smallest name) of each name's class; same shape as ``names``."""
        roots = self._parent[names]
        while True:
            above = self._parent[roots]
            if (above == roots).all():
                return roots
            self._parent[names] = above
            roots = above

    def merge(self, a: Ints, b: Ints) -> None:
        """Merge the classes of ``a[i]`` and ``b[i]`` for each i. The arrays broadcast against each other."""
        a, b = np.broadcast_arrays(a, b)
        a, b = a.ravel(), b.ravel()
        while True:
            a, b = self.find(a), self.find(b)
            differ = a != b
            if not differ.any():
                return
            a, b = a[differ], b[differ]
            low, high = np.minimum(a, b), np.maximum(a, b)
            # Where one class meets several others at once the last assignment wins; the loop merges the rest.
            self._parent[high] = low
            roots = self.find(high)
            frozen = (self._reason[high] >= 0) & (self._reason[roots] < 0)
            self._reason[roots[frozen]] = self._reason[high[frozen]]
            self._produced[roots[self._produced[high]]] = True

    def freeze(self, names: Ints, text: str) -> None:
        """Freeze the classes of ``names``. The first reason that a class is given stands."""
        roots = self.find(names.ravel())
        roots = roots[self._reason[roots] < 0]
        if len(roots):
            self._reason[roots] = self._reason_number(text)

    def frozen(self, names: Ints) -> Bools:
        """Whether each name's class is frozen; same shape as ``names``."""
        return self._reason[self.find(names)] >= 0

    def reason(self, name: int) -> Reason | None:
        """Why the class of ``name`` is frozen, or None when it is free."""
        number = int(self._reason[self.find(np.array([name]))[0]])
        return self.reasons[number] if number >= 0 else None

    def reason_numbers(self, names: Ints) -> Ints:
        """For each name the index of its class's reason in ``reasons``, -1 where it is free."""
        return self._reason[self.find(names)]

    def produce(self, names: Ints) -> None:
        """Mark the classes of ``names`` as the output of a contraction."""
        self._produced[self.find(names)] = True

    def produced(self, names: Ints) -> Bools:
        """Whether each name's class is the output of some contraction; same shape as ``names``."""
        return self._produced[self.find(names)]

    def _reason_number(self, text: str) -> int:
        reason = Reason(text, self.node)
        if reason not in self._known:
            self._known[reason] = len(self.reasons)
            self.reasons.append(reason)
        return self._known[reason]

    def _grow(self, size: int) -> None:
        old = len(self._parent)
        self._parent = np.concatenate([self._parent, np.arange(old, size)])
        self._reason = np.concatenate([self._reason, np.full(size - old, -1)])
        self._produced = np.concatenate([self._produced, np.zeros(size - old, dtype=bool)])
