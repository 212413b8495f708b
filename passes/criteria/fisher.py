"""Fisher: what the loss would change by, to second order, with the Fisher information for the curvature."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from fxprune.budget.cost import Floats
from fxprune.budget.sums import Sums
from fxprune.channels.analysis import Analysis
from fxprune.graph.batches import Batch

from .._data import mean_over, read_labelled, weights_times_gradients
from ..base import Criterion, share_in_layers


@dataclass(frozen=True)
class Fisher(Criterion):
    """1/2 * sum of w^2 * (dL/dw)^2 over all slices of a channel, averaged over batches.

    Optimal Brain Damage: at a minimum, setting w to zero changes the loss by h * w^2 / 2, where the diagonal h of the
    Hessian is that of the Fisher information, the mean of (dL/dw)^2 over samples; here over batches, so batches of
    one sample give it exactly. Shares and costs are as for ``Magnitude``. After LeCun et al., "Optimal Brain Damage"
    (1989), and Theis et al., "Faster Gaze Prediction with Dense Networks and Fisher Pruning" (2018), on whole groups.
    How the model runs, and the attributes, are those of ``Taylor``.
    """

    per_cost: ClassVar[bool] = True
    data: Any
    loss: Callable[[Any, Any], Tensor]

    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group."""

        def changes(model: nn.Module, batch: Batch) -> dict[str, Floats]:
            products = weights_times_gradients(model, batch, self.loss)
            sums = Sums(analysis, products, lambda product: product.square() / 2)
            return {name: sums(group) for name, group in analysis.groups.items()}

        means = mean_over(analysis, read_labelled(self.data, analysis, "Fisher"), "Fisher", changes)
        return {name: share_in_layers(analysis, analysis.groups[name], mean) for name, mean in means.items()}
