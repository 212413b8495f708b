"""Taylor: what the loss would change by, to first order."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from fxprune.budget.cost import Floats
from fxprune.budget.sums import Sums
from fxprune.channels.analysis import Analysis
from fxprune.graph.batches import Batch

from .._data import mean_over, read_labelled, weights_times_gradients
from ..base import Criterion, share_in_layers


@dataclass(frozen=True)
class Taylor(Criterion):
    """|sum of w * dL/dw| over all slices of a channel, averaged over batches.

    Setting the slices of channel c to zero changes the loss by -sum(w * dL/dw) to first order; the score is the
    absolute value; shares and costs are as for ``Magnitude``. After Molchanov et al., "Importance Estimation for
    Neural Network Pruning" (2019), on whole groups. The model runs in the mode it is in, on a copy: it is not
    changed, nor is the state of torch's random numbers. Within torch.autocast it runs in that precision; in a
    distributed run every rank gives its share of the data, and all get the mean.

    Attributes:
        data: one batch (x, y), or an iterable of batches such as a DataLoader; x is a tensor, a tuple or dict of
            arguments, or (args, kwargs). A batch may be a dict too; what the example had of it goes to the model, the
            rest is y. A batch of two inputs and two targets looks like two batches: put it in a list.
        loss: a function of (output, y) that gives a scalar.
    """

    per_cost: ClassVar[bool] = True
    data: Any
    loss: Callable[[Any, Any], Tensor]

    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group."""

        def changes(model: nn.Module, batch: Batch) -> dict[str, Floats]:
            sums = Sums(analysis, weights_times_gradients(model, batch, self.loss))
            return {name: np.abs(sums(group)) for name, group in analysis.groups.items()}

        means = mean_over(analysis, read_labelled(self.data, analysis, "Taylor"), "Taylor", changes)
        return {name: share_in_layers(analysis, analysis.groups[name], mean) for name, mean in means.items()}
