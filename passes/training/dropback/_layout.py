"""Layout: the parameters of a model one after the other, so that numbers about all weights lie in one tensor."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.errors import SessionError


class Layout:
    """Places for a number about each weight, in the order of the parameters, each in the order of its memory.

    Attributes:
        parameters: by name, all on one device.
        names: the opposite.
        size: of all together, in weights.
        dtype: the widest of theirs, float32 at least.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        devices = {str(parameter.device) for parameter in parameters.values()}
        if len(devices) > 1:
            raise SessionError(f"the weights must be on one device to be compared; they are on {sorted(devices)}")
        self.parameters = dict(parameters)
        self.names = {parameter: name for name, parameter in parameters.items()}
        self.size = sum(parameter.numel() for parameter in parameters.values())
        self.device = next((parameter.device for parameter in parameters.values()), torch.device("cpu"))
        self.dtype = torch.float32
        for parameter in parameters.values():
            self.dtype = torch.promote_types(self.dtype, parameter.dtype)
        self._form = self._formed()

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """Zeros: one number for each weight."""
        return torch.zeros(self.size, dtype=dtype, device=self.device)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """For each parameter its part of ``buffer``, in its shape and memory format."""
        result, at = {}, 0
        for name, parameter in self.parameters.items():
            stride = torch.empty_like(parameter, device="meta").stride()
            result[name] = buffer[at : at + parameter.numel()].as_strided(parameter.shape, stride)
            at += parameter.numel()
        return result

    def stale(self) -> bool:
        """Whether a parameter has changed its shape, device, dtype or memory format since."""
        return self._form != self._formed()

    def _formed(self) -> list[object]:
        return [(p.shape, p.stride(), p.device, p.dtype) for p in self.parameters.values()]


def to_bits(mask: Tensor) -> Tensor:
    """uint8: a bool tensor, eight to a byte."""
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))


def from_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    """bool[shape]: undo ``to_bits``.

    Raises:
        SessionError: there are not as many bits.
    """
    count = shape.numel()
    if bits.dtype != torch.uint8 or bits.numel() != -(-count // 8):
        raise SessionError(
            f"{bits.numel()} bytes of {bits.dtype} can't say yes or no to {count} weights: they are of another model"
        )
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=count).astype(bool)).reshape(shape)
