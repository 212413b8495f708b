"""Guards: what Python found of sizes and dtypes, in comparisons say, while a model was recorded.

The graph is the path that was taken then. It holds where Python would find the same, and says so where it would not.
"""

import operator
from collections.abc import Callable
from typing import Any, Union

import torch
from torch import fx
from torch.fx.node import has_side_effect

from fxprune.graph.refusal import OtherPathError

Size = Union[int, float]  # noqa: UP007 - TorchScript reads it, and tells them apart
Found = Union[bool, int, float]  # noqa: UP007
RELATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "int": lambda size, _: int(size),
}


@has_side_effect
def check_size(a: Size, relation: str, b: Size, found: Found, place: str) -> None:
    """Refuse sizes of which Python would find something else than it found when the graph was made.

    Args:
        a: a size, or a number computed from sizes.
        relation: of ``RELATIONS``.
        b: what ``a`` is compared with.
        found: what was found.
        place: the line of the user's model.

    Raises:
        OtherPathError: something else is found.
    """
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        refuse_size(a, relation, b, found, place)


@has_side_effect
def check_dtype(dtype: Any, expected: Any, place: str) -> None:
    """Refuse another dtype than the graph was made with.

    Raises:
        OtherPathError: it is another.
    """
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        refuse_dtype(dtype, expected, place)


GUARDS = (check_size, check_dtype)


def refuse_size(a: Any, relation: str, b: Any, found: Any, place: str) -> None:
    """What ``check_size`` does outside TorchScript; an exporter, whose sizes are symbols, is left alone."""
    symbol = next((size for size in (a, b) if isinstance(size, fx.Proxy)), None)
    if symbol is not None:  # the graph is traced again: so will be the check
        symbol.tracer.create_proxy("call_function", check_size, (a, relation, b, found, place), {})
        return
    if torch.compiler.is_exporting() or not all(isinstance(size, (int, float)) for size in (a, b)):
        return
    now = RELATIONS[relation](a, b)
    if now == found:
        return
    known = found if relation == "int" else b
    plain = relation == "int" or (relation == "==" and found)
    said = f"needs the size {known}, and is given {a}" if plain else f"finds that {a} {relation} {b} is {now}"
    raise OtherPathError(
        f"{place}: the graph is what Python does there for the sizes it was made with, and it {said}: trace the model "
        "with example_inputs of such a size"
    )


def refuse_dtype(dtype: Any, expected: Any, place: str) -> None:
    """What ``check_dtype`` does outside TorchScript."""
    if isinstance(dtype, fx.Proxy):
        dtype.tracer.create_proxy("call_function", check_dtype, (dtype, expected, place), {})
    elif dtype != expected:
        raise OtherPathError(
            f"{place}: what Python does there depends on the dtype, which is {dtype}, but the graph was made in "
            f"{expected}, and holds for that alone: trace the model in {dtype}"
        )


def erase_guard(node: fx.Node) -> None:
    """Erase a guard, and the numbers that nothing else reads."""
    sources = node.all_input_nodes
    node.graph.erase_node(node)
    for source in sources:
        if source.users:
            continue
        if source.target in ("size", getattr):
            node.graph.erase_node(source)
        else:
            erase_guard(source)


def erase_guards(graph: fx.Graph) -> None:
    """Erase all guards: for a graph that is looked at for itself, and not in place of its model."""
    for node in [node for node in graph.nodes if node.target in GUARDS]:
        erase_guard(node)
