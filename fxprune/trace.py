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
from collections.abc import Callable, Iterable, Mapping
from functools import cache, cached_property
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

from fxprune.attention import REPLACEMENTS
from fxprune.errors import TraceError, require
from fxprune.inputs import bind, tensors_in

TORCH = os.path.dirname(torch.__file__) + os.sep
OURS = os.path.dirname(__file__) + os.sep
TRACED_THROUGH = (nn.Unflatten, nn.ChannelShuffle)  # sizes of pruned axes stand in their attributes
KEPT = (StochasticDepth,)  # like dropout: what it does depends on the mode, but not on channels


class TracedModule(fx.GraphModule):
    """A ``GraphModule`` with one graph for each mode. ``.training`` decides which one runs, and is ``.graph``.

    Where both modes give the same graph there is only one. Deep-copies and pickles like any GraphModule.
    """

    def __init__(self, root: nn.Module, train_graph: fx.Graph, eval_graph: fx.Graph, *, compiled: bool = True) -> None:
        """Take over everything that ``root`` holds, except its class.

        Without ``compiled`` it can't be called before ``recompile``: for one whose graphs are still to be edited.
        """
        self.__dict__["_both"] = None
        self.__dict__["_observers"] = {}
        super().__init__(nn.Module(), fx.Graph())
        own = self.__dict__
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"):
            own[name] = root.__dict__[name]
        own.update({name: value for name, value in root.__dict__.items() if isinstance(value, Tensor)})
        self.meta.update(getattr(root, "meta", {}))
        self.set_graphs(train_graph, eval_graph, compiled=compiled)

    @property
    def graphs(self) -> dict[bool, fx.Graph]:
        """The graph of each mode, by the value of ``training``; the same object twice where the modes agree."""
        both: dict[bool, fx.Graph] = self.__dict__["_both"]
        return both

    def distinct_graphs(self) -> dict[bool, fx.Graph]:
        """The graphs without repetition: {False: eval} or {False: eval, True: train}."""
        return {
            mode: self.graphs[mode] for mode in (False, True) if not mode or self.graphs[True] is not self.graphs[False]
        }

    def set_graphs(self, train_graph: fx.Graph, eval_graph: fx.Graph, *, compiled: bool = True) -> None:
        """Replace both graphs and recompile."""
        self.__dict__["_both"] = {True: train_graph, False: eval_graph}
        for graph in (train_graph, eval_graph):
            graph.owning_module = self
        if compiled:
            self.recompile()

    @property
    def graph(self) -> fx.Graph:
        """The graph of the current mode."""
        if self.__dict__["_both"] is None:
            return super().graph
        return self.graphs[self.training]

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        if self.__dict__["_both"] is None:
            fx.GraphModule.graph.fset(self, graph)  # type: ignore[attr-defined]
            return
        train, evaluate = self.graphs[True], self.graphs[False]
        shared = train is evaluate
        self.set_graphs(
            graph if self.training or shared else train, evaluate if self.training and not shared else graph
        )

    def observe(self, observers: Mapping[str, Callable[[Tensor], None]]) -> None:
        """In train mode, call ``observers[name](value)`` when the node called ``name`` has its value.

        Only the code that runs has these calls. The graphs, copies, pickles and exports of this model do not.
        ``observers`` replace those before; {} takes them off.
        """
        self.__dict__["_observers"] = dict(observers)
        self.recompile()

    def recompile(self) -> Any:
        """Make ``forward`` anew from the graphs; one that looks at ``training`` where they differ."""
        if self.__dict__["_both"] is None:  # while it is being made
            return None
        cls = type(self)
        forwards, codes = {}, {}
        graphs = self.distinct_graphs()
        if observers := self.__dict__["_observers"]:
            graphs[True] = observed(self.graphs[True], observers)
        for mode, graph in graphs.items():
            self._graph = graph
            codes[mode] = super().recompile()
            forwards[mode] = cls.forward
        if True in forwards:
            cls.forward = by_mode(forwards[True], forwards[False])
        return codes[self.training if self.training in codes else False]

    def __deepcopy__(self, memo: dict[int, Any]) -> "TracedModule":
        root = copy.deepcopy(self.root(), memo)
        train, evaluate = self.graphs[True], self.graphs[False]
        new_train = copy_graph(train)
        new = TracedModule(root, new_train, new_train if evaluate is train else copy_graph(evaluate))
        memo[id(self)] = new
        return new

    def __reduce__(self) -> Any:
        """Plain GraphModules that share their submodules: torch knows how to pickle these."""
        root = self.root()
        graphs = self.distinct_graphs()
        return rebuild, (root, {mode: fx.GraphModule(root, copy_graph(graph)) for mode, graph in graphs.items()})

    def root(self) -> nn.Module:
        """A plain module with everything this one holds except its graphs."""
        root = nn.Module()
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"):
            root.__dict__[name] = self.__dict__[name]
        root.__dict__.update({name: value for name, value in self.__dict__.items() if isinstance(value, Tensor)})
        root.__dict__["meta"] = self.meta
        return root


