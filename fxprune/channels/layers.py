"""Layers: the operator that a well-known layer of torch.nn calls, for a short way to that operator's rule.

A layer that is not listed, or is set up in an unusual way, is run as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

aten = torch.ops.aten
Tensors = Callable[[str], Any]  # a parameter or buffer of the layer by its name; None where it has none
Lowered = tuple[OpOverload, tuple[Any, ...]]  # an operator and its arguments


def lower_layer(layer: nn.Module, its: Tensors, x: Tensor, training: bool, past_hooks: bool = False) -> Lowered | None:
    """The operator that ``layer`` calls when it is given ``x``; None if that is not plain.

    ``past_hooks``: whether hooks, which may change what the layer gives, are passed by.
    """
    how = LAYERS.get(type(layer))
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    if how is None or "forward" in vars(layer) or (hooked and not past_hooks):
        return None
    return how(layer, its, x, training)


def convolution(layer: Any, its: Tensors, x: Tensor, training: bool) -> Lowered | None:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or x.ndim != len(layer.kernel_size) + 2:
        return None
    zeros = (0,) * len(layer.kernel_size)
    steps = layer.stride, layer.padding, layer.dilation
    return aten.convolution.default, (x, its("weight"), its("bias"), *steps, False, zeros, layer.groups)


def linear(layer: Any, its: Tensors, x: Tensor, training: bool) -> Lowered | None:
    return aten.linear.default, (x, its("weight"), its("bias"))


def batch_norm(layer: Any, its: Tensors, x: Tensor, training: bool) -> Lowered | None:
    if x.ndim != 4 or not layer.track_running_stats or (training and x.numel() == x.shape[1]):
        return None
    vectors = (its(name) for name in ("weight", "bias", "running_mean", "running_var"))
    return aten.batch_norm.default, (x, *vectors, training, layer.momentum, layer.eps, False)


def layer_norm(layer: Any, its: Tensors, x: Tensor, training: bool) -> Lowered | None:
    shape = list(layer.normalized_shape)
    return aten.layer_norm.default, (x, shape, its("weight"), its("bias"), layer.eps, False)


def adaptive_avg_pool2d(layer: Any, its: Tensors, x: Tensor, training: bool) -> Lowered | None:
    sizes = layer.output_size if isinstance(layer.output_size, tuple) else (layer.output_size,) * 2
    return None if None in sizes else (aten._adaptive_avg_pool2d.default, (x, sizes))


def elementwise(operator: OpOverload, in_place: OpOverload | None, *options: Any) -> Callable[..., Lowered]:
    def lowered(layer: Any, its: Tensors, x: Tensor, training: bool) -> Lowered:
        chosen = in_place if in_place is not None and layer.inplace else operator
        return chosen, (x, *options)

    return lowered


LAYERS: dict[type[nn.Module], Callable[[Any, Tensors, Tensor, bool], Lowered | None]] = {
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.Linear: linear,
    nn.modules.linear.NonDynamicallyQuantizableLinear: linear,
    nn.BatchNorm2d: batch_norm,
    nn.LayerNorm: layer_norm,
    nn.AdaptiveAvgPool2d: adaptive_avg_pool2d,
    nn.ReLU: elementwise(aten.relu.default, aten.relu_.default),
    nn.ReLU6: elementwise(aten.hardtanh.default, aten.hardtanh_.default, 0.0, 6.0),
    nn.SiLU: elementwise(aten.silu.default, aten.silu_.default),
    nn.Hardswish: elementwise(aten.hardswish.default, aten.hardswish_.default),
    nn.Hardsigmoid: elementwise(aten.hardsigmoid.default, aten.hardsigmoid_.default),
    nn.GELU: elementwise(aten.gelu.default, None),
    nn.Sigmoid: elementwise(aten.sigmoid.default, None),
}
