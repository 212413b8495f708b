"""Twins: a model recorded beside its compact graph, call by call: what its sizes must be to make the calls of that."""

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import fx, nn

from fxprune.channels.interpret import GraphInterpreter, bind_placeholders, in_mode
from fxprune.errors import RewriteError, TraceError
from fxprune.graph.dtypes import reads_dtype
from fxprune.graph.inputs import Bound, map_tensors
from fxprune.graph.keep import tensors_kept
from fxprune.graph.places import describe_place
from fxprune.graph.sizes import Slot, gives_number, is_number, record_sizes
from fxprune.graph.traced import Mode, TracedModule
from fxprune.rewrite.equations import Equation
from fxprune.rewrite.fit import find_argument, name_of_target

SPLITS = ("split", "split_with_sizes", "chunk", "tensor_split")


@dataclass(frozen=True)
class Twins:
    """Two graphs that make the same calls.

    Attributes:
        pairs: their nodes, one by one, but for those that compute sizes.
        results: what each node of the compact graph gives: a number, or the shape of a tensor.
        checks: nodes for what the model's Python found to be equal.
    """

    pairs: Mapping[fx.Node, fx.Node]
    results: Mapping[fx.Node, Any]
    checks: tuple[fx.Node, ...]

    def size_of(self, node: fx.Node, axis: int) -> int:
        """A size, in the compact model, of what a node of the model gives."""
        size: int = self.results[self.pairs[node]][axis]
        return size

    def equations(self) -> Iterator[Equation]:
        """What must be equal."""
        for node, twin in self.pairs.items():
            for left, right in self.compare_calls(node, twin):
                if left in self.pairs or (isinstance(left, fx.Node) and right == 0):  # a place, no size
                    continue
                if is_number(left) or is_number(right):
                    yield Equation(left, right, describe_place(node))
        for check in self.checks:
            yield Equation(check.args[0], check.args[1], describe_place(check))

    def compare_calls(self, node: fx.Node, twin: fx.Node) -> Iterator[tuple[Any, Any]]:
        """Pairs of arguments of a call: what the model gives, and what the compact graph gives."""
        if name_of_target(node) in SPLITS:
            yield from self.compare_parts(node, twin)
            return
        args, twin_args = ({**dict(enumerate(call.args)), **call.kwargs} for call in (node, twin))
        shape = self.results[twin] if name_of_target(node) in ("view", "reshape") else ()
        for key in args | twin_args:
            pairs = zip_longest(leaves_of(args.get(key)), leaves_of(twin_args.get(key)))
            for at, (left, right) in enumerate(pairs, key - 1 if isinstance(key, int) else 0):
                if left == -1 or right != -1:
                    yield left, self.number_of(right)
                elif shape:  # of which torch infers one
                    yield left, shape[at]

    def compare_parts(self, node: fx.Node, twin: fx.Node) -> Iterator[tuple[Any, Any]]:
        """Sizes of parts, which a call may give one by one, or all at once, or by their number."""
        axis = self.number_of(find_argument(twin, 2, "dim", 0))
        sizes = [part[axis] for part in self.results[twin]]
        asked = find_argument(node, 1, next((name for name in node.kwargs if name != "dim"), ""))
        if isinstance(asked, (tuple, list)):
            yield from zip_longest(asked, sizes)
            return
        by_number = name_of_target(node) in ("chunk", "tensor_split")
        largest = math.ceil(sum(sizes) / len(sizes)) if by_number else sizes[0]
        yield asked, len(sizes) if by_number else largest
        yield from ((largest, size) for size in sizes[:-1])

    def number_of(self, value: Any) -> Any:
        """A number of the compact graph; tensors stay nodes."""
        number = self.results.get(value) if isinstance(value, fx.Node) else None
        return number if is_number(number) else value


class ShapeRun(GraphInterpreter):
    """Runs the graph of one mode, and keeps what each node gives, shapes in place of tensors."""

    def __init__(self, compact: TracedModule, mode: Mode) -> None:
        super().__init__(compact, graph=compact.graphs[mode])
        self.results: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        result = super().run_node(n)
        self.results[n] = map_tensors(lambda tensor: tuple(tensor.shape), result)
        return result


def record_twins(
    model: nn.Module, slots: Mapping[Slot, int], compact: TracedModule, mode: Mode, inputs: Bound
) -> Twins:
    """Record ``model``, and run ``compact``, in one mode.

    Args:
        model: not changed.
        slots: of its sizes, those that shall be found.
        compact: the graph.
        mode: of both.
        inputs: what to run them on.

    Raises:
        RewriteError: the model can't be recorded, or makes other calls.
    """
    try:
        recorded = record_sizes(model, slots, inputs, mode)
    except TraceError as error:
        raise RewriteError(f"the class can't be given back: {error}") from error
    pairs = dict(pair_nodes(recorded, compact.graphs[mode]))
    run = ShapeRun(compact, mode)
    with in_mode(compact, mode), tensors_kept(compact), torch.no_grad():
        run.run(*bind_placeholders(compact.graphs[mode], inputs), enable_io_processing=False)
    return Twins(
        pairs, run.results, tuple(node for node in recorded.nodes if node.target is operator.eq and gives_number(node))
    )


def pair_nodes(graph: fx.Graph, compact: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The nodes of two graphs that make the same calls, but for those that compute sizes.

    Raises:
        RewriteError: they make others.
    """
    pairs = zip_longest(
        *(
            [node for node in side.nodes if not gives_number(node) and not reads_dtype(node)]
            for side in (graph, compact)
        )
    )
    for node, twin in pairs:
        if node is None or twin is None or not is_same_call(node, twin):
            place, twin_place = (describe_place(call) if call is not None else "nothing" for call in (node, twin))
            raise RewriteError(
                f"where the model calls {place}, the compact graph has {twin_place}: it was changed by more than a "
                "cut. Give the compact model before any rewrite pass"
            )
        yield node, twin


def is_same_call(node: fx.Node, twin: fx.Node) -> bool:
    """Whether two nodes make the same call; parts may be given by their sizes in one of them."""
    if name_of_target(node) in SPLITS:
        return name_of_target(twin) in SPLITS
    return (node.op, node.target) == (twin.op, twin.target)


def leaves_of(value: Any) -> Iterator[Any]:
    """What is in an argument, one by one."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves_of(item)
    elif isinstance(value, dict):
        yield from leaves_of(list(value.values()))
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    else:
        yield value
