"""Effects: what a model's Python leaves behind beside its result. A graph writes into buffers; all else is refused.

What is written anew in each run, a size say, is none, and no more is a cache of what does not depend on the inputs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from torch import Tensor, fx

from fxprune.graph.refusal import RefusalError
from fxprune.graph.state import Key, Modules, Picture, describe_key
from fxprune.graph.traced import ATOMS

CAPTURES = "transformers.utils.output_capturing"  # its hooks give nothing, but the model returns what they saw


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


def refuse_kept_tensors(writer: Writer, before: Picture, after: Picture) -> None:
    """Refuse tensors, made of those that the model is given, that its Python keeps in an attribute or variable.

    Raises:
        RefusalError: names it.
    """
    for key, tensors in after.tensors.items():
        known = set(map(id, before.tensors.get(key, ())))
        for tensor in tensors:
            node = writer.nodes.get(id(tensor))
            if id(tensor) not in known and node is not None and is_made_of_inputs(node):
                raise RefusalError(
                    f"{describe_key(key)} keeps a tensor of shape {list(tensor.shape)}, which a graph "
                    "would not: return it, or copy it into a buffer"
                )


def settings_of(modules: Modules, layers: Iterable[str]) -> dict[Key, Any]:
    """The plain values in the attributes of layers, but for their mode, which is recorded with each call."""
    return {
        (path, name): value
        for path in layers
        for name, value in vars(modules[path]).items()
        if type(value) in ATOMS and name != "training"
    }


def refuse_settings(before: Mapping[Key, Any], after: Mapping[Key, Any]) -> None:
    """Refuse what the model's Python has set in a layer of torch.nn, which a graph calls as it was.

    Raises:
        RefusalError: names the attribute.
    """
    for key, value in after.items():
        if key in before and before[key] != value:
            raise RefusalError(
                f"{describe_key(key)} becomes {value!r} in a run, where a graph keeps {before[key]!r}: set it outside "
                "of forward, or call a function of torch.nn.functional"
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
