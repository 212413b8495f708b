"""Pointwise operators: names that meet under broadcasting are merged.

Operators that torch tags as pointwise come here by themselves; listed are those that lack the tag, and those that only
look pointwise from the channels' side.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fxprune.channels.labels import Labels, Operand, join
from fxprune.channels.tensor import Call, operand, rule, unknown

UNTAGGED = (
    "hardswish hardsigmoid hardtanh relu6 prelu _prelu_kernel rrelu_with_noise log_sigmoid log_sigmoid_forward mish "
    "leaky_relu elu celu selu softplus softshrink hardshrink threshold floor_divide remainder fmod where masked_fill "
    "clamp clamp_min clamp_max lerp addcmul addcdiv special_expit copy nan_to_num fill zero ne eq "
    "bernoulli normal uniform random exponential bitwise_and bitwise_or bitwise_not logical_not rsub"
).split()
LIKE = (
    "alias detach clone contiguous lift_fresh lift_fresh_copy _to_copy zeros_like ones_like full_like empty_like "
    "rand_like randn_like randint_like"
).split()
CREATION = "new_zeros new_ones new_empty new_full new_empty_strided".split()


@rule("pointwise", *UNTAGGED)
def pointwise(call: Call) -> Labels:
    tensors = [operand(value) for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)]
    return join(call.names, tensors, len(call.shape))


@rule(*LIKE)
def like(call: Call) -> Labels:
    return operand(call.args[0]).labels


@rule("native_dropout", "_fused_dropout")
def dropout(call: Call) -> Any:
    labels = operand(call.args[0]).labels
    return [labels, labels]


@rule(*CREATION)
def creation(call: Call) -> Labels:
    return ()


@rule("as_strided")
def as_strided(call: Call) -> Any:
    """Pooling in channels_last restrides its result in place; any other use is not understood."""
    value = operand(call.args[0])
    return value.labels if value.shape == call.shape else unknown(call)


def with_vectors(call: Call, value: Operand, vectors: Iterable[Any], axis: int) -> Labels:
    """Join one-dimensional ``vectors`` (biases, scales, statistics), where given, onto ``axis`` of a value."""
    ndim = len(value.shape)
    operands = [value]
    for vector in vectors:
        if isinstance(vector, Tensor):
            its = operand(vector)
            shape = (*its.shape, *[1] * (ndim - axis - 1))
            operands.append(Operand(tuple(label.reshape(shape) for label in its.labels), shape, its.source))
    return join(call.names, operands, ndim)
