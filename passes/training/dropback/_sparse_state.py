"""An optimizer's state of some weights only: between steps the others' takes no memory."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Of a weight that has made no step yet these are zero, so where they are missing zeros stand for them.
ZERO = {"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "sum"}
Packed = dict[str, dict[str, Tensor]]  # parameter -> kind of state -> the values of its tracked weights, by their index


def pack_state(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> Packed:
    """Take the state out of ``optimizer`` and return that of the weights in ``masks``; nothing large stays there."""
    packed = {
        name: {key: optimizer.state[p][key][masks[name]] for key in state_kinds(optimizer, p)}
        for name, p in parameters.items()
    }
    empty_state(optimizer, parameters, packed)
    return packed


def empty_state(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], packed: Packed) -> None:
    """Let one zero take the place of each tensor of what ``pack_state`` returned, in its shape."""
    for name, kept in packed.items():
        for key, values in kept.items():
            optimizer.state[parameters[name]][key] = values.new_zeros(()).expand(parameters[name].shape)


def unpack_state(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor], packed: Packed
) -> None:
    """Put the state that ``pack_state`` returned back, with zeros for all other weights."""
    for name, kept in packed.items():
        for key, values in kept.items():
            unpacked = torch.zeros_like(parameters[name], dtype=values.dtype, memory_format=torch.preserve_format)
            optimizer.state[parameters[name]][key] = unpacked.masked_scatter_(masks[name], values.to(unpacked.device))


def state_kinds(optimizer: Optimizer, parameter: nn.Parameter) -> list[str]:
    """The kinds of state of a parameter that start at zero and are shaped like it."""
    state = optimizer.state.get(parameter, {})
    return [
        key
        for key, value in state.items()
        if key in ZERO and isinstance(value, Tensor) and value.shape == parameter.shape
    ]
