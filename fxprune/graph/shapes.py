"""Shapes of results that are plain to see.

torch's meta kernels of common operators are Python and cost more than all else in an analysis. Where an operator is not
listed, or its arguments are not the plain ones, its shape is None, and the kernel runs, and complains where it must.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]
SHAPES: dict[Any, Callable[..., Shape | None]] = {}  # by the name of an ATen operator, or by function; ops/ fills it


def plain_shape(*operators: Any) -> Callable[[Callable[..., Shape | None]], Callable[..., Shape | None]]:
    """Say what shape the result of ``operators`` has: ATen names, and functions that take the same arguments.

    The decorated function gets the arguments of a call by position; it gives None where it does not know.
    """

    def register(function: Callable[..., Shape | None]) -> Callable[..., Shape | None]:
        SHAPES.update(dict.fromkeys(operators, function))
        return function

    return register


def shape_of_result(operator: Any, args: Sequence[Any]) -> Shape | None:
    """The shape of a result that is of the dtype of the first tensor; None if that is not plain.

    Its strides are nobody's concern: a view of a contiguous tensor succeeds wherever that of another does.
    """
    find = SHAPES.get(operator)
    if find is None:
        return None
    tensors = [arg for arg in (args[0] if isinstance(args[0], (list, tuple)) else args) if isinstance(arg, Tensor)]
    dtype = tensors[0].dtype if tensors else torch.int64
    if dtype.is_floating_point and all(tensor.dtype == dtype for tensor in tensors):
        return find(*args)
    return None
