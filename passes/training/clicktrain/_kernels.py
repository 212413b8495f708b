"""The kernels of a model's convolutions: which layers there are, and masks of what goes from them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.channels.depth import is_sum
from fxprune.graph.layers import BATCH_NORMS
from fxprune.graph.traced import Mode, Model, regions_of
from fxprune.rewrite.param_map import ParamMap

from .._norms import EPSILON, at_least_float32


@dataclass(frozen=True, eq=False)
class KernelLayer:
    """A convolution: the path of its module, its weight and groups, and the fraction of kernels that goes."""

    path: str
    weight: Tensor
    groups: int
    fraction: float = 0.0

    @property
    def name(self) -> str:
        """Of the weight."""
        return f"{self.path}.weight"

    @property
    def depthwise(self) -> bool:
        """Whether each filter has one kernel."""
        return self.groups > 1 and self.weight.shape[1] == 1

    @property
    def three(self) -> bool:
        """Whether its kernels are 3×3."""
        return self.weight.shape[2:] == (3, 3)


class Mask:
    """What goes from one layer: bool, shaped like its weight.

    Attributes:
        outside: what the patterns leave out, or None where there are no patterns.
        removed: the kernels that go, or None where all stay.
        gone: both.
    """

    def __init__(self, layer: KernelLayer, pool: Tensor, pattern: Tensor | None, removed: Tensor) -> None:
        device, shape = layer.weight.device, layer.weight.shape
        self.layer = layer
        self.outside = None if pattern is None else ~pool.to(device)[pattern.to(device).long()]
        self.removed = removed.to(device)[:, :, None, None].expand(shape) if removed.any() else None
        parts = [part for part in (self.outside, self.removed) if part is not None]
        self.gone = sum(parts[1:], start=parts[0]).bool() if parts else torch.zeros((), dtype=torch.bool, device=device)


def norm_of_kernels(weight: Tensor, where: Tensor) -> Tensor:
    """float[out, in]: sqrt(sum + 1e-8) of the squares of a weight, float[out, in, h, w], in each kernel ``where``."""
    squares = at_least_float32(weight).square() * where
    return (squares.sum((2, 3)) + EPSILON).sqrt()


def cut_kernels(param_map: ParamMap, name: str, tensor: Tensor) -> Tensor:
    """Cut a tensor with an element, or more, for each kernel of the weight ``name``."""
    kept = param_map[name][:2]
    for axis, index in enumerate(kept):
        tensor = tensor if index is None else tensor.index_select(axis, index.to(tensor.device))
    return tensor


def find_convolutions(model: Model) -> list[KernelLayer]:
    """All two-dimensional convolutions, in the order of the model."""
    return [
        KernelLayer(path, module.weight, module.groups)
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and "weight" in module._parameters
    ]


def eval_graphs(model: Model) -> Iterator[tuple[str, fx.Graph]]:
    """The graph of each region in eval mode, and what its paths begin with."""
    for path, region in regions_of(model).items():
        yield (f"{path}." if path else ""), region.graphs[Mode.EVAL]


def first_convolution(model: Model) -> str:
    """The path of the convolution that is called first: the one that reads the image."""
    for prefix, graph in eval_graphs(model):
        for node in graph.nodes:
            if node.op == "call_module" and isinstance(model.get_submodule(f"{prefix}{node.target}"), nn.Conv2d):
                return f"{prefix}{node.target}"
    return ""


def find_shortcuts(model: Model) -> Iterator[str]:
    """The 1×1 convolutions that are added, behind a norm or not, to what is computed from their own input."""
    for prefix, graph in eval_graphs(model):
        for join in filter(is_sum, graph.nodes):
            for branch, trunk in (join.args, join.args[::-1]):
                while branch.op == "call_module" and isinstance(
                    model.get_submodule(f"{prefix}{branch.target}"), BATCH_NORMS
                ):
                    branch = branch.args[0]
                layer: Any = model.get_submodule(f"{prefix}{branch.target}") if branch.op == "call_module" else None
                if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and comes_from(trunk, branch.args[0]):
                    yield f"{prefix}{branch.target}"


def comes_from(node: fx.Node, source: fx.Node) -> bool:
    """Whether ``node`` is computed from ``source``, by at least one other node."""
    ahead, seen = list(node.all_input_nodes), set[fx.Node]()
    while ahead:
        ancestor = ahead.pop()
        if ancestor is source:
            return True
        if ancestor not in seen:
            seen.add(ancestor)
            ahead += ancestor.all_input_nodes
    return False
