"""Batch: what a graph has baked in of the sizes of the example is seen beside a graph of other sizes."""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.errors import TraceError
from fxprune.graph.follow import MADE, DiffersError, Follower, behind_inputs
from fxprune.graph.guards import check_size, erase_guard
from fxprune.graph.inputs import Bound, map_tensors, tensors_in
from fxprune.graph.numbers import cut_off
from fxprune.graph.places import describe_place

FIRST = "first tensor"  # in the meta of a node: it gives the first tensor that the model is given
LONGER = (3, 2, 7)  # so many times as long are the axes of images and sequences in the other recording


def larger_batch(batch: int) -> int:
    """The batch of the other recording: large enough that Python may take another path, and no multiple."""
    return 4 * batch + 1


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
    """The inputs, without data, with a larger batch wherever the first axis is as long as that.

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
                shape[0] = larger_batch(batch)
            elif axis:
                shape[axis] = size * (factors.get(axis, 1) if tensor is first else longer.get(size, 1))
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    other: Bound = map_tensors(enlarge, inputs)
    return other


class SizeFollower(Follower):
    """Lets a graph follow the sizes of its inputs.

    The other graph is recorded with a batch larger than ``batch``, perhaps with longer axes too.
    """

    def __init__(self, graph: fx.Graph, batch: int) -> None:
        super().__init__(graph)
        self.batch = batch
        self.guards: dict[fx.Node, tuple[float, float]] = {}  # of numbers that Python made plain; and these in both

    def follow_graph(self, other: fx.Graph) -> None:
        """Put nodes for numbers. What was followed needs no guard."""
        super().follow_graph(other)
        for guard in self.guards:
            erase_guard(guard)

    def follow_node(self, node: fx.Node, twin: fx.Node) -> None:
        """Note what guards say that differ."""
        if node.target is not check_size:
            super().follow_node(node, twin)
            return
        a, b = plain_number(node), plain_number(twin)
        if a is None or b is None:
            raise DiffersError(node, twin)
        self.guards[node] = a, b

    def find(self, node: fx.Node, twin: fx.Node, a: Any, b: Any) -> fx.Node | None:
        """The batch, times a number; or a number that Python made plain."""
        if type(a) is int and type(b) is int and a * larger_batch(self.batch) == b * self.batch:
            size = self.make(behind_inputs(first_tensor(self.graph)), "size", first_tensor(self.graph), 0)
            return size if a == self.batch else self.make(size, operator.mul, size, a // self.batch)
        guard = next((guard for guard, pair in self.guards.items() if pair == (a, b)), None)
        if guard is None or type(a) is not type(b):
            return None
        number: fx.Node = guard.args[0]  # type: ignore[assignment]
        return number if guard.args[1] == "==" else self.make(number, cut_off, number)


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


def fix_sizes(graph: fx.Graph, inputs: Bound, axes: tuple[int, ...], node: fx.Node) -> None:
    """Let ``graph`` refuse other sizes of ``axes`` of the first tensor: for these, ``node`` would be another."""
    first, shape, place = first_tensor(graph), tensors_in(inputs)[0].shape, describe_place(node)
    with graph.inserting_after(behind_inputs(first)):
        for axis in axes:
            size = graph.call_method("size", (first, axis))
            with graph.inserting_after(size):
                guard = graph.call_function(check_size, (size, "==", shape[axis], True, place))
            size.meta[MADE] = guard.meta[MADE] = True


def depends_on_batch(node: fx.Node) -> TraceError:
    """What to say where Python does something else for another batch."""
    return TraceError(
        f"node {describe_place(node)} is another for another batch size: Python there reads the number of samples (by "
        "len, int or a loop). Use x.shape[0] in the calls of torch, or move that line into a module of its own"
    )
