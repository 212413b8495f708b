"""Taylor: what the loss would change by, to first order."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.channels.analysis import Analysis
from fxprune.cost import Floats, device_of
from fxprune.errors import PlanError
from fxprune.inputs import map_tensors

from .base import Criterion, Sums, detached, normalized


@dataclass(frozen=True)
class Taylor(Criterion):
    """|sum of w * dL/dw| over all slices of a channel, averaged over batches.

    Setting the slices of channel c to zero changes the loss by -sum(w * dL/dw) to first order; the score is the absolute
    value of that, divided by the mean of the group. After Molchanov et al., "Importance Estimation for Neural Network
    Pruning" (2019), on whole groups. The model runs in the mode it is in, on a copy: it is not changed.

    Attributes:
        data: one batch (x, y), or an iterable of batches such as a DataLoader; x is a tensor or a tuple of arguments.
        loss: a function of (output, y) that gives a scalar.
    """

    data: Any
    loss: Callable[[Any, Any], Tensor]

    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group."""
        model = copy.deepcopy(analysis.graph)
        device, _ = device_of(model)
        parameters = dict(model.named_parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        totals = {name: np.zeros(group.size) for name, group in analysis.groups.items()}
        count = 0
        for x, y in batches(self.data):
            x, y = map_tensors(lambda tensor: tensor.to(device), (x, y))
            with torch.enable_grad():
                value = self.loss(model(*x) if isinstance(x, (tuple, list)) else model(x), y)
            names = list(parameters)
            grads = torch.autograd.grad(value, [parameters[name] for name in names], allow_unused=True)
            products = {
                name: detached(parameters[name]) * detached(grad)
                for name, grad in zip(names, grads, strict=True)
                if grad is not None
            }
            sums = Sums(analysis, products)
            for name, group in analysis.groups.items():
                totals[name] += np.abs(sums(group))
            count += 1
        if not count:
            raise PlanError("Taylor got no batches: data must be one batch (x, y) or an iterable of batches")
        return {name: normalized(total) for name, total in totals.items()}


def batches(data: Any) -> Iterator[tuple[Any, Any]]:
    """``data`` as batches (x, y)."""
    one = isinstance(data, (tuple, list)) and len(data) == 2 and not is_pair(data[0])
    source: Iterable[Any] = [data] if one else data
    for batch in source:
        if not is_pair(batch):
            raise PlanError(
                f"data must be one batch (x, y) or an iterable of batches; got a {type(batch).__name__} in it"
            )
        yield batch[0], batch[1]


def is_pair(batch: Any) -> bool:
    """Whether ``batch`` looks like (x, y)."""
    return isinstance(batch, (tuple, list)) and len(batch) == 2
