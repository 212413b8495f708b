"""Signature: what a recorded model is given and gives back, in the form that the model's own forward has."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from operator import getitem
from typing import Any, Protocol

from torch import Tensor, fx
from torch.fx.node import has_side_effect

from fxprune.errors import TraceError
from fxprune.graph.inputs import Bound, map_tensors
from fxprune.graph.numbers import Number
from fxprune.graph.traced import is_plain


class Writer(Protocol):
    """What is used here of a recorder."""

    graph: fx.Graph

    def bind_argument(self, tensor: Tensor, node: fx.Node) -> Tensor:
        """A fake tensor for one that the model is given."""

    def arg(self, value: Any) -> Any:
        """A value as a graph has it."""


def write_arguments(writer: Writer, forward: Callable[..., Any], inputs: Bound) -> Bound:
    """Write a placeholder for each argument of ``forward``. Returns what to call it with.

    An argument that is no tensor must have the same value whenever the graph runs: Python may have looked at it.

    Raises:
        TypeError: the inputs do not fit the signature.
        TraceError: an argument is of a class that no graph can take.
    """
    signature = inspect.signature(forward)
    given = signature.bind(*inputs[0], **inputs[1])
    placed: dict[str, fx.Node] = {}
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    for name, parameter in signature.parameters.items():
        star = stars.get(parameter.kind, "")  # type: ignore[call-overload]
        default = parameter.default
        if not star and name not in given.arguments and not is_plain(default):
            continue  # nobody can give it to the graph
        values = () if star or not is_plain(default) else (default,)
        placed[name] = writer.graph.create_node("placeholder", star + name, values, name=name)
    for name, node in placed.items():
        missing = {"*": (), "**": {}}.get(str(node.target).removesuffix(name), signature.parameters[name].default)
        value = given.arguments.get(name, missing)
        pattern = pattern_of(value, name)
        if pattern is not ... or node.args:  # who leaves it out gives its default
            writer.graph.call_function(check_argument, (node, pattern, name))
        if name in given.arguments and value is not signature.parameters[name].default:  # that may be written into
            given.arguments[name] = write_parts(writer, value, node)
    rest: Mapping[str, Any] = given.kwargs | given.arguments  # as it was called: what wraps forward may add defaults
    return given.args[: len(inputs[0])], {name: rest[name] for name in inputs[1]}


def pattern_of(value: Any, name: str) -> Any:
    """``value`` with ... in place of tensors."""
    if isinstance(value, Tensor):
        return ...
    if type(value) in (tuple, list):
        return type(value)(pattern_of(item, name) for item in value)
    if isinstance(value, Mapping):
        return {key: pattern_of(item, name) for key, item in value.items()}
    if is_plain(value):
        return value
    raise TraceError(
        f"argument {name!r} is a {type(value).__name__}, which no graph can take; give tensors, numbers, text, and "
        "tuples, lists or dicts of these"
    )


def write_parts(writer: Writer, value: Any, node: fx.Node) -> Any:
    """``value``, which ``node`` gives, with fake tensors."""
    if isinstance(value, Tensor):
        return writer.bind_argument(value, node)
    if type(value) in (tuple, list):
        items = [write_parts(writer, item, part_of(writer, node, key)) for key, item in enumerate(value)]
        return type(value)(items)
    if isinstance(value, Mapping):
        pairs = [(key, write_parts(writer, item, part_of(writer, node, key))) for key, item in value.items()]
        return type(value)(pairs)  # type: ignore[call-arg]
    return value


def part_of(writer: Writer, node: fx.Node, key: Any) -> fx.Node:
    """A node for an item of what ``node`` gives."""
    return writer.graph.call_function(getitem, (node, key))


@has_side_effect
def check_argument(value: Any, pattern: Any, name: str) -> None:
    """Refuse an argument that is not what it was when the graph was made; ... stands for any tensor.

    Raises:
        TraceError: it has another value.
    """
    if isinstance(value, fx.Proxy):  # the graph is traced again: so will be the check
        value.tracer.create_proxy("call_function", check_argument, (value, pattern, name), {})
    elif not matches_pattern(value, pattern):
        raise TraceError(
            f"argument {name!r} is {show_argument(value)}, but the graph was made with {show_argument(pattern)}, and "
            "holds for that alone: trace the model with example_inputs that give this argument"
        )


def matches_pattern(value: Any, pattern: Any) -> bool:
    """Whether ``value`` has the form of ``pattern``."""
    if pattern is ...:
        return isinstance(value, Tensor)
    if pattern == {} and value == []:  # what an fx.Interpreter, as torch.export's, gives for no **options
        return True
    if isinstance(pattern, dict):
        same = isinstance(value, Mapping) and value.keys() == pattern.keys()
        return same and all(matches_pattern(value[key], pattern[key]) for key in pattern)
    if isinstance(pattern, (tuple, list)):
        same = isinstance(value, (tuple, list)) and len(value) == len(pattern)
        return same and all(map(matches_pattern, value, pattern))
    return type(value) is type(pattern) and bool(value == pattern)


def show_argument(value: Any) -> str:
    """An argument in a message."""
    form = map_tensors(lambda _: ..., value)
    return "a tensor" if form is ... else f"{form!r:.60}".replace("Ellipsis", "a tensor")


def write_result(writer: Writer, value: Any) -> Any:
    """What a model gives back, as the output of a graph. Objects are made anew whenever the graph runs.

    Raises:
        TraceError: it is of a class that no graph can make.
    """
    if type(value) is dict:
        return {key: write_result(writer, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [write_result(writer, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        made = {name: write_result(writer, getattr(value, name)) for name in fields}
        return writer.graph.call_function(type(value), (), made)
    if isinstance(value, Mapping):
        pairs = {key: write_result(writer, item) for key, item in value.items()}
        return writer.graph.call_function(type(value), (pairs,))
    if isinstance(value, (Tensor, Number)) or is_plain(value):
        return writer.arg(value)
    kind = type(value).__name__
    cure = " A decoder returns no cache when it is called with use_cache=False: give that in the example, as in "
    cure += '((), {"input_ids": ids, "use_cache": False})'
    raise TraceError(
        f"the model returns a {kind}, which no graph can make; return tensors, numbers, text, dataclasses, and tuples, "
        f"lists or dicts of these.{cure if kind.endswith('Cache') else ''}"
    )
