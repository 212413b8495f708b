"""What is kept of a tensor: for each axis the sorted int64 indices, or None for all."""

import torch
from torch import Tensor

Kept = tuple[Tensor | None, ...]


def cut_tensor(tensor: Tensor, kept: Kept) -> Tensor:
    """A copy of ``tensor`` with only the ``kept`` indices of each axis; its memory format stays."""
    result = tensor.detach()
    for axis, index in enumerate(kept):
        if index is not None:
            result = result.index_select(axis, index.to(result.device))
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    if channels_last and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=channels_last):
        return result.clone(memory_format=channels_last)
    return result.clone() if result.data_ptr() == tensor.data_ptr() or result is tensor else result


def compose_kept(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Indices into the original of what ``second`` keeps of what ``first`` kept."""
    if first is None or second is None:
        return second if first is None else first
    return first[second]
