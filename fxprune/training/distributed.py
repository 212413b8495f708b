"""What the ranks of a distributed run tell each other. Without torch.distributed there is one rank."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fxprune.errors import SessionError


def count_ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if count_ranks() > 1 else 0


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of ``tensor`` over all ranks, the same on each."""
    if count_ranks() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / count_ranks()


def largest_over_ranks(number: float) -> float:
    """The largest ``number`` of all ranks."""
    numbers: list[float] = gather_values(number)
    return max(numbers)


@dataclass(frozen=True)
class Failure:
    """What a rank that failed sends in place of a value."""

    error: str


class ElsewhereError(SessionError):
    """Another rank failed where this one did not."""


def gather_values(value: Any) -> list[Any]:
    """``value`` of every rank, in the order of the ranks, on every rank.

    Raises:
        ElsewhereError: another rank has left a block of ``all_or_none`` with an error.
    """
    if count_ranks() == 1:
        return [value]
    values: list[Any] = [None] * count_ranks()
    dist.all_gather_object(values, value)
    failed = [f"rank {number}: {its.error}" for number, its in enumerate(values) if isinstance(its, Failure)]
    if failed:
        raise ElsewhereError(f"taken back on every rank, because it failed on some: {'; '.join(failed)}")
    return values


def any_rank(truth: bool) -> bool:
    """Whether ``truth`` holds on any rank."""
    return any(gather_values(truth))


def require_agreement(what: str, text: str) -> None:
    """Raise SessionError on every rank unless ``text`` is the same on all.

    Raises:
        SessionError: names the ranks that differ.
    """
    hashes = gather_values(hashlib.sha256(text.encode()).hexdigest()[:16])
    if len(set(hashes)) > 1:
        parties: dict[str, list[int]] = {}
        for number, its in enumerate(hashes):
            parties.setdefault(its, []).append(number)
        raise SessionError(
            f"the ranks disagree on {what}: {', '.join(f'{its} on {who}' for its, who in parties.items())}. Nothing "
            "was cut. Their weights or their passes differ: check that every rank trains the same model."
        )


@contextmanager
def all_or_none() -> Iterator[None]:
    """A block that every rank runs. Where it fails on one, it fails on all.

    Raises:
        ElsewhereError: on the ranks where the block itself did not fail; names the others, and their errors.
    """
    try:
        yield
        gather_values(None)
    except ElsewhereError:
        raise
    except BaseException as error:
        with suppress(ElsewhereError):
            gather_values(Failure(f"{type(error).__name__}: {error}"))
        raise
