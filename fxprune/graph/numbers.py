"""Numbers that remember where they come from: sizes of recorded tensors, and what Python computes with them.

They are ints and floats, so that Python's checks, loops and slices just work. Their node is made when it is asked for.
"""

import linecache
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxprune.graph.places import is_users
from fxprune.graph.watch import RECORDER

Make = Callable[[], fx.Node]


def cut_off(number: float) -> int:
    """The whole part of a number, as ``int`` gives it; tracers and TorchScript follow it."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return int(number)
    return torch.sym_int(number)


OPERATORS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow")},
    **{name: getattr(operator, name) for name in ("abs", "pos", "lshift", "rshift")},
    **{name: getattr(operator, name + "_") for name in ("and", "or")},
}
COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}  # as guards have them
BARE = ("int", "float", "trunc", "round", "hash")  # methods of which a number comes that does not remember


class Number:
    """What a number of a recording knows beside its value: the graph that it belongs to, and how to make its node."""

    graph: fx.Graph
    make: Make
    made: fx.Node | None = None

    @property
    def node(self) -> fx.Node:
        """The node that computes this number."""
        if self.made is None:
            self.made = self.make()
        return self.made

    @property
    def plain(self) -> float:
        """The number, which does not remember."""
        return int.__int__(self) if isinstance(self, int) else float.__float__(self)  # type: ignore[arg-type]

    def __reduce__(self) -> Any:
        """Outside the recording, and in copies, it is a plain number."""
        return (int if isinstance(self, int) else float), (self.plain,)


class Int(Number, int):
    """An int that remembers."""

    def __floor__(self) -> Any:
        return self

    def __ceil__(self) -> Any:
        return self


class Float(Number, float):
    """A float that remembers."""

    def __floor__(self) -> Any:
        lower: Any = self // 1
        return remember_number(int(lower.plain), self.graph, lambda: self.graph.call_function(cut_off, (lower.node,)))

    def __ceil__(self) -> Any:
        return -(-self).__floor__()


def remember_number(value: float, graph: fx.Graph, make: Make) -> Any:
    """``value`` as a number of ``graph`` with a node that ``make`` makes."""
    number: Int | Float = Int(value) if isinstance(value, int) else Float(value)
    number.graph, number.make = graph, make
    return number


def make_remember(plain: Callable[..., Any], function: Callable[..., Any], reflected: bool) -> Callable[..., Any]:
    """The method ``plain`` of int or float, with a result that remembers."""

    def method(self: Any, *others: Any) -> Any:
        value = plain(self, *others)
        if value is NotImplemented and isinstance(others[0], float):  # it would not ask this int
            value = getattr(float, plain.__name__)(float(self.plain), *others)
        if value is NotImplemented:
            return value
        operands = (*others, self) if reflected else (self, *others)

        def make() -> fx.Node:
            nodes = [node_or_number(operand, self.graph) for operand in operands]
            node: fx.Node = self.graph.call_function(function, tuple(nodes))
            return node

        return remember_number(value, self.graph, make)

    return method


def node_or_number(value: Any, graph: fx.Graph) -> Any:
    """The node of a number of ``graph``; any other number as it is."""
    return value.node if isinstance(value, Number) and value.graph is graph else value


def make_compare(plain: Callable[..., Any], relation: str) -> Callable[..., Any]:
    """The comparison ``plain`` of int or float, which leaves a guard where the user's model compares."""

    def method(self: Any, other: Any) -> Any:
        found = plain(self.plain, other)
        if found is NotImplemented and isinstance(other, float):  # it would not ask this int
            found = getattr(float, plain.__name__)(float(self.plain), other)
        if found is not NotImplemented and isinstance(other, (int, float)):
            write_guard(self, relation, other, found)
        return found

    return method


def make_bare(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The method ``plain`` of int or float, which leaves a guard: what comes of it holds for this number alone."""

    def method(self: Any, *digits: int) -> Any:
        value = plain(self, *digits)
        cut = isinstance(self, float) and plain in (float.__int__, float.__trunc__)
        write_guard(self, *(("int", 0, value) if cut else ("==", self.plain, True)))
        return value

    return method


def make_truth(plain: Callable[..., Any]) -> Callable[..., Any]:
    """``__bool__`` of int or float, which leaves a guard."""

    def method(self: Any) -> bool:
        truth: bool = plain(self)
        write_guard(self, "!=", 0, truth)
        return truth

    return method


def divide(self: Any, other: Any) -> Any:
    """``__divmod__`` of int or float."""
    return self // other, self % other


def write_guard(number: Any, relation: str, other: float, found: float) -> None:
    """Where the user's model asks for it, the graph that is being recorded says what was found."""
    recorder, frame = RECORDER.get(), sys._getframe(2)
    if recorder is None or recorder.graph is not number.graph or not is_users(frame.f_code.co_filename):
        return
    file, line = frame.f_code.co_filename, frame.f_lineno
    place = f"{file}:{line}: `{linecache.getline(file, line).strip()}`"
    recorder.guard(number, relation, other, found, place)


for kind, base in ((Int, int), (Float, float)):
    for name, function in OPERATORS.items():
        for method, reflected in ((f"__{name}__", False), (f"__r{name}__", True)):
            if hasattr(base, method):
                setattr(kind, method, make_remember(getattr(base, method), function, reflected))
    for name, relation in COMPARISONS.items():
        setattr(kind, f"__{name}__", make_compare(getattr(base, f"__{name}__"), relation))
    for name in BARE:
        setattr(kind, f"__{name}__", make_bare(getattr(base, f"__{name}__")))
    setattr(kind, "__divmod__", divide)  # noqa: B010
    setattr(kind, "__bool__", make_truth(base.__bool__))  # noqa: B010
