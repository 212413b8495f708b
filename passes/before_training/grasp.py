"""GraSP: pruning before training, by what each channel does for the norm of the gradient."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxprune.budget.cost import Floats
from fxprune.budget.sums import Sums
from fxprune.channels.analysis import Analysis
from fxprune.errors import PlanError
from fxprune.graph.batches import Batch
from fxprune.graph.inputs import map_tensors
from fxprune.graph.traced import device_of

from .._data import mean_over, read_labelled, take_loss
from ..base import detach_weights
from .base import BeforeTraining
from .single_shot import only_readers


@dataclass(frozen=True)
class GraSP(BeforeTraining):
    """Sum of w * (H g) over the weights that read a channel, for what goes with it of what the budget limits.

    g is the gradient of the loss and H its Hessian, on one batch, in train mode. Setting w to zero changes |g|^2 by
    -2 w * (H g) to first order, so the channels that stay are those without which the gradient would be smallest;
    a channel of a negative score stands in its way. After Wang et al., "Picking Winning Tickets Before Training by
    Preserving Gradient Flow" (2020), which divides the outputs by 200 first: let ``loss`` do that where you want it.
    Taken in float32 at least, whatever the precision of the weights and of autocast. The model, its statistics and
    torch's random numbers stay as they are.

    Attributes:
        data: one batch (x, y), or a loader, of which the first batch is used; on several ranks each takes its own, and
            all get the mean.
        loss: a function of (output, y) that gives a scalar.
    """

    per_cost: ClassVar[bool] = True
    data: Any
    loss: Callable[[Any, Any], Tensor]

    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group.

        Raises:
            PlanError: an operator of the model can't be differentiated twice.
        """

        def changes(model: nn.Module, batch: Batch) -> dict[str, Floats]:
            sums = Sums(analysis, weights_times_curvature(model.train(), batch, self.loss))
            return {name: sums(only_readers(analysis, group)) for name, group in analysis.groups.items()}

        return mean_over(analysis, itertools.islice(read_labelled(self.data, analysis, "GraSP"), 1), "GraSP", changes)


def weights_times_curvature(model: nn.Module, batch: Batch, loss: Callable[[Any, Any], Tensor]) -> dict[str, Tensor]:
    """The products w * (H g) of every parameter, in float32 at least, by its name."""
    for parameter in model.parameters():
        parameter.data = detach_weights(parameter)
    for buffer in model.buffers():
        buffer.data = detach_weights(buffer)
    # Fused attention can't be differentiated twice.
    with torch.enable_grad(), torch.autocast(device_of(model)[0].type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        value, parameters = take_loss(model, map_tensors(detach_weights, batch), loss)
        weights = list(parameters.values())
        try:
            gradients = torch.autograd.grad(value, weights, create_graph=True, allow_unused=True)
            flow = torch.stack([(g.detach() * g).sum() for g in gradients if g is not None]).sum()
            curvatures = torch.autograd.grad(flow, weights, allow_unused=True)
        except RuntimeError as error:
            raise PlanError(f"GraSP needs second derivatives, which this model does not have: {error}") from error
    products = zip(parameters.items(), curvatures, strict=True)
    return {name: weight.detach() * curvature for (name, weight), curvature in products if curvature is not None}
