"""Readers: nodes that multiply what they read by weights, in a way that ``restore`` has no least squares for."""

from collections.abc import Iterable
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.channels.interpret import Runner
from fxprune.graph.inputs import map_tensors, tensors_in
from fxprune.graph.layers import CONTRACTIONS
from fxprune.graph.traced import Mode, TracedModule
from fxprune.rewrite.rows import get_parameter

SCALES = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)  # they scale each value, whatever the shape of their weight
ROUNDING = 30  # times the precision of a value: smaller differences are none
MOST_ROUNDING = 0.03  # of a value, in half precision
Sources = dict[fx.Node, tuple[str, ...]]


def find_weights(model: TracedModule) -> Sources:
    """The nodes of the eval graph that are made of parameters and constants alone, and the parameters behind each."""
    weights: Sources = {}
    for node in model.graphs[Mode.EVAL].nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr":
            weights[node] = (str(node.target),) if get_parameter(model, node) is not None else ()
        elif inputs and node.op != "output" and all(value in weights for value in inputs):
            matrices = name_matrices(model, node) if node.op == "call_module" else []
            weights[node] = tuple(dict.fromkeys([*(name for value in inputs for name in weights[value]), *matrices]))
    return weights


def count_uses(model: TracedModule) -> dict[int, int]:
    """How many nodes of the eval graph read each parameter, by its id."""
    uses: dict[int, int] = {}
    for node in model.graphs[Mode.EVAL].nodes:
        parameter = get_parameter(model, node)
        read: Iterable[nn.Parameter | None] = [parameter] * len(node.users)
        if node.op == "call_module":
            read = model.get_submodule(str(node.target)).parameters()
        for tensor in read:
            uses[id(tensor)] = uses.get(id(tensor), 0) + 1
    return uses


def describe_reader(model: TracedModule, live: Runner, node: fx.Node, weights: Sources) -> str:
    """The layer that a node is, and why it is no linear layer of one parameter; "" where it multiplies by no weight."""
    if node.op == "call_module":
        return describe_module(model, node)
    read = [value for value in node.all_input_nodes if weights.get(value) and is_matrix(live.env[value])]
    if node in weights or not read or not multiplies(live, node):
        return ""
    name = ", ".join(dict.fromkeys(name for value in read for name in weights[value]))
    called = getattr(node.target, "__name__", node.target)
    made = [value for value in node.all_input_nodes if weights.get(value) and value.op != "get_attr"]
    if made and node.target is F.linear:
        return f"{name}: {called} reads what is computed from {', '.join(weights[made[0]])}"
    return f"{name}: there is no least squares for {called}"


def describe_module(model: TracedModule, node: fx.Node) -> str:
    """``describe_reader`` of a call of a module."""
    layer, names = model.get_submodule(str(node.target)), name_matrices(model, node)
    if not names or isinstance(layer, SCALES):
        return ""
    if isinstance(layer, CONTRACTIONS):
        return f"{node.target}: its weight is computed from {', '.join(names)}"
    return f"{node.target}: there is no least squares for {type(layer).__name__}"


def name_matrices(model: nn.Module, node: fx.Node) -> list[str]:
    """The parameters with more than one axis of the module that a node calls."""
    layer = model.get_submodule(str(node.target))
    return [f"{node.target}.{name}" for name, tensor in layer.named_parameters() if is_matrix(tensor)]


def is_matrix(value: object) -> bool:
    """Whether a value is a tensor with more than one axis."""
    return isinstance(value, Tensor) and value.ndim > 1


def multiplies(live: Runner, node: fx.Node) -> bool:
    """Whether a node, run on copies of what it reads, has products of matrices, convolutions or attention in it."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    args, kwargs = live.fetch_args_kwargs_from_env(node)
    args, kwargs = map_tensors(Tensor.clone, (args, kwargs))
    with FlopCounterMode(display=False) as counter:
        getattr(live, node.op)(node.target, args, kwargs)
    return bool(counter.get_total_flops() > 0)


def has_changed_input(live: Runner, node: fx.Node, dense: Runner, original: fx.Node | None, weights: Sources) -> bool:
    """Whether a node reads other values than the ``original``, weights aside, by more than rounding."""
    if original is None or len(node.all_input_nodes) != len(original.all_input_nodes):
        return True
    both = zip(node.all_input_nodes, original.all_input_nodes, strict=True)
    return any(differ(live.env[value], dense.env[source]) for value, source in both if value not in weights)


def differ(value: object, source: object) -> bool:
    """Whether two values have other tensors in them, by more than rounding."""
    pairs = list(zip_longest(tensors_in(value), tensors_in(source)))
    if any(a is None or b is None or a.shape != b.shape for a, b in pairs):
        return True
    return any(not (a.double() - b.double()).norm() <= allow_rounding(a.dtype) * b.double().norm() for a, b in pairs)


def allow_rounding(dtype: torch.dtype) -> float:
    """How much of the size of values differences must have to be any."""
    return min(ROUNDING * torch.finfo(dtype).eps, MOST_ROUNDING) if dtype.is_floating_point else 0.0
