"""Kernels with zeros in files: of each kernel the weights that are not zero, and where they are.

Kernels that were pruned by patterns have few such places between them, so a number of one byte names them.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxprune.errors import FileError
from fxprune.files.sparse import StateDict, bits_of

PATTERN, POOL = ":pattern", ":pool"  # what stands behind the names of a weight
MOST = 256  # patterns that a byte can name


def pack_kernels(state: Mapping[str, Tensor]) -> tuple[StateDict, list[str]]:
    """``state`` for a file, and the names of what became smaller.

    Of a weight float[out, in, h, w] with at most 256 patterns of zeros in its kernels, where that takes less space, the
    weights that are not zero are written in order, with the pattern of each kernel, uint8[out, in], and the patterns,
    bool[patterns, h, w], under two other names.
    """
    result: StateDict = {}
    names: list[str] = []
    for name, tensor in state.items():
        result[name] = tensor
        if tensor.ndim != 4 or not tensor.is_floating_point() or any(name + end in state for end in (PATTERN, POOL)):
            continue
        nonzero = (bits_of(tensor.contiguous()) != 0).reshape(tensor.shape)
        if int((~nonzero).sum()) * tensor.element_size() <= tensor.shape[:2].numel():
            continue
        pool, pattern = torch.unique(nonzero.flatten(2).flatten(0, 1), dim=0, return_inverse=True)
        if len(pool) <= MOST:
            result[name] = tensor[nonzero]
            result[name + PATTERN] = pattern.reshape(tensor.shape[:2]).to(torch.uint8)
            result[name + POOL] = pool.reshape(-1, *tensor.shape[2:])
            names.append(name)
    return result, names


def unpack_kernels(state: Mapping[str, Tensor], names: Sequence[str], expected: Mapping[str, Tensor]) -> StateDict:
    """Undo ``packed``, for a model that has the tensors ``expected``: nothing larger is made.

    Raises:
        FileError: the patterns are damaged, or of another model.
    """
    result = dict(state)
    for name in names:
        pool, pattern = result.pop(name + POOL), result.pop(name + PATTERN)
        shape = tuple(expected[name].shape)
        if (*pattern.shape, *pool.shape[1:]) != shape or pattern.ndim != 2:
            raise FileError(
                f"the kernels of {name} have patterns of shape {tuple(pool.shape[1:])} at {tuple(pattern.shape)} "
                f"places; in the model it has shape {shape}"
            )
        if pool.dtype != torch.bool or pattern.dtype != torch.uint8 or int(pattern.max()) >= len(pool):
            raise FileError(f"the patterns of {name} are damaged")
        nonzero = pool[pattern.long()]
        if state[name].shape != (int(nonzero.sum()),):
            raise FileError(f"{name} does not have the weights that its patterns ask for: the file is damaged")
        result[name] = state[name].new_zeros(nonzero.shape).masked_scatter_(nonzero, state[name])
    return result
