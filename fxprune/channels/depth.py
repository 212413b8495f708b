"""Depth: residual branches, what they add to a stream, and which of them may go whole.

A branch ends at a sum whose other operand goes around it: that is what the branch reads, or comes of that by one layer
at most. The parameters that nothing but the branch reads are its own. Where it gives zero as soon as these are zero, it
may go, and the sum becomes its other operand: that is exact, as every cut is.
"""

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.channels.values import Value
from fxprune.graph.layers import BATCH_NORMS, CONTRACTIONS, ELEMENTWISE
from fxprune.graph.trace import named_tensors
from fxprune.graph.traced import Mode, TracedModule, Values

SUMS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
# What leaves zero as it is, by the name of the function or method; div and masked_fill of their first operand.
STEADY = frozenset(
    "relu relu_ gelu silu silu_ tanh hardswish dropout neg abs div truediv to float type type_as clone detach".split()
    + "contiguous view reshape flatten unflatten permute transpose squeeze unsqueeze expand roll getitem".split()
)
PRODUCTS = frozenset("mul mul_ imul multiply matmul bmm mm".split())  # zero where one operand is
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Residual:
    """A residual branch in one graph, that may go whole.

    Attributes:
        name: the path of the last layer in it that has a matrix or kernel.
        end: gives what is added.
        join: the sum.
        nodes: what is computed for the branch alone.
        state: the parameters and buffers that nothing else reads.
        output: the parameters of that last layer (of each, where the branch is a sum), and of what follows it: zeroed,
            they silence the branch.
    """

    name: str
    end: fx.Node
    join: fx.Node
    nodes: frozenset[fx.Node]
    state: frozenset[str]
    output: tuple[str, ...]


def find_residuals(model: Any, values: Values) -> dict[str, dict[Mode, Residual]]:
    """The residual branches that may go whole, by name, those that are the same in both modes; none in others.

    Args:
        model: a traced model. Where plain Python steers it, nothing is found.
        values: of the nodes, by mode and region.
    """
    if not isinstance(model, TracedModule):
        return {}
    modes = {
        mode: {residual.name: residual for residual in residuals_of(model, graph, values[mode][""])}
        for mode, graph in model.distinct_graphs().items()
    }
    first, *others = modes.values()
    return {
        name: {mode: residuals[name] for mode, residuals in modes.items()}
        for name, residual in first.items()
        if all(name in other and other[name].state == residual.state for other in others)
    }


def residuals_of(model: TracedModule, graph: fx.Graph, values: Mapping[str, Any]) -> list[Residual]:
    """Those of one graph, in its order, without those that have others inside."""
    reading = readers_of_state(model, graph)
    found: list[Residual] = []
    for join in graph.nodes:
        if is_sum(join):
            for end, other in (join.args, join.args[::-1]):
                if same_form(values.get(join.name), values.get(other.name)):
                    found += find_residual(model, join, end, other, reading)
    joins = {residual.join for residual in found}
    return [residual for residual in found if joins.isdisjoint(residual.nodes)]


def find_residual(
    model: TracedModule, join: fx.Node, end: fx.Node, other: fx.Node, reading: Mapping[str, frozenset[fx.Node]]
) -> Iterator[Residual]:
    """The branch from ``end`` to ``join``, if it is one and may go whole."""
    if set(end.users) != {join}:
        return
    nodes = nodes_for({end})
    if not goes_around(model, other, nodes):
        return
    state = frozenset(name for name, readers in reading.items() if readers <= nodes)
    zero: set[fx.Node] = set()
    order = [node for node in join.graph.nodes if node in nodes]
    for node in order:
        if gives_zero(model, node, state, zero):
            zero.add(node)
    if end not in zero:
        return
    tensors = named_tensors(model)
    wide = [name for node in order for name in state_of(model, node) if name in state and tensors[name].ndim > 1]
    if not wide:
        return
    yield Residual(
        name=wide[-1].rpartition(".")[0] or wide[-1],
        end=end,
        join=join,
        nodes=frozenset(nodes),
        state=state,
        output=tuple(find_output(model, end, zero, {name: tensors[name] for name in state})),
    )


def find_output(model: TracedModule, end: fx.Node, zero: set[fx.Node], state: Mapping[str, Tensor]) -> Iterator[str]:
    """The parameters in ``state`` of the last layers before ``end`` that have a matrix or kernel, and of what follows.

    ``zero``: the nodes that give zero where all of ``state`` is zero.
    """
    waiting, seen = [end], {end}
    while waiting:
        node = waiting.pop()
        readers = [node, *(source for source in node.all_input_nodes if source.op == "get_attr")]
        read = [name for reader in readers for name in state_of(model, reader)]
        names = [name for name in read if isinstance(state.get(name), nn.Parameter)]
        yield from names
        if not any(state[name].ndim > 1 for name in names):
            fresh = [source for source in node.all_input_nodes if source in zero and source not in seen]
            waiting += [source for source in fresh if source.op != "get_attr"]
            seen.update(fresh)


