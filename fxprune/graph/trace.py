"""Trace: a model becomes a GraphModule that is right in train and in eval mode.

Layers of ``torch.nn`` stay modules, everything else becomes graph. The parameters and buffers are the model's own
objects under their own names; the modules are copies, so that nothing done to the traced model changes the original.
"""

import copy
import inspect
import logging
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from fxprune.errors import TraceError, require_type
from fxprune.graph.batch import (
    SizeFollower,
    batch_of,
    depends_on_batch,
    fix_sizes,
    free_axes,
    plain_number,
    with_other_sizes,
)
from fxprune.graph.capture import record_run
from fxprune.graph.check import check_graph
from fxprune.graph.contexts import follow_autocast
from fxprune.graph.draws import find_draw, has_drawn, read_state
from fxprune.graph.dtypes import ASKED, DtypeFollower, cast, cast_inputs, other_dtype
from fxprune.graph.follow import DiffersError
from fxprune.graph.guards import check_size
from fxprune.graph.inputs import Bound, bind_inputs, for_mode, tensors_in
from fxprune.graph.keep import attributes_kept
from fxprune.graph.places import describe_error_place
from fxprune.graph.refusal import DoesNotRunError, LeftOverError, RefusalError
from fxprune.graph.regions import trace_regions
from fxprune.graph.state import describe_key
from fxprune.graph.traced import (
    ARGUMENTS,
    ATOMS,
    PLAIN,
    START,
    Fixed,
    FixedModuleDict,
    FixedModuleList,
    FixedSequential,
    Mode,
    TracedModule,
    carried_attributes,
    is_plain,
    is_traced,
)
from fxprune.graph.watch import ALONE
from fxprune.loaded import loaded_types

SPREAD = "torch.distributed.tensor.DTensor"


def trace(model: nn.Module, example_inputs: Any = (), *, check: bool = True) -> Any:
    """Trace ``model`` in train and in eval mode.

    Args:
        model: any module, a GraphModule included. DistributedDataParallel and ``torch.compile`` wrappers are taken off.
            It is not changed.
        example_inputs: a tensor, a tuple or dict of arguments, (args, kwargs), or a loader's batch. They say which
            arguments are given; the others keep their defaults.
        check: compare the graphs with the model, outputs and gradients in both modes, and record them once more with a
            larger batch. It costs two runs of the model in each mode, one with its backward pass.

    Returns:
        A GraphModule with the state_dict keys, parameters and buffers of ``model`` (the same tensors, not copies), in
        the mode of ``model``. Where the model's Python asks for the values of tensors, a copy of the model, of its own
        class, in which the largest parts that do not are such GraphModules: its regions.

    Raises:
        TraceError: the model can't be recorded, or its graph would not be the model; names the module, file and line.
    """
    require_type(model, nn.Module, "model", TraceError)
    model = unwrap_model(model)
    if is_traced(model):
        return model
    check_traceable(model)
    inputs = bind_inputs(example_inputs, model)
    check_inputs(model, inputs)
    with ALONE:
        traced = trace_parts(model, inputs, check)
    if START in vars(model):
        traced.meta[START] = vars(model)[START]
    return traced


def trace_parts(model: nn.Module, inputs: Bound, check: bool) -> Any:
    """What ``trace`` gives: one graph, or, where that can't be, plain Python with graphs for its parts.

    Raises:
        TraceError: neither can be.
    """
    try:
        return trace_whole(model, inputs, check)
    except DoesNotRunError:
        raise
    except TraceError as whole:
        try:
            traced: Any = trace_regions(copy_modules(model, {}).eval(), inputs, partial(trace_whole, check=check))
            traced.train(model.training)
            traced.meta[PLAIN] = {"": str(whole)} | traced.meta[PLAIN]
            given = name_arguments(model, inputs)
            traced.meta[ARGUMENTS] = {name: value if is_plain(value) else ... for name, value in given.items()}
            return traced
        except DoesNotRunError:
            raise
        except TraceError as error:
            raise TraceError(f"{whole} Its parts could not be traced one by one either: {error}.") from whole


