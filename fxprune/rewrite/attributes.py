"""Attributes: what layers of torch.nn say of their sizes, made to say what their weights are now."""

from collections.abc import Callable
from typing import Any

from torch import nn

from fxprune.graph.shapes import Shape

AttributesOf = Callable[[Any, Shape, Shape], dict[str, Any]]
ATTRIBUTES: dict[type[nn.Module], AttributesOf] = {}  # ops/ fills it


def attributes(*layers: type[nn.Module]) -> Callable[[AttributesOf], AttributesOf]:
    """Say which attributes of a layer follow from its weights: decorates ``f(layer, input, out) -> {name: value}``.

    ``input`` and ``out`` are the shapes of what the layer gets and gives, after the cut.

    Args:
        layers: classes; what derives from them counts too, unless it has attributes of its own.
    """

    def register(function: AttributesOf) -> AttributesOf:
        ATTRIBUTES.update(dict.fromkeys(layers, function))
        return function

    return register


def layer_attributes(layer: nn.Module, input: Shape, out: Shape) -> dict[str, Any]:
    """The attributes of a layer that follow from its weights and the shapes of its input and output."""
    for kind in type(layer).__mro__:
        if kind in ATTRIBUTES:
            return ATTRIBUTES[kind](layer, input, out)
    return {}
