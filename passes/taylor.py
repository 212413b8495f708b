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
from fxprune.inputs import bind, map_tensors

from .base import Criterion, Sums, detached, normalized, weights_of


@dataclass(frozen=True)
class Taylor(Criterion):
    """|sum of w * dL/dw| over all slices of a channel, averaged over batches.

    Setting the slices of channel c to zero changes the loss by -sum(w * dL/dw) to first order; the score is the
    absolute value of that, divided by the mean of the group. After Molchanov et al., "Importance Estimation for
    Neural Network Pruning" (2019), on whole groups. The model runs in the mode it is in, on a copy: it is not
    changed, nor is the state of torch's random numbers.

    Attributes:
        data: one batch (x, y), or an iterable of batches such as a DataLoader; x is a tensor, a tuple of arguments, or
            (args, kwargs). A batch of two inputs and two targets looks like two batches: put it in a list.
        loss: a function of (output, y) that gives a scalar.
    """

    data: Any
    loss: Callable[[Any, Any], Tensor]

    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group."""
        totals = {name: np.zeros(group.size) for name, group in analysis.groups.items()}
        count = 0
        for products in weights_times_gradients(analysis, batches(self.data), self.loss):
            sums = Sums(analysis, products)
            for name, group in analysis.groups.items():
                totals[name] += np.abs(sums(group))
            count += 1
        if not count:
            raise PlanError("Taylor got no batches: data must be one batch (x, y) or an iterable of batches")
        return {name: normalized(total) for name, total in totals.items()}


def weights_times_gradients(
    analysis: Analysis, data: Iterable[tuple[Any, Any]], loss: Callable[[Any, Any], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """For each batch w * dL/dw of every parameter, in float32 at least, by its name.

    The model runs in the mode it is in, on a copy: its parameters, buffers and random numbers stay as they are.
    """
    weights_of(analysis)  # raises where they have no values
    model = copy.deepcopy(analysis.graph)
    device, _ = device_of(model)
    parameters = {name: p.requires_grad_() for name, p in model.named_parameters() if p.is_floating_point()}
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        for x, y in data:
            (args, kwargs), y = map_tensors(lambda tensor: tensor.to(device), (bind(x), y))
            try:
                value = loss(model(*args, **kwargs), y)
            except Exception as error:
                raise PlanError(f"loss(model(x), y) fails on this data: {type(error).__name__}: {error}") from error
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                raise PlanError(f"loss(output, y) must give a scalar tensor with a gradient; got {value!r:.200}")
            grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            yield {
                name: detached(parameter) * detached(grad)
                for (name, parameter), grad in zip(parameters.items(), grads, strict=True)
                if grad is not None
            }


def batches(data: Any) -> Iterator[tuple[Any, Any]]:
    """``data`` as batches (x, y)."""
    one = is_pair(data) and not (is_pair(data[0]) and is_pair(data[1]))
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
