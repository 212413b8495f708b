"""TracedModule: a GraphModule with a graph for each mode. A model is one, or has them for its parts: its regions."""

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from fxprune.errors import FxpruneError, TraceError, require_type
from fxprune.graph.contexts import ENTERS, end_contexts
from fxprune.graph.rows import Row, graph_of, rows_of

ATOMS = frozenset((type(None), bool, int, float, str))
START = "fxprune_start"  # what a model remembers of fxprune.initialize stands here
NEW = "_fxprune_new"  # the names of attributes that a traced model was given stand here
PLAIN = "fxprune_plain"  # why parts of a model stay plain Python stands here
ARGUMENTS = "fxprune_arguments"  # what plain Python was given in the example, by name
M = TypeVar("M", bound=nn.Module)
Model = Any  # a traced model: a TracedModule, or a module of the user's own class that has some in it


class Mode(Enum):
    """Which of a model's two graphs: a model that trains may do other things than one that evaluates."""

    EVAL = "eval"
    TRAIN = "train"

    @property
    def training(self) -> bool:
        """What ``nn.Module.training`` is in this mode."""
        return self is Mode.TRAIN

    @property
    def other(self) -> "Mode":
        """The mode that this one is not."""
        return Mode.EVAL if self.training else Mode.TRAIN

    @classmethod
    def of(cls, module: nn.Module) -> "Mode":
        """The mode that a module is in."""
        return cls.TRAIN if module.training else cls.EVAL


class OwnedGraph(fx.Graph):
    """A graph that does not keep its module alive, so that a network nobody uses frees its memory at once."""

    @property
    def owning_module(self) -> fx.GraphModule | None:
        """The module it belongs to; None once that is gone."""
        owner: weakref.ref[fx.GraphModule] | None = self.__dict__.get("_owner")
        return owner() if owner else None

    @owning_module.setter
    def owning_module(self, module: fx.GraphModule | None) -> None:
        self._owner = None if module is None else weakref.ref(module)


class Late:
    """``forward`` of a model until somebody asks for it: the code of a graph that is only looked at is never made."""

    def __init__(self, model: "TracedModule") -> None:
        self.model = weakref.ref(model)  # of a class of its own

    def __get__(self, model: "TracedModule | None", owner: type) -> Any:
        """Make it, whether the model is asked or its class: some libraries call ``type(model).forward(model, x)``."""
        made = model or self.model()
        assert made is not None
        made.recompile()
        return made.forward if model is not None else type(made).forward


class Fixed(nn.Module):
    """A module whose attributes are in a graph that does not look at them again."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, unless that would do nothing.

        Raises:
            TraceError: a graph holds the value that it has.
        """
        new = vars(self).setdefault(NEW, set())
        old = vars(self).get(name, ...)
        if old is ... and not name.startswith("_"):
            new.add(name)
        if name not in new and is_carried(name, old) and not (type(value) is type(old) and value == old):
            raise TraceError(
                f"{name!r} can't be set to {value!r:.60}: graphs hold what it was when they were made, {old!r:.60}. "
                "Set it on your own model and trace that, or delete it first (del) if nothing computes with it"
            )
        super().__setattr__(name, value)


class FixedSequential(Fixed, nn.Sequential):
    """One with attributes."""


class FixedModuleList(Fixed, nn.ModuleList):
    """One with attributes."""


class FixedModuleDict(Fixed, nn.ModuleDict):
    """One with attributes."""


