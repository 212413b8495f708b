"""What the ranks of a distributed run tell each other. Without torch.distributed there is one rank."""

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fxprune.errors import SessionError


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if ranks() > 1 else 0


def mean(tensor: Tensor) -> Tensor:
    """The mean of ``tensor`` over all ranks, the same on each."""
    if ranks() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / ranks()


def largest(number: float) -> float:
    """The largest ``number`` of all ranks."""
    numbers: list[float] = gather(number)
    return max(numbers)


def gather(value: Any) -> list[Any]:
    """``value`` of every rank, in the order of the ranks, on every rank."""
    if ranks() == 1:
        return [value]
    values: list[Any] = [None] * ranks()
    dist.all_gather_object(values, value)
    return values


def agree(what: str, text: str) -> None:
    """Raise SessionError on every rank unless ``text`` is the same on all.

    Raises:
        SessionError: names the ranks that differ.
    """
    hashes = gather(hashlib.sha256(text.encode()).hexdigest()[:16])
    if len(set(hashes)) > 1:
        parties: dict[str, list[int]] = {}
        for number, its in enumerate(hashes):
            parties.setdefault(its, []).append(number)
        raise SessionError(
            f"the ranks disagree on {what}: {', '.join(f'{its} on {who}' for its, who in parties.items())}. Nothing "
            "was cut. Their weights or their passes differ: check that every rank trains the same model."
        )


def wait() -> None:
    """Wait until every rank is here."""
    if ranks() > 1:
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
