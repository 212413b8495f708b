"""Contexts: what holds for the calls within it, as nodes: where it begins and where it ends.

Gradients that are off or on, and autocast. What a graph can't hold so is refused.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import fx
from torch._functorch import eager_transforms, vmap
from torch.fx.node import has_side_effect
from torch.utils import checkpoint

from fxprune.graph.places import is_users
from fxprune.graph.refusal import RefusalError
from fxprune.graph.watch import handles

GRAD_MODE = torch.no_grad.__enter__.__code__.co_filename
IS_GRAD_ENABLED = torch.is_grad_enabled  # another stands for it while anybody records
_open: ContextVar[tuple[Any, ...]] = ContextVar("open contexts", default=())  # those that a graph has entered


class Writer(Protocol):
    """What is used here of a recorder."""

    entered: dict[int, fx.Node]  # what leaving a context takes, by the id of the context
    autocast: bool  # what the model's Python is told
    asks_autocast: str  # where it asks

    def node(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """A new node."""


def write_grad_mode(writer: Writer, enabled: bool) -> None:
    """``torch._C._set_grad_enabled`` is called: by a context that begins, and sets a mode, or ends, and puts back one.

    What it puts back is what it met. While the model is recorded that may be another mode than when its graph runs.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename != GRAD_MODE or frame.f_back.f_code.co_filename == GRAD_MODE):
        frame = frame.f_back  # the outermost: ``no_grad`` itself uses ``set_grad_enabled``
    context = id(frame.f_locals.get("self")) if frame is not None else 0
    if frame is not None and frame.f_code.co_name == "__exit__" and context in writer.entered:
        writer.node("call_function", torch._C._set_grad_enabled, (writer.entered.pop(context),), {})
    else:
        before = writer.node("call_function", IS_GRAD_ENABLED, (), {})
        writer.entered.setdefault(context, before)
        writer.node("call_function", torch._C._set_grad_enabled, (enabled,), {})
    torch._C._set_grad_enabled(enabled)


@handles(torch.autocast, "__enter__")
def write_enter(writer: Writer, function: Any, context: Any) -> Any:
    """``with torch.autocast(...)`` begins."""
    options = (context.device, context.fast_dtype, context._enabled, context._cache_enabled)
    with torch._C.DisableTorchFunction():
        writer.entered[id(context)] = writer.node("call_function", enter_autocast, options, {})
        return function(context)


@handles(torch.autocast, "__exit__")
def write_exit(writer: Writer, function: Any, context: Any, *error: Any) -> Any:
    """``with torch.autocast(...)`` ends."""
    with torch._C.DisableTorchFunction():
        writer.node("call_function", leave, (writer.entered.pop(id(context)),), {})
        return function(context, *error)


def is_asked(writer: Writer, node: Any) -> bool:
    """Whether the user's Python asks for a mode of torch's, and has not set it itself by the call of ``node``."""
    caller: Any = sys._getframe(3)  # behind a handler, and what calls that
    return is_users(caller.f_code.co_filename) and all(before.target is not node for before in writer.entered.values())


@handles(torch, "is_autocast_enabled")
@handles(torch, "is_autocast_cpu_enabled")
def tell_autocast(writer: Writer, function: Any, *device: str) -> bool:
    """Python asks whether autocast is on. While a run is recorded it is off; ``follow_autocast`` tries both."""
    if not is_asked(writer, enter_autocast):
        return bool(function(*device))
    caller: Any = sys._getframe(2)
    writer.asks_autocast = f"{caller.f_code.co_filename}:{caller.f_lineno}"
    return writer.autocast


@handles(torch, "is_grad_enabled")
@handles(torch, "is_inference_mode_enabled")
def refuse_question(writer: Writer, function: Any) -> bool:
    """Python asks whether gradients are on, which is so in some runs only."""
    if is_asked(writer, IS_GRAD_ENABLED):
        raise RefusalError(f"Python there asks torch.{function.__name__}(), which differs from run to run")
    return bool(function())


@handles(torch, "manual_seed")
@handles(torch.random, "manual_seed")
@handles(torch, "set_rng_state")
def refuse_seed(writer: Writer, function: Any, seed: Any) -> Any:
    """The random numbers that torch draws next are chosen."""
    if not is_users(sys._getframe(2).f_code.co_filename):
        return function(seed)
    raise RefusalError(f"torch.{function.__name__} can't stand in a graph; what calls it stays plain Python")


