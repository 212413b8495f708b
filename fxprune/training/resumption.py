"""Whether an optimizer can go on with the state of a file: tried on a copy, before anything is changed."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxprune.errors import FileError
from fxprune.graph.traced import Model
from fxprune.rewrite.param_map import ParamMap
from fxprune.rewrite.state_axes import copy_optimizer


def check_optimizer(optimizer: Optimizer, saved: Mapping[str, Any], compact: Model, param_map: ParamMap) -> None:
    """Raise FileError unless ``optimizer``, cut as ``param_map`` says, can take over the state ``saved``, and step.

    Args:
        optimizer: of the dense model; it is not changed.
        saved: what ``state_dict`` gave, and the name of the class.
        compact: what the dense model is cut to.
        param_map: how.

    Raises:
        FileError: it is of another optimizer, or damaged.
    """
    kind = type(optimizer).__name__
    if saved["kind"] != kind:
        raise FileError(f"the optimizer is {kind}, the file's {saved['kind']}")
    counts = [sum(not param_map.is_gone(p) for p in group["params"]) for group in optimizer.param_groups]
    saved_counts = [len(group["params"]) for group in saved["param_groups"]]
    if counts != saved_counts:
        raise FileError(f"the optimizer has {counts} parameters in its groups, the file {saved_counts}")
    held = [p for group in optimizer.param_groups for p in group["params"] if not param_map.is_gone(p)]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    state = saved["state"]
    if numbers != [*range(len(held))] or not all(type(at) is int and 0 <= at < len(held) for at in state):
        raise FileError("the optimizer's parameters are not numbered in order: the file is damaged")
    if not all(isinstance(values, dict) for values in state.values()):
        raise FileError("the optimizer's state in the file is damaged")
    for saved_group, group in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        check_settings(saved_group, group)
    names = {parameter: param_map.name_of(parameter) for parameter in held}
    parameters = {p: nn.Parameter(torch.zeros_like(compact.get_parameter(names[p])), p.requires_grad) for p in held}
    fresh = fresh_state(optimizer, parameters, saved["param_groups"])
    for at, values in state.items():
        check_parameter_state(names[held[at]], values, fresh.get(held[at], {}))


def check_settings(saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise FileError where a group of parameters has a setting of another kind than the optimizer's."""
    for name in (saved.keys() & settings.keys()) - {"params"}:
        if not is_alike(saved[name], settings[name]):
            raise FileError(
                f"the optimizer's setting {name!r} is {saved[name]!r:.60} in the file, where one as "
                f"{settings[name]!r:.60} should be"
            )


def is_alike(saved: object, current: object) -> bool:
    """Whether two settings are of one kind: numbers, tensors of one number, or tuples of them."""
    if isinstance(saved, (tuple, list)) and isinstance(current, (tuple, list)):
        return len(saved) == len(current) and all(map(is_alike, saved, current))
    if isinstance(saved, Tensor) and isinstance(current, (Tensor, float)):
        return saved.numel() == 1
    if isinstance(saved, bool) or isinstance(current, bool) or not isinstance(saved, (int, float)):
        return type(saved) is type(current) or saved is None or current is None
    return isinstance(current, (int, float, Tensor, type(None))) and math.isfinite(saved)


def fresh_state(
    optimizer: Optimizer, parameters: Mapping[nn.Parameter, nn.Parameter], groups: list[dict[str, Any]]
) -> dict[nn.Parameter, dict[str, Any]]:
    """The state that ``optimizer`` has after its first step of ``parameters`` with the settings of ``groups``.

    Found on copies. Nothing where it can't be tried, as it needs a closure or second derivatives.

    Raises:
        FileError: it could be, but for these settings.
    """
    try:
        step_copy(optimizer, parameters, None)
    except Exception:  # whatever it asks for
        return {}
    try:
        state = step_copy(optimizer, parameters, groups)
    except Exception as error:
        raise FileError(
            f"the optimizer can't step with the settings in the file: {type(error).__name__}: {error}"
        ) from error
    return {old: state[new] for old, new in parameters.items() if new in state}


def step_copy(
    optimizer: Optimizer, parameters: Mapping[nn.Parameter, nn.Parameter], groups: list[dict[str, Any]] | None
) -> dict[Any, dict[str, Any]]:
    """The state of a copy of ``optimizer`` after one step of ``parameters`` with gradients of zero."""
    twin = copy_optimizer(optimizer, parameters)
    if groups is not None:
        twin.load_state_dict({"state": {}, "param_groups": [group for group in groups if group["params"]]})
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    type(twin).step(twin)
    return twin.state


def check_parameter_state(name: str, saved: Mapping[str, Any], fresh: Mapping[str, Any]) -> None:
    """Raise FileError unless the state of the parameter ``name`` has what a fresh one has, in the same shapes."""
    for key, value in fresh.items() if saved else ():
        if key not in saved:
            raise FileError(f"the optimizer's state {key!r} of {name} is not in the file")
        saved_kind, kind = describe_value(saved[key]), describe_value(value)
        if saved_kind != kind and value is not None:
            raise FileError(f"the optimizer's state {key!r} of {name} is {saved_kind} in the file; it should be {kind}")


def describe_value(value: object) -> str:
    """The kind of a value; of a tensor its shape, and whether it holds fractions."""
    if isinstance(value, Tensor):
        return f"{'float' if value.is_floating_point() else str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return "a number" if isinstance(value, (int, float)) else type(value).__name__
