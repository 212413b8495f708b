"""Example inputs: a tensor, a tuple or dict of arguments, (args, kwargs), or a loader's batch; and trees of values."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.errors import AnalysisError
from fxprune.graph.traced import Mode, regions_of

Bound = tuple[tuple[Any, ...], dict[str, Any]]


def bind_inputs(example_inputs: Any, model: nn.Module | None = None) -> Bound:
    """``example_inputs`` as (args, kwargs). Of a list, a DataLoader's batch, as many as ``model`` takes."""
    if any(isinstance(leaf, np.ndarray) for leaf in pytree.tree_leaves(example_inputs)):
        raise AnalysisError("example_inputs hold a numpy array; make it a tensor with torch.from_numpy")
    if is_kwargs(example_inputs) and example_inputs:
        return (), dict(example_inputs)
    if isinstance(example_inputs, list) and model is not None:
        example_inputs = take_arguments(example_inputs, model)
    if isinstance(example_inputs, (tuple, list)):
        if len(example_inputs) == 2 and isinstance(example_inputs[0], (tuple, list)) and is_kwargs(example_inputs[1]):
            return tuple(example_inputs[0]), dict(example_inputs[1])
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def is_kwargs(value: Any) -> bool:
    """Whether ``value`` can be keyword arguments."""
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def take_arguments(batch: list[Any], model: nn.Module) -> list[Any]:
    """As many entries of ``batch``, from the first, as the forward of ``model`` takes; all where no number is right."""
    signature = inspect.signature(model.forward)
    for count in range(len(batch), 0, -1):
        with suppress(TypeError):
            signature.bind(*batch[:count])
            return batch[:count]
    return batch


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """``tree`` with ``function`` applied to each tensor in it."""
    return pytree.tree_map_only(Tensor, function, tree)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in ``tree``, in order; dataclasses and mappings of any class are looked into."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in([getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)])
        elif isinstance(leaf, Mapping):
            found += tensors_in(list(leaf.values()))
    return found


def without_data(tensor: Tensor) -> Tensor:
    """A tensor on meta, of the same shape, strides and dtype."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def for_mode(inputs: Bound, mode: Mode, module: nn.Module) -> Bound:
    """The inputs to run a mode with: batch norm can't train on one value per channel, so a batch of 1 becomes 2."""
    if not (mode.training and norms_batches(module)) or any(
        not tensor.ndim or tensor.shape[0] != 1 for tensor in tensors_in(inputs)
    ):
        return inputs
    # Unlike samples: the norm of two that are nearly alike is all noise.
    double: Bound = map_tensors(lambda t: torch.cat([t, -t if t.is_floating_point() else t.flip(-1)]), inputs)
    return double


def norms_batches(model: nn.Module) -> bool:
    """Whether there is batch norm in ``model``, as a layer or as a function."""
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()):
        return True
    graphs = [graph for region in regions_of(model).values() for graph in region.distinct_graphs().values()]
    return any(node.target in (F.batch_norm, torch.batch_norm) for graph in graphs for node in graph.nodes)


def describe_inputs(example_inputs: Any) -> Any:
    """``example_inputs`` without data, as JSON: tensors become {"shape", "dtype"}."""
    args, kwargs = bind_inputs(example_inputs)
    return {"args": _to_json(args), "kwargs": _to_json(kwargs)}


def imagine_inputs(description: Any) -> Bound:
    """The opposite of ``describe``: tensors of the shapes described, without data."""
    return tuple(_from_json(description["args"])), _from_json(description["kwargs"])


def _to_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}}
    if isinstance(value, dict):
        return {"dict": {key: _to_json(item) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if isinstance(value, dict) and "tensor" in value:
        return torch.empty(value["tensor"]["shape"], dtype=getattr(torch, value["tensor"]["dtype"]), device="meta")
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value["dict"].items()}
    return value
