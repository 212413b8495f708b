"""The norm of a part of a weight, as the penalties take it: sqrt(sum of squares + 1e-8), in float32 at least."""

import torch
from torch import Tensor

EPSILON = 1e-8


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor, in float32 where its dtype is a smaller one."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
