"""Layers: the operator that a well-known layer of torch.nn calls, for a short way to that operator's rule.

A layer that is not listed, or is set up in an unusual way, is run as it is.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch._ops import OpOverload

Tensors = Callable[[str], Any]  # a parameter or buffer of the layer by its name; None where it has none
Lowered = tuple[OpOverload, tuple[Any, ...]]  # an operator and its arguments
Lowering = Callable[[Any, Tensors, Tensor, bool], Lowered | None]
LOWERINGS: dict[type[nn.Module], Lowering] = {}  # ops/ fills it


def lowering(*layers: type[nn.Module]) -> Callable[[Lowering], Lowering]:
    """Say which operator ``layers`` call: decorates ``f(layer, tensors, x, training)``, None where it is not plain."""

    def register(function: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(layers, function))
        return function

    return register


def lower_layer(
    layer: nn.Module, tensors: Tensors, x: Tensor, training: bool, past_hooks: bool = False
) -> Lowered | None:
    """The operator that ``layer`` calls when it is given ``x``; None if that is not plain.

    ``past_hooks``: whether hooks, which may change what the layer gives, are passed by.
    """
    lower = LOWERINGS.get(type(layer))
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    if lower is None or "forward" in vars(layer) or (hooked and not past_hooks):
        return None
    return lower(layer, tensors, x, training)
