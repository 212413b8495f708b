"""Regions: a model that torch.fx can't follow becomes graphs, and the Python that steers them.

Where the root can't be traced, its largest parts that can are replaced by their graphs. Everything else stays what it
is: the model's own classes, their attributes and their Python, and the layers of torch.nn that this calls itself.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import TraceError
from fxprune.graph.capture import is_layer
from fxprune.graph.inputs import Bound, map_tensors, tensors_in, without_data
from fxprune.graph.keep import state_kept
from fxprune.graph.places import describe_error_place
from fxprune.graph.refusal import DoesNotRunError
from fxprune.graph.signature import pattern_of
from fxprune.graph.state import names_in
from fxprune.graph.traced import PLAIN, TracedModule, regions_of

Trace = Callable[[nn.Module, Bound], TracedModule]


def trace_regions(model: nn.Module, inputs: Bound, trace: Trace) -> nn.Module:
    """Replace the largest parts of ``model`` that can be traced by their graphs, in place.

    Args:
        model: a copy that may be changed, in eval mode.
        inputs: what to run it on, to see how its parts are called.
        trace: makes the graph of one part, given the arguments of a call.

    Raises:
        TraceError: the model does not run on the inputs, or its graphs do not give what it gave.
    """
    calls = Calls(model)
    try:
        expected = calls.record(inputs)
    except Exception as error:
        said = f"{describe_error_place(model, error)}: {type(error).__name__}: {error}"
        raise DoesNotRunError(f"{type(model).__name__} does not run on example_inputs: {said}") from error
    made: dict[int, TracedModule] = {}
    reasons: dict[str, str] = {}
    paths = {id(module): path for path, module in model.named_modules()}

    waiting = [model]
    for module in waiting:  # it grows
        for name, child in module._modules.items():
            if child is None or is_layer(child) or not child.state_dict():
                continue
            given = calls.arguments(child)
            if id(child) not in made and given is not None:
                try:
                    made[id(child)] = trace(child, given)
                except TraceError as error:
                    reasons[paths[id(child)]] = str(error)
            if id(child) in made:
                module._modules[name] = made[id(child)]
            else:
                waiting.append(child)

    vars(model).update(steers=True, meta={PLAIN: reasons})
    try:
        found = run_model(model, inputs)
    except Exception as error:
        raise TraceError(
            f"with its parts traced, {type(model).__name__} does not run on example_inputs: {type(error).__name__}: "
            f"{error}"
        ) from error
    if len(expected) != len(found) or not all(map(are_close, expected, found)):
        raise TraceError(f"the graphs of the parts of {type(model).__name__} do not give what the model gave")
    return model


def steered_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a traced model, by their paths, that stand in no region: plain Python calls them itself."""
    inside = {part for region in regions_of(model).values() for part in region.modules()}
    return {
        path: part
        for path, part in model.named_modules()
        if part not in inside and is_layer(part) and (part._parameters or part._buffers)
    }


@contextmanager
def replaced_forwards(new: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """While this holds, these functions stand in for the ``forward`` of their modules."""
    try:
        for module, forward in new.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module in new:
            vars(module).pop("forward", None)


def are_close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same but for rounding."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


def run_model(model: nn.Module, inputs: Bound) -> list[Tensor]:
    """What ``model`` returns for ``inputs``. What it writes is undone."""
    with state_kept(model), torch.enable_grad():
        return tensors_in(model(*inputs[0], **inputs[1]))


class Calls:
    """How a model's Python calls its modules, as one run shows it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.above: dict[nn.Module, list[nn.Module]] = {}  # the modules that a module is a part of
        for module in model.modules():
            for part in module.modules():
                self.above.setdefault(part, []).append(module)
        self.active: list[nn.Module] = []
        self.entered = set(parts_with_methods(model))  # modules of which a part was called from outside
        self.found: dict[nn.Module, list[Bound]] = {}  # without data

    def record(self, inputs: Bound) -> list[Tensor]:
        """Run the model; returns the tensors it gives."""
        handles = [module.register_forward_pre_hook(self.enter, with_kwargs=True) for module in self.above]
        handles += [module.register_forward_hook(self.leave, always_call=True) for module in self.above]
        try:
            return run_model(self.model, inputs)
        finally:
            for handle in handles:
                handle.remove()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a call."""
        if not is_layer(module):
            self.entered.update(set(self.above[module]) - {module, *self.active})
        self.active.append(module)
        self.found.setdefault(module, []).append(map_tensors(without_data, (args, kwargs)))

    def leave(self, module: nn.Module, args: Any, result: Any) -> None:
        """Note its end."""
        self.active.pop()

    def arguments(self, module: nn.Module) -> Bound | None:
        """What ``module`` was called with; None where calls differ in more than tensors, or no graph can take it."""
        calls = self.found.get(module, [])
        if not calls or module in self.entered:
            return None
        try:
            patterns = [pattern_of(list(call), type(module).__name__) for call in calls]
        except TraceError:
            return None
        return calls[0] if all(pattern == patterns[0] for pattern in patterns) else None


def parts_with_methods(model: nn.Module) -> Iterator[nn.Module]:
    """The parts of ``model`` with methods that its Python may call: a graph has none."""
    users = [module for module in model.modules() if not type(module).__module__.startswith("torch.")]
    functions = {kind: functions_of(kind) for kind in map(type, users)}
    said = {name for own in functions.values() for function in own.values() for name in names_in(function.__code__)}
    for module in users:
        if module is not model and said & {
            name for name in functions[type(module)] if name != "forward" and name[0] != "_"
        }:
            yield module


def functions_of(kind: type) -> dict[str, FunctionType]:
    """The methods that a class has and nn.Module has not, and its forward."""
    own = {name: getattr(kind, name) for name in dir(kind) if name == "forward" or not hasattr(nn.Module, name)}
    return {name: function for name, function in own.items() if isinstance(function, FunctionType)}
