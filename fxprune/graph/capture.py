"""Capture: a model's run on its example is written down as a graph, while its own Python runs.

Tensors are fake: they have shapes and dtypes, and no data. Sizes are numbers that remember their node. So each check,
loop and property of the model does what it always does, and what comes of it is the graph of this run. Layers of
torch.nn stay modules. What needs the data of a tensor is refused.
"""

import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from math import prod
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from fxprune.graph.batch import FIRST
from fxprune.graph.contexts import refuse_backward, refuse_hook, write_grad_mode
from fxprune.graph.dtypes import ASKED
from fxprune.graph.effects import (
    buffers_of,
    refuse_kept_tensors,
    refuse_settings,
    settings_of,
    watch_hooks,
    write_buffers,
)
from fxprune.graph.follow import behind_inputs
from fxprune.graph.guards import check_size
from fxprune.graph.inputs import Bound, tensors_in, without_data
from fxprune.graph.lowering import lower_layer
from fxprune.graph.numbers import Number, remember_number
from fxprune.graph.places import is_users, write_place
from fxprune.graph.refusal import LeftOverError, RefusalError
from fxprune.graph.shapes import shape_of_result
from fxprune.graph.signature import write_arguments, write_result
from fxprune.graph.state import Key, Picture, surroundings_of
from fxprune.graph.traced import Mode
from fxprune.graph.watch import RECORDER, watch_nothing, watch_torch

THROUGH = (  # layers of torch.nn in which sizes of pruned axes stand: their own calls are recorded
    nn.Unflatten,
    nn.ChannelShuffle,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterList,
    nn.ParameterDict,
)
OPERATORS = {  # methods of Tensor that Python's operators call
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
    "__floordiv__": operator.floordiv,
    "__mod__": operator.mod,
    "__matmul__": operator.matmul,
    "__and__": operator.and_,
    "__or__": operator.or_,
    "__xor__": operator.xor,
    "__invert__": operator.invert,
    "__eq__": operator.eq,
    "__ne__": operator.ne,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "matmul": operator.matmul,
    "neg": operator.neg,
    "pow": operator.pow,
}
REFLECTED = {
    "__rsub__": operator.sub,
    "__rdiv__": operator.truediv,
    "__rtruediv__": operator.truediv,
    "__rfloordiv__": operator.floordiv,
    "__rpow__": operator.pow,
    "__rmatmul__": operator.matmul,
    "__rmod__": operator.mod,
}
PLAIN = frozenset(("add", "sub", "mul", "div", "relu", "sigmoid", "tanh", "silu", "gelu", "cat", "mean", "linear"))
NOT_NEEDED = ("size", "mean", getattr, operator.getitem)  # unless used; the mean: of attention weights over the heads
LITERALS = (
    *(type(None), bool, int, float, complex, str, type(Ellipsis)),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout),
)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of torch.nn that stays a module."""
    return type(module).__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, THROUGH)


class Run(NamedTuple):
    """What was recorded."""

    graph: fx.Graph
    reads_mode: bool  # the model may have another graph in the other mode: it asked which one it is in
    changed: list[Key]  # attributes and variables that the model has changed
    asks_autocast: str  # where it asked whether autocast is on


def record_run(
    model: nn.Module,
    names: Mapping[int, str],
    constants: dict[str, Tensor],
    known: dict[Any, Any],
    inputs: Bound,
    mode: Mode,
    prepare: Callable[[fx.Graph], None] | None = None,
    autocast: bool = False,
) -> Run:
    """Record one run of ``model`` in one mode.

    Args:
        model: a copy that is used up: its Python may write into it.
        names: the name in the model of each of its tensors, by its id.
        constants: gets the other tensors that the run uses, by the names that they have in the graph.
        known: what calls on fake tensors gave, in this and other recordings.
        inputs: what to run it on.
        mode: which one.
        prepare: is given the graph before the run.
        autocast: what Python is told when it asks whether autocast is on.

    Raises:
        Exception: whatever the model's Python raises, a RefusalError for what can't be recorded.
    """
    modules = dict(model.named_modules())
    layers = {path: module for path, module in modules.items() if is_layer(module)}
    users = {path: module for path, module in modules.items() if path not in layers}
    around = surroundings_of(users.values())
    buffers, before = buffers_of(modules), Picture(users, around.variables)
    model.train(mode.training)
    settings = settings_of(modules, layers)
    tensors = chain(model.parameters(), model.buffers(), tensors_in(inputs))
    home = next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))
    recorder = Recorder(names, constants, known, home, mode.training)
    recorder.autocast = autocast
    if prepare is not None:
        prepare(recorder.graph)
    with torch.inference_mode(False), torch.enable_grad():
        args, kwargs = write_arguments(recorder, model.forward, inputs)
        with (
            torch.autocast(home.type, enabled=False),
            watch_hooks(users),
            recorder.watch_modules(modules),
            watch_torch(recorder),
            recorder,
        ):
            result = recorder.call_model(model, args, kwargs)
        after = Picture(users, around.variables)
        write_buffers(recorder, buffers, buffers_of(modules))
        refuse_settings(settings, settings_of(modules, layers))
        refuse_kept_tensors(recorder, before, after)
        recorder.graph.output(write_result(recorder, result))
    for node in reversed(list(recorder.graph.nodes)):
        if not node.users and (node.op == "get_attr" or node.target in NOT_NEEDED):
            recorder.graph.erase_node(node)
    overrides = any(type(module).train is not nn.Module.train for module in users.values())
    return Run(recorder.graph, recorder.reads_mode or overrides, after.changes(before), recorder.asks_autocast)


def seeming_device(tensor: Tensor) -> torch.device:
    """The device of a tensor. Asked for that, a fake one takes as long as for a call."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def writes(function: str) -> bool:
    """Whether a function of this name writes into its first argument."""
    return function.endswith("_") and (not function.endswith("__") or function.startswith(("__i", "__set")))


