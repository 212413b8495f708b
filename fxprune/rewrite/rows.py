"""Rows: a layer that is linear in its weights, as a product of matrices.

A linear layer, and a convolution of any kind, gives ``rows @ matrix + bias`` in each of its groups. A row holds what
one output position reads, float[groups, rows, columns]; the matrix is the weight, float[groups, columns, outputs].
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

Transposed = nn.modules.conv._ConvTransposeNd
Convolution = nn.modules.conv._ConvNd
Positions = tuple[Tensor, ...]  # of one axis each, int64[positions]; of a linear layer, into all that comes before


@dataclass(frozen=True)
class LinearLayer:
    """A layer that is linear in its weights.

    Attributes:
        name: of its weight, as in the ``state_dict``.
        weight: the parameter.
        bias: the parameter; None where it has none.
        convolution: the module, where it is one.
    """

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    convolution: Convolution | None

    @property
    def groups(self) -> int:
        """Parts that read and write channels of their own."""
        return self.convolution.groups if self.convolution is not None else 1

    @property
    def channel_axis(self) -> int:
        """The axis of channels of what it reads and gives."""
        return -1 if self.convolution is None else 1

    @property
    def columns(self) -> int:
        """The length of a row: what one output of a group reads."""
        outputs = self.weight.shape[1] if self.is_transposed else self.weight.shape[0] // self.groups
        return self.weight.numel() // self.groups // outputs

    @property
    def is_transposed(self) -> bool:
        """Whether the weight has its inputs first."""
        return isinstance(self.convolution, Transposed)


def find_linear_layer(model: nn.Module, node: fx.Node) -> LinearLayer | None:
    """The layer that a node calls, if it is linear in a weight that the model holds as a parameter."""
    if node.op == "call_module" and len(node.all_input_nodes) == 1:
        layer = model.get_submodule(str(node.target))
        if not isinstance(layer, (Convolution, nn.Linear)):
            return None
        weight, bias, name = layer._parameters.get("weight"), layer.bias, f"{node.target}.weight"
        convolution = layer if isinstance(layer, Convolution) else None
    elif node.op == "call_function" and node.target is F.linear and isinstance(node.args[0], fx.Node):
        tensors = dict(zip(("weight", "bias"), node.args[1:], strict=False)) | node.kwargs
        weight, bias = (get_parameter(model, tensors.get(key)) for key in ("weight", "bias"))
        if bias is None and tensors.get("bias") is not None:
            return None
        name, convolution = str(getattr(tensors["weight"], "target", "")), None
    else:
        return None
    if not isinstance(weight, nn.Parameter) or not weight.numel():
        return None
    return LinearLayer(name, weight, bias if isinstance(bias, nn.Parameter) else None, convolution)


def get_parameter(model: nn.Module, node: object) -> nn.Parameter | None:
    """The parameter that a node reads as it is."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    path, _, leaf = str(node.target).rpartition(".")
    return model.get_submodule(path)._parameters.get(leaf)


def lay_out_input(layer: LinearLayer, x: Tensor, positions: Positions | None = None) -> Tensor:
    """float[groups, rows, columns]: what each output position of ``layer`` reads of its input ``x``.

    ``positions``: of the output, from ``draw_positions``; default, all.
    """
    if layer.convolution is None:
        rows = x.flatten(0, -2)
        return (rows if positions is None else rows[positions[0]]).unsqueeze(0)
    windows = slide_window(layer.convolution, x)
    last = 1 + len(layer.convolution.kernel_size)  # of the axes of positions
    windows = windows.flatten(2, last) if positions is None else pick(windows, positions)
    split = split_axis(windows, 1, layer.groups)  # samples, groups, channels, positions, kernel
    return split.transpose(2, 3).transpose(0, 1).flatten(3).flatten(1, 2)


def lay_out_output(layer: LinearLayer, y: Tensor, positions: Positions | None = None) -> Tensor:
    """float[groups, rows, outputs]: the output ``y`` of ``layer``, in the rows of ``lay_out_input``."""
    if layer.convolution is None:
        rows = y.flatten(0, -2)
        return (rows if positions is None else rows[positions[0]]).unsqueeze(0)
    values = y.flatten(2) if positions is None else pick(y, positions)
    return split_axis(values, 1, layer.groups).permute(1, 0, 3, 2).flatten(1, 2)