def goes_around(model: TracedModule, other: fx.Node, nodes: set[fx.Node]) -> bool:
    """Whether ``other`` is what the branch of ``nodes`` reads, or comes of that by one contraction at most."""
    read = inputs_of(nodes)
    if other in read:
        return True
    way = nodes_for({other})
    sources = inputs_of(way)
    few = min(2, count_contractions(model, nodes))
    return sources <= read and len(sources) == 1 and count_contractions(model, way) < few


def nodes_for(ends: Iterable[fx.Node]) -> set[fx.Node]:
    """``ends`` and everything that is computed for them alone."""
    nodes = set(ends)
    waiting = [source for node in nodes for source in node.all_input_nodes]
    while waiting:
        node = waiting.pop()
        if node not in nodes and node.op != "placeholder" and set(node.users) <= nodes:
            nodes.add(node)
            waiting.extend(node.all_input_nodes)
    return nodes


def inputs_of(nodes: set[fx.Node]) -> set[fx.Node]:
    """What ``nodes`` read and are not."""
    return {source for node in nodes for source in node.all_input_nodes} - nodes


def count_contractions(model: TracedModule, nodes: Iterable[fx.Node]) -> int:
    """How many of ``nodes`` are convolutions or linear layers."""
    layers = [model.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"]
    return sum(isinstance(layer, CONTRACTIONS) for layer in layers)


def is_sum(node: fx.Node) -> bool:
    """Whether a node adds two values."""
    return (
        node.op in ("call_function", "call_method")
        and node.target in SUMS
        and len(node.args) == 2
        and not node.kwargs
        and all(isinstance(operand, fx.Node) for operand in node.args)
        and node.args[0] is not node.args[1]
    )


def same_form(first: Any, second: Any) -> bool:
    """Whether two values have the same shape and dtype."""
    both = isinstance(first, Value) and isinstance(second, Value)
    return both and (first.shape, first.dtype) == (second.shape, second.dtype)


def state_of(model: TracedModule, node: fx.Node) -> list[str]:
    """The parameters and buffers that a node reads."""
    path = str(node.target)
    if node.op == "call_module":
        return [f"{path}.{name}" for name in named_tensors(model.get_submodule(path))]
    return [path] if node.op == "get_attr" else []


def readers_of_state(model: TracedModule, graph: fx.Graph) -> dict[str, frozenset[fx.Node]]:
    """The nodes that read each parameter and buffer, under this name or another; not those that nothing reads."""
    tensors: dict[str, Tensor] = named_tensors(model)
    readers: dict[int, set[fx.Node]] = {}
    for node in graph.nodes:
        for name in state_of(model, node):
            if name in tensors:
                readers.setdefault(id(tensors[name]), set()).add(node)
    return {name: frozenset(readers[id(tensor)]) for name, tensor in tensors.items() if id(tensor) in readers}


def gives_zero(model: TracedModule, node: fx.Node, state: frozenset[str], zero: set[fx.Node]) -> bool:
    """Whether a node gives zero where all of ``state`` is zero, as what the nodes in ``zero`` give is."""
    if node.op == "get_attr":
        return str(node.target) in state
    first = node.args[0] if node.args else None
    if node.op == "call_module":
        layer = model.get_submodule(str(node.target))
        if isinstance(layer, (*ELEMENTWISE, *DROPOUTS)):
            return first in zero
        silenced = [f"{node.target}.{name}" in state for name, _ in layer.named_parameters(remove_duplicate=False)]
        scaled = isinstance(getattr(layer, "weight", None), nn.Parameter)
        return isinstance(layer, (*CONTRACTIONS, *NORMS)) and scaled and all(silenced)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    operands = [argument for argument in node.args if isinstance(argument, fx.Node)]
    if name in STEADY:
        return first in zero
    if name in PRODUCTS:
        return not zero.isdisjoint(operands)
    if name in ("linear", "conv1d", "conv2d", "conv3d"):
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        return not zero.isdisjoint(operands[:2]) and (bias is None or bias in zero)
    if name == "addmm":
        return first in zero and not zero.isdisjoint(operands[1:])
    return is_sum(node) and zero.issuperset(operands)
