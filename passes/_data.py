"""What the criteria that look at data share: batches, the model's gradients on them, and means over all ranks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.budget.cost import Floats
from fxprune.channels.analysis import Analysis
from fxprune.errors import PlanError
from fxprune.graph.batches import Batch, read_batches
from fxprune.graph.inputs import map_tensors
from fxprune.graph.traced import copy_model, device_of
from fxprune.training import distributed

from .base import detach_weights, weights_of

HALF_SCALE = 2.0**16  # of a loss whose gradients are float16, in which small ones would be 0


def read_labelled(data: Any, analysis: Analysis, name: str) -> Iterator[Batch]:
    """``data`` as batches (inputs, labels), with a bar called ``name`` on a terminal."""
    return read_batches(data, analysis.graph, PlanError, name, labelled=True)


def mean_over(
    analysis: Analysis, data: Iterable[Batch], name: str, of: Callable[[nn.Module, Batch], Mapping[str, Floats]]
) -> dict[str, Floats]:
    """The mean of ``of(model, batch)``, float64 arrays by name, over all batches of all ranks.

    ``model`` is a copy in the mode that the analysed one is in: that keeps its parameters, gradients and buffers, and
    torch its random numbers. Every rank calls this, with its share of the data; all get the same.

    Raises:
        PlanError: there is no batch, here or on another rank, or ``of`` raises it.
    """
    if not analysis.groups:
        return {}
    weights_of(analysis)  # raises where they have no values
    totals: dict[str, Floats] = {}
    count = 0
    with distributed.all_or_none(), copy_for_data(analysis.graph) as model:
        device, _ = device_of(model)
        for batch in data:
            for key, values in of(model, map_tensors(lambda tensor: tensor.to(device), batch)).items():
                totals[key] = totals[key] + values if key in totals else values
            count += 1
        if not count:
            raise PlanError(f"{name} got no batches: data must be one batch, or an iterable of batches")
    row = np.concatenate([*totals.values(), [count]])
    *means, batches_a_rank = distributed.mean_over_ranks(torch.from_numpy(row).to(device)).tolist()
    split = np.split(np.array(means) / batches_a_rank, np.cumsum([len(values) for values in totals.values()])[:-1])
    return dict(zip(totals, split, strict=True))


@contextmanager
def copy_for_data(graph: nn.Module) -> Iterator[nn.Module]:
    """A copy of ``graph`` to run data through, with random numbers that do not depend on the caller's."""
    model = copy_model(graph)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield model


def weights_times_gradients(model: nn.Module, batch: Batch, loss: Callable[[Any, Any], Tensor]) -> dict[str, Tensor]:
    """The products w * dL/dw of every parameter, in float32 at least, by its name."""
    with torch.enable_grad():
        value, parameters = take_loss(model, batch, loss)
        grads = batch_gradients(value, list(parameters.values()), HALF_SCALE if in_half_precision(model) else 1.0)
    return {
        name: detach_weights(parameter) * grad
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True)
        if grad is not None
    }


def take_loss(model: nn.Module, batch: Batch, loss: Callable[[Any, Any], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, a scalar with a gradient, and the parameters that it can be taken of, by name."""
    (args, kwargs), y = batch
    parameters = {name: p.requires_grad_() for name, p in model.named_parameters() if p.is_floating_point()}
    try:
        value = loss(model(*args, **kwargs), y)
    except Exception as error:
        raise PlanError(f"loss(model(x), y) fails on this data: {type(error).__name__}: {error}") from error
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise PlanError(f"loss(output, y) must give a scalar tensor with a gradient; got {value!r:.200}")
    return value, parameters


def batch_gradients(value: Tensor, parameters: list[Tensor], scale: float) -> list[Tensor | None]:
    """Of ``value``, taken of ``scale`` times it and divided; smaller scales follow where that overflows."""
    grads = torch.autograd.grad(
        value.float() * scale if scale > 1 else value, parameters, allow_unused=True, retain_graph=scale > 1
    )
    if scale > 1 and not all(grad is None or grad.isfinite().all() for grad in grads):
        return batch_gradients(value, parameters, scale / 16)
    return [None if grad is None else detach_weights(grad) / scale for grad in grads]


def in_half_precision(model: nn.Module) -> bool:
    """Whether gradients pass through float16: that of the weights, or of an autocast that is on."""
    device, dtype = device_of(model)
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
    return autocast or dtype == torch.float16
