"""Batch: what a graph has baked in of the size of the example's batch is seen beside a graph of another batch."""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.errors import TraceError
from fxprune.graph.inputs import Bound, map_tensors, tensors_in
from fxprune.graph.places import describe_place

FIRST = "first tensor"  # in the meta of a node: it gives the first tensor that the model is given


def batch_of(inputs: Bound) -> int:
    """The size of the first axis of the first tensor; 0 where there is none."""
    first = next(iter(tensors_in(inputs)), None)
    return first.shape[0] if first is not None and first.ndim else 0


def with_larger_batch(inputs: Bound) -> Bound:
    """The inputs, without data, with one sample more wherever the first axis is as long as the batch."""
    batch = batch_of(inputs)

    def enlarge(tensor: Tensor) -> Tensor:
        first, *rest = tensor.shape or (0,)
        shape = (batch + 1, *rest) if tensor.ndim and first == batch else tensor.shape
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    larger: Bound = map_tensors(enlarge, inputs)
    return larger


def follow_batch(graph: fx.Graph, other: fx.Graph, batch: int) -> None:
    """Where numbers in ``graph`` are multiples of the batch size, put that of the run for them.

    Args:
        graph: recorded with ``batch`` samples; changed in place.
        other: recorded with one sample more.
        batch: the number of samples.

    Raises:
        TraceError: the two differ in another way; names the line.
    """
    nodes, others = list(graph.nodes), list(other.nodes)
    for node, twin in zip(nodes, others, strict=False):
        if (node.op, node.target, node.name) != (twin.op, twin.target, twin.name):
            raise depends_on_batch(node)
        pairs = ((node.args, twin.args), (node.kwargs, twin.kwargs))
        if repr(node.args) == repr(twin.args) and repr(node.kwargs) == repr(twin.kwargs):
            continue
        node.args, node.kwargs = (follow_value(graph, node, a, b, batch) for a, b in pairs)
    if len(nodes) != len(others):
        raise depends_on_batch(max(nodes, others, key=len)[min(len(nodes), len(others)) - 1])


def follow_value(graph: fx.Graph, node: fx.Node, a: Any, b: Any, batch: int) -> Any:
    """An argument of ``node``, ``b`` where the batch is one larger, with what multiplies the batch made a node."""
    if isinstance(a, slice) and isinstance(b, slice):
        bounds = ((a.start, b.start), (a.stop, b.stop), (a.step, b.step))
        return slice(*(follow_value(graph, node, *pair, batch) for pair in bounds))
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return {key: follow_value(graph, node, a[key], b[key], batch) for key in a}
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
        items = [follow_value(graph, node, *pair, batch) for pair in zip(a, b, strict=True)]
        return tuple(items) if isinstance(a, tuple) else items
    if repr(a) == repr(b):
        return a
    if type(a) is int and type(b) is int and a * (batch + 1) == b * batch:
        return batch_node(graph, a // batch)
    raise depends_on_batch(node)


def batch_node(graph: fx.Graph, factor: int) -> fx.Node:
    """A node that gives the batch size times ``factor``."""
    first = behind = next(node for node in graph.nodes if FIRST in node.meta)
    while behind.op == "placeholder" and behind.next.op == "placeholder":
        behind = behind.next
    with graph.inserting_after(behind):
        size: fx.Node = graph.call_method("size", (first, 0))
    if factor == 1:
        return size
    with graph.inserting_after(size):
        product: fx.Node = graph.call_function(operator.mul, (size, factor))
    return product


def depends_on_batch(node: fx.Node) -> TraceError:
    """What to say where Python does something else for another batch."""
    return TraceError(
        f"node {describe_place(node)} is another for another batch size: Python there reads the number of samples (by "
        "len, int or a loop). Use x.shape[0] in the calls of torch, or move that line into a module of its own"
    )
