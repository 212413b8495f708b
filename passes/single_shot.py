"""SingleShot: 3SP, pruning before training, by what one batch says of each channel for what it costs."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from fxprune.channels.analysis import Analysis
from fxprune.channels.groups import Group
from fxprune.cost import Floats, marginal
from fxprune.errors import PlanError

from .base import Criterion, Sums
from .taylor import batches, weights_times_gradients


@dataclass(frozen=True)
class SingleShot(Criterion):
    """Sensitivity of the loss to a gate on each channel, per FLOP that goes with the channel.

    The gate z_c = 1 stands where the layers that read the channel read it, behind norm and activation: a train-mode
    batch norm would cancel a gate in front of it. |dL/dz_c| = |sum of w * dL/dw| over the weights that read channel c,
    summed over all readers of the group; where no weight reads it, over those that write it. One forward and one
    backward pass over one batch. After van Amersfoort et al., "Single Shot Structured Pruning Before Training" (2020).

    Give it the untrained model, and train what the plan leaves. ``minimum`` caps what goes from one group.

    Attributes:
        data: one batch (x, y), or a loader, of which the first batch is used.
        loss: a function of (output, y) that gives a scalar.
        compute_aware: divide by the FLOPs that go with the channel, at the present widths.
    """

    data: Any
    loss: Callable[[Any, Any], Tensor]
    compute_aware: bool = True

    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group."""
        batch = next(batches(self.data), None)
        if batch is None:
            raise PlanError("SingleShot got no batch: data must be one batch (x, y) or an iterable of batches")
        products = next(weights_times_gradients(analysis, [batch], self.loss))
        sums = Sums(analysis, products)
        gates = {name: np.abs(sums(readers(analysis, group))) for name, group in analysis.groups.items()}
        silent = [name for name, gate in gates.items() if not gate.any()]
        if silent:
            warnings.warn(
                f"SingleShot: the loss does not feel {len(silent)} of {len(gates)} groups ({', '.join(silent[:4])}), "
                "so their channels go first. Is the last norm of their branch zero at the start (zero_init_residual)?",
                stacklevel=3,
            )
        if not self.compute_aware:
            return gates
        flops = marginal(analysis, "flops")
        return {name: gate / np.maximum(flops[name], 1.0) for name, gate in gates.items()}


def readers(analysis: Analysis, group: Group) -> Group:
    """``group`` with only the members that read its channels; those that write them where none reads."""
    reading = [member for member in group.members if member.axis == input_axis(analysis, member.parameter)]
    return replace(group, members=tuple(reading)) if reading else group


def input_axis(analysis: Analysis, parameter: str) -> int | None:
    """The axis along which a weight reads its layer's input, if it has one."""
    module = analysis.graph.get_submodule(parameter.rpartition(".")[0])
    ndim = len(analysis.shapes[parameter])
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and ndim > 1:
        depthwise = getattr(module, "groups", 1) > 1 and analysis.shapes[parameter][1] == 1
        return None if depthwise else 0 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 1
    return None
