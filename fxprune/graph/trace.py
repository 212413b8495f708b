"""Trace: a model becomes a GraphModule that is right in train and in eval mode.

Layers of ``torch.nn`` stay modules, everything else becomes graph. The parameters and buffers are the model's own
objects under their own names; the modules are copies, so that nothing done to the traced model changes the original.
"""

import copy
import inspect
import linecache
import os
import sys
import traceback
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import cache, cached_property
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from fxprune.errors import TraceError, require_type
from fxprune.graph.attention import find_replacement
from fxprune.graph.inputs import bind_inputs, tensors_in
from fxprune.graph.regions import trace_regions
from fxprune.graph.traced import ATOMS, START, TracedModule, carried_attributes, is_traced
from fxprune.loaded import loaded_types

TORCH = os.path.dirname(torch.__file__) + os.sep
OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
TRACED_THROUGH = (nn.Unflatten, nn.ChannelShuffle)  # sizes of pruned axes stand in their attributes
NOT_NEEDED = (torch._assert, "mean")  # unless used: checks of sizes, and the attention weights' mean over the heads
KEPT = ("torchvision.ops.StochasticDepth",)  # like dropout: what it does depends on the mode, but not on channels


def trace(model: nn.Module, example_inputs: Any = ()) -> Any:
    """Trace ``model`` in train and in eval mode.

    Args:
        model: any module, a GraphModule included. DistributedDataParallel and ``torch.compile`` wrappers are taken off.
            It is not changed.
        example_inputs: a tensor, a tuple of arguments, or (args, kwargs). They say which arguments are given; the
            others keep their defaults. Their values matter only where ``torch.fx`` can't trace the model as a whole.

    Returns:
        A GraphModule with the state_dict keys, parameters and buffers of ``model`` (the same tensors, not copies), in
        the mode of ``model``. Where ``torch.fx`` can't trace the model as a whole, a copy of it, of its own class, in
        which the largest parts that can be traced are such GraphModules: its regions. The model is run on the example
        then, to see how its Python calls them.

    Raises:
        TraceError: the model's Python can't be traced; names the module, file and line.
    """
    require_type(model, nn.Module, "model", TraceError)
    model = unwrap_model(model)
    if is_traced(model):
        return model
    check_traceable(model)
    working = working_copy(model)
    constants = unused_arguments(working, example_inputs)
    try:
        traced: Any = trace_whole(working, constants)
    except TraceError as whole:
        inputs = bind_inputs(example_inputs)
        if not any(inputs):
            raise
        try:
            traced = trace_regions(working_copy(model).eval(), inputs, trace_whole).train(model.training)
        except TraceError as error:
            raise TraceError(f"{whole} Its parts could not be traced one by one either: {error}.") from whole
    if START in vars(model):
        traced.meta[START] = vars(model)[START]
    return traced


def trace_whole(working: nn.Module, constants: dict[str, Any]) -> TracedModule:
    """Trace ``working``, a copy that is used up, as one graph; ``constants`` are arguments that keep these values."""
    modes = [(module, module.training) for module in working.modules()]
    with Watch() as watch:
        evaluate = train = trace_mode(working, False, constants)
        if watch.read or switches_modes(module for module, _ in modes):
            train = trace_mode(working, True, constants)
    for module, training in modes:
        if module.training != training:
            module.training = training
    if same_graphs(train, evaluate):
        train = evaluate
    called = {node.target for graph in (train, evaluate) for node in graph.nodes if node.op == "call_module"}
    return TracedModule(plain_root(working, called), train, evaluate)


def check_traceable(model: nn.Module) -> None:
    """Refuse models that hide their Python, and layers that wait for their first input."""
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(f"{name} is TorchScript, which can't be traced again; give the model it was made from")
    for parameter, tensor in named_tensors(model).items():
        if nn.parameter.is_lazy(tensor):
            raise TraceError(f"{parameter} of {name} has no shape yet: call the model once, as its lazy layers need")


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters, and after them the buffers, of ``model``, each under all its names."""
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for kind, found in ((module._parameters, parameters), (module._buffers, buffers)):
            found.update((prefix + name, tensor) for name, tensor in kind.items() if tensor is not None)
    return parameters | buffers


def same_graphs(a: fx.Graph, b: fx.Graph) -> bool:
    """Whether two graphs do the same: node by node, with the same names."""
    return len(a.nodes) == len(b.nodes) and all(
        (m.op, m.name, m.target) == (n.op, n.name, n.target) and repr((m.args, m.kwargs)) == repr((n.args, n.kwargs))
        for m, n in zip(a.nodes, b.nodes, strict=True)
    )


def unwrap_model(model: nn.Module) -> nn.Module:
    """Take off DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