def trace_whole(model: nn.Module, inputs: Bound, check: bool = True) -> TracedModule:
    """Record ``model``, which is not changed, in both modes; with ``check``, compare the graphs with it.

    Raises:
        TraceError: the run can't be recorded, or the graph does not give what the model gives.
    """
    recording = Recording(model, names_of(model), {})
    evaluate, given = recording.record_mode(Mode.EVAL, inputs)
    runs = {Mode.EVAL: (evaluate, given)}
    if recording.reads_mode:
        runs[Mode.TRAIN] = recording.record_mode(Mode.TRAIN, inputs)
    if check:
        for mode, (graph, given) in runs.items():
            recording.follow_dtype(mode, graph, given)
            recording.follow_sizes(mode, graph, given)
    for graph, _ in runs.values():
        for node in graph.nodes:
            node.meta.pop(ASKED, None)
    train, in_train = runs.get(Mode.TRAIN, (evaluate, for_mode(inputs, Mode.TRAIN, model)))
    if same_graphs(train, evaluate):
        train = evaluate
    called = {node.target for graph in (train, evaluate) for node in graph.nodes if node.op == "call_module"}
    root = plain_root(copy_modules(model, {}), called)
    vars(root).update(recording.constants)
    traced = TracedModule(root, train, evaluate)
    if check and not any(tensor.is_meta for tensor in (*model.parameters(), *tensors_in(inputs))):
        check_graph(partial(copy_modules, model, {}), traced, {Mode.EVAL: inputs, Mode.TRAIN: in_train})
    return traced


