"""SynFlow: pruning before training without data, by what of the signal goes through each channel."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxprune.budget.cost import Floats
from fxprune.budget.sums import Sums
from fxprune.channels.analysis import Analysis
from fxprune.graph.inputs import map_tensors, tensors_in
from fxprune.graph.traced import device_of
from fxprune.rewrite.verify import Comparable

from .._data import copy_for_data
from ..base import weights_of
from .base import BeforeTraining
from .single_shot import only_readers


@dataclass(frozen=True)
class SynFlow(BeforeTraining):
    """Sum of |w| * dR/d|w| over the weights that read a channel, for what goes with it of what the budget limits.

    R is the sum of the outputs of the network with the absolute values of all its weights and statistics, on inputs of
    ones, in eval mode and float64: what flows through the network without data. Inputs that are integers are
    0. Taken once, where the paper prunes a little in each of a hundred rounds so that no layer is emptied; ``minimum``
    sees to that here. After Tanaka et al., "Pruning neural networks without any data by iteratively
    conserving synaptic flow" (2020).
    """

    per_cost: ClassVar[bool] = True

    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group."""
        if not analysis.groups:
            return {}
        weights_of(analysis)  # raises where they have no values
        sums = Sums(analysis, flow_through_weights(analysis))
        return {name: sums(only_readers(analysis, group)) for name, group in analysis.groups.items()}


def flow_through_weights(analysis: Analysis) -> dict[str, Tensor]:
    """The products |w| * dR/d|w| of every parameter, in float64, by its name."""
    with copy_for_data(analysis.graph) as model, Comparable(torch.float64), torch.enable_grad():
        model.double().eval()
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.detach().abs_()
        device = device_of(model)[0]
        args, kwargs = map_tensors(lambda tensor: make_input(tensor, device), analysis.example_inputs)
        parameters = {name: p.requires_grad_() for name, p in model.named_parameters() if p.is_floating_point()}
        outputs = tensors_in(model(*args, **kwargs))
        flow = torch.stack([output.sum() for output in outputs if output.is_floating_point()]).sum()
        gradients = torch.autograd.grad(flow, list(parameters.values()), allow_unused=True)
    products = zip(parameters.items(), gradients, strict=True)
    return {name: weight.detach() * gradient for (name, weight), gradient in products if gradient is not None}


def make_input(example: Tensor, device: torch.device) -> Tensor:
    """Ones in float64 of the shape of ``example``; zeros where it holds integers, which may be places in a table."""
    if example.is_floating_point():
        return torch.ones(example.shape, dtype=torch.float64, device=device)
    return torch.full(example.shape, example.dtype is torch.bool, dtype=example.dtype, device=device)