def by_mode(train: Callable[..., Any], evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """A ``forward`` that is ``train`` or ``evaluate``, with the signature they share."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return train(self, *args, **kwargs) if self.training else evaluate(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(evaluate)  # type: ignore[attr-defined]
    return forward


def observed(graph: fx.Graph, observers: Mapping[str, Callable[[Tensor], None]]) -> fx.Graph:
    """A copy of ``graph`` that also calls ``observers`` with the values of the nodes that they are named after."""
    copied = copy_graph(graph)
    for node in [node for node in copied.nodes if node.name in observers]:
        with copied.inserting_after(node):
            copied.call_function(observers[node.name], (node,))
    return copied


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of ``graph`` with the same node names and its output."""
    return copy.deepcopy(graph)


def rebuild(root: nn.Module, modules: dict[bool, fx.GraphModule]) -> TracedModule:
    """Undo ``TracedModule.__reduce__``."""
    evaluate = modules[False].graph
    return TracedModule(root, modules[True].graph if True in modules else evaluate, evaluate)


def trace(model: nn.Module, example_inputs: Any = ()) -> TracedModule:
    """Trace ``model`` in train and in eval mode.

    Args:
        model: any module that ``torch.fx`` can trace symbolically, a GraphModule included. DistributedDataParallel and
            ``torch.compile`` wrappers are taken off. It is not changed.
        example_inputs: a tensor, a tuple of arguments, or (args, kwargs). They say which arguments are given; the
            others keep their defaults. Their values do not matter.

    Returns:
        A GraphModule with the state_dict keys, parameters and buffers of ``model`` (the same tensors, not copies), in
        the mode of ``model``.

    Raises:
        TraceError: the model's Python can't be traced; names the module, file and line.
    """
    require(model, nn.Module, "model", TraceError)
    model = unwrap(model)
    if isinstance(model, TracedModule):
        return model
    check_traceable(model)
    working = working_copy(model)
    concrete = unused_arguments(working, example_inputs)
    modes = [(module, module.training) for module in working.modules()]
    with Watch() as watch:
        evaluate = train = trace_mode(working, False, concrete)
        if watch.read or switches(module for module, _ in modes):
            train = trace_mode(working, True, concrete)
    for module, training in modes:
        if module.training != training:
            module.training = training
    if same(train, evaluate):
        train = evaluate
    called = {node.target for graph in (train, evaluate) for node in graph.nodes if node.op == "call_module"}
    return TracedModule(plain(working, called), train, evaluate)


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


def same(a: fx.Graph, b: fx.Graph) -> bool:
    """Whether two graphs do the same: node by node, with the same names."""
    return len(a.nodes) == len(b.nodes) and all(
        (m.op, m.name, m.target) == (n.op, n.name, n.target) and repr((m.args, m.kwargs)) == repr((n.args, n.kwargs))
        for m, n in zip(a.nodes, b.nodes, strict=True)
    )


def unwrap(model: nn.Module) -> nn.Module:
    """Take off DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


ATOMS = (type(None), bool, int, float, str)
EMPTY = (dict, OrderedDict, set, list)


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
        if type(value) in ATOMS or (type(value) is tuple and all(type(each) in ATOMS for each in value)):
            return value
        if type(value) in EMPTY and not value:
            return type(value)()
        # In a container, a tensor may have a history, which can't be copied.
        memo.update({id(tensor): memo.get(id(tensor), tensor) for tensor in tensors_in(value)})
        return copy.deepcopy(value, memo)

    for module in modules:
        memo[id(module)].__dict__ = {name: copied(name, value) for name, value in vars(module).items()}
    result: nn.Module = memo[id(root)]
    return result


def working_copy(model: nn.Module) -> nn.Module:
    """A copy that shares every tensor with ``model``, with opaque attention replaced."""
    working = copy_modules(model, {})
    replaced: dict[int, nn.Module] = {}
    for name, module in list(working.named_modules(remove_duplicate=False)):
        make = REPLACEMENTS.get(type(module))
        if make is None or not name:
            continue
        new = replaced.setdefault(id(module), make(module))
        working.set_submodule(name, new)
    return REPLACEMENTS[type(working)](working) if type(working) in REPLACEMENTS else working


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


def switches(modules: Iterable[nn.Module]) -> bool:
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
    args, kwargs = bind(example_inputs)
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
        self.inside: list[nn.Module] = []

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

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether ``m`` stays a module."""
        layer = super().is_leaf_module(m, module_qualified_name) and not isinstance(m, TRACED_THROUGH)
        return layer or isinstance(m, KEPT)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A node that knows the line of the user's model it comes from."""
        node = super().create_node(*args, **kwargs)
        frame = sys._getframe(1)
        while frame is not None and not is_users(frame.f_code.co_filename):
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None:
            node.stack_trace = stack_trace(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        return node

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Trace one module, which is left standing if it fails."""
        self.inside.append(m)
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()
        return result


def trace_mode(model: nn.Module, training: bool, concrete: dict[str, Any]) -> fx.Graph:
    """The graph of ``model`` in one mode."""
    model.train(training)
    try:
        graph = Tracer(follow_buffers=True).trace(model, concrete_args=concrete or None)
    except Exception:  # Python there may depend on the value of a buffer
        graph = trace_once(model, concrete)
    for node in list(graph.nodes):
        if isinstance(node.type, str):  # an annotation of postponed evaluation; torch 2.11 can't pickle it
            node.type = None
        if node.op == "call_function" and node.target is torch._assert and not node.users:
            graph.erase_node(node)
    return graph


def trace_once(model: nn.Module, concrete: dict[str, Any]) -> fx.Graph:
    """The graph of ``model`` with buffers taken as constants, or an error that says where it can't be traced."""
    tracer = Tracer(follow_buffers=False)
    try:
        return tracer.trace(model, concrete_args=concrete or None)
    except Exception as error:
        where = next(
            (frame for frame in reversed(traceback.extract_tb(error.__traceback__)) if is_users(frame.filename)), None
        )
        place = f", {where.filename}:{where.lineno}: `{where.line}`" if where else ""
        paths = {part: path for path, part in model.named_modules()}
        inner = tracer.inside[-1] if tracer.inside else model
        module = f"{paths[inner]} ({type(inner).__name__})" if inner is not model else type(model).__name__
        raise TraceError(
            f"torch.fx can't trace module {module} of {type(model).__name__}{place}: {type(error).__name__}: {error} "
            "Python there depends on the values of tensors. Trace a part of the model without it, or put that code "
            "into a function marked with torch.fx.wrap."
        ) from error


@cache
def stack_trace(file: str, line: int, function: str) -> str:
    """One frame of a stack trace, as Python writes it."""
    return f'  File "{file}", line {line}, in {function}\n    {linecache.getline(file, line).strip()}\n'


@cache
def is_users(filename: str) -> bool:
    """Whether a stack frame is the user's, and not torch's or ours."""
    return not filename.startswith((TORCH, OURS, "<"))


def plain(working: nn.Module, called: set[Any]) -> nn.Module:
    """The modules that graphs call, in a tree of plain modules that hold everything else under its own name."""
    paths = dict(working.named_modules(remove_duplicate=False))
    leaves = {id(paths[path]) for path in called}
    made: dict[int, nn.Module] = {}

    def convert(module: nn.Module) -> nn.Module:
        if id(module) in leaves:
            return module
        if id(module) in made:
            return made[id(module)]
        new = made[id(module)] = nn.Module()
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "training"):
            new.__dict__[name] = module.__dict__[name]
        new._modules = {name: None if child is None else convert(child) for name, child in module._modules.items()}
        new.__dict__.update({name: value for name, value in vars(module).items() if isinstance(value, Tensor)})
        return new

    return convert(working)