class TracedModule(Fixed, fx.GraphModule):
    """A ``GraphModule`` with one graph for each mode. ``.training`` decides which one runs, and is ``.graph``.

    Where both modes give the same graph there is only one. Deep-copies and pickles like any GraphModule.
    """

    # torch.jit.script leaves them out.
    __jit_unused_properties__ = [*fx.GraphModule.__jit_unused_properties__, "graphs", "code"]  # noqa: RUF012

    def __init__(self, root: nn.Module, train_graph: fx.Graph, eval_graph: fx.Graph) -> None:
        """Take over everything that ``root`` holds, except its class."""
        self.__dict__["_both"] = None
        self.__dict__["_observers"] = {}
        super().__init__(nn.Module(), OwnedGraph())
        own = self.__dict__
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"):
            own[name] = root.__dict__[name]
        own.update(carried_attributes(root))
        self.meta.update(getattr(root, "meta", {}))
        self.set_graphs(train_graph, eval_graph)

    @property
    def graphs(self) -> dict[Mode, fx.Graph]:
        """The graph of each mode; the same object twice where the modes agree."""
        both: dict[Mode, fx.Graph] = self.__dict__["_both"]
        return both

    def distinct_graphs(self) -> dict[Mode, fx.Graph]:
        """The graphs without repetition: that of ``Mode.EVAL``, and that of ``Mode.TRAIN`` where it is another."""
        train, evaluate = self.graphs[Mode.TRAIN], self.graphs[Mode.EVAL]
        return {Mode.EVAL: evaluate} if train is evaluate else {Mode.EVAL: evaluate, Mode.TRAIN: train}

    def set_graphs(self, train_graph: fx.Graph, eval_graph: fx.Graph) -> None:
        """Replace both graphs."""
        self.__dict__["_both"] = {Mode.TRAIN: train_graph, Mode.EVAL: eval_graph}
        for graph in (train_graph, eval_graph):
            graph.__class__ = OwnedGraph
            graph._owning_module = None
            graph.owning_module = self
        self._graph = train_graph
        type(self).forward = Late(self)  # type: ignore[assignment]  # a descriptor that gives one

    @property
    def graph(self) -> fx.Graph:
        """The graph of the current mode."""
        if self.__dict__["_both"] is None:
            return super().graph
        return self.graphs[Mode.of(self)]

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        if self.__dict__["_both"] is None:
            fx.GraphModule.graph.fset(self, graph)  # type: ignore[attr-defined]
            return
        train, evaluate = self.graphs[Mode.TRAIN], self.graphs[Mode.EVAL]
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
            graphs[Mode.TRAIN] = observed_values(self.graphs[Mode.TRAIN], observers)
        for mode, graph in graphs.items():
            self._graph = graph
            codes[mode] = super().recompile()
            forwards[mode] = cls.forward
            if any(node.target in ENTERS for node in graph.nodes):
                forwards[mode] = cls.forward = end_contexts()(cls.forward)  # even if it fails
        if Mode.TRAIN in forwards:
            cls.forward = by_mode(forwards[Mode.TRAIN], forwards[Mode.EVAL])
        return codes.get(Mode.of(self), codes[Mode.EVAL])

    @property
    def code(self) -> str:
        """The Python code that runs."""
        self.forward  # noqa: B018 - makes it
        return super().code

    def __str__(self) -> str:
        self.forward  # noqa: B018 - makes the code that this shows
        return super().__str__()

    def __deepcopy__(self, memo: dict[int, Any]) -> "TracedModule":
        for tensor_id, tensor in tensors_without_history(self).items():
            memo.setdefault(tensor_id, tensor)
        root = copy.deepcopy(self.root(), memo)
        train, evaluate = self.graphs[Mode.TRAIN], self.graphs[Mode.EVAL]
        new_train = copy_graph(train)
        new = TracedModule(root, new_train, new_train if evaluate is train else copy_graph(evaluate))
        memo[id(self)] = new
        return new

    def __reduce__(self) -> Any:
        return rebuild_traced, (self.root(), {mode: rows_of(graph) for mode, graph in self.distinct_graphs().items()})

    def root(self) -> nn.Module:
        """A plain module with everything this one holds except its graphs."""
        root = nn.Module()
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"):
            root.__dict__[name] = self.__dict__[name]
        root.__dict__.update(carried_attributes(self))
        root.__dict__["meta"] = self.meta
        return root


def copy_model(model: M) -> M:
    """A deep copy of a module, traced or not, also after a training step."""
    return copy.deepcopy(model, dict(tensors_without_history(model)))


def tensors_without_history(model: nn.Module) -> dict[int, Tensor]:
    """Copies, by the id of the tensor, of weights that a hook computed with gradients, as old parametrizations do.

    torch refuses to copy these.
    """
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf}


def carried_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module keeps, of its attributes, when it becomes a graph: tensors that graphs use, and plain values."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, Tensor) or name == NEW or is_carried(name, value)
    }


def is_carried(name: str, value: Any) -> bool:
    """Whether an attribute of a module is the user's, and plain."""
    return not name.startswith("_") and not hasattr(fx.GraphModule, name) and name != "training" and is_plain(value)


def is_plain(value: Any) -> bool:
    """Whether a value is a number, text, or a tuple or list of these."""
    return type(value) in ATOMS or (type(value) in (tuple, list) and all(type(each) in ATOMS for each in value))


