"""Interpret: run a graph on tensors that carry channel names, and keep what every node gives."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fxprune.channels.groups import Axis
from fxprune.channels.labels import Label, freeze_labels, on_axis
from fxprune.channels.tensor import STATES, STATISTICS, ChannelTensor, NameRun, apply_operator, on_meta
from fxprune.channels.values import Value
from fxprune.errors import AnalysisError, FxpruneError
from fxprune.graph.inputs import Bound, map_tensors, tensors_in
from fxprune.graph.lowering import Lowered, lower_layer
from fxprune.graph.places import describe_place
from fxprune.graph.trace import named_tensors
from fxprune.graph.traced import Mode, TracedModule, hooks_of


def name_parameters(
    graph: nn.Module, run: NameRun
) -> tuple[dict[str, Tensor], dict[tuple[str, int], Axis], dict[str, str]]:
    """Each parameter and floating-point buffer as a ChannelTensor with fresh names along every axis.

    A tensor that is registered under several names gets one ChannelTensor. Integer buffers stay tensors, as copies:
    they are read as indices, and the model may write into them.
    """
    tensors = named_tensors(graph)  # the buffers after all parameters
    run.names.reserve(sum(sum(tensor.shape) for tensor in tensors.values()))
    state: dict[str, Tensor] = {}
    axes: dict[tuple[str, int], Axis] = {}
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    buffers: int | None = None
    for name, tensor in tensors.items():
        if buffers is None and not isinstance(tensor, nn.Parameter):
            buffers = len(run.names)
        aliases[name] = first.setdefault(id(tensor), name)
        if aliases[name] != name:
            state[name] = state[aliases[name]]
        elif not (tensor.is_floating_point() or tensor.is_complex()):
            state[name] = copy_data(tensor)
        else:
            labels = []
            for axis, size in enumerate(tensor.shape):
                if size > 1:
                    names = run.names.fresh(size)
                    if hooks_of(tensor):
                        run.names.freeze(names, f"{name} has a hook, which may know its shape")
                    axes[name, axis] = Axis(name, axis, names, weak=not isinstance(tensor, nn.Parameter))
                    labels.append(on_axis(names, axis, tensor.ndim))
            data = copy_data(tensor) if run.real else on_meta(tensor)
            state[name] = ChannelTensor(data, tuple(labels), run, name, name, isinstance(tensor, nn.Parameter))
    if run.heads == "whole" and buffers is not None:
        run.names.yielding = range(buffers, len(run.names))
    return state, axes, aliases


def copy_data(tensor: Tensor) -> Tensor:
    """A copy that the run may write into, even when it is made in inference mode."""
    with torch.inference_mode(False):
        return tensor.detach().clone()


@contextmanager
def in_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """The whole of ``model`` in train or eval mode, and back."""
    turned = [part for part in model.modules() if Mode.of(part) is not mode]
    for part in turned:
        part.training = mode.training
    try:
        yield
    finally:
        for part in turned:
            part.training = mode.other.training


class GraphInterpreter(fx.Interpreter):
    """torch's, which also knows arguments behind "*args"."""

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An argument; for "*args" and "**kwargs" a tuple and a dict of them."""
        return next(self.args_iter) if target.startswith("*") else super().placeholder(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call it; what the model gives back in a class of its own may be written into too."""
        if isinstance(target, type):
            args, kwargs = with_plain_containers(args), with_plain_containers(kwargs)
        return super().call_function(target, args, kwargs)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        """What the graph gives, in lists and dicts that plain Python may write into, as the graph's code gives it."""
        return with_plain_containers(args[0])


def with_plain_containers(value: Any) -> Any:
    """``value`` with lists and dicts in place of those of torch.fx, which can't be written into."""
    if isinstance(value, fx.immutable_collections.immutable_dict):
        return {key: with_plain_containers(item) for key, item in value.items()}
    if isinstance(value, fx.immutable_collections.immutable_list):
        return list(map(with_plain_containers, value))
    if hasattr(value, "_fields"):
        return type(value)(*map(with_plain_containers, value))
    return tuple(map(with_plain_containers, value)) if type(value) is tuple else value


