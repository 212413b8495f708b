"""Layers: facts of torch.nn that several stages need, written once."""

from typing import Any

from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONTRACTIONS = (nn.modules.conv._ConvNd, nn.Linear)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ELEMENTWISE = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Identity)  # they leave zero as it is


def is_depthwise(layer: Any) -> bool:
    """Whether a layer is a convolution with one input channel for each of its groups."""
    return isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1 and layer.weight.shape[1] == 1


def writes_second_axis(layer: nn.Module) -> bool:
    """Whether the channels that a layer gives lie on the second axis of its weight, not on the first."""
    return isinstance(layer, (nn.modules.conv._ConvTransposeNd, nn.Embedding))


def reads_axis(layer: nn.Module) -> int | None:
    """The axis of its weight along which a convolution or linear layer reads its input; None where none goes alone."""
    if not isinstance(layer, CONTRACTIONS) or is_depthwise(layer):
        return None
    return 0 if writes_second_axis(layer) else 1


def channel_axis(layer: nn.Module, ndim: int) -> int:
    """The axis of a value with ``ndim`` axes along which a convolution, linear layer or batch norm finds channels."""
    return ndim - 1 if isinstance(layer, nn.Linear) else 1
