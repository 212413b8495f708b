"""Regions: a model that torch.fx can't follow becomes graphs, and the Python that steers them.

Where the root can't be traced, its largest parts that can are replaced by their graphs. Everything else stays what it
is: the model's own classes, their attributes and their Python, and the layers of torch.nn that this calls itself.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import TraceError
from fxprune.graph.inputs import Bound, tensors_in
from fxprune.graph.traced import ATOMS, TracedModule, regions_of

Trace = Callable[[nn.Module, dict[str, Any]], TracedModule]
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def trace_regions(model: nn.Module, inputs: Bound, trace: Trace) -> nn.Module:
    """Replace the largest parts of ``model`` that can be traced by their graphs, in place.

    Args:
        model: a copy that may be changed, in eval mode.
        inputs: what to run it on, to see how its parts are called.
        trace: makes the graph of one part, given the arguments that are constants.

    Raises:
        TraceError: the model does not run on the inputs, or its graphs do not give what it gave.
    """
    calls = Calls(model)
    expected = calls.record(inputs)
    made: dict[int, TracedModule] = {}

    waiting = [model]
    for module in waiting:  # it grows
        for name, child in module._modules.items():
            if child is None or is_layer(child) or not child.state_dict():
                continue
            constants = calls.constants(child)
            if id(child) not in made and constants is not None:
                with suppress(TraceError):
                    made[id(child)] = trace(child, constants)
            if id(child) in made:
                module._modules[name] = made[id(child)]
            else:
                waiting.append(child)

    vars(model).update(steers=True, meta={})
    found = run_model(model, inputs, "with its parts traced, ")
    if len(expected) != len(found) or not all(map(are_close, expected, found)):
        raise TraceError(f"the graphs of the parts of {type(model).__name__} do not give what the model gave")
    return model


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of torch.nn, which has no graph of its own."""
    return type(module).__module__.startswith("torch.nn") and not isinstance(module, CONTAINERS)


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


def run_model(model: nn.Module, inputs: Bound, what: str) -> list[Tensor]:
    """What ``model`` returns for ``inputs``."""
    try:
        with torch.random.fork_rng(), torch.no_grad():
            return tensors_in(model(*inputs[0], **inputs[1]))
    except Exception as error:
        raise TraceError(
            f"{what}{type(model).__name__} does not run on example_inputs: {type(error).__name__}: {error}"
        ) from error


class Calls:
    """How a model's Python calls its modules, as one run shows it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.above: dict[nn.Module, list[nn.Module]] = {}  # the modules that a module is a part of
        for module in model.modules():
            for part in module.modules():
                self.above.setdefault(part, []).append(module)
        self.active: list[nn.Module] = []
        self.entered: set[nn.Module] = set()  # modules of which a part was called from outside
        self.found: dict[nn.Module, list[dict[str, Any] | None]] = {}

    def record(self, inputs: Bound) -> list[Tensor]:
        """Run the model; returns the tensors it gives."""
        handles = [module.register_forward_pre_hook(self.enter, with_kwargs=True) for module in self.above]
        handles += [module.register_forward_hook(self.leave, always_call=True) for module in self.above]
        try:
            return run_model(self.model, inputs, "")
        finally:
            for handle in handles:
                handle.remove()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a call."""
        if not is_layer(module):
            self.entered.update(set(self.above[module]) - {module, *self.active})
        self.active.append(module)
        self.found.setdefault(module, []).append(constants_of(module, args, kwargs))

    def leave(self, module: nn.Module, args: Any, result: Any) -> None:
        """Note its end."""
        self.active.pop()

    def constants(self, module: nn.Module) -> dict[str, Any] | None:
        """The arguments of all calls of ``module`` that are no tensors; None where these differ, or no graph can be."""
        calls = self.found.get(module, [])
        if not calls or module in self.entered or any(call is None or call != calls[0] for call in calls):
            return None
        return calls[0]


def constants_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of one call that are no tensors, defaults included; None where a graph can't take the others."""
    signature = inspect.signature(module.forward)
    if any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in signature.parameters.values()):
        return None
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    rest = {name: value for name, value in bound.arguments.items() if not isinstance(value, Tensor)}
    return rest if all(type(value) in ATOMS for value in rest.values()) else None
