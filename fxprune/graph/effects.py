"""Effects: what a model's Python leaves behind beside its result. A graph writes into buffers; all else is refused.

What is written anew in each run, a size say, is none, and no more is a cache of what does not depend on the inputs.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
from torch import Tensor, fx, nn

from fxprune.graph.inputs import tensors_in
from fxprune.graph.numbers import Number
from fxprune.graph.refusal import RefusalError
from fxprune.graph.traced import ATOMS

CAPTURES = "transformers.utils.output_capturing"  # its hooks give nothing, but the model returns what they saw
TORCHS = frozenset(vars(nn.Module()))  # the attributes that torch itself keeps in a module
Modules = Mapping[str, nn.Module]  # by their paths
Attributes = Mapping[tuple[str, str], Any]  # by the path of a module, and the name of the attribute


class Writer(Protocol):
    """What is used here of a recorder."""

    nodes: dict[int, fx.Node]
    fakes: dict[int, Any]

    def node(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """A new node."""


def buffers_of(modules: Modules) -> dict[str, Tensor | None]:
    """The buffers of modules by their names."""
    return {
        f"{path}.{name}".removeprefix("."): buffer
        for path, module in modules.items()
        for name, buffer in module._buffers.items()
    }


def write_buffers(writer: Writer, before: Mapping[str, Tensor | None], after: Mapping[str, Tensor | None]) -> None:
    """Where the model's Python put another tensor for a buffer, the graph copies that into the buffer."""
    for name, buffer in after.items():
        old = before.get(name)
        if buffer is old or (old is not None and buffer is writer.fakes.get(id(old))):
            continue
        if buffer is None or old is None or (buffer.shape, buffer.dtype) != (old.shape, old.dtype):
            raise RefusalError(f"buffer {name} becomes {buffer}; a graph can only write into it: keep shape and dtype")
        writer.node("call_method", "copy_", (old, buffer), {})


def attributes_of(modules: Modules) -> Attributes:
    """What modules keep in their attributes, beside what torch keeps there."""
    return {
        (path, name): keep_value(value)
        for path, module in modules.items()
        for name, value in vars(module).items()
        if name not in TORCHS
    }


def keep_value(value: Any) -> Any:
    """``value``, or a copy of it that does not change with it; of an object, its attributes."""
    if type(value) in (list, tuple, set):
        return type(value)(map(keep_value, value))
    if isinstance(value, dict):
        return {key: keep_value(item) for key, item in value.items()}
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return str(value.get_state(legacy=False))
    return dict(vars(value)) if is_record(value) else value


def is_record(value: Any) -> bool:
    """Whether a value is an object that holds something in its attributes, a config or a counter say."""
    return hasattr(value, "__dict__") and not (isinstance(value, (Tensor, nn.Module, type)) or callable(value))


def refuse_kept_tensors(writer: Writer, before: Attributes, after: Attributes) -> None:
    """Refuse tensors, made of those that the model is given, that its Python keeps in an attribute.

    Raises:
        RefusalError: names the attribute.
    """
    for (path, name), value in after.items():
        if type(value) in ATOMS:
            continue
        known = {id(tensor) for tensor in tensors_in(before.get((path, name)))}
        for tensor in tensors_in(value):
            node = writer.nodes.get(id(tensor))
            if id(tensor) not in known and node is not None and is_made_of_inputs(node):
                raise RefusalError(
                    f"{describe_attribute(path, name)} keeps a tensor of shape {list(tensor.shape)}, which a graph "
                    "would not: return it, or copy it into a buffer"
                )


def is_made_of_inputs(node: fx.Node) -> bool:
    """Whether the values that ``node`` gives come from an argument of the model; its sizes do not count."""
    waiting, seen = [node], {node}
    for behind in waiting:  # it grows
        if behind.op == "placeholder":
            return True
        if behind.target not in ("size", getattr):
            waiting += [source for source in behind.all_input_nodes if source not in seen]
            seen.update(behind.all_input_nodes)
    return False


def iterators_in(modules: Modules) -> list[tuple[str, str]]:
    """The attributes of modules that give another item whenever they are asked."""
    return [
        (path, name)
        for path, module in modules.items()
        for name, value in vars(module).items()
        if name not in TORCHS and isinstance(value, Iterator)
    ]


def changed_values(before: Attributes, after: Attributes) -> list[tuple[str, str]]:
    """The attributes that a run has changed: plain values, in containers too, that are no sizes of this run."""
    return [key for key, value in after.items() if has_changed(before.get(key), value)]


def has_changed(before: Any, after: Any) -> bool:
    """Whether plain values differ; of other objects nothing is known."""
    if isinstance(after, (list, tuple)) and isinstance(before, (list, tuple)) and len(before) == len(after):
        return any(map(has_changed, before, after))
    if isinstance(after, dict) and isinstance(before, dict):
        return before.keys() != after.keys() or any(has_changed(before[key], item) for key, item in after.items())
    plain = isinstance(after, (type(None), bool, int, float, str, list, tuple, dict, set))
    return plain and not isinstance(after, Number) and not (type(before) is type(after) and before == after)


def describe_attribute(path: str, name: str) -> str:
    """An attribute in a message."""
    return f"attribute {name!r} of {f'module {path}' if path else 'the model'}"


@contextmanager
def watch_hooks(modules: Modules) -> Iterator[None]:
    """While this holds, hooks of modules that are no layers, which a graph would lose, are refused.

    What they give back is recorded; one that gives nothing is there for its effects.

    Raises:
        RefusalError: names the hook and its module.
    """
    hooks: list[tuple[Any, Any, Any]] = []
    for path, module in modules.items():
        place = f"module {path}" if path else "the model"
        if module._backward_hooks or module._backward_pre_hooks:
            raise RefusalError(f"{place} has a backward hook, which a graph would lose: put it on a layer of torch.nn")
        for kind in (module._forward_hooks, module._forward_pre_hooks):
            watched = {key: hook for key, hook in kind.items() if getattr(hook, "__module__", "") != CAPTURES}
            hooks += [(kind, key, hook) for key, hook in watched.items()]
            kind.update({key: partial(call_hook, place, hook) for key, hook in watched.items()})
    try:
        yield
    finally:
        for kind, key, hook in hooks:
            kind[key] = hook


def call_hook(place: str, hook: Callable[..., Any], *args: Any) -> Any:
    """Call a hook, which must give something."""
    result = hook(*args)
    if result is None:
        name = getattr(hook, "__qualname__", type(hook).__name__)
        raise RefusalError(
            f"hook {name} of {place} gives nothing back: what it is there for, a graph would lose. Remove it before "
            "(handle.remove()), or put it on a layer of torch.nn"
        )
    return result
