"""Check: a graph is compared with the user's own model, on the example, in both modes: outputs and gradients."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.errors import TraceError
from fxprune.graph.inputs import Bound, map_tensors, tensors_in
from fxprune.graph.places import describe_error_place
from fxprune.graph.refusal import DoesNotRunError
from fxprune.graph.traced import Mode, is_plain


@dataclass(frozen=True)
class Outcome:
    """What comes of a run of a model."""

    result: Any
    gradients: dict[str, Tensor]  # of those parameters that get one
    buffers: dict[str, Tensor]  # afterwards


SMALL = 64  # pixels along each side


def check_graph(copy: Callable[[], nn.Module], graph: nn.Module, inputs: Mapping[Mode, Bound]) -> None:
    """Compare a graph with the model that it was made of. Both keep their tensors, modes and random numbers.

    Outputs are compared on the example. Gradients, which cost most, on smaller images cut from it where the model
    takes these and its graph agrees, and else on the example too.

    Args:
        copy: makes a copy of the model that shares its tensors with ``graph``.
        graph: a traced model.
        inputs: what to run each mode on.

    Raises:
        TraceError: they differ; says where and by how much.
    """
    for mode in Mode:
        agree = agree_on_less(copy, graph, inputs[mode], mode)
        if agree and mode.training:
            continue
        difference = compare_runs(copy, graph, inputs[mode], mode, gradients=not agree)
        if difference:
            raise TraceError(
                f"the graph of {type(copy()).__name__} does not give what the model gives: in {mode.value} mode "
                f"{difference}. Please report this model."
            )


def agree_on_less(copy: Callable[[], nn.Module], graph: nn.Module, inputs: Bound, mode: Mode) -> bool:
    """Whether a graph and its model agree on images cut from ``inputs``. False too where that can't be told."""

    def crop(tensor: Tensor) -> Tensor:
        image = tensor.ndim > 3 and tensor.is_floating_point()
        return tensor[(slice(None), slice(None), *[slice(SMALL)] * (tensor.ndim - 2))] if image else tensor

    less: Bound = map_tensors(crop, inputs)
    if [tensor.shape for tensor in tensors_in(less)] == [tensor.shape for tensor in tensors_in(inputs)]:
        return False
    try:
        return not compare_runs(copy, graph, less, mode, gradients=True)
    except TraceError:
        return False


def compare_runs(copy: Callable[[], nn.Module], graph: nn.Module, inputs: Bound, mode: Mode, gradients: bool) -> str:
    """In words how a run of a graph differs from one of its model; "" where it does not.

    Raises:
        TraceError: one of them does not run.
    """
    model = copy()
    name = type(model).__name__
    try:
        with tensors_kept(graph):
            expected = run_once(model, inputs, mode, gradients)
    except Exception as error:
        said = f"{describe_error_place(model, error)}: {type(error).__name__}: {error}"
        raise DoesNotRunError(f"{name} does not run on example_inputs: {said}") from error
    try:
        with tensors_kept(graph):
            found = run_once(graph, inputs, mode, gradients)
    except Exception as error:
        raise TraceError(f"the graph of {name} does not run: {type(error).__name__}: {error}") from error
    return find_difference(expected, found)


@contextmanager
def tensors_kept(model: nn.Module) -> Iterator[None]:
    """What is written into buffers meanwhile is undone, and random numbers that are drawn are not missed."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for buffer, values in before:
                buffer.copy_(values)


def run_once(model: nn.Module, inputs: Bound, mode: Mode, gradients: bool) -> Outcome:
    """One run of ``model``; if asked for, also the gradients of a sum of its outputs, weighted always alike."""
    torch.manual_seed(0)
    modes = [(module, module.training) for module in model.modules()]
    model.train(mode.training)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            args, kwargs = map_tensors(lambda tensor: tensor.detach().clone(), inputs)
            result = model(*args, **kwargs)
            buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
            return Outcome(result, gradients_of(model, result) if gradients else {}, buffers)
    finally:
        for module, training in modes:
            module.training = training


def gradients_of(model: nn.Module, result: Any) -> dict[str, Tensor]:
    """The gradients by the names of the parameters."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    outputs = [tensor for tensor in tensors_in(result) if tensor.requires_grad and tensor.is_floating_point()]
    if not parameters or not outputs:
        return {}
    noise = torch.Generator().manual_seed(0)
    weights = [torch.randn(tensor.shape, generator=noise).to(tensor) for tensor in outputs]
    try:
        gradients = torch.autograd.grad(outputs, list(parameters.values()), weights, allow_unused=True)
    except RuntimeError:  # there is an operator in it that has no backward
        return {}
    return {name: each for name, each in zip(parameters, gradients, strict=True) if each is not None}


def find_difference(expected: Outcome, found: Outcome) -> str:
    """In words how two outcomes differ; "" where they do not."""
    if pytree.tree_structure(expected.result) != pytree.tree_structure(found.result):
        return f"the result is {describe_form(found.result)}, not {describe_form(expected.result)}"
    if expected.gradients.keys() != found.gradients.keys():
        name = min(expected.gradients.keys() ^ found.gradients.keys())
        return f"{name} gets {'a' if name in found.gradients else 'no'} gradient"
    for a, b in zip(pytree.tree_leaves(expected.result), pytree.tree_leaves(found.result), strict=True):
        if type(a) is not type(b) or (is_plain(a) and a != b):
            return f"the result holds {b!r:.60}, not {a!r:.60}"
    for number, (a, b) in enumerate(zip(tensors_in(expected.result), tensors_in(found.result), strict=True)):
        if not are_alike(a, b):
            return f"output {number} is another"
    for name, buffer in expected.buffers.items():
        if name in found.buffers and not are_alike(buffer, found.buffers[name]):
            return f"buffer {name} is another afterwards"
    sizes = [float(gradient.abs().max()) for gradient in expected.gradients.values() if gradient.numel()]
    for name, gradient in expected.gradients.items():
        if not are_alike(gradient, found.gradients[name], max(sizes, default=0.0)):
            return f"the gradient of {name} is another"
    return ""


def describe_form(result: Any) -> str:
    """What a model gives, without the values."""
    return str(map_tensors(lambda tensor: f"Tensor{list(tensor.shape)}", result))[:200]


def are_alike(a: Tensor, b: Tensor, largest: float = 0.0) -> bool:
    """Whether two tensors are the same but for rounding, measured against their largest value, or ``largest``."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if not a.numel() or torch.equal(a, b):
        return True
    if not a.is_floating_point():
        return False
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    scale = max(float(a.detach().abs().nan_to_num().max()), largest)
    return torch.allclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True)
