"""Pointwise operators: names that meet under broadcasting are merged.

Operators that torch tags as pointwise come here by themselves; listed are those that lack the tag, and those that only
look pointwise from the channels' side.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxprune.channels.labels import Labels, Operand, align_label, join_labels, varying_axes
from fxprune.channels.tensor import Call, as_operand, freeze_unknown, register_rule

UNTAGGED = (
    "hardswish hardsigmoid hardtanh relu6 prelu _prelu_kernel rrelu_with_noise log_sigmoid log_sigmoid_forward mish "
    "leaky_relu elu celu selu softplus softshrink hardshrink threshold floor_divide remainder fmod where masked_fill "
    "clamp clamp_min clamp_max lerp addcmul addcdiv special_expit copy nan_to_num fill zero ne eq "
    "bernoulli normal uniform random exponential bitwise_and bitwise_or bitwise_not logical_not rsub"
).split()
LIKE = "alias detach clone contiguous lift_fresh lift_fresh_copy _to_copy zeros_like".split()
MADE_UP = "ones_like full_like empty_like rand_like randn_like randint_like".split()
CREATION = "new_zeros new_ones new_empty new_full new_empty_strided".split()


@register_rule("pointwise", *UNTAGGED)
def pointwise(call: Call) -> Labels:
    tensors = [as_operand(value) for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)]
    labels = join_labels(call.names, tensors, len(call.shape))
    call.zero = all(zero_along(call, {*varying_axes(label)}) for label in labels)
    return labels


def zero_along(call: Call, axes: set[int]) -> bool:
    """Whether the result is zero in channels that go along ``axes``: the operator is asked, on numbers."""

    def known(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        its = as_operand(value)
        named = {axis for label in its.labels for axis in varying_axes(align_label(label, len(call.shape)))}
        return Sample(value.dtype, its.zero and axes <= named)

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

    def given(value: Any) -> Any:
        return value.values() if isinstance(value, Sample) else value

    try:
        with torch.random.fork_rng(devices=[]):
            out = func(*map(given, args), **{name: given(value) for name, value in kwargs})
    except (RuntimeError, NotImplementedError):  # it wants other shapes, or more than one number
        return False
    return isinstance(out, Tensor) and not out.any()


@register_rule(*LIKE)
def like(call: Call) -> Labels:
    return as_operand(call.args[0]).labels


@register_rule(*MADE_UP)
def made_up(call: Call) -> Labels:
    """A value that has only the shape of another."""
    call.zero = False
    return as_operand(call.args[0]).labels


@register_rule("native_dropout", "_fused_dropout")
def dropout(call: Call) -> Any:
    labels = as_operand(call.args[0]).labels
    return [labels, labels]


@register_rule(*CREATION)
def creation(call: Call) -> Labels:
    return ()


@register_rule("as_strided")
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
            its = as_operand(vector)
            shape = (*its.shape, *[1] * (ndim - axis - 1))
            operands.append(Operand(tuple(label.reshape(shape) for label in its.labels), shape, its.source))
    return join_labels(call.names, operands, ndim)


def add_vector(labels: Labels, vector: Any, axis: int) -> bool:
    """Whether a value with ``labels`` stays zero where it is when ``vector``, if given, is added along ``axis``."""
    return vector is None or (as_operand(vector).zero and all(varying_axes(label) == [axis] for label in labels))