@dataclass
class Recording:
    """Runs of copies of one model."""

    model: nn.Module
    names: Mapping[int, str]
    constants: dict[str, Tensor]
    known: dict[Any, Any] = field(default_factory=dict)  # see record_run
    reads_mode: bool = False
    takes_longer: bool = True  # inputs, as far as is known, with the same Python

    def record_mode(self, mode: Mode, inputs: Bound) -> tuple[fx.Graph, Bound]:
        """The graph of one mode, and what it was run on: a batch of two where batch norm can't train on the example.

        Raises:
            TraceError: the run can't be recorded.
        """
        try:
            return self.record_graph(mode, inputs), inputs
        except TraceError as error:
            double = for_mode(inputs, mode, self.model)
            if double is inputs or not isinstance(error.__cause__, ValueError):
                raise
            return self.record_graph(mode, double), double

    def follow_dtype(self, mode: Mode, graph: fx.Graph, inputs: Bound) -> None:
        """Let ``graph`` follow the dtype of the model, where its Python asks for that and the model takes another.

        A dtype for which Python does something else is refused when the graph runs.
        """
        if not any(ASKED in node.meta for node in graph.nodes):
            return
        dtype = other_dtype(self.model)
        tensors = {id(tensor): cast(tensor, dtype) for tensor in named_tensors(self.model).values()}
        other = self.record_other(mode, cast_inputs(inputs, dtype), copy_modules(self.model, tensors))
        follower = DtypeFollower(graph)
        try:
            if other is not None:
                follower.follow_graph(other)
        except DiffersError as difference:
            follower.fix_dtype(difference)

    def follow_sizes(self, mode: Mode, graph: fx.Graph, inputs: Bound) -> None:
        """Let ``graph`` follow the sizes of its inputs, unless the model itself takes no others.

        Longer axes that Python does something else for are refused when the graph runs.

        Raises:
            TraceError: Python does something else for another batch.
        """
        batch = batch_of(inputs)
        if not batch:
            return
        axes, different = free_axes(inputs) if self.takes_longer else (), None
        if axes and any(node.target is check_size and plain_number(node) for node in graph.nodes):
            self.record_other(mode, with_other_sizes(inputs, ()))  # a cache by sizes would show what it kept
        other = self.record_other(mode, with_other_sizes(inputs, axes)) if axes else None
        try:
            if other is not None:
                SizeFollower(graph, batch).follow_graph(other)
                return
        except DiffersError as error:
            different = error.node
        self.takes_longer = different is not None and different.target is not check_size
        other = self.record_other(mode, with_other_sizes(inputs, ()))
        try:
            if other is not None:
                SizeFollower(graph, batch).follow_graph(other)
        except DiffersError as error:
            if error.node.target is not check_size:
                raise depends_on_batch(error.node) from None
        if different is not None and different.target is not check_size:
            fix_sizes(graph, inputs, axes, different)

    def record_other(self, mode: Mode, inputs: Bound, model: nn.Module | None = None) -> fx.Graph | None:
        """The graph for other inputs, of another model even; None where that does not take them."""
        model = model or self.model
        other = Recording(model, names_of(model), dict(self.constants), self.known)
        FAKES.disabled = True  # it tells of each call that fails
        try:
            return other.record_graph(mode, inputs)
        except TraceError as error:
            if isinstance(error.__cause__, LeftOverError):
                raise
            return None
        finally:
            FAKES.disabled = False

    def record_graph(self, mode: Mode, inputs: Bound) -> fx.Graph:
        """The graph of one mode.

        Raises:
            TraceError: the run can't be recorded.
        """
        working, before = copy_modules(self.model, {}), read_state()
        try:
            with attributes_kept(self.model, copied=True):
                graph = self.record_settled(working, inputs, mode)
        except Exception as error:
            raise explain_error(working, error) from error
        if has_drawn(before):
            again = copy_modules(self.model, {})
            place = find_draw(lambda: record_run(again, self.names, {}, {}, inputs, mode))
            raise TraceError(
                f"can't trace {type(self.model).__name__}, {place}: Python there draws a random number, which the "
                "graph would hold for ever. Draw with torch (torch.rand) and choose with torch.where, or in a module "
                "of its own"
            )
        return graph

    def record_settled(self, working: nn.Module, inputs: Bound, mode: Mode) -> fx.Graph:
        """The graph of one mode of ``working``, which must not depend on how often it was run.

        Raises:
            Exception: as ``record_run``; a RefusalError where it counts its runs.
        """
        record = partial(record_run, working, self.names, self.constants, self.known, inputs, mode)
        run = record()
        self.reads_mode |= run.reads_mode
        graph = run.graph
        if run.asks_autocast:
            graph = follow_autocast(graph, partial(record, autocast=True), run.asks_autocast)
        if not run.changed:
            return graph
        again = record()
        if again.changed or not same_graphs(run.graph, again.graph):
            raise RefusalError(
                f"{describe_key((again.changed or run.changed)[0])} is another after each run, which a graph would not "
                "follow: make it a buffer, and write into that"
            )
        return graph


def explain_error(model: nn.Module, error: Exception) -> TraceError:
    """What to say of an error in a recorded run of ``model``."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        said = (
            f"Python there asks for the values of a tensor ({error.func}), which differ from run to run. Compute with "
            "tensors instead (torch.where), or move that line into a module of its own"
        )
    return TraceError(f"can't trace {describe_error_place(model, error)}: {said}.")


def check_inputs(model: nn.Module, inputs: Bound) -> None:
    """Refuse inputs that the model's forward does not take."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*inputs[0], **inputs[1])
    except TypeError as error:
        raise TraceError(
            f"example_inputs do not fit {type(model).__name__}.forward({', '.join(signature.parameters)}): {error}. "
            "Give a tensor, a tuple of arguments, a dict of arguments by name, or (args, kwargs) such as ((), {...}); "
            "of a batch (x, y) with labels give x."
        ) from error


def name_arguments(model: nn.Module, inputs: Bound) -> dict[str, Any]:
    """What a model is called with, by name; in order, with a name of its own for each value of ``*args``."""
    signature = inspect.signature(model.forward)
    found: dict[str, Any] = {}
    for name, value in signature.bind(*inputs[0], **inputs[1]).arguments.items():
        match signature.parameters[name].kind:
            case inspect.Parameter.VAR_POSITIONAL:
                found |= {f"*{name}{at}": item for at, item in enumerate(value)}
            case inspect.Parameter.VAR_KEYWORD:
                found |= value
            case _:
                found[name] = value
    return found


