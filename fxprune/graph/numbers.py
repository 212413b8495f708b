"""Numbers that remember where they come from: sizes of recorded tensors, and what Python computes with them.

They are ints and floats, so that Python's checks, loops and slices just work. Their node is made when it is asked for.
"""

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

Make = Callable[[], fx.Node]
OPERATORS = ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg")


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

    def __reduce__(self) -> Any:
        """Outside the recording, and in copies, it is a plain number."""
        value: Any = self
        kind = int if isinstance(self, int) else float
        return kind, (kind(value),)


class Int(Number, int):
    """An int that remembers."""


class Float(Number, float):
    """A float that remembers."""


def remember_number(value: float, graph: fx.Graph, make: Make) -> Any:
    """``value`` as a number of ``graph`` with a node that ``make`` makes."""
    number: Int | Float = Int(value) if isinstance(value, int) else Float(value)
    number.graph, number.make = graph, make
    return number


def make_remember(plain: Callable[..., Any], function: Callable[..., Any], reflected: bool) -> Callable[..., Any]:
    """The method ``plain`` of int or float, with a result that remembers."""

    def method(self: Any, *others: Any) -> Any:
        value = plain(self, *others)
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


for kind, base in ((Int, int), (Float, float)):
    for name in OPERATORS:
        for method, reflected in ((f"__{name}__", False), (f"__r{name}__", True)):
            if hasattr(base, method):
                setattr(kind, method, make_remember(getattr(base, method), getattr(operator, name), reflected))