class Runner(GraphInterpreter):
    """Runs the graph of one mode, with the tensors of ``state`` for the parameters and buffers of those names."""

    def __init__(self, module: TracedModule, mode: Mode, state: Mapping[str, Tensor]) -> None:
        super().__init__(module, garbage_collect_values=False, graph=module.graphs[mode])
        self.mode, self.state = mode, state

    def start(self, inputs: Bound) -> Any:
        """Run on ``inputs``: ``run`` without its progress bar and its text in every error."""
        self.args_iter = bind_placeholders(self.graph, inputs)
        with torch.inference_mode(False), torch.no_grad():
            for node in self.graph.nodes:
                self.env[node] = self.run_node(node)
        return self.env[self.graph.output_node()]

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return getattr(self, n.op)(n.target, args, kwargs)

    def tensor(self, name: str) -> Tensor | None:
        """The tensor to use for the parameter or buffer called ``name``."""
        return self.state.get(name)

    def layer(self, target: str) -> nn.Module:
        """The module called ``target``; ``submodules`` knows each module under its first name only."""
        return self.submodules.get(target) or self.module.get_submodule(target)

    def lowered(self, target: str, args: Sequence[Any]) -> Lowered | None:
        """The operator that a layer of torch.nn calls, with its arguments, where that is plain."""
        if len(args) != 1 or not isinstance(args[0], Tensor):
            return None
        layer = self.layer(target)
        past_hooks = self.past_hooks(layer)
        return lower_layer(
            layer, lambda name: self.state.get(f"{target}.{name}"), args[0], self.mode.training, past_hooks
        )

    def past_hooks(self, layer: nn.Module) -> bool:
        """Whether the user's hooks on ``layer`` need not be called."""
        return False

    def fetch_attr(self, target: str) -> Any:
        """Parameters and buffers come from the state."""
        tensor = self.tensor(target)
        return super().fetch_attr(target) if tensor is None else tensor

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a layer in this mode, with its tensors swapped.

        A part that has several names is swapped under its first: ``functional_call`` would not restore it otherwise.
        """
        layer = self.layer(target)
        swapped = {}
        for path, part in layer.named_modules():
            for leaf in (*part._parameters, *part._buffers):
                name = f"{path}.{leaf}".removeprefix(".")
                if (tensor := self.tensor(f"{target}.{name}")) is not None:
                    swapped[name] = tensor
        with in_mode(layer, self.mode):
            if not swapped:
                return layer(*args, **kwargs)
            return functional_call(layer, swapped, args, kwargs, tie_weights=False)


class ChannelRunner(Runner):
    """Runs a graph on ChannelTensors and keeps the shape and labels of every value."""

    def __init__(
        self, module: TracedModule, mode: Mode, state: Mapping[str, Tensor], run: NameRun, region: str = ""
    ) -> None:
        super().__init__(module, mode, state)
        self.run_, self.region, self.values = run, region, dict[str, Any]()
        self._storages: dict[int, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, with errors that name it and the user's line."""
        self.run_.names.node = name_within(self.region, n.name)
        self.run_.statistic = function_of(n) in STATISTICS
        try:
            result = super().run_node(n)
        except FxpruneError:
            raise
        except Exception as error:
            shapes = [list(tensor.shape) for tensor in tensors_in(self.fetch_args_kwargs_from_env(n))]
            raise AnalysisError(
                f"node {describe_place(n)} does not run on channel names, given the shapes {shapes}: "
                f"{describe_cause(error)}"
            ) from error
        self.values[n.name] = (
            self.as_value(result) if isinstance(result, Tensor) else pytree.tree_map(self.as_values, result)
        )
        return result

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A module that gets what it got before, in the other mode say, gives what it gave, and merges nothing new."""
        run, layer = self.run_, self.layer(target)
        if len(args) == 1 and not kwargs and type(layer) in STATES:
            args = (*args, STATES[type(layer)](layer, args[0]))
        if run.real:
            return super().call_module(target, args, kwargs)
        if kwargs or not all(isinstance(arg, ChannelTensor) for arg in args):
            # What the graph made of numbers is on another device than its inputs are here.
            args, kwargs = map_tensors(
                lambda arg: arg if isinstance(arg, ChannelTensor) else on_meta(arg), (args, kwargs)
            )
            return super().call_module(target, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            operator = self.lowered(target, args)
        inputs = tuple(
            (tuple(map(memory_place, arg.labels)), arg.data_.shape, arg.data_.stride(), arg.source) for arg in args
        )
        key = target, inputs, operator is None and self.mode  # what torch runs, it may refuse in the other mode
        if key in run.calls:
            _, result, norms, flops = run.calls[key]
            run.flops += [replace(term, node=run.names.node) for term in flops if run.mode is Mode.EVAL]
            run.norms += [replace(norm, mode=run.mode, node=run.names.node) for norm in norms]
            return result
        norms, flops = len(run.norms), len(run.flops)
        labels = [arg.labels for arg in args]  # kept, so that their memory is not used again
        if operator is None:
            result = super().call_module(target, args, {})
        else:
            with torch._C.DisableTorchFunctionSubclass():
                result = apply_operator(*operator, {})
        run.calls[key] = labels, result, run.norms[norms:], run.flops[flops:]
        return result

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Inputs have no names, and say so; those of a region may have."""
        return map_tensors(
            lambda tensor: self.named(tensor, f"input {target}"), super().placeholder(target, args, kwargs)
        )

    def named(self, tensor: Tensor, source: str) -> ChannelTensor:
        """An input as a ChannelTensor."""
        if isinstance(tensor, ChannelTensor):
            return tensor
        return ChannelTensor(tensor if self.run_.real else on_meta(tensor), (), self.run_, source)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        """What the model returns keeps its shape."""
        result = super().output(target, args, kwargs)
        if not self.region:
            for tensor in tensors_in(result):
                freeze_output(tensor)
        return result

    def as_values(self, leaf: Any) -> Any:
        """What is known of a tensor, or of the tensors in an object; anything else as it is."""
        if isinstance(leaf, Tensor):
            return self.as_value(leaf)
        tensors = tensors_in(leaf)
        return [self.as_value(tensor) for tensor in tensors] if tensors else leaf

    def as_value(self, tensor: Tensor) -> Value:
        """What is known of a tensor; a plain tensor has no labels."""
        labels = tensor.labels if isinstance(tensor, ChannelTensor) else ()
        data = tensor.data_ if isinstance(tensor, ChannelTensor) else tensor
        storage = data.untyped_storage()
        owner = storage._cdata not in self._storages
        self._storages[storage._cdata] = storage  # kept alive, so that its address is not used again
        return Value(tuple(data.shape), labels, data.dtype, owner)