EMPTY = frozenset((dict, OrderedDict, set, list))


def copy_modules(root: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """A deep copy of a tree of modules that shares its tensors, or has those of ``tensors``, by the original's id.

    It is here because ``copy.deepcopy`` spends most of its time on the numbers and the empty hooks of every layer.
    """
    modules = list(root.modules())
    memo: dict[int, Any] = {**tensors}
    if any(hasattr(type(module), "__deepcopy__") for module in modules):
        memo = {id(tensor): tensor for tensor in tensors_in([vars(module) for module in modules])} | memo
        return copy.deepcopy(root, memo)
    memo |= {id(module): object.__new__(type(module)) for module in modules}

    def copied(name: str, value: Any) -> Any:
        if name in ("_parameters", "_buffers", "_modules"):
            return {key: memo.get(id(each), each) for key, each in value.items()}
        if type(value) is tuple and all(type(each) in ATOMS for each in value):
            return value
        # In a container, a tensor may have a history, which can't be copied.
        memo.update({id(tensor): memo.get(id(tensor), tensor) for tensor in tensors_in(value)})
        return copy.deepcopy(value, memo)

    for module in modules:
        own = memo[id(module)].__dict__ = vars(module).copy()
        for name, value in own.items():
            kind = type(value)
            if kind in ATOMS:
                continue
            own[name] = kind() if kind in EMPTY and not value else copied(name, value)
    result: nn.Module = memo[id(root)]
    return result


def working_copy(model: nn.Module) -> nn.Module:
    """A copy that shares every tensor with ``model``, with opaque attention replaced."""
    working = copy_modules(model, {})
    replaced: dict[int, nn.Module] = {}
    for name, module in list(working.named_modules(remove_duplicate=False)):
        make = find_replacement(module)
        if make is None or not name:
            continue
        new = replaced.setdefault(id(module), make(module))
        working.set_submodule(name, new)
    make = find_replacement(working)
    return make(working) if make else working


class Watch:
    """Stands in for ``training`` of all modules, and knows whether it was read: if not, both modes are one graph.

    fx traces without entering layers of torch.nn, so their reading it does not count.
    """

    read = False

    def __enter__(self) -> Self:
        nn.Module.training = self  # type: ignore[assignment]
        return self

    def __exit__(self, *error: object) -> None:
        del nn.Module.training

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        self.read = True
        if module is None or "training" not in module.__dict__:
            raise AttributeError("training")
        return module.__dict__["training"]

    def __set__(self, module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value


def switches_modes(modules: Iterable[nn.Module]) -> bool:
    """Whether a module does more than to set ``training`` when it is set to train or eval mode."""
    modules = list(modules)
    return any({"train", "eval"} & vars(module).keys() for module in modules) or any(
        its.train is not nn.Module.train
        or its.eval is not nn.Module.eval
        or any("training" in vars(base) for base in its.__mro__ if base is not nn.Module)
        for its in {type(module) for module in modules}
    )


def unused_arguments(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """The arguments of ``forward`` that the example leaves at their defaults; tracing takes these as constants."""
    signature = inspect.signature(model.forward)
    args, kwargs = bind_inputs(example_inputs)
    if not args and not kwargs:
        return {}
    try:
        given = signature.bind_partial(*args, **kwargs).arguments
    except TypeError as error:
        raise TraceError(
            f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}. Give a tensor, a tuple of "
            "arguments, or (args, kwargs)."
        ) from error
    return {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name not in given and parameter.default is not inspect.Parameter.empty
    }


class Tracer(fx.Tracer):
    """Keeps the layers of ``torch.nn`` as modules, and remembers where in the model it is.

    ``follow_buffers``: what the model computes from its buffers alone becomes graph, not a constant that would miss a
    ``load_state_dict`` or ``to``.
    """

    def __init__(self, follow_buffers: bool = True) -> None:
        super().__init__(autowrap_functions=())
        self.proxy_buffer_attributes = follow_buffers
        self.inside: list[tuple[int, str]] = []  # the id and class of each module around the current line

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of ``root``. The tracer then forgets the model: closures of fx keep the tracer for a while."""
        try:
            return super().trace(root, concrete_args or None)
        finally:
            inside = self.inside
            vars(self).clear()
            self.inside = inside

    @cached_property
    def names(self) -> dict[int, str]:
        """The first name of each tensor that becomes a node, by its id."""
        buffers = self.root.named_buffers() if self.proxy_buffer_attributes else ()
        return {id(tensor): name for name, tensor in (*buffers, *self.root.named_parameters())}

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """A parameter or followed buffer is a node: fx does the same, but searches all of them each time."""
        name = self.names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def path_of_module(self, mod: nn.Module) -> str:
        """The path of a module. A slice of a Sequential has none, but its layers have."""
        try:
            return super().path_of_module(mod)
        except NameError:
            if self.is_leaf_module(mod, ""):
                raise
            return ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether ``m`` stays a module."""
        layer = super().is_leaf_module(m, module_qualified_name) and not isinstance(m, TRACED_THROUGH)
        return layer or isinstance(m, loaded_types(*KEPT))

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A node that knows the line of the user's model it comes from; beyond ``trace_mode`` are its callers."""
        node = super().create_node(*args, **kwargs)
        frame = sys._getframe(1)
        while frame is not None and frame.f_code not in STARTS and not is_users(frame.f_code.co_filename):
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None and frame.f_code not in STARTS:
            node.stack_trace = stack_trace(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        return node

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Trace one module, which is left standing if it fails."""
        self.inside.append((id(m), type(m).__name__))
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()
        return result


def trace_mode(model: nn.Module, training: bool, concrete: dict[str, Any]) -> fx.Graph:
    """The graph of ``model`` in one mode."""
    model.train(training)
    try:
        graph = Tracer(follow_buffers=True).trace(model, concrete)
    except Exception:  # Python there may depend on the value of a buffer
        graph = trace_once(model, concrete)
    for node in list(graph.nodes):
        if isinstance(node.type, str):  # an annotation of postponed evaluation; torch 2.11 can't pickle it
            node.type = None
        if node.target in NOT_NEEDED and not node.users:
            graph.erase_node(node)
    return graph


def trace_once(model: nn.Module, concrete: dict[str, Any]) -> fx.Graph:
    """The graph of ``model`` with buffers taken as constants, or an error that says where it can't be traced."""
    tracer = Tracer(follow_buffers=False)
    try:
        return tracer.trace(model, concrete)
    except Exception as error:
        where = next(
            (frame for frame in reversed(traceback.extract_tb(error.__traceback__)) if is_users(frame.filename)), None
        )
        place = f", {where.filename}:{where.lineno}: `{where.line}`" if where else ""
        module = type(model).__name__
        if tracer.inside:
            paths = {id(part): path for path, part in model.named_modules()}
            inner, kind = tracer.inside[-1]
            module = f"{paths.get(inner, '')} ({kind})"
        raise TraceError(
            f"torch.fx can't trace module {module} of {type(model).__name__}{place}: {type(error).__name__}: {error} "
            "Python there depends on the values of tensors. With example_inputs, its parts are traced one by one; "
            "or put that code into a function marked with torch.fx.wrap."
        ) from error


STARTS = (trace_mode.__code__, trace_once.__code__)


@cache
def stack_trace(file: str, line: int, function: str) -> str:
    """One frame of a stack trace, as Python writes it."""
    return f'  File "{file}", line {line}, in {function}\n    {linecache.getline(file, line).strip()}\n'


@cache
def is_users(filename: str) -> bool:
    """Whether a stack frame is the user's, and not torch's or ours."""
    return not filename.startswith((TORCH, OURS, "<"))


def plain_root(working: nn.Module, called: set[Any]) -> nn.Module:
    """The modules that graphs call, in a tree of plain modules that hold everything else under its own name."""
    paths = dict(working.named_modules(remove_duplicate=False))
    made = {id(paths[path]): paths[path] for path in called}
    return bare_module(working, made)


def bare_module(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """A plain module for ``module`` and for each below it, unless ``made`` has one by the id."""
    if id(module) in made:
        return made[id(module)]
    new = made[id(module)] = nn.Module()
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "training"):
        new.__dict__[name] = module.__dict__[name]
    new._modules = {
        name: None if child is None else bare_module(child, made) for name, child in module._modules.items()
    }
    new.__dict__.update(carried_attributes(module))
    return new
