"""Sparse states: of a parameter whose start is known, only the weights that differ from it are written."""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import FileError
from fxprune.files.start import Start

StateDict = dict[str, Tensor]


def pack_sparse(state: Mapping[str, Tensor], start: Start | None) -> tuple[StateDict, dict[str, Any] | None]:
    """``state`` for a file, and what to write beside it to have it back: None where no start is known.

    Where it takes less space than the parameter, only the values that differ from their start are written, and under
    another name where they are: as ``gaps_between`` has it, or their positions where they are few.
    """
    if start is None:
        return dict(state), None
    result: StateDict = {}
    index: dict[str, str] = {}
    check = 0
    for name, tensor in state.items():
        result[name], key = tensor, f"{name}:index"
        if name not in start.origins or start.shape(name) != tuple(tensor.shape) or key in state:
            continue
        begin = start.values(name, tensor.device).to(tensor.dtype)
        where = (bits_of(tensor) != bits_of(begin)).nonzero().flatten()
        positions = where.int() if tensor.numel() < 2**31 else where
        places = min(gaps_between(where), positions, key=lambda kind: kind.nbytes)
        if len(where) * tensor.element_size() + places.nbytes < tensor.nbytes:
            result[name], result[key] = tensor.flatten()[where], places
            index[name] = key
            check = checksum_of(tensor, check)
    return result, {**start.to_json(), "index": index, "check": check}


def unpack_sparse(state: Mapping[str, Tensor], description: Mapping[str, Any], start: Start) -> StateDict:
    """Undo ``packed``.

    Args:
        state: what was written.
        description: what ``packed`` said of it.
        start: that of the description, after the cuts that the model had.

    Raises:
        FileError: the positions are damaged, or the start values come out differently here.
    """
    index: dict[str, str] = description["index"]
    result = {name: tensor for name, tensor in state.items() if name not in index.values()}
    check = 0
    for name, key in index.items():
        values, where = state[name], state[key]
        where = positions_after(where) if where.dtype == torch.uint8 else where.long()
        flat = start.values(name).to(values.dtype).flatten()
        ordered = where.ndim == 1 and bool((where.diff() > 0).all())
        if not ordered or where.shape != values.shape or (len(where) and not 0 <= where[0] <= where[-1] < len(flat)):
            raise FileError(f"the positions of the weights of {name} are damaged")
        flat[where] = values
        result[name] = flat.reshape(start.shape(name))
        check = checksum_of(flat, check)
    if check != description["check"]:
        raise FileError("its weights are not those that were saved: the file is damaged, or start values differ here")
    return result


def gaps_between(where: Tensor) -> Tensor:
    """uint8: how many weights lie before each of ``where``, int64, in order, and after the last one; 255 for 255 more.

    >>> gaps_between(torch.tensor([2, 3, 300]))
    tensor([  2,   0, 255,  41], dtype=torch.uint8)
    """
    gaps = where.diff(prepend=where.new_full((1,), -1)) - 1
    ends = (gaps // 255 + 1).cumsum(0) - 1
    result = torch.full((int(ends[-1]) + 1 if len(ends) else 0,), 255, dtype=torch.uint8, device=where.device)
    result[ends] = (gaps % 255).to(torch.uint8)
    return result


def positions_after(gaps: Tensor) -> Tensor:
    """int64: the opposite of ``gaps_between``."""
    ends = gaps < 255
    return ((gaps.long() + ends).cumsum(0) - 1)[ends]


def start_in(description: Mapping[str, Any], model: nn.Module) -> Start:
    """The start that ``packed`` described, of ``model`` before any cut.

    Raises:
        InitializeError: it was made by another generator.
        FileError: it is of another model.
    """
    start = Start.from_json(description)
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, origin in start.origins.items():
        if parameters.get(name) != origin.shape:
            raise FileError(
                f"{name} started with shape {origin.shape} in the file, {parameters.get(name)} in the model"
            )
    return start


def bits_of(tensor: Tensor) -> Tensor:
    """The numbers of a tensor, flat, as integers of their size: equal where all their bits are."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.flatten().view(integer)


def checksum_of(tensor: Tensor, before: int) -> int:
    """A number that changes with every bit of ``tensor``, continued from ``before``."""
    return zlib.crc32(bits_of(tensor).cpu().numpy().data, before)