def function_of(node: fx.Node) -> Any:
    """The function that a node calls, on its first argument, as a mode of torch sees it; None for other nodes."""
    if not node.args:
        return None
    if node.op == "call_method":
        return getattr(Tensor, str(node.target), None)
    return node.target if node.op == "call_function" else None


def freeze_output(tensor: Tensor) -> None:
    """Freeze the names of one returned tensor."""
    if isinstance(tensor, ChannelTensor):
        freeze_labels(tensor.run.names, tensor.labels, "output")


def name_within(region: str, name: str) -> str:
    """What a node is called in the whole model: by the path of the region that it stands in, and its own name."""
    return f"{region}/{name}" if region else name


def memory_place(label: Label) -> Any:
    """Where the names of a label stand in memory: labels of the same place are the same."""
    return label.__array_interface__["data"][0], label.shape, label.strides


def describe_cause(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}"


def run_on_names(
    graph: TracedModule, mode: Mode, inputs: Bound, state: dict[str, Tensor], run: NameRun
) -> dict[str, Any]:
    """Run one mode's graph. Returns, for each node, its result with tensors replaced by Values."""
    run.mode = mode
    runner = ChannelRunner(graph, mode, state, run)
    runner.start(inputs)
    return runner.values


def bind_placeholders(graph: fx.Graph, inputs: Bound) -> Iterator[Any]:
    """The arguments for each placeholder of ``graph``, in order."""
    args, kwargs = inputs
    positional = iter(args)
    names = {str(node.target) for node in graph.nodes if node.op == "placeholder"}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target)
        if name.startswith("**"):
            yield {key: value for key, value in kwargs.items() if key not in names}
        elif name.startswith("*"):
            yield tuple(positional)
        elif name in kwargs:
            yield kwargs[name]
        else:
            missing = object()
            value = next(positional, missing)
            if value is missing:
                if not node.args:
                    raise AnalysisError(f"example_inputs give no value for argument {name!r} of the model")
                value = node.args[0]
            yield value
