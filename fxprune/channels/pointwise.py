"""Pointwise operators: names that meet under broadcasting are merged.

Operators that torch tags as pointwise come here by themselves; listed are those that lack the tag, and those that only
look pointwise from the channels' side.
"""

from typing import Any

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
    tensors = [operand(value) for value in (*call.args, *call.kwargs.values()) if hasattr(value, "shape")]
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


def add_bias(call: Call, labels: Labels, shape: Any, bias: Any, axis: int) -> Labels:
    """Join a one-dimensional ``bias`` onto ``axis`` of a value."""
    if bias is None:
        return labels
    vector = operand(bias)
    trailing = len(shape) - axis - 1
    spread = tuple(label.reshape(-1, *[1] * trailing) for label in vector.labels)
    there = Operand(spread, (*vector.shape, *[1] * trailing), vector.source)
    return join(call.names, [Operand(labels, shape), there], len(shape))
