"""Rows: a graph as plain data, which can be pickled.

torch pickles a graph as its code, and runs that on proxies to have the graph again: calls without a tensor (a random
draw, a context) would be made then, once for ever.
"""

from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from typing import Any

from torch import fx
from torch._ops import OpOverload, OpOverloadPacket


@dataclass(frozen=True)
class Reference:
    """A node, by its name."""

    name: str


@dataclass(frozen=True)
class Named:
    """A function that pickle can't find by itself, by the place where it can be found."""

    module: str
    path: str

    def find(self) -> Any:
        """The function."""
        return reduce(getattr, self.path.split("."), import_module(self.module))


@dataclass(frozen=True)
class Row:
    """A node."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    stack_trace: str | None


def find_name(target: Any) -> Any:
    """The target of a node in a form that can be pickled."""
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        return Named("torch", f"ops.{target}")
    if "<locals>" in getattr(target, "__qualname__", ""):  # as those that torch.nn.functional makes of two
        return Named(target.__module__, target.__name__)
    return target


def reference_of(value: Any) -> Any:
    """A reference in place of a node."""
    return Reference(value.name) if isinstance(value, fx.Node) else value


def rows_of(graph: fx.Graph) -> list[Row]:
    """The nodes of ``graph`` in order."""
    rows = []
    for node in graph.nodes:
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), reference_of)
        rows.append(Row(node.op, node.name, find_name(node.target), args, kwargs, node.stack_trace))
    return rows


def graph_of(rows: list[Row]) -> fx.Graph:
    """The graph with these nodes."""
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    for row in rows:
        args, kwargs = fx.node.map_aggregate(
            (row.args, row.kwargs), lambda value: nodes[value.name] if isinstance(value, Reference) else value
        )
        target = row.target.find() if isinstance(row.target, Named) else row.target
        node = nodes[row.name] = graph.create_node(row.op, target, args, kwargs, row.name)
        node.stack_trace = row.stack_trace
    return graph