def follow_autocast(graph: fx.Graph, record: Callable[[], Any], place: str) -> fx.Graph:
    """The graph that is right with autocast and without it.

    Args:
        graph: recorded where Python was told that autocast is off.
        record: records once more, where it is told that it is on.
        place: where Python asked.

    Returns:
        The second, if it does nothing else but switch autocast off.

    Raises:
        RefusalError: they do different things.
    """
    refusal = RefusalError(f"Python at {place} asks whether autocast is on, and does something else where it is")
    try:
        within: fx.Graph = record().graph
    except Exception as error:
        raise refusal from error
    bare = [
        [
            (node.op, node.name, node.target, str((node.args, node.kwargs)))
            for node in either.nodes
            if not (node.target is enter_autocast and not node.args[2])
            and not (node.target is leave and not node.args[0].args[2])
        ]
        for either in (graph, within)
    ]
    if bare[0] != bare[1]:
        raise refusal
    return within


@has_side_effect
def enter_autocast(device: str, dtype: torch.dtype, enabled: bool, cache: bool) -> torch.autocast:
    """Begin autocast; ``leave`` ends it."""
    context = torch.autocast(device, dtype, enabled, cache)
    context.__enter__()  # type: ignore[no-untyped-call]
    _open.set((*_open.get(), context))
    return context


@has_side_effect
def leave(context: torch.autocast) -> None:
    """End autocast."""
    _open.set(tuple(other for other in _open.get() if other is not context))
    context.__exit__(None, None, None)


ENTERS = (enter_autocast, torch._C._set_grad_enabled)  # graphs that call these run in ``end_contexts``


@contextmanager
def end_contexts() -> Iterator[None]:
    """What a graph has entered in here ends with this, should the graph fail before it leaves it."""
    before = _open.get()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        for context in reversed(_open.get()[len(before) :]):
            leave(context)


@handles(checkpoint, "_checkpoint_without_reentrant_generator_impl")
def refuse_checkpoint(writer: Writer, function: Any, *args: Any, **kwargs: Any) -> Any:
    """What is computed again in the backward pass can't stand in a graph."""
    raise RefusalError("a checkpoint can't stand in a graph; what calls it stays plain Python")


@handles(torch.autograd.graph.saved_tensors_hooks, "__enter__")
def refuse_hook(writer: Writer, *_: Any) -> Any:
    """What is done to tensors in the backward pass alone can't stand in a graph, and the check may not see it."""
    raise RefusalError("a hook of the backward pass can't stand in a graph; what sets it stays plain Python")


@handles(vmap, "vmap_increment_nesting")
@handles(eager_transforms, "grad_increment_nesting")
@handles(eager_transforms, "jvp_increment_nesting")
def refuse_transform(writer: Writer, *_: Any) -> Any:
    """What runs on tensors of torch.func's own can't stand in a graph."""
    raise RefusalError(
        "a transform of torch.func (vmap, grad, vjp, jvp) can't stand in a graph: write it with tensors that have the "
        "axis (torch.einsum, @), or in a module of its own"
    )


def refuse_backward(writer: Writer, *_: Any, **__: Any) -> Any:
    """A graph has no backward pass within."""
    raise RefusalError("a backward pass within forward can't stand in a graph; what runs it stays plain Python")


@handles(torch.autograd.Function, "apply")
def write_function(recorder: Any, function: Any, kind: Any, *args: Any) -> Any:
    """A function with a backward of its own is one node: what its forward calls is not recorded."""
    if kind is checkpoint.CheckpointFunction:
        refuse_checkpoint(recorder, function)
    with torch._C.DisableTorchFunction():
        with recorder.fake:
            result = function(kind, *recorder.fake_all(args))
        return recorder.bind(result, recorder.node("call_function", Apply(kind), args, {}))


class Apply:
    """``apply`` of a ``torch.autograd.Function``, with the name of its class."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.__name__, self.__module__ = kind.__name__, kind.__module__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Apply) and other.kind is self.kind

    def __hash__(self) -> int:
        return hash(self.kind)

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        return self.kind.apply(*args)


@handles(torch.jit.ScriptFunction, "__call__")
def call_script(recorder: Any, function: Any, script: Any, *args: Any, **kwargs: Any) -> Any:
    """A scripted function is what it was made from."""
    source = getattr(script, "_torchdynamo_inline", None)
    if source is None:
        raise RefusalError(f"{script.name} is TorchScript without its Python; give the function that it was made from")
    return source(*args, **kwargs)