def slide_window(convolution: Convolution, x: Tensor) -> Tensor:
    """float[samples, channels, *positions, *kernel]: what each output position reads, a view of the padded input.

    A transposed convolution is one of stride 1 over its input with zeros between, with the kernel the other way round.
    """
    if isinstance(convolution, Transposed):
        x, strides = spread_input(convolution, x), (1,) * len(convolution.kernel_size)
    else:
        mode = convolution.padding_mode
        x = F.pad(x, convolution._reversed_padding_repeated_twice, "constant" if mode == "zeros" else mode)
        strides = convolution.stride
    for axis, (size, dilation, stride) in enumerate(
        zip(convolution.kernel_size, convolution.dilation, strides, strict=True), 2
    ):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return x


def spread_input(convolution: Transposed, x: Tensor) -> Tensor:
    """The input of a transposed convolution with zeros between and around."""
    sizes = [(size - 1) * stride + 1 for size, stride in zip(x.shape[2:], convolution.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    spread[(slice(None), slice(None), *(slice(None, None, stride) for stride in convolution.stride))] = x
    pads: list[int] = []
    for axis, size in enumerate(convolution.kernel_size):
        around = convolution.dilation[axis] * (size - 1) - int(convolution.padding[axis])
        more = convolution.output_padding[axis]
        pads = [around, around + more, *pads]  # F.pad begins with the last axis
    return F.pad(spread, pads)


def as_matrix(layer: LinearLayer, weight: Tensor) -> Tensor:
    """float[groups, columns, outputs]: a tensor shaped like the weight of ``layer``."""
    if layer.is_transposed:
        flipped = weight.flip(tuple(range(2, weight.ndim)))
        return split_axis(flipped, 0, layer.groups).movedim(2, -1).flatten(1, -2)
    return split_axis(weight, 0, layer.groups).flatten(2).transpose(1, 2)


def as_weight(layer: LinearLayer, matrix: Tensor) -> Tensor:
    """Undo ``as_matrix``."""
    shape = layer.weight.shape
    if layer.is_transposed:
        split = matrix.reshape(layer.groups, shape[0] // layer.groups, *shape[2:], shape[1])
        return split.movedim(-1, 2).flatten(0, 1).flip(tuple(range(2, len(shape))))
    return matrix.transpose(1, 2).reshape(shape)


def pick(value: Tensor, positions: Positions) -> Tensor:
    """[samples, channels, positions, ...]: a tensor at some places of the axes behind its channels."""
    index: tuple[Any, ...] = (slice(None), slice(None), *positions)
    return value[index]


def split_axis(value: Tensor, axis: int, count: int) -> Tensor:
    """``value`` with ``axis`` as two, of which the first has the size ``count``."""
    return value.reshape(*value.shape[:axis], count, -1, *value.shape[axis + 1 :])


def draw_positions(layer: LinearLayer, y: Tensor, rows: int, generator: torch.Generator) -> Positions | None:
    """Places of the output ``y``, drawn at random, that give about ``rows`` rows; None for all."""
    if layer.convolution is None:
        count = math.prod(y.shape[:-1])
        return (torch.randperm(count, generator=generator)[:rows].to(y.device),) if rows < count else None
    sizes = y.shape[2:]
    count, per_example = math.prod(sizes), -(-rows // len(y))
    if per_example >= count:
        return None
    drawn = torch.randperm(count, generator=generator)[:per_example].to(y.device)
    return tuple(torch.unravel_index(drawn, sizes))


def kept_outputs(dense: LinearLayer, kept: tuple[Tensor | None, ...]) -> Tensor | None:
    """int64[outputs]: which outputs of the layer ``dense`` a cut left; None for all.

    ``kept``: of its weight, as a ``ParamMap`` has it.
    """
    if not dense.is_transposed:
        return kept[0]
    if dense.groups == 1:
        return kept[1]
    inputs, outputs = (size for size in dense.weight.shape[:2])
    groups = torch.arange(dense.groups) if kept[0] is None else torch.unique(kept[0] * dense.groups // inputs)
    within = torch.arange(outputs) if kept[1] is None else kept[1]
    return (groups[:, None] * outputs + within).flatten()
