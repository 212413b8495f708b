"""Norms over what is kept: where a norm runs over channels that were removed, this is the function that is meant."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxprune.channels.tensor import STATISTICS
from fxprune.rewrite.kept import Kept

OverKept = Callable[..., Any]
NORMS_OVER_KEPT: dict[Any, OverKept] = {}  # by function; ops/ fills it


def norm_over_kept(*functions: Any) -> Callable[[OverKept], OverKept]:
    """Say what functions give when their statistics run over the kept channels only: decorates ``f(kept, ...)``.

    After ``kept``, for each axis of the value int64[indices that stay] or None for all, it takes the arguments of the
    functions. It gives a result as large as theirs, zero where something was removed.

    Args:
        functions: as ``torch.overrides`` sees them: ``F.layer_norm``, ``torch.mean`` and ``Tensor.mean``. Where a graph
            calls one, a statistic over channels may be pruned, though no pruning of it is exact.
    """

    def register(function: OverKept) -> OverKept:
        NORMS_OVER_KEPT.update(dict.fromkeys(functions, function))
        STATISTICS.update(functions)
        return function

    return register


class NormOverKept(TorchFunctionMode):
    """While this holds, norms see only what is kept of their input."""

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self.kept = kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Intercept norms, and statistics that others are written with."""
        over_kept = NORMS_OVER_KEPT.get(func)
        return func(*args, **(kwargs or {})) if over_kept is None else over_kept(self.kept, *args, **(kwargs or {}))


def take_kept(tensor: Tensor, kept: Kept) -> Tensor:
    """What is kept of a tensor; gradients pass through."""
    for axis, index in enumerate(kept):
        if index is not None:
            tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor


def put_back(small: Tensor, kept: Kept, original: Tensor) -> Tensor:
    """What ``small`` holds, at the kept places of a tensor shaped like ``original``, and zeros elsewhere."""
    for axis, index in enumerate(kept):
        if index is not None:
            shape = list(small.shape)
            shape[axis] = original.shape[axis]
            small = small.new_zeros(shape).index_copy(axis, index.to(small.device), small)
    return small