FAKES = logging.getLogger("torch._subclasses.fake_tensor")
FRAMES = 8  # of Python's stack that copying a model takes for each level of modules within modules


def check_traceable(model: nn.Module) -> None:
    """Refuse models that hide their Python or nest too deep to copy, and layers that wait for their first input."""
    name = type(model).__name__
    depth = depth_of(model)
    if FRAMES * depth > sys.getrecursionlimit():
        raise TraceError(
            f"modules of {name} stand {depth} deep within each other; Python's recursion limit, "
            f"{sys.getrecursionlimit()}, is too low to copy them: call sys.setrecursionlimit({2 * FRAMES * depth})"
        )
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            part = f"{path} of {name}" if path else name
            raise TraceError(f"{part} is TorchScript, which can't be traced again; give the model it was made from")
    for parameter, tensor in named_tensors(model).items():
        if nn.parameter.is_lazy(tensor):
            raise TraceError(f"{parameter} of {name} has no shape yet: call the model once, as its lazy layers need")
        if isinstance(tensor, loaded_types(SPREAD)):
            raise TraceError(
                f"{parameter} of {name} is spread over ranks (DTensor), and a rank has a part of it only. "
                "fxprune.fsdp.prune_sharded cuts what fully_shard has split; of others give the whole model"
            )


def depth_of(model: nn.Module) -> int:
    """How many modules stand within each other where the nesting of ``model`` is deepest. No recursion of its own."""
    depth, level = 0, [model]
    while level:
        level = list({id(child): child for module in level for child in module.children()}.values())
        depth += 1
    return depth


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
        try:
            return copy.deepcopy(value, memo)
        except TypeError as error:
            raise DoesNotRunError(
                f"attribute {name!r} of a {type(module).__name__} can't be copied, and copies of the model are run: "
                f"{error}. Put it outside of the model, or give its class a __deepcopy__"
            ) from error

    for module in modules:
        own = memo[id(module)].__dict__ = vars(module).copy()
        for name, value in own.items():
            kind = type(value)
            if kind in ATOMS:
                continue
            own[name] = kind() if kind in EMPTY and not value else copied(name, value)
    result: nn.Module = memo[id(root)]
    return result


def names_of(model: nn.Module) -> dict[int, str]:
    """The first name of each tensor that modules hold, by its id: parameters, buffers, and other attributes."""
    names: dict[int, str] = {}
    for name, tensor in named_tensors(model).items():
        names.setdefault(id(tensor), name)
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                names.setdefault(id(value), f"{path}.{name}".removeprefix("."))
    return names


def plain_root(working: nn.Module, called: set[Any]) -> nn.Module:
    """The modules that graphs call, in a tree of plain modules that hold everything else under its own name."""
    paths = dict(working.named_modules(remove_duplicate=False))
    made = {id(paths[path]): paths[path] for path in called}
    return bare_module(working, made)


CONTAINERS = {  # these stay: people index them; so do they where they have attributes
    nn.Sequential: FixedSequential,
    nn.ModuleList: FixedModuleList,
    nn.ModuleDict: FixedModuleDict,
    nn.Module: Fixed,
}


def bare_module(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """A plain module or container for ``module`` and for each below it, unless ``made`` has one by the id."""
    if id(module) in made:
        return made[id(module)]
    kind = next(kind for kind in CONTAINERS if isinstance(module, kind))
    carried = carried_attributes(module)
    new: nn.Module = CONTAINERS[kind]() if carried else kind()
    made[id(module)] = new
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "training"):
        new.__dict__[name] = module.__dict__[name]
    new._modules = {
        name: None if child is None else bare_module(child, made) for name, child in module._modules.items()
    }
    new.__dict__.update(carried)
    return new
