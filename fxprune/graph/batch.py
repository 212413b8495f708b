"""Batch: what a graph has baked in of the sizes of the example is seen beside a graph of other sizes."""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.errors import TraceError
from fxprune.graph.guards import check_size, erase_guard
from fxprune.graph.inputs import Bound, map_tensors, tensors_in
from fxprune.graph.numbers import cut_off
from fxprune.graph.places import describe_place

FIRST = "first tensor"  # in the meta of a node: it gives the first tensor that the model is given
LONGER = (3, 5, 7)  # so many times as long are the axes of images and sequences in the other recording


class DiffersError(Exception):
    """Two graphs differ in what can't be followed."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(node.name)
        self.node = node


def batch_of(inputs: Bound) -> int:
    """The size of the first axis of the first tensor; 0 where there is none."""
    first = next(iter(tensors_in(inputs)), None)
    return first.shape[0] if first is not None and first.ndim else 0


def free_axes(inputs: Bound) -> tuple[int, ...]:
    """The axes of the first tensor, the batch aside, that a model may take longer: of images, sequences and tokens."""
    first = tensors_in(inputs)[0]
    if first.ndim > 3:
        return tuple(range(2, first.ndim))
    return (1,) if first.ndim == 3 or (first.ndim == 2 and not first.is_floating_point()) else ()


def with_other_sizes(inputs: Bound, axes: tuple[int, ...]) -> Bound:
    """The inputs, without data, with one sample more wherever the first axis is as long as the batch.

    ``axes`` of the first tensor are longer, each by another factor, and so are those of the same length in others.
    """
    first = tensors_in(inputs)[0]
    batch = first.shape[0]
    factors = dict(zip(axes, LONGER, strict=False))
    longer = {first.shape[axis]: factor for axis, factor in factors.items()}

    def enlarge(tensor: Tensor) -> Tensor:
        shape = list(tensor.shape)
        for axis, size in enumerate(shape):
            if axis == 0 and size == batch:
                shape[0] = batch + 1
            elif axis:
                shape[axis] = size * (factors.get(axis, 1) if tensor is first else longer.get(size, 1))
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    other: Bound = map_tensors(enlarge, inputs)
    return other


def follow_sizes(graph: fx.Graph, other: fx.Graph, batch: int) -> None:
    """Where numbers in ``graph`` follow from sizes, put those of the run for them.

    Args:
        graph: recorded with ``batch`` samples; changed in place.
        other: recorded with one sample more, perhaps with longer axes too.
        batch: the number of samples.

    Raises:
        DiffersError: the two differ in another way; then ``graph`` is as it was.
    """
    nodes, others = list(graph.nodes), list(other.nodes)
    follower = Follower(graph, batch)
    try:
        for node, twin in zip(nodes, others, strict=False):
            follower.follow_node(node, twin)
        if len(nodes) != len(others):
            raise DiffersError(max(nodes, others, key=len)[min(len(nodes), len(others)) - 1])
    except DiffersError:
        for node in reversed(follower.made):
            graph.erase_node(node)
        raise
    follower.apply()


class Follower:
    """Finds, for numbers that differ between two graphs, the nodes that give them."""

    def __init__(self, graph: fx.Graph, batch: int) -> None:
        self.graph, self.batch = graph, batch
        self.made: list[fx.Node] = []
        self.changes: list[tuple[fx.Node, Any, Any]] = []
        self.guards: dict[fx.Node, tuple[float, float]] = {}  # of numbers that Python made plain; and these in both

    def follow_node(self, node: fx.Node, twin: fx.Node) -> None:
        """Find what the arguments of ``node`` follow."""
        if (node.op, node.target, node.name) != (twin.op, twin.target, twin.name):
            raise DiffersError(node)
        if repr(node.args) == repr(twin.args) and repr(node.kwargs) == repr(twin.kwargs):
            return
        if node.target is check_size:
            a, b = plain_number(node), plain_number(twin)
            if a is None or b is None:
                raise DiffersError(node)
            self.guards[node] = a, b
            return
        args, kwargs = (self.follow(node, *pair) for pair in ((node.args, twin.args), (node.kwargs, twin.kwargs)))
        self.changes.append((node, args, kwargs))

    def follow(self, node: fx.Node, a: Any, b: Any) -> Any:
        """An argument of ``node``, ``b`` for the other sizes, with nodes for the numbers that differ."""
        if isinstance(a, slice) and isinstance(b, slice):
            return slice(
                *(self.follow(node, *pair) for pair in ((a.start, b.start), (a.stop, b.stop), (a.step, b.step)))
            )
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {key: self.follow(node, a[key], b[key]) for key in a}
        if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
            items = [self.follow(node, *pair) for pair in zip(a, b, strict=True)]
            return tuple(items) if isinstance(a, tuple) else items
        if repr(a) == repr(b):
            return a
        if type(a) is int and type(b) is int and a * (self.batch + 1) == b * self.batch:
            return self.batch_node(a // self.batch)
        guard = next((guard for guard, pair in self.guards.items() if pair == (a, b)), None)
        if guard is None or type(a) is not type(b):
            raise DiffersError(node)
        if guard.args[1] == "==":
            return guard.args[0]
        with self.graph.inserting_before(guard):
            self.made.append(self.graph.call_function(cut_off, (guard.args[0],)))
        return self.made[-1]

    def batch_node(self, factor: int) -> fx.Node:
        """A node that gives the batch size times ``factor``."""
        with self.graph.inserting_after(behind_inputs(self.graph)):
            size = self.graph.call_method("size", (first_tensor(self.graph), 0))
        self.made.append(size)
        if factor == 1:
            return size
        with self.graph.inserting_after(size):
            self.made.append(self.graph.call_function(operator.mul, (size, factor)))
        return self.made[-1]

    def apply(self) -> None:
        """Put the nodes where the numbers stand. What was followed needs no guard."""
        for node, args, kwargs in self.changes:
            node.args, node.kwargs = args, kwargs
        for guard in self.guards:
            erase_guard(guard)


def plain_number(guard: fx.Node) -> Any:
    """The plain number of which a guard says that Python made it of a size; None where it says something else."""
    _, relation, other, found, _ = guard.args
    if relation == "int":
        return found
    return other if relation == "==" and found is True and isinstance(other, (int, float)) else None


def first_tensor(graph: fx.Graph) -> fx.Node:
    """The node of the first tensor that the model is given."""
    first: fx.Node = next(node for node in graph.nodes if FIRST in node.meta)
    return first


def behind_inputs(graph: fx.Graph) -> fx.Node:
    """The node of the first tensor; where that is an argument, the last of the arguments."""
    node = first_tensor(graph)
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node


def fix_sizes(graph: fx.Graph, inputs: Bound, axes: tuple[int, ...], node: fx.Node) -> None:
    """Let ``graph`` refuse other sizes of ``axes`` of the first tensor: for these, ``node`` would be another."""
    first, shape, place = first_tensor(graph), tensors_in(inputs)[0].shape, describe_place(node)
    with graph.inserting_after(behind_inputs(graph)):
        for axis in axes:
            size = graph.call_method("size", (first, axis))
            with graph.inserting_after(size):
                graph.call_function(check_size, (size, "==", shape[axis], True, place))


def depends_on_batch(node: fx.Node) -> TraceError:
    """What to say where Python does something else for another batch."""
    return TraceError(
        f"node {describe_place(node)} is another for another batch size: Python there reads the number of samples (by "
        "len, int or a loop). Use x.shape[0] in the calls of torch, or move that line into a module of its own"
    )
