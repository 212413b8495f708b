"""Pointwise operators: names that meet under broadcasting are merged.

Operators that torch tags as pointwise come here by themselves; listed are those that lack the tag, and those that only
look pointwise from the channels' side. Zero-ness is found by asking the operator, on numbers.
"""

import itertools
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload

from fxprune.channels.depth import SUMS
from fxprune.channels.labels import Labels, Operand, align_label, join_labels, varying_axes
from fxprune.channels.tensor import Call, as_operand, freeze_unknown, rule
from fxprune.graph.layers import ELEMENTWISE
from fxprune.graph.lowering import Lowered, Tensors, lowering
from fxprune.graph.shapes import Shape, plain_shape
from fxprune.rewrite.attributes import attributes
from fxprune.rewrite.kinds import GIVES_ZEROS, mark_kind

aten = torch.ops.aten

UNTAGGED = (
    "hardswish hardsigmoid hardtanh relu6 prelu _prelu_kernel rrelu_with_noise log_sigmoid log_sigmoid_forward mish "
    "leaky_relu elu celu selu softplus softshrink hardshrink threshold floor_divide remainder fmod where masked_fill "
    "clamp clamp_min clamp_max lerp addcmul addcdiv special_expit copy nan_to_num fill zero ne eq "
    "bernoulli normal uniform random exponential bitwise_and bitwise_or bitwise_not logical_not rsub"
).split()
LIKE = "alias detach clone contiguous lift_fresh lift_fresh_copy _to_copy zeros_like".split()
MADE_UP = "ones_like full_like empty_like rand_like randn_like randint_like".split()
CREATION = "new_zeros new_ones new_empty new_full new_empty_strided".split()


@rule("pointwise", *UNTAGGED)
def pointwise(call: Call) -> Labels:
    tensors = [as_operand(value) for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)]
    labels = join_labels(call.names, tensors, len(call.shape))
    call.zero = all(zero_along(call, {*varying_axes(label)}) for label in labels)
    return labels


@plain_shape(
    "relu", "hardtanh", "silu", "gelu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "leaky_relu", "elu", "mish",
    F.relu,
)  # fmt: skip
def same_shape(x: Tensor, *rest: Any) -> Shape | None:
    return x.shape if isinstance(x, Tensor) else None


@plain_shape(
    "add", operator.add, torch.add, "sub", operator.sub, "mul", operator.mul, torch.mul, "div", operator.truediv
)
def broadcast_shape(x: Any, y: Any, *rest: Any) -> Shape | None:
    if not isinstance(x, Tensor) or isinstance(y, complex):
        return None
    if not isinstance(y, Tensor) or x.shape == y.shape:
        return x.shape
    pairs = list(itertools.zip_longest(reversed(x.shape), reversed(y.shape), fillvalue=1))[::-1]
    if any(a != b and 1 not in (a, b) for a, b in pairs):
        return None
    return tuple(b if a == 1 else a for a, b in pairs)


# What a layer calls, what it calls in place, and with which numbers.
LAYERS: dict[type[nn.Module], tuple[OpOverload, OpOverload | None, tuple[float, ...]]] = {
    nn.ReLU: (aten.relu.default, aten.relu_.default, ()),
    nn.ReLU6: (aten.hardtanh.default, aten.hardtanh_.default, (0.0, 6.0)),
    nn.SiLU: (aten.silu.default, aten.silu_.default, ()),
    nn.Hardswish: (aten.hardswish.default, aten.hardswish_.default, ()),
    nn.Hardsigmoid: (aten.hardsigmoid.default, aten.hardsigmoid_.default, ()),
    nn.GELU: (aten.gelu.default, None, ()),
    nn.Sigmoid: (aten.sigmoid.default, None, ()),
}


@lowering(*LAYERS)
def lower_pointwise(layer: Any, tensors: Tensors, x: Tensor, training: bool) -> Lowered:
    called, in_place, numbers = LAYERS[type(layer)]
    return in_place if in_place is not None and layer.inplace else called, (x, *numbers)


