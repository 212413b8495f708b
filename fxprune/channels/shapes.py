"""Shapes of results that are plain to see.

torch's meta kernels of common operators are Python and cost more than all else in an analysis. Where an operator is not
listed, or its arguments are not the plain ones, its shape is None, and the kernel runs, and complains where it must.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]
SHAPES: dict[str, Callable[..., Shape | None]] = {}


def shape_of_result(operator: str, args: Sequence[Any]) -> Shape | None:
    """The shape of a result that is of the dtype of the first tensor; None if that is not plain.

    Its strides are nobody's concern: a view of a contiguous tensor succeeds wherever that of another does.
    """
    find = SHAPES.get(operator)
    if find is None:
        return None
    tensors = [arg for arg in (args[0] if isinstance(args[0], (list, tuple)) else args) if isinstance(arg, Tensor)]
    dtype = tensors[0].dtype if tensors else torch.int64
    if dtype.is_floating_point and all(each.dtype == dtype for each in tensors):
        return find(*args)
    return None


def operators(*names: str) -> Callable[[Callable[..., Shape | None]], Callable[..., Shape | None]]:
    """Register the shape of the ATen operators ``names``."""

    def register(function: Callable[..., Shape | None]) -> Callable[..., Shape | None]:
        SHAPES.update(dict.fromkeys(names, function))
        return function

    return register


@operators(
    "relu", "hardtanh", "silu", "gelu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "leaky_relu", "elu", "mish",
    "_safe_softmax", "roll",
)  # fmt: skip
def same(x: Tensor, *rest: Any) -> Shape | None:
    return x.shape if isinstance(x, Tensor) else None


@operators("add", "sub", "mul", "div")
def broadcast(x: Any, y: Any, *rest: Any) -> Shape | None:
    if not isinstance(x, Tensor) or isinstance(y, complex):
        return None
    if not isinstance(y, Tensor) or x.shape == y.shape:
        return x.shape
    pairs = list(itertools.zip_longest(reversed(x.shape), reversed(y.shape), fillvalue=1))[::-1]
    if any(a != b and 1 not in (a, b) for a, b in pairs):
        return None
    return tuple(b if a == 1 else a for a, b in pairs)


@operators("convolution")
def convolution(
    x: Tensor, w: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, more: Any, groups: int
) -> Shape | None:
    space = w.ndim - 2
    if transposed or x.ndim != w.ndim or x.shape[1] != w.shape[1] * groups or w.shape[0] % groups:
        return None
    each = (list(of) * space if len(of) == 1 else of for of in (padding, dilation, stride))
    sizes = zip(x.shape[2:], w.shape[2:], *each, strict=True)
    after = [(size + 2 * pad - gap * (window - 1) - 1) // step + 1 for size, window, pad, gap, step in sizes]
    return (x.shape[0], w.shape[0], *after) if min(after) > 0 else None


@operators("batch_norm")
def batch_norm(x: Tensor, *vectors: Any) -> Shape | None:
    fits = x.ndim > 1 and all(vector is None or vector.shape == x.shape[1:2] for vector in vectors[:4])
    return x.shape if fits else None


@operators("layer_norm")
def layer_norm(x: Tensor, shape: Sequence[int], weight: Any, bias: Any, *rest: Any) -> Shape | None:
    wanted = tuple(shape)
    fits = x.shape[-len(wanted) :] == wanted and all(each is None or each.shape == wanted for each in (weight, bias))
    return x.shape if fits else None


@operators("linear")
def linear(x: Tensor, w: Tensor, bias: Any = None) -> Shape | None:
    fits = w.ndim == 2 and x.ndim > 0 and x.shape[-1] == w.shape[1] and (bias is None or bias.shape == w.shape[:1])
    return (*x.shape[:-1], w.shape[0]) if fits else None


@operators("mean")
def mean(x: Tensor, dims: Any = None, keep: bool = False, *rest: Any) -> Shape | None:
    if not isinstance(dims, (list, tuple)) or not dims or rest:
        return None
    gone = {axis % x.ndim for axis in dims}
    if len(gone) < len(dims):
        return None
    return tuple(1 if axis in gone else size for axis, size in enumerate(x.shape) if keep or axis not in gone)


@operators("_adaptive_avg_pool2d")
def adaptive_avg_pool2d(x: Tensor, sizes: Sequence[int]) -> Shape | None:
    return (*x.shape[:-2], *sizes) if x.ndim in (3, 4) and len(sizes) == 2 else None


@operators("cat")
def cat(tensors: Sequence[Tensor], axis: int = 0) -> Shape | None:
    first, *others = (list(tensor.shape) for tensor in tensors)
    if not -len(first) <= axis < len(first):
        return None
    for other in others:
        if len(other) != len(first):
            return None
        first[axis] += other[axis]
        other[axis] = first[axis]
        if other != first:
            return None
    return tuple(first)
