"""What the ranks of a distributed run tell each other. Without torch.distributed there is one rank."""

import gc
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join

from fxprune.errors import SessionError

TOLD = "The other ranks were told, and stop as well."


def count_ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if count_ranks() > 1 else 0


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of ``tensor`` over all ranks, the same on each.

    Sent as a value, not reduced: a rank that fails in its place is heard.
    """
    if count_ranks() == 1:
        return tensor
    tensors: list[Tensor] = gather_values(tensor.detach().cpu())
    return torch.stack(tensors).mean(0).to(tensor.device)


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
    failed = [f"rank {rank}: {answer.error}" for rank, answer in enumerate(values) if isinstance(answer, Failure)]
    if failed:
        raise ElsewhereError(f"taken back on every rank, because it failed on some: {'; '.join(failed)}")
    return values


def any_rank(truth: bool) -> bool:
    """Whether ``truth`` holds on any rank."""
    return any(gather_values(truth))


def require_agreement(facts: Mapping[str, object]) -> None:
    """Raise SessionError on every rank unless each of ``facts``, plain data by name, is the same on all.

    Raises:
        SessionError: names the first fact that differs, and the ranks by what they have.
    """
    hashes = gather_values({name: hash_plain(fact) for name, fact in facts.items()})
    for name in facts:
        parties: dict[str, list[int]] = {}
        for rank, of_rank in enumerate(hashes):
            parties.setdefault(of_rank[name], []).append(rank)
        if len(parties) > 1:
            raise SessionError(
                f"the ranks disagree on {name}: {', '.join(f'{key} on {ranks}' for key, ranks in parties.items())}. "
                "Nothing was cut. Their weights or their passes differ: check that every rank trains the same model."
            )


def hash_plain(data: object) -> str:
    """16 digits that stand for plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def require_outside_join(wrappers: Iterable[nn.Module]) -> None:
    """Raise SessionError within torch's ``Join`` of one of ``wrappers``: ranks that have left it answer nobody.

    torch leaves the mark of a Join on the wrapper after its end; its object is gone by then.
    """
    marked = any(getattr(getattr(wrapper, "_join_config", None), "enable", False) for wrapper in wrappers)
    if marked and any(type(thing) is Join and thing._enable for thing in gc.get_objects()):
        raise SessionError(
            "the session is asked to cut or save within torch's Join, where ranks that have no batches left do not "
            "answer. Call it after the `with Join(...)` block, and keep no reference to the Join"
        )


@contextmanager
def all_or_none() -> Iterator[None]:
    """A block that every rank runs. Where it fails on one, it fails on all. Within it ranks talk by ``gather_values``.

    Blocks may stand in each other: an error is told to the other ranks once.

    Raises:
        ElsewhereError: on the ranks where the block itself did not fail; names the others, and their errors.
    """
    try:
        yield
        gather_values(None)
    except ElsewhereError:
        raise
    except BaseException as error:
        if count_ranks() > 1 and TOLD not in getattr(error, "__notes__", ()):
            error.add_note(TOLD)
            with suppress(ElsewhereError):
                gather_values(Failure(f"{type(error).__name__}: {error}"))
        raise