def hooks_of(parameter: Tensor) -> list[tuple[str, Callable[..., Any]]]:
    """The user's hooks on a parameter, each with the name of the method that registers it."""
    kinds = {
        "register_hook": parameter._backward_hooks,
        "register_post_accumulate_grad_hook": getattr(parameter, "_post_accumulate_grad_hooks", None),
    }
    hooks = [(register, hook) for register, own in kinds.items() for hook in (own or {}).values()]
    return [(register, hook) for register, hook in hooks if not getattr(hook, "__module__", "").startswith("fxprune.")]


def reasons_of(model: nn.Module) -> dict[str, str]:
    """Why parts of a traced model stay plain Python, by their paths; "" is the whole."""
    reasons: dict[str, str] = getattr(model, "meta", {}).get(PLAIN, {})
    return reasons


def by_mode(train: Callable[..., Any], evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """A ``forward`` that is ``train`` or ``evaluate``, with the signature they share.

    It is made of text, as that of every GraphModule: ``symbolic_trace`` counts the arguments in its code.
    """
    parameters = inspect.signature(evaluate).parameters.values()
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty, default=inspect.Parameter.empty)
        for parameter in parameters
    ]
    given = ", ".join(f"{own.name}={own.name}" if own.kind is own.KEYWORD_ONLY else str(own) for own in bare)
    scope: dict[str, Any] = {"train": train, "evaluate": evaluate}
    exec(f"def forward{inspect.Signature(bare)}: return (train if self.training else evaluate)({given})", scope)
    forward: Any = scope["forward"]
    inner = inspect.unwrap(evaluate)  # one that ends contexts hides them
    forward.__defaults__ = getattr(inner, "__defaults__", None)
    forward.__kwdefaults__ = getattr(inner, "__kwdefaults__", None)
    return forward  # type: ignore[no-any-return]


def observed_values(graph: fx.Graph, observers: Mapping[str, Callable[[Tensor], None]]) -> fx.Graph:
    """A copy of ``graph`` that also calls ``observers`` with the values of the nodes that they are named after."""
    copied = copy_graph(graph)
    for node in [node for node in copied.nodes if node.name in observers]:
        with copied.inserting_after(node):
            copied.call_function(observers[node.name], (node,))
    return copied


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of ``graph`` with the same node names and its output."""
    return copy.deepcopy(graph)


def rebuild_traced(root: nn.Module, rows: dict[Mode, list[Row]]) -> TracedModule:
    """Undo ``TracedModule.__reduce__``."""
    graphs = {mode: graph_of(rows[mode]) for mode in rows}
    return TracedModule(root, graphs.get(Mode.TRAIN, graphs[Mode.EVAL]), graphs[Mode.EVAL])


def regions_of(model: nn.Module) -> dict[str, TracedModule]:
    """The graphs of a traced model by their paths. One that is a graph as a whole has that one, at "".

    In the others plain Python, the model's own, steers the graphs: what ``torch.fx`` can't follow.
    """
    if isinstance(model, TracedModule):
        return {"": model}
    return {path: part for path, part in model.named_modules() if isinstance(part, TracedModule)}


Values = Mapping[Mode, Mapping[str, Mapping[str, Any]]]  # mode -> region -> node -> what is known of its value


@dataclass(frozen=True)
class Place:
    """One graph of a traced model, and what is known of its nodes."""

    mode: Mode
    region: str  # the path of its module; "" where the model is one graph as a whole
    module: TracedModule
    graph: fx.Graph
    values: Mapping[str, Any]  # by node; empty where the graph was not run


def places_of(model: nn.Module, values: Values) -> list[Place]:
    """The graphs of a traced model, region by region, each once, with what ``values`` tells of their nodes."""
    return [
        Place(mode, region, module, graph, values.get(mode, {}).get(region, {}))
        for region, module in regions_of(model).items()
        for mode, graph in module.distinct_graphs().items()
    ]


def require_traced(value: object, what: str, error: type[FxpruneError]) -> None:
    """Raise ``error`` unless ``value``, which the user gave for ``what``, is a traced model."""
    if not is_traced(value):
        require_type(value, TracedModule, what, error)


def is_traced(model: object) -> bool:
    """Whether ``trace`` returned this, or a copy of it."""
    return isinstance(model, TracedModule) or (isinstance(model, nn.Module) and "steers" in vars(model))


def device_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where and in what precision the weights of ``model`` are; CPU float32 where it has none."""
    first: Tensor | None = next((p for p in model.parameters() if p.is_floating_point()), None)
    return (first.device, first.dtype) if first is not None else (torch.device("cpu"), torch.float32)


@contextmanager
def in_eval(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode, and each of their modules back into its own mode."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
