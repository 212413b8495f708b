"""Dtypes: what a graph has baked in of the model's dtype is seen beside a graph in another dtype."""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.graph.follow import MADE, DiffersError, Follower, behind_inputs
from fxprune.graph.guards import check_dtype
from fxprune.graph.inputs import Bound, map_tensors, without_data
from fxprune.graph.places import describe_place

ASKED = "asked"  # in the meta of a node: by dtype, the last tensor (node or name) that Python had asked for it
LIMITS = ("min", "max", "eps", "tiny")


def other_dtype(model: nn.Module) -> torch.dtype:
    """One that a model is cast to, and for which Python may do something else: half precision, for the usual one."""
    floats = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return torch.float16 if floats <= {torch.float32} else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor without data, in ``dtype`` if it holds floats, as ``nn.Module.to`` makes it."""
    data = without_data(tensor)
    data = data.to(dtype) if data.is_floating_point() else data
    return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def cast_inputs(inputs: Bound, dtype: torch.dtype) -> Bound:
    """The inputs, without data, in ``dtype``."""
    bound: Bound = map_tensors(lambda tensor: cast(tensor, dtype), inputs)
    return bound


def limit_of(dtype: Any, name: str) -> Any:
    """A limit of a dtype, as ``torch.finfo`` has it."""
    if isinstance(dtype, fx.Proxy):
        return dtype.tracer.create_proxy("call_function", limit_of, (dtype, name), {})
    return getattr(torch.finfo(dtype), name)


def reads_dtype(node: fx.Node) -> bool:
    """Whether a node gives a dtype, or a limit of one, or a parameter for its dtype alone."""
    if node.op == "get_attr":
        return bool(node.users) and all(map(reads_dtype, node.users))
    return bool(node.target is limit_of or (node.target is getattr and node.args[1] == "dtype"))


class DtypeFollower(Follower):
    """Lets a graph follow the dtypes that Python asked its tensors for. The other is recorded in another dtype."""

    def find(self, node: fx.Node, twin: fx.Node, a: Any, b: Any) -> fx.Node | None:
        """The dtype of a tensor, or a limit of that, times a number."""
        for before, after, source in asked_in_both(node, twin):
            if (a, b) == (before, after):
                return self.dtype_node(source, node)
            if type(a) is not float or type(b) is not float:
                continue
            for name in LIMITS:
                limit = limit_of(before, name)
                if a / limit == b / limit_of(after, name):
                    dtype = self.dtype_node(source, node)
                    made = self.make(dtype, limit_of, dtype, name)
                    return made if a == limit else self.make(made, operator.mul, made, a / limit)
        return None

    def dtype_node(self, source: fx.Node | str, node: fx.Node) -> fx.Node:
        """A node that gives the dtype of ``source`` to ``node``."""
        if isinstance(source, str):
            with self.graph.inserting_before(node):
                source = self.graph.create_node("get_attr", source)
            source.meta[MADE] = True
            self.made.append(source)
        return self.make(behind_inputs(source), getattr, source, "dtype")

    def fix_dtype(self, difference: DiffersError) -> None:
        """Let the graph refuse another dtype: in that it would be another."""
        node = difference.node
        places = dict.fromkeys(map(describe_place, (node, difference.twin)))
        for before, _, source in asked_in_both(node, difference.twin):
            dtype = self.dtype_node(source, node)
            self.make(dtype, check_dtype, dtype, before, " or ".join(places))
            return


def asked_in_both(node: fx.Node, twin: fx.Node) -> Iterator[tuple[torch.dtype, torch.dtype, fx.Node | str]]:
    """The dtypes, here and there, of tensors that Python had asked for them before two nodes; and the tensor."""
    there = {str(source): dtype for dtype, source in twin.meta.get(ASKED, {}).items()}
    for dtype, source in node.meta.get(ASKED, {}).items():
        other = there.get(str(source), dtype)
        if other != dtype:
            yield dtype, other, source
