"""The largest k of many numbers: exactly, ties to the first, or as many as a sample of them says."""

import math

import numpy as np
import torch
from torch import Tensor

SAMPLED = 1 << 16  # at least so many numbers make a sample, or all are looked at
STRIDE = 17  # one number in so many is in it; odd, since weights come in rows of even lengths
SAFE = 2.0  # standard deviations that a sample aims below k


def select_largest(numbers: Tensor, k: int, out: Tensor) -> None:
    """Mark the ``k`` largest of ``numbers``; where some are equal, the first. Zeros are never marked.

    Args:
        numbers: float[n], none negative. NaN counts as the largest.
        k: from 0 to n.
        out: bool[n], overwritten.
    """
    bound = kth_largest(numbers, k) if k else math.inf
    if bound == 0:
        torch.ne(numbers, 0, out=out)
        return
    torch.logical_not(torch.le(numbers, bound, out=out), out=out)
    missing = k - int(torch.count_nonzero(out))
    if missing > 0:
        out[find_equal(numbers, bound)[:missing]] = True


def about_largest(numbers: Tensor, k: int, out: Tensor, *, turn: int = 0) -> None:
    """Mark at most ``k`` of the largest of ``numbers``, nearly as many: those above a bound estimated from a sample.

    Every 17th number is in the sample, from another one on at each ``turn``. The estimate aims two standard deviations
    below ``k``; where more are above it even so, or the sample would be small, the choice is exact.
    """
    sample = numbers[turn % STRIDE :: STRIDE]
    share = k / max(1, len(numbers))
    aim = math.floor(share * len(sample) - SAFE * math.sqrt(len(sample) * share * (1 - share)))
    if len(sample) < SAMPLED or aim < 1:
        select_largest(numbers, k, out)
        return
    torch.gt(numbers, kth_largest(sample, aim), out=out)
    if int(torch.count_nonzero(out)) > k:
        select_largest(numbers, k, out)


def kth_largest(numbers: Tensor, k: int) -> float:
    """The k-th largest of ``numbers``, counted from 1; NaN comes first."""
    place = len(numbers) - k
    if numbers.device.type == "cpu":  # numpy takes a sixth of the time that torch takes
        return float(np.partition(numbers.numpy(), place)[place])
    return float(numbers.kthvalue(place + 1).values)


def find_equal(numbers: Tensor, bound: float) -> Tensor:
    """int64[m]: where ``numbers`` are ``bound``, in order."""
    if numbers.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(numbers.numpy() == bound))
    return (numbers == bound).nonzero().flatten()
