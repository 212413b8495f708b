"""Tensors that what is registered keeps beside the model, as a moving average by hand does: cut with it, or refused."""

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fxprune.errors import SessionError
from fxprune.graph.inputs import tensors_in
from fxprune.training.run import Run, named_attributes

Shadow = tuple[str, Tensor]  # the name of a parameter or buffer, and a tensor of its shape


def shadows_of(run: Run, name: str, thing: object) -> list[Shadow]:
    """The tensors of ``thing``, registered as ``name``, that belong to parameters and buffers of the model.

    Those are in dictionaries by the names of the model, or in lists with one for each (trained) parameter, in order.

    Raises:
        SessionError: a tensor elsewhere has the shape of a parameter, so nobody knows whether it should be cut.
    """
    if isinstance(thing, (nn.Module, Optimizer, LRScheduler)):
        return []
    shadows = [shadow for held in collections_in(thing) for shadow in match_model(run.graph, held)]
    own_tensors = run.graph.state_dict(keep_vars=True).values()
    known = {id(tensor) for tensor in (*own_tensors, *(tensor for _, tensor in shadows))}
    pruned = {member.parameter for group in run.analysis.groups.values() for member in group.members}
    shapes = {run.analysis.shapes[parameter]: parameter for parameter in pruned}
    for tensor in (tensor for tensor in tensors_in(named_attributes(thing)) if id(tensor) not in known):
        if tuple(tensor.shape) in shapes:
            raise SessionError(
                f"{name} keeps a tensor of shape {tuple(tensor.shape)}, as {shapes[tuple(tensor.shape)]} has, and "
                "nobody knows whether it should be cut alike. Keep such tensors in a dictionary by the names of the "
                "model, or in a list with one for each parameter; or in a torch.optim.swa_utils.AveragedModel."
            )
    return shadows


def collections_in(thing: object) -> Iterator[Collection[Any]]:
    """The lists, tuples and dictionaries among the attributes of ``thing``, and those within them."""
    waiting = list(named_attributes(thing).values())
    for value in waiting:
        if isinstance(value, (dict, list, tuple)):
            yield value
            waiting += value.values() if isinstance(value, dict) else value


def match_model(graph: nn.Module, held: Collection[Any]) -> list[Shadow]:
    """The tensors of one collection with their names, where all of it belongs to the model."""
    if isinstance(held, dict):
        state = graph.state_dict()
        tensors = {key: value for key, value in held.items() if isinstance(value, Tensor)}
        fits = all(key in state and shares_shape(tensor, state[key]) for key, tensor in tensors.items())
        return list(tensors.items()) if fits else []
    every = dict(graph.named_parameters())
    trained = {key: parameter for key, parameter in every.items() if parameter.requires_grad}
    for parameters in (every, trained):
        if held and len(held) == len(parameters) and all(map(shares_shape, held, parameters.values())):
            return list(zip(parameters, held, strict=True))
    return []


def shares_shape(value: object, parameter: Tensor) -> bool:
    """Whether ``value`` is a tensor of the parameter's shape, and not itself."""
    return isinstance(value, Tensor) and value.shape == parameter.shape and value is not parameter
