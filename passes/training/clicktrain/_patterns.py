"""Kernel patterns: which taps of a 3×3 kernel stay, and how one is chosen for each kernel."""

import torch
from torch import Tensor

# The pools of the authors' code, row by row. The first four are the 2×2 corners of the kernel.
CORNERS = "000011011 000110110 011011000 110110000"
EIGHT = f"{CORNERS} 000001111 000111010 010011010 010110010"
TWELVE = f"{EIGHT} 111010000 000100111 111100000 000101011"
POOLS = {"static4": CORNERS, "static8": EIGHT, "static12": TWELVE}
TAPS = 4  # that a pattern keeps
SHARES = {"none": (), "input_channel": (-2,), "filter": (-1,)}  # the axes of (out, in) over which a pattern is shared


def static_pool(name: str) -> Tensor:
    """bool[patterns, 3, 3]: a pool of the authors."""
    rows = [[tap == "1" for tap in pattern] for pattern in POOLS[name].split()]
    return torch.tensor(rows).reshape(-1, 3, 3)


def dynamic_pool(importances: list[Tensor], count: int) -> Tensor:
    """bool[count, 3, 3]: the patterns that most kernels would choose, had each its own four most important taps.

    Args:
        importances: float[out, in, 3, 3] of each layer.
        count: patterns in the pool, fewer where the kernels choose fewer. Of two as frequent, that with earlier taps.
    """
    weights = 2 ** torch.arange(8, -1, -1)
    best = [importance.flatten(2).flatten(0, 1).topk(TAPS).indices.cpu() for importance in importances]
    codes: Tensor
    times: Tensor
    codes, times = torch.unique(weights[torch.cat(best)].sum(1), return_counts=True)
    order = (times * 512 + codes).argsort(descending=True)[:count]
    return (codes[order, None] & weights).bool().reshape(-1, 3, 3)


def choose_patterns(importance: Tensor, pool: Tensor, share: str, groups: int = 1) -> Tensor:
    """uint8[out, in]: for each kernel the pattern of the ``pool`` that keeps most importance, the first of equals.

    Args:
        importance: float[out, in, 3, 3], of each tap.
        pool: bool[patterns, 3, 3].
        share: "none", or what all kernels with one pattern have in common: "input_channel" or "filter".
        groups: of the convolution; each has input channels of its own.
    """
    grouped = importance.reshape(groups, -1, *importance.shape[1:])
    with torch.autocast(importance.device.type, enabled=False):  # in half precision squares of gradients vanish
        kept = torch.einsum("goihw,phw->pgoi", grouped, pool.to(importance))
    for axis in SHARES[share]:
        kept = kept.sum(axis, keepdim=True).expand_as(kept)
    return kept.argmax(0).flatten(0, 1).to(torch.uint8)


def least_patterns(importance: Tensor, fraction: float) -> Tensor:
    """bool[out, in]: the ``fraction`` of the kernels, rounded up, that are least important, the first of equals."""
    kernels = importance.flatten(2).sum(2)
    count = -int(-round(fraction * kernels.numel(), 6) // 1)  # 0.55 of 100 is 55, not 56
    gone = torch.zeros(kernels.numel(), dtype=torch.bool, device=kernels.device)
    gone[kernels.flatten().argsort(stable=True)[:count]] = True
    return gone.reshape(kernels.shape)
