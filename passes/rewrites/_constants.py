"""Constants: which elements of which values do not depend on the input. The model is run once on that question.

Beside each value runs a mask of its shape: 1 where the input may have an influence, else 0. It passes through norms,
elementwise layers, poolings and movements as the values do, and through a convolution or linear layer only where the
weights are not zero. Whatever is not understood may vary everywhere.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fxprune.channels.interpret import Runner
from fxprune.graph.inputs import Bound, bind_inputs, for_mode, map_tensors
from fxprune.graph.layers import TRANSPOSED, channel_axis
from fxprune.graph.traced import Mode, TracedModule, copy_model
from fxprune.rewrite.branches import writes_in_place
from fxprune.rewrite.kinds import kind_of


@dataclass(frozen=True)
class Reading:
    """What a convolution or linear layer reads.

    ``constant``: bool[positions of its input axis], whether all there is one constant; ``value``: float64, which.
    """

    node: fx.Node
    constant: Tensor
    value: Tensor


class Constants(Runner):
    """Runs the graph of one mode, in float64, on the example.

    Attributes:
        varies: node -> a mask for each tensor of its value: float64, 0 or 1.
        readings: of the convolutions and linear layers, in their order.
    """

    def __init__(self, graph: TracedModule, mode: Mode, example_inputs: Any) -> None:
        model = copy_model(graph).double()  # a copy, for buffers move in training
        super().__init__(model, mode, {})
        self.varies: dict[fx.Node, Any] = {}
        self.readings: list[Reading] = []
        self.start(as_float64(for_mode(bind_inputs(example_inputs), mode, model)))

    def run_node(self, n: fx.Node) -> Any:
        """Run one node on the values and on the masks."""
        does = kind_of(self.module, n)
        if does == "contraction":
            self.readings.append(self.reading(n))
        args, kwargs = fx.map_arg((n.args, n.kwargs), lambda node: self.varies[node])
        source = self.env[n.all_input_nodes[0]] if does == "contraction" else None
        passed = self.past(n, does, args, kwargs, source)
        result = super().run_node(n)
        if passed is None:
            passed = map_tensors(torch.ones_like, result)
        elif isinstance(passed, Tensor):
            passed = (passed > 0).double().expand(result.shape)
        self.varies[n] = passed
        if isinstance(result, Tensor) and writes_in_place(self.module, n):
            for node, value in self.env.items():
                if isinstance(value, Tensor) and value.untyped_storage()._cdata == result.untyped_storage()._cdata:
                    self.varies[node] = passed if value.shape == result.shape else torch.ones_like(value)
        return result

    def past(self, n: fx.Node, does: str, args: Any, kwargs: Any, source: Any) -> Any:
        """The mask that node ``n`` makes of those of its inputs; None where all may vary."""
        layer: Any = self.layer(str(n.target)) if n.op == "call_module" else None
        padded = isinstance(layer, nn.modules.pooling._AvgPoolNd) and layer.padding not in (0, (0,) * 2, (0,) * 3)
        if padded or (isinstance(layer, nn.modules.dropout._DropoutNd) and self.mode.training):
            return None
        match does:
            case "get_attr":
                return 0 * self.fetch_attr(str(n.target)) if self.is_parameter(str(n.target)) else None
            case "contraction":
                return past_contraction(layer, args[0], source)
            case "norm":
                return past_norm(layer, args[0], self.mode.training)
            case "pointwise":
                masks = [mask for mask in pytree.tree_leaves((args, kwargs)) if isinstance(mask, Tensor)]
                return functools.reduce(torch.maximum, masks) if masks else None
            case "pool" | "move" | "free move":
                return getattr(self, n.op)(n.target, args, kwargs)
        return None

    def is_parameter(self, name: str) -> bool:
        """Whether a parameter of the model has that name; buffers may be anything at the next call."""
        return name in dict(self.module.named_parameters(remove_duplicate=False))

    def reading(self, n: fx.Node) -> Reading:
        """What layer ``n`` reads."""
        value, mask = (held[n.all_input_nodes[0]] for held in (self.env, self.varies))
        axis = channel_axis(self.layer(str(n.target)), value.ndim)
        value, mask = (part.movedim(axis, 0).flatten(1) for part in (value, mask))
        low, high = value.aminmax(dim=1)
        even = high - low <= 1e-13 * (1 + high.abs())
        return Reading(n, (mask.amax(1) == 0) & even, value[:, 0].clone())


def past_contraction(layer: Any, mask: Tensor, value: Tensor) -> Tensor:
    """The mask behind a layer with weights.

    At a padded border zeros take the place of a constant, and a transposed convolution makes a pattern of it: there
    only a constant that is zero remains one.
    """
    if isinstance(layer, TRANSPOSED) or is_padded(layer):
        mask = torch.maximum(mask, (value != 0).double())
    pattern = {name: (parameter != 0).double() for name, parameter in layer.named_parameters() if name == "weight"}
    zeros = {} if layer.bias is None else {"bias": torch.zeros_like(layer.bias)}
    return functional_call(layer, pattern | zeros, (mask,))  # type: ignore[no-any-return]


def is_padded(layer: Any) -> bool:
    """Whether a layer reads zeros beyond the border."""
    padding = getattr(layer, "padding", 0)
    unpadded = padding in (0, "valid") or (isinstance(padding, tuple) and not any(padding))
    return not unpadded and layer.padding_mode == "zeros"


def past_norm(norm: Any, mask: Tensor, training: bool) -> Tensor:
    """The mask behind a batch norm. With scale zero all is constant; in training a channel varies if any of it does."""
    if training or norm.running_mean is None:
        mask = mask.movedim(1, 0).flatten(1).amax(1).reshape([-1 if axis == 1 else 1 for axis in range(mask.ndim)])
    if norm.weight is not None:
        mask = mask * (norm.weight != 0).double().reshape([-1 if axis == 1 else 1 for axis in range(mask.ndim)])
    return mask


def as_float64(inputs: Bound) -> Bound:
    """Inputs in float64; zeros for those that have no data."""

    def make(tensor: Tensor) -> Tensor:
        tensor = torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor
        return tensor.double() if tensor.is_floating_point() else tensor

    bound: Bound = map_tensors(make, inputs)
    return bound