mark_kind(
    "pointwise",
    *(*ELEMENTWISE, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU, nn.Mish, nn.Softplus, nn.Hardsigmoid, nn.Hardtanh),
    *(nn.PReLU, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(*SUMS, operator.sub, torch.sub, "sub", operator.mul, operator.imul, torch.mul, "mul", "mul_"),
    *(torch.relu, torch.relu_, "relu", "relu_", torch.sigmoid, "sigmoid", torch.tanh, "tanh", torch.clone, "clone"),
    *(F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.leaky_relu, F.elu, F.mish, F.softplus),
    *(torch.clamp, "clamp", "clamp_", "contiguous"),
)
GIVES_ZEROS.update((nn.ReLU, nn.ReLU6, nn.Hardswish))
GIVES_ZEROS.update((torch.relu, torch.relu_, F.relu, F.relu6, F.hardswish, "relu", "relu_"))


@attributes(nn.PReLU)
def prelu_attributes(layer: Any, input: Shape, out: Shape) -> dict[str, Any]:
    return {"num_parameters": layer.weight.shape[0]}


def zero_along(call: Call, axes: set[int]) -> bool:
    """Whether the result is zero in channels that go along ``axes``: the operator is asked, on numbers."""

    def known(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        operand = as_operand(value)
        named = {axis for label in operand.labels for axis in varying_axes(align_label(label, len(call.shape)))}
        return Sample(value.dtype, operand.zero and axes <= named)

    try:
        return zero_of(call.func, tuple(map(known, call.args)), tuple((k, known(v)) for k, v in call.kwargs.items()))
    except TypeError:  # an argument that can't be hashed
        return False


@dataclass(frozen=True)
class Sample:
    """A tensor operand: all zeros, or any numbers."""

    dtype: torch.dtype
    zero: bool

    def values(self) -> Tensor:
        """Some numbers, none of them a special one."""
        if self.zero:
            return torch.zeros(8, dtype=self.dtype, device="cpu")
        if self.dtype is torch.bool:
            return torch.arange(8, device="cpu") % 2 == 0
        return torch.linspace(-3.3, 4.6, 8, device="cpu").to(self.dtype)


@lru_cache(maxsize=4096)
def zero_of(func: OpOverload, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> bool:
    """Whether a pointwise operator gives zeros, whatever its operands are that are not."""

    def values_of(value: Any) -> Any:
        return value.values() if isinstance(value, Sample) else value

    try:
        with torch.random.fork_rng(devices=[]):
            out = func(*map(values_of, args), **{name: values_of(value) for name, value in kwargs})
    except (RuntimeError, NotImplementedError):  # it wants other shapes, or more than one number
        return False
    return isinstance(out, Tensor) and not out.any()


@rule(*LIKE, keeps_zero=True)
def like(call: Call) -> Labels:
    return as_operand(call.args[0]).labels


@rule(*MADE_UP)
def made_up(call: Call) -> Labels:
    """A value that has only the shape of another."""
    return as_operand(call.args[0]).labels


@rule("native_dropout", "_fused_dropout", keeps_zero=True)
def dropout(call: Call) -> Any:
    labels = as_operand(call.args[0]).labels
    return [labels, labels]


@rule(*CREATION, keeps_zero=True)
def creation(call: Call) -> Labels:
    """A value without names: it has no channel that could go and not be zero."""
    return ()


@rule("as_strided", keeps_zero=True)
def as_strided(call: Call) -> Any:
    """Pooling in channels_last restrides its result in place; any other use is not understood."""
    value = as_operand(call.args[0])
    return value.labels if value.shape == call.shape else freeze_unknown(call)


def with_vectors(call: Call, value: Operand, vectors: Iterable[Any], axis: int) -> Labels:
    """Join one-dimensional ``vectors`` (biases, scales, statistics), where given, onto ``axis`` of a value."""
    ndim = len(value.shape)
    operands = [value]
    for vector in vectors:
        if isinstance(vector, Tensor):
            operand = as_operand(vector)
            shape = (*operand.shape, *[1] * (ndim - axis - 1))
            operands.append(Operand(tuple(label.reshape(shape) for label in operand.labels), shape, operand.source))
    return join_labels(call.names, operands, ndim)


def add_vector(labels: Labels, vector: Any, axis: int) -> bool:
    """Whether a value with ``labels`` stays zero where it is when ``vector``, if given, is added along ``axis``."""
    return vector is None or (as_operand(vector).zero and all(varying_axes(label) == [axis] for label in labels))