def key_of(value: Any) -> Any:
    """What the result of a call on fake tensors depends on, of one of its arguments."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, seeming_device(value)
    if isinstance(value, (tuple, list)):
        return tuple(map(key_of, value))
    if isinstance(value, dict):
        return tuple((name, key_of(item)) for name, item in value.items())
    if isinstance(value, slice):
        return slice, value.start, value.stop, value.step
    return type(value), value


class Recorder(TorchFunctionMode):
    """Writes down each call of torch that is made while this context holds."""

    def __init__(
        self,
        names: Mapping[int, str],
        constants: dict[str, Tensor],
        known: dict[Any, Any],
        home: torch.device,
        training: bool,
    ) -> None:
        super().__init__()
        self.names, self.constants, self.known, self.home, self.training = names, constants, known, home, training
        self.graph = fx.Graph()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.nodes: dict[int, fx.Node] = {}  # by the id of the tensor
        self.fakes: dict[int, FakeTensor] = {}  # by the id of a real tensor
        self.reals: dict[int, Tensor] = {}  # by the id of a fake one
        self.alive: list[Tensor] = []  # so that no id is used twice
        self.sizes: dict[tuple[fx.Node, int], fx.Node] = {}
        self.guards: set[tuple[Any, ...]] = set()
        self.entered: dict[int, fx.Node] = {}  # see contexts.py
        self.within: dict[str, tuple[str, type[nn.Module]]] = {}  # the modules that are being called, by their paths
        self.refusal: Exception | None = None
        self.asked: dict[torch.dtype, fx.Node | str] = {}  # by dtype, the last tensor that Python asked for it
        self.reads_mode, self.autocast, self.asks_autocast = False, False, ""
        self.first_tensor: fx.Node | None = None  # among the arguments
        self.first_device: torch.device | None = None
        self.device_node: fx.Node | None = None

    def call_model(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What ``model`` gives, unless something was refused in it."""
        try:
            result = model(*args, **kwargs)
            if self.refusal:  # the model's Python went on
                raise self.refusal
            return result
        finally:
            self.refusal = None  # its frames hold this object, and the model: nobody would free them

    # ------------------------------------------------------------------------------------------ calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One call of torch."""
        kwargs = kwargs or {}
        if func in HANDLED:
            return HANDLED[func](self, *args, **kwargs)
        if func in GRADIENT:
            return self.read_gradient(func, *args)
        if func.__name__ == "__set__":
            return self.set_attribute(func, *args)
        if func is F.multi_head_attention_forward:
            with self:
                return attend(*args, **kwargs)
        try:
            result = self.run(func, args, kwargs)
        except RuntimeError as error:  # fake tensors have no data; that is one
            self.refusal = self.refusal or error
            raise
        if not holds_tensors(result) and not writes(func.__name__):
            return result
        if id(result) in self.nodes and not writes(func.__name__):
            result = self.new(
                result.shape, result.dtype, seeming_device(result)
            )  # nothing to do here, but elsewhere there is
        return self.bind(result, self.node(*form_of_call(func, args), kwargs))

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What a call gives, on fake tensors; without the call where that is plain."""
        args, kwargs = self.fake_all(args), self.fake_all(kwargs)
        name = func.__name__
        if name == "__get__":
            return func(*args)
        if torch._C._is_any_autocast_enabled():
            with self.fake:
                return func(*args, **kwargs)
        if not kwargs and name.rstrip("_") in PLAIN:
            shape = shape_of_result(name.rstrip("_"), args)
            first = args[0] if isinstance(args[0], Tensor) else args[0][0]
            if shape is not None and not name.endswith("_"):
                return self.new(shape, first.dtype, seeming_device(first))
            if shape is not None and shape == first.shape:
                return first
        if not holds_tensors((args, kwargs)) or (writes(name) and func is not Tensor.__setitem__):
            with self.fake:
                return func(*args, **kwargs)
        key = key_of((func, args, kwargs))
        if key in self.known:
            return self.new_all(self.known[key])
        with self.fake:
            result = func(*args, **kwargs)
        if result is None or isinstance(result, Tensor) or type(result) in (tuple, list):
            self.known[key] = self.new_all(result)  # the result itself may be written into
        return result

    def new_all(self, result: Any) -> Any:
        """Fake tensors like those in ``result``."""
        if type(result) in (tuple, list):
            return type(result)(map(self.new_all, result))
        if not isinstance(result, Tensor):
            return result
        data = without_data(result)
        return FakeTensor(self.fake, data, seeming_device(result))

    def call_layer(self, path: str, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A call of a layer of torch.nn. What a graph would not keep is recorded through: its own mode or weights."""
        if vars(layer)["training"] is not self.training or self.is_lent(layer):
            return self.call_module(path, layer, *args, **kwargs)
        if RECORDER.get() is None:  # a part of a layer
            return layer._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        with torch._C.DisableTorchFunction(), self.enter_module(path, layer):
            with watch_nothing():
                result = self.run_layer(layer, args, kwargs)
            return self.bind(result, self.node("call_module", path, args, kwargs))

    def is_lent(self, layer: nn.Module) -> bool:
        """Whether a layer has tensors for this call alone, as ``functional_call`` gives them."""
        tensors = (*layer._parameters.values(), *layer._buffers.values())
        return not all(tensor is None or id(tensor) in self.names for tensor in tensors)

    def call_module(self, path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A call of a module that is recorded call by call."""
        with self.enter_module(path, module):
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    @contextmanager
    def enter_module(self, path: str, module: nn.Module) -> Iterator[None]:
        """While this holds, new nodes say that they belong to ``module``."""
        before = self.within
        self.within = {**before, path: (path, type(module))}
        try:
            yield
        finally:
            self.within = before

    def run_layer(self, layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What a layer gives, on fake tensors; without a call where that is plain."""
        args, kwargs = self.fake_all(args), self.fake_all(kwargs)
        plain = len(args) == 1 and not kwargs and not torch._C._is_any_autocast_enabled()
        plain = plain and "parametrizations" not in layer._modules  # to ask for their weight makes it
        if plain and isinstance(args[0], Tensor):
            lowered = lower_layer(layer, partial(getattr, layer), args[0], layer.training)
            shape = lowered and shape_of_result(lowered[0]._schema.name.removeprefix("aten::").rstrip("_"), lowered[1])
            if shape:
                return self.new(shape, args[0].dtype, seeming_device(args[0]))
        with self.fake, self.faked(layer):
            return layer._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    @contextmanager
    def faked(self, layer: nn.Module) -> Iterator[None]:
        """While this holds, the layer has fake tensors: what it writes into its buffers goes nowhere."""
        kinds: list[Any] = [kind for part in layer.modules() for kind in (part._parameters, part._buffers)]
        before = [dict(kind) for kind in kinds]
        for kind in kinds:
            kind.update(self.fake_all(kind))
        try:
            yield
        finally:
            for kind, tensors in zip(kinds, before, strict=True):
                kind.update(tensors)

    @contextmanager
    def watch_modules(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """While this holds, calls of modules, which are given by their paths, come here, hooks included."""
        parts = {path: module for path, module in modules.items() if path}
        for path, part in parts.items():
            call = self.call_layer if is_layer(part) else self.call_module
            vars(part)["_compiled_call_impl"] = partial(call, path, part)
        try:
            yield
        finally:
            for part in parts.values():
                del vars(part)["_compiled_call_impl"]

    # ---------------------------------------------------------------------------------------- tensors

    def new(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> FakeTensor:
        """A fake tensor."""
        return FakeTensor(self.fake, torch.empty(shape, dtype=dtype, device="meta"), device)

    def fake_of(self, tensor: Tensor) -> Tensor:
        """The fake tensor that stands for a real one."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self.fakes:
            data = without_data(tensor)
            fake = self.fakes[id(tensor)] = FakeTensor(self.fake, data, self.device_of(tensor))
            self.reals[id(fake)] = tensor
            self.alive.append(tensor)
        return self.fakes[id(tensor)]

    def fake_all(self, value: Any) -> Any:
        """``value`` with fake tensors in place of real ones."""
        if isinstance(value, Tensor):
            return self.fake_of(value)
        if type(value) in (tuple, list):
            return type(value)(map(self.fake_all, value))
        if type(value) is dict:
            return {key: self.fake_all(item) for key, item in value.items()}
        return value

    def device_of(self, tensor: Tensor) -> torch.device:
        """Where a tensor lies; one without data seems to lie where the others do."""
        return self.home if tensor.is_meta else tensor.device

    def bind_argument(self, tensor: Tensor, node: fx.Node) -> Tensor:
        """A fake tensor for one that the model is given."""
        device = self.device_of(tensor)
        data = without_data(tensor)
        if self.first_tensor is None:
            self.first_tensor, self.first_device = node, device
            node.meta[FIRST] = True
        fake: Tensor = self.bind(FakeTensor(self.fake, data, device), node)
        return fake

    def bind(self, result: Any, node: fx.Node) -> Any:
        """Remember that ``node`` gives ``result``."""
        if isinstance(result, Tensor):
            self.nodes[id(result)] = node
            self.alive.append(result)
        elif isinstance(result, (tuple, list, dict)):
            items = result.items() if isinstance(result, dict) else enumerate(result)
            for key, item in items:
                if isinstance(item, (Tensor, tuple, list, dict)):
                    part = self.graph.call_function(operator.getitem, (node, key))
                    part.meta.update(node.meta)
                    self.bind(item, part)
        return result

    # ------------------------------------------------------------------------------------------ nodes

    def node(self, op: str, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> fx.Node:
        """A new node, which knows the line of the user's model that it comes from."""
        if torch.is_inference_mode_enabled():
            raise RefusalError("inference_mode can't be told from no_grad in a graph: write torch.no_grad")
        node = self.graph.create_node(op, target, self.arg(tuple(args)), self.arg(dict(kwargs)))
        node.meta["nn_module_stack"] = self.within
        if self.asked:
            node.meta[ASKED] = self.asked
        write_place(node, record_run.__code__)
        return node

    def arg(self, value: Any) -> Any:
        """An argument of a call as a graph has it."""
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, Number):
            return value.node if value.graph is self.graph else value.plain
        if isinstance(value, torch.device):
            return self.device if value == self.first_device else value
        if isinstance(value, (fx.Node, *LITERALS)):
            return value
        if isinstance(value, slice):
            return slice(*map(self.arg, (value.start, value.stop, value.step)))
        if isinstance(value, dict):
            return {key: self.arg(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            items = list(map(self.arg, value))
            if hasattr(value, "_fields"):
                return type(value)(*items)
            return items if isinstance(value, list) else tuple(items)
        raise RefusalError(f"a {type(value).__name__} is given to torch, which no graph can hold")

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that gives ``tensor``."""
        node = self.nodes.get(id(tensor))
        if node is None:
            real = self.reals.get(id(tensor), tensor)
            if isinstance(real, FakeTensor):
                raise LeftOverError(f"a tensor of shape {list(real.shape)} comes from a call that can't be recorded")
            name = self.names.get(id(real)) or self.name_constant(real)
            node = self.graph.create_node("get_attr", name)
            self.bind(tensor, node)
        return node

    def name_constant(self, tensor: Tensor) -> str:
        """The name of a tensor that is no part of the model."""
        if isinstance(tensor, nn.Parameter):
            raise RefusalError(
                f"a parameter of shape {list(tensor.shape)} is used that the model does not register; make it an "
                "attribute of a module, or put it into a ParameterList"
            )
        for name, constant in self.constants.items():
            if constant is tensor or (constant.dtype == tensor.dtype and torch.equal(constant, tensor)):
                return name
        name = f"_tensor_constant{len(self.constants)}"
        self.constants[name] = tensor
        return name

    def guard(self, number: Number, relation: str, other: float, found: float, place: str) -> None:
        """Python found something of a size: the graph says so, once."""
        key = (number.node, relation, self.arg(other), found)
        if key not in self.guards:
            self.guards.add(key)
            self.node("call_function", check_size, (number, relation, other, found, place), {})

    # ----------------------------------------------------------------------------------- sizes, device

    def size(self, tensor: Tensor, axis: int) -> Any:
        """One size of a tensor."""
        owner, axis = self.node_of(tensor), axis % max(tensor.dim(), 1)
        return remember_number(int(tensor.shape[axis]), self.graph, partial(self.size_node, owner, axis))

    def size_node(self, owner: fx.Node, axis: int) -> fx.Node:
        """The node that gives a size, right behind its tensor: later that may be written into."""
        if (owner, axis) not in self.sizes:
            with self.graph.inserting_after(behind_inputs(owner)):
                self.sizes[owner, axis] = self.graph.call_method("size", (owner, axis))
        return self.sizes[owner, axis]

    def behind(self, node: fx.Node) -> fx.Node:
        """``node``; for an argument of the model, the last one."""
        while node.op == "placeholder" and node.next.op == "placeholder":
            node = node.next
        return node

    def read_gradient(self, getter: Any, tensor: Tensor) -> Any:
        """What a tensor knows of its gradient. It differs from run to run; torch itself asks, to be quick."""
        if is_users(sys._getframe(2).f_code.co_filename):
            raise RefusalError("Python there asks whether a tensor has a gradient, which differs from run to run")
        return getter(tensor)

    def set_attribute(self, setter: Any, tensor: Tensor, value: Any) -> None:
        """Python sets an attribute of a tensor. That an input is to have a gradient is no matter of the model."""
        name = setter.__self__.__name__
        if name != "requires_grad" or isinstance(tensor, nn.Parameter) or not value:
            raise RefusalError(f"Python there sets {name!r} of a tensor, which a graph would not: write with copy_")

    def dtype(self, tensor: Tensor) -> torch.dtype:
        """The dtype of a tensor. What comes of it may have to follow the tensor: nodes know what was asked before."""
        dtype = self.fake_of(tensor).dtype
        if is_users(sys._getframe(2).f_code.co_filename):
            real = self.reals.get(id(tensor), tensor)
            source = self.names.get(id(real)) or self.nodes.get(id(tensor))
            self.asked = {**self.asked, dtype: source} if source is not None else self.asked
        return dtype

    def shape(self, tensor: Tensor) -> torch.Size:
        """The shape of a tensor."""
        return torch.Size([self.size(tensor, axis) for axis in range(tensor.dim())])

    @property
    def device(self) -> Any:
        """The node that gives the device of the first tensor among the arguments."""
        if self.device_node is None:
            assert self.first_tensor is not None  # its device is why this is asked
            with self.graph.inserting_after(behind_inputs(self.first_tensor)):
                self.device_node = self.graph.call_function(getattr, (self.first_tensor, "device"))
        return self.device_node


def is_unwatched(*_: Any) -> bool:
    """Nothing is watching."""
    return False


# torch's own, which does not ask whether it is watched: so what it calls is recorded, with the sizes of its heads.
attend = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": is_unwatched},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def holds_tensors(value: Any) -> bool:
    """Whether there is a tensor in what a call gives."""
    if isinstance(value, (tuple, list)):
        return any(map(holds_tensors, value))
    return isinstance(value, Tensor) or (isinstance(value, dict) and any(map(holds_tensors, value.values())))


def form_of_call(func: Any, args: Sequence[Any]) -> tuple[str, Any, Sequence[Any]]:
    """How a graph writes a call: the kind of node, its target and its arguments."""
    name = func.__name__
    if name == "__get__":
        return "call_function", getattr, (args[0], func.__self__.__name__)
    if not isinstance(args[0] if args else None, Tensor) or getattr(func, "__qualname__", "").split(".")[0] not in (
        "Tensor",
        "TensorBase",
    ):
        return "call_function", func, args
    if name in REFLECTED:
        return "call_function", REFLECTED[name], args[::-1]
    if name in OPERATORS:
        return "call_function", OPERATORS[name], args
    return "call_method", name, args


HANDLED: dict[Any, Callable[..., Any]] = {
    Tensor.shape.__get__: Recorder.shape,  # type: ignore[attr-defined]
    Tensor.size: lambda recorder, tensor, dim=None: (
        recorder.shape(tensor) if dim is None else recorder.size(tensor, dim)
    ),
    Tensor.__len__: lambda recorder, tensor: recorder.size(tensor, 0),
    Tensor.numel: lambda recorder, tensor: prod(recorder.shape(tensor)),
    torch._C._set_grad_enabled: write_grad_mode,
    Tensor.dtype.__get__: Recorder.dtype,  # type: ignore[attr-defined]
    Tensor.nelement: lambda recorder, tensor: prod(recorder.shape(tensor)),
    **dict.fromkeys((Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad), refuse_hook),
    **dict.fromkeys((Tensor.backward, torch.autograd.backward, torch.autograd.grad), refuse_backward),
}
GRADIENT = frozenset(getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf", "grad"))
