"""SingleShot: 3SP, pruning before training, by what one batch says of each channel for what it costs."""

import itertools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from fxprune.budget.cost import Floats, marginal
from fxprune.budget.sums import Sums
from fxprune.channels.analysis import Analysis, abridge_list
from fxprune.channels.groups import Group
from fxprune.graph.batches import Batch

from .._data import mean_over, read_labelled, weights_times_gradients
from ..base import input_axis
from .base import BeforeTraining


@dataclass(frozen=True)
class SingleShot(BeforeTraining):
    """Sensitivity of the loss to a gate on each channel, per FLOP that goes with the channel.

    The gate z_c = 1 stands where the layers that read the channel read it, behind norm and activation: a train-mode
    batch norm would cancel a gate in front of it. |dL/dz_c| = |sum of w * dL/dw| over the weights that read channel c,
    summed over all readers of the group; where no weight reads it, over those that write it. One forward and one
    backward pass over one batch, in train mode, whatever the mode of the model. After van Amersfoort et al., "Single
    Shot Structured Pruning Before Training" (2020).

    Give it the untrained model, and train what the plan leaves. ``minimum`` caps what goes from one group. The model,
    its statistics and torch's random numbers stay as they are; autocast and distributed runs are as for ``Taylor``.

    Attributes:
        data: one batch (x, y), or a loader, of which the first batch is used (on each rank).
        loss: a function of (output, y) that gives a scalar.
        compute_aware: divide by the FLOPs that go with the channel, at the present widths.
    """

    scores_layers: ClassVar[bool] = False
    data: Any
    loss: Callable[[Any, Any], Tensor]
    compute_aware: bool = True

    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group."""

        def signed(model: nn.Module, batch: Batch) -> dict[str, Floats]:
            sums = Sums(analysis, weights_times_gradients(model.train(), batch, self.loss))
            return {name: sums(only_readers(analysis, group)) for name, group in analysis.groups.items()}

        first = itertools.islice(read_labelled(self.data, analysis, "SingleShot"), 1)
        means = mean_over(analysis, first, "SingleShot", signed)
        gates = {name: np.abs(mean) for name, mean in means.items()}
        warn_of_silence(analysis, gates)
        if not self.compute_aware:
            return gates
        flops = marginal(analysis, "flops")
        return {name: gate / np.maximum(flops[name], 1.0) for name, gate in gates.items()}


def warn_of_silence(analysis: Analysis, gates: Mapping[str, Floats]) -> None:
    """Say which groups the loss does not feel at all, and which norms are zero, as at the end of a residual branch."""
    silent = [name for name, gate in gates.items() if not gate.any()]
    zero = [name for name in sorted(analysis.batch_norm_scales) if not analysis.graph.get_parameter(name).any()]
    if not silent:
        return
    why = (
        f"The scales of {abridge_list(zero, 4)} are zero, as zero_init_residual=True makes them: score the model "
        "before they are set to zero."
        if zero
        else "Are weights on the way to the loss zero?"
    )
    warnings.warn(
        f"SingleShot: the loss does not feel {len(silent)} of {len(gates)} groups ({abridge_list(silent, 4)}), so "
        f"their channels go first. {why}",
        stacklevel=4,
    )


def only_readers(analysis: Analysis, group: Group) -> Group:
    """``group`` with only the members that read its channels; those that write them where none reads."""
    reading = [member for member in group.members if member.axis == input_axis(analysis.graph, member.parameter)]
    return replace(group, members=tuple(reading)) if reading else group
