"""Sizes: integers in the attributes of a model's own modules, which remember where they stand while it is recorded."""

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from fxprune.graph.capture import is_layer, record_run
from fxprune.graph.guards import GUARDS
from fxprune.graph.inputs import Bound
from fxprune.graph.numbers import Int, cut_off, node_or_number
from fxprune.graph.places import write_place
from fxprune.graph.state import TORCHS
from fxprune.graph.trace import copy_modules, explain_error, names_of
from fxprune.graph.traced import Mode

SLOT = "size"  # in the meta of a node that gives one: its Slot


@dataclass(frozen=True)
class Slot:
    """Where an integer stands: the path of a module, an attribute of it, and keys or indices into what that holds."""

    path: str
    keys: tuple[str | int, ...]

    def __str__(self) -> str:
        within = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in self.keys)
        return f"{self.path}{within}".removeprefix(".")


class Size(Int):
    """An integer of an attribute. Where it is found to be equal to a number, a node of the graph says so."""

    def __eq__(self, other: object) -> bool:
        equal = bool(int(self) == other)
        if equal and isinstance(other, (int, float)):
            write_check(self, other)
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return int.__hash__(self)

    def __copy__(self) -> "Size":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Size":
        return self


def find_sizes(model: nn.Module, *, layers: bool = False) -> dict[Slot, int]:
    """The integers in attributes of ``model``'s own modules, in lists and objects there too; each object once.

    ``layers``: in those of layers of torch.nn too.
    """
    seen: set[int] = set()
    return {
        Slot(path, (name, *keys)): size
        for path, module in model.named_modules()
        if layers or not is_layer(module)
        for name, value in vars(module).items()
        if name not in TORCHS
        for keys, size in integers_in(value, seen)
    }


def integers_in(value: Any, seen: set[int]) -> Iterator[tuple[tuple[str | int, ...], int]]:
    """The integers in a value, with the keys that lead to them. ``seen``: ids of objects that were looked into."""
    if type(value) in (int, Int, Size):
        yield (), value
        return
    if type(value) not in (tuple, list, dict):
        if id(value) in seen or not is_record(value):
            return
        seen.add(id(value))
    for key, item in items_of(value):
        for keys, size in integers_in(item, seen):
            yield (key, *keys), size


def items_of(value: Any) -> Iterator[tuple[str | int, Any]]:
    """What a list, dictionary or object holds, with the keys: integers in a list, otherwise text."""
    if isinstance(value, (tuple, list)):
        yield from enumerate(value)
        return
    held = value if isinstance(value, dict) else vars(value)
    yield from ((key, item) for key, item in held.items() if isinstance(key, str))


def is_record(value: Any) -> bool:
    """Whether a value is an object that holds something in its attributes, a config say."""
    return hasattr(value, "__dict__") and not (isinstance(value, (Tensor, nn.Module, type)) or callable(value))


def put_sizes(model: nn.Module, sizes: Mapping[Slot, int]) -> None:
    """Set attributes, in place."""
    for slot, size in sizes.items():
        put_item(model.get_submodule(slot.path), slot.keys, size)


def put_item(value: Any, keys: tuple[str | int, ...], size: int) -> Any:
    """``value`` with ``size`` where ``keys`` lead: itself where it can be written into, else another."""
    if not keys:
        return size
    key, *rest = keys
    if isinstance(value, (tuple, list)):
        return type(value)(put_item(item, tuple(rest), size) if at == key else item for at, item in enumerate(value))
    held = value if isinstance(value, dict) else vars(value)
    held[key] = put_item(held[key], tuple(rest), size)
    return value


def record_sizes(model: nn.Module, sizes: Mapping[Slot, int], inputs: Bound, mode: Mode) -> fx.Graph:
    """The graph of ``model``, which is not changed, in one mode, with a node for each use of ``sizes``.

    Raises:
        TraceError: it can't be recorded.
    """
    working = copy_modules(model, {})

    def remember(graph: fx.Graph) -> None:
        put_sizes(working, {slot: remembered_size(graph, slot, size) for slot, size in sizes.items()})

    try:
        return record_run(working, names_of(model), {}, {}, inputs, mode, remember).graph
    except Exception as error:
        raise explain_error(working, error) from error


def remembered_size(graph: fx.Graph, slot: Slot, size: int) -> Size:
    """A size that has a node in ``graph``."""
    number = Size(size)
    number.graph, number.make = graph, partial(slot_node, graph, slot)
    return number


def slot_node(graph: fx.Graph, slot: Slot) -> fx.Node:
    """A node for an integer of an attribute."""
    node = graph.create_node("get_attr", str(slot))
    node.meta[SLOT] = slot
    return node


def write_check(size: Size, other: float) -> None:
    """The model's Python found two numbers equal."""
    node = size.graph.call_function(operator.eq, (size.node, node_or_number(other, size.graph)))
    write_place(node, record_run.__code__)


def gives_number(node: fx.Node) -> bool:
    """Whether a node computes a number from sizes, or compares such numbers."""
    if SLOT in node.meta or node.target in GUARDS or (node.op == "call_method" and node.target == "size"):
        return True
    computes = node.target is cut_off or getattr(node.target, "__module__", "") == "_operator"
    return computes and all(gives_number(arg) if isinstance(arg, fx.Node) else is_number(arg) for arg in node.args)


def is_number(value: Any) -> bool:
    """Whether a value is a number."""
    return isinstance(value, (int, float))
