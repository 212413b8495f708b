"""Rounding: how far the last bits of a run carry, measured and not assumed.

In exact arithmetic the masked original and the compact model are one function, but they round differently: sums have
other lengths, kernels another order. How much that may be is a property of the model: a norm over values that hardly
differ makes of the last bit what it likes. So the original is compared with itself while every value on the way
forwards, and every gradient on the way back, is moved at random by its last bit: Monte Carlo arithmetic (Parker 1997,
"Monte Carlo Arithmetic: exploiting randomness in floating-point arithmetic"). By how much outputs and gradients then
spread is the unit in which a difference between two models is measured.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxprune.graph.inputs import map_tensors


class LastBit(torch.autograd.Function):
    """A tensor, and on the way back its gradient, moved at random by the last bit."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, draws: torch.Generator) -> Tensor:
        """Move the values."""
        ctx.draws = draws
        return move_last_bit(tensor, draws)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Move the gradient."""
        return move_last_bit(gradient, ctx.draws), None


class RandomRounding(TorchFunctionMode):
    """While this holds, whatever is computed from parameters is moved at random by its last bit.

    Not what is computed in place or looks into another tensor, and nothing without a gradient: the places of a grid or
    a mask are exact, and are to stay so.
    """

    def __init__(self, draws: torch.Generator) -> None:
        super().__init__()
        self.draws = draws

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Move what a function gives."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {id(value) for value in (*args, *kwargs.values())}

        def move(tensor: Tensor) -> Tensor:
            computed = tensor.requires_grad and tensor.is_floating_point() and not tensor._is_view()
            return LastBit.apply(tensor, self.draws) if computed and id(tensor) not in given else tensor

        return map_tensors(move, result) if torch.is_grad_enabled() else result


def move_last_bit(tensor: Tensor, draws: torch.Generator) -> Tensor:
    """A copy in which each element is as it was, or its neighbour up or down, at random. Integers stay."""
    if not tensor.is_floating_point():
        return tensor
    step = torch.randint(-1, 2, tensor.shape, generator=draws).to(tensor)
    return tensor + tensor * step * torch.finfo(tensor.dtype).eps


def move_parameters(model: nn.Module, draws: torch.Generator) -> None:
    """Move the last bits of all parameters, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(move_last_bit(parameter, draws))
