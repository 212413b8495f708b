"""Check: a graph is compared with the user's own model, on the example, in both modes: outputs and gradients.

The backward pass costs more than all else here, so it is not run where it need not be: autograd has written down its
steps during the forward pass, and where those of the graph are those of the model, so are the gradients.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils import _pytree as pytree

from fxprune.errors import TraceError
from fxprune.graph.batch import batch_of
from fxprune.graph.inputs import Bound, map_tensors, tensors_in
from fxprune.graph.keep import attributes_kept, tensors_kept
from fxprune.graph.places import describe_error_place
from fxprune.graph.refusal import DoesNotRunError, OtherPathError
from fxprune.graph.traced import Mode, is_plain


@dataclass(frozen=True)
class Outcome:
    """What comes of a run of a model."""

    result: Any
    backward: Any  # what was asked of its backward pass: see steps_of, gradients_of
    buffers: dict[str, Tensor]  # afterwards


Look = Callable[[nn.Module, Any], Any]

SMALL = 64  # pixels along each side
FEW = 2  # samples
OTHER_STEPS = "its backward pass is another"


def check_graph(copy: Callable[[], nn.Module], graph: nn.Module, inputs: Mapping[Mode, Bound]) -> None:
    """Compare a graph with the model that it was made of. Both keep their tensors, modes and random numbers.

    In eval mode outputs and the steps of the backward pass are compared, on the first two samples of the example, or
    on all where the model takes no fewer. In train mode outputs and gradients, on smaller images cut from these
    samples; where the model or its graph does not take those, what is compared in eval mode. Where the steps differ,
    or one of them is a function of Python, the gradients themselves are compared.

    Args:
        copy: makes a copy of the model that shares its tensors with ``graph``.
        graph: a traced model.
        inputs: what to run each mode on.

    Raises:
        TraceError: they differ; says where and by how much.
        DoesNotRunError: the model fails on the example.
    """
    for mode in Mode:
        few = cut_samples(inputs[mode])
        if mode.training and agree_on_crops(copy, graph, few):
            continue
        try:
            difference = compare_in_mode(copy, graph, few, mode)
        except (DoesNotRunError, OtherPathError):
            difference = compare_in_mode(copy, graph, inputs[mode], mode)
        if difference:
            raise TraceError(
                f"the graph of {type(copy()).__name__} does not give what the model gives: in {mode.value} mode "
                f"{difference}. Please report this model."
            )


def cut_samples(inputs: Bound) -> Bound:
    """The first samples of a batch."""
    batch = batch_of(inputs)
    few: Bound = map_tensors(lambda tensor: tensor[:FEW] if tensor.ndim and len(tensor) == batch else tensor, inputs)
    return few


def agree_on_crops(copy: Callable[[], nn.Module], graph: nn.Module, inputs: Bound) -> bool:
    """Whether graph and model agree in train mode on images cut from ``inputs``. False too where none are to be had."""

    def crop(tensor: Tensor) -> Tensor:
        image = tensor.ndim > 3 and tensor.is_floating_point()
        return tensor[(slice(None), slice(None), *[slice(SMALL)] * (tensor.ndim - 2))] if image else tensor

    less: Bound = map_tensors(crop, inputs)
    if [tensor.shape for tensor in tensors_in(less)] == [tensor.shape for tensor in tensors_in(inputs)]:
        return False
    try:
        return not compare_runs(copy, graph, less, Mode.TRAIN, gradients_of)
    except TraceError:
        return False


def compare_in_mode(copy: Callable[[], nn.Module], graph: nn.Module, inputs: Bound, mode: Mode) -> str:
    """In words how a graph differs from its model in one mode; "" where it does not.

    Raises:
        TraceError: one of them does not run.
    """
    difference = compare_runs(copy, graph, inputs, mode, steps_of)
    return compare_runs(copy, graph, inputs, mode, gradients_of) if difference == OTHER_STEPS else difference


def compare_runs(copy: Callable[[], nn.Module], graph: nn.Module, inputs: Bound, mode: Mode, look: Look) -> str:
    """In words how a run of a graph differs from one of its model; "" where it does not.

    Args:
        copy: see ``check_graph``.
        graph: the graph.
        inputs: what to run them on.
        mode: in which mode.
        look: what is asked of the backward pass.

    Raises:
        TraceError: one of them does not run.
    """
    model = copy()
    name = type(model).__name__
    try:
        with attributes_kept(model, copied=True), tensors_kept(model):
            expected = run_once(model, inputs, mode, look)
    except Exception as error:
        said = f"{describe_error_place(model, error)}: {type(error).__name__}: {error}"
        raise DoesNotRunError(f"{name} does not run on example_inputs: {said}") from error
    try:
        with tensors_kept(graph):
            found = run_once(graph, inputs, mode, look)
    except OtherPathError:
        raise
    except Exception as error:
        raise TraceError(f"the graph of {name} does not run: {type(error).__name__}: {error}") from error
    return find_difference(expected, found)


def run_once(model: nn.Module, inputs: Bound, mode: Mode, look: Look) -> Outcome:
    """One run of ``model``."""
    torch.manual_seed(0)
    modes = [(module, module.training) for module in model.modules()]
    model.train(mode.training)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            args, kwargs = map_tensors(lambda tensor: tensor.detach().clone(), inputs)
            result = model(*args, **kwargs)
            buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
            return Outcome(result, look(model, result), buffers)
    finally:
        for module, training in modes:
            module.training = training


def steps_of(model: nn.Module, result: Any) -> Any:
    """The steps of the backward pass from ``result`` to the parameters, each with those that come next.

    They are numbered in the order in which they are met, so the same steps are written alike. None where one is a
    function of Python: its name does not say all that it does.
    """
    steps: list[Any] = []  # it grows while it is read
    numbers: dict[Any, int] = {None: -1}

    def number_of(step: Any) -> int:
        if step not in numbers:
            numbers[step] = len(steps)
            steps.append(step)
        return numbers[step]

    tensors = [tensor for tensor in tensors_in(result) if tensor.requires_grad]
    written: list[Any] = [
        (number_of(tensor.grad_fn), tensor.output_nr, tensor.is_leaf and id(tensor)) for tensor in tensors
    ]
    for step in steps:
        if isinstance(step, BackwardCFunction):
            return None
        parameter = id(getattr(step, "variable", None))
        written.append((step.name(), parameter, [(number_of(after), place) for after, place in step.next_functions]))
    return written


def gradients_of(model: nn.Module, result: Any) -> dict[str, Tensor]:
    """The gradients of a sum of outputs, weighted always alike, by the names of the parameters."""
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
    difference = compare_results(expected.result, found.result)
    if difference:
        return difference
    for name, buffer in expected.buffers.items():
        if name in found.buffers and not are_alike(buffer, found.buffers[name]):
            return f"buffer {name} is another afterwards"
    if isinstance(expected.backward, dict):
        return compare_gradients(expected.backward, found.backward)
    return OTHER_STEPS if expected.backward is None or expected.backward != found.backward else ""


def compare_results(expected: Any, found: Any) -> str:
    """In words how two results differ; "" where they do not."""
    if pytree.tree_structure(expected) != pytree.tree_structure(found):
        return f"the result is {describe_form(found)}, not {describe_form(expected)}"
    for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True):
        if type(a) is not type(b) or (is_plain(a) and a != b):
            return f"the result holds {b!r:.60}, not {a!r:.60}"
    for number, (a, b) in enumerate(zip(tensors_in(expected), tensors_in(found), strict=True)):
        if not are_alike(a, b):
            return f"output {number} is another"
    return ""


def compare_gradients(expected: dict[str, Tensor], found: dict[str, Tensor]) -> str:
    """In words how gradients differ; "" where they do not."""
    if expected.keys() != found.keys():
        name = min(expected.keys() ^ found.keys())
        return f"{name} gets {'a' if name in found else 'no'} gradient"
    largest = max((float(gradient.abs().max()) for gradient in expected.values() if gradient.numel()), default=0.0)
    for name, gradient in expected.items():
        if not are_alike(gradient, found[name], largest):
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
