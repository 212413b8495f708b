"""Steered: run on channel names a model in which plain Python calls the graphs.

Python can't be rewritten, so nothing that it sees of a size may change. The model runs on real data, for Python that
looks at values, and while Python is at work it is watched: a size that it reads is frozen, and so are the channels that
it gives to an operator whose other arguments would not fit fewer of them.
"""

import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fxprune.channels.interpret import ChannelRunner, describe_cause, freeze_output, in_mode, name_within
from fxprune.channels.labels import Label, freeze_labels, label_along
from fxprune.channels.names import Bools, Names
from fxprune.channels.tensor import ChannelTensor, NameRun, carry_out
from fxprune.channels.values import Cutter, Value
from fxprune.errors import AnalysisError, FxpruneError
from fxprune.graph.inputs import Bound, map_tensors
from fxprune.graph.keep import attributes_kept
from fxprune.graph.places import describe_error_place, is_users
from fxprune.graph.regions import replaced_forwards, steered_layers
from fxprune.graph.traced import Mode, TracedModule, Values, reasons_of, regions_of
from fxprune.graph.watch import ALONE

logger = logging.getLogger("fxprune")


class Steered:
    """Runs a model mode by mode. ``values`` and ``inputs`` say of each region what its graphs were given and gave.

    ``values``: mode -> region -> node -> value. A layer that Python itself calls counts as a region with two nodes,
    "input" and "output". ``inputs``: mode -> region -> its arguments.
    """

    def __init__(self, model: nn.Module, state: Mapping[str, Tensor], run: NameRun) -> None:
        self.model, self.state, self.run = model, state, run
        self.regions = regions_of(model)
        self.layers = steered_layers(model)
        self.steering = Steering(run)
        self.unsteady = unsteady_parts(model)
        self.values: dict[Mode, dict[str, dict[str, Any]]] = {mode: {} for mode in Mode}
        self.inputs: dict[Mode, dict[str, Bound]] = {mode: {} for mode in Mode}

    def start(self, mode: Mode, inputs: Bound) -> None:
        """Run the model in one mode.

        Raises:
            AnalysisError: it does not run.
        """
        # Each module once: functional_call would not restore one that it swaps under two names.
        parts = {path: (*part._parameters, *part._buffers) for path, part in self.model.named_modules()}
        names = [f"{path}.{leaf}".removeprefix(".") for path, leaves in parts.items() for leaf in leaves]
        state = {name: self.state[name] for name in names if name in self.state}
        self.run.mode = mode
        try:
            with (
                ALONE,
                in_mode(self.model, mode),
                attributes_kept(self.model),
                self.watched(),
                leave_untouched(mode),
                self.steering,
            ):
                result = functional_call(self.model, state, *inputs, tie_weights=False)
        except FxpruneError:
            raise
        except Exception as error:
            backward = "does not require grad" in str(error)
            raise AnalysisError(
                f"{type(self.model).__name__} does not run on channel names in {mode.value} mode "
                f"({describe_error_place(self.model, error)}): {describe_cause(error)}"
                + "; a backward pass within forward can't be followed"
                * backward
            ) from error
        for tensor in tensors_within(result):
            freeze_output(tensor)

    def other_graphs(self, mode: Mode) -> None:
        """Run the graphs that regions have for ``mode`` on what they got in the other mode."""
        self.run.mode = mode
        for path, bound in self.inputs[mode.other].items():
            region = self.regions[path]
            if mode in region.distinct_graphs() and path not in self.inputs[mode]:
                self.record(path, region, mode, bound)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While this holds, calls of regions and layers come here."""
        watched: dict[nn.Module, Callable[..., Any]] = {
            region: self.call_of_region(path, region) for path, region in self.regions.items()
        }
        watched |= {layer: self.call_of_layer(path, layer.forward) for path, layer in self.layers.items()}
        with replaced_forwards(watched):
            yield

    def call_of_region(self, path: str, region: TracedModule) -> Callable[..., Any]:
        """What stands in for the forward of a region."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.steering.away():
                result = self.record(path, region, self.run.mode, (args, kwargs))
            return map_tensors(as_plain, self.settled(path, result))

        return forward

    def record(self, path: str, region: TracedModule, mode: Mode, bound: Bound) -> Any:
        """Run a region on names. What it was given and what its nodes gave is kept of its first call."""
        prefix = path + "."
        state = {name.removeprefix(prefix): tensor for name, tensor in self.state.items() if name.startswith(prefix)}
        runner = ChannelRunner(region, mode, state, self.run, path)
        result = runner.start(bound)
        first = self.inputs[mode].setdefault(path, bound)
        if first is bound:
            self.values[mode][path] = runner.values
        elif varying_sizes(first) != varying_sizes(
            bound
        ):  # what is baked into its graph was made to fit the first call
            for tensor in tensors_within((first, bound)):
                if isinstance(tensor, ChannelTensor):
                    freeze_labels(self.run.names, tensor.labels, f"{path} is called with other channels elsewhere")
        return result

    def call_of_layer(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """What stands in for the forward of a layer that Python itself calls: its attributes will follow its sizes."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.run.names.node = name_within(path, "output")
            with self.steering.away():
                result = forward(*args, **kwargs)
            for name, value in (("input", (*args, *kwargs.values())), ("output", result)):
                tensor = next(iter(tensors_within(value)), None)
                if tensor is not None:
                    self.values[self.run.mode].setdefault(path, {}).setdefault(name, describe_known(tensor))
            return map_tensors(as_plain, self.settled(path, result))

        return call

    def settled(self, path: str, result: Any) -> Any:
        """What a region or layer gives; frozen where Python may take it elsewhere in another run."""
        if path.startswith(self.unsteady):
            for tensor in tensors_within(result):
                if isinstance(tensor, ChannelTensor):
                    freeze_labels(self.run.names, tensor.labels, "plain Python here may go another way in other runs")
        return result


UNSTEADY = ("is another after each run", "asks whether autocast is on", "asks torch.is_inference_mode_enabled")


def unsteady_parts(model: nn.Module) -> tuple[str, ...]:
    """With what the paths begin of the parts whose Python does something else in other runs: it counts them, say."""
    reasons = reasons_of(model)
    parts = {f"{path}." if path else "": path for path in reasons if any(words in reasons[path] for words in UNSTEADY)}
    return tuple(
        part
        for part, path in parts.items()
        if " of the model is another" in reasons[path]
        or not any(other.startswith(part) for other in parts.keys() - {part})
    )


def as_plain(tensor: Tensor) -> Tensor:
    """A tensor without names is an ordinary one to Python."""
    return tensor.data_ if isinstance(tensor, ChannelTensor) and not tensor.labels else tensor


def varying_sizes(bound: Bound) -> list[Any]:
    """Where the channels of a call's arguments stand: the sizes of the axes along which they vary."""
    return [
        [label.shape for label in tensor.labels] if isinstance(tensor, ChannelTensor) else []
        for tensor in tensors_within(bound)
    ]


def tensors_within(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, in lists, dicts and the attributes of objects."""
    waiting, seen = [value], set[int]()
    while waiting:
        item = waiting.pop(0)
        if isinstance(item, Tensor):
            yield item
        elif id(item) not in seen and not isinstance(item, (str, type, nn.Module)):
            seen.add(id(item))
            if isinstance(item, Mapping):
                waiting += item.values()
            elif isinstance(item, (list, tuple, set)):
                waiting += item
            elif hasattr(item, "__dict__"):
                waiting += vars(item).values()


@contextmanager
def leave_untouched(mode: Mode) -> Iterator[None]:
    """As models are run in this mode, with gradients only where they train, and with the random stream put back."""
    with torch.inference_mode(False), torch.set_grad_enabled(mode.training), torch.random.fork_rng():
        yield


class Steering:
    """Watches what plain Python reads of ChannelTensors and what it calls with them, while this context holds."""

    def __init__(self, run: NameRun) -> None:
        self.run = run
        self.inside = False  # a function that Python called is at work
        self.reads: dict[Any, Callable[..., Any]] = {
            Tensor.shape.__get__: self.shape,  # type: ignore[attr-defined]
            Tensor.size: lambda tensor, dim=None: self.shape(tensor) if dim is None else self.size(tensor, dim),
            Tensor.__len__: lambda tensor: self.size(tensor, 0),
            Tensor.numel: lambda tensor: math.prod(self.shape(tensor)),
            Tensor.nelement: lambda tensor: math.prod(self.shape(tensor)),
            **{
                getattr(Tensor, name).__get__: read
                for name, read in {
                    "requires_grad": self.requires_grad,
                    "grad_fn": lambda tensor: self.requires_grad(tensor) or None,
                    "is_leaf": lambda tensor: not self.requires_grad(tensor),
                }.items()
            },
            Tensor.register_hook: lambda tensor, hook: None,  # there is no backward pass here
            Tensor.retain_grad: lambda tensor: None,
            Tensor.tolist: lambda tensor: self.data(tensor).tolist(),
            Tensor.numpy: lambda tensor: self.data(tensor).numpy(),
            Tensor.__array__: lambda tensor, *dtype: np.asarray(self.data(tensor), *dtype),
        }

    def __enter__(self) -> None:
        ChannelTensor.steering, self.inside = self, False

    def __exit__(self, *error: object) -> None:
        ChannelTensor.steering = None

    @contextmanager
    def away(self) -> Iterator[None]:
        """While a graph or a layer is at work, which can be rewritten."""
        ChannelTensor.steering = None
        try:
            yield
        finally:
            ChannelTensor.steering = self

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One call of a function by Python. What it gives without names is an ordinary tensor."""
        if self.inside:
            return carry_out(func, args, kwargs)
        self.locate()
        if func in self.reads:
            return self.reads[func](*args, **kwargs)
        before, count = map_tensors(describe_known, (args, kwargs)), len(self.run.names)
        self.inside = True
        try:
            result = carry_out(func, args, kwargs)
            self.run.names.freeze(np.arange(count, len(self.run.names)), "plain Python adds it")  # by padding
            self.check(func, before, result)
        finally:
            self.inside = False
        return result if any(result is arg for arg in args) else map_tensors(as_plain, result)  # in place: the same

    def locate(self) -> str:
        """Say where in the user's Python the run is, for the reasons of what is frozen."""
        frame = sys._getframe(1)
        while frame is not None and not is_users(frame.f_code.co_filename):
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None:
            self.run.names.node = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        return self.run.names.node

    def shape(self, tensor: ChannelTensor) -> Any:
        """The shape; reading one of its sizes freezes that."""
        return Sizes(tensor) if tensor.labels else tensor.data_.shape

    def size(self, tensor: ChannelTensor, axis: int) -> int:
        """One size, which may not change any more."""
        label = label_along(tensor.labels, axis % tensor.data_.ndim)
        if label is not None:
            self.locate()
            self.run.names.freeze(label, "plain Python reads its size")
        return tensor.data_.shape[axis]

    def requires_grad(self, tensor: Tensor) -> bool:
        """Whether a tensor has a gradient where the model is run: where it trains, all that is computed has."""
        return self.run.mode.training and tensor.is_floating_point()

    def data(self, tensor: ChannelTensor) -> Tensor:
        """The data, for Python to look at."""
        freeze_labels(self.run.names, tensor.labels, "plain Python reads it")
        return tensor.data_

    def check(self, func: Any, arguments: Any, result: Any) -> None:
        """Freeze what a call is given that would not do the same with fewer channels."""
        names = self.run.names
        labels = [label for value in known_in(arguments) for label in value.labels]
        ends = [name for label in labels for name in (label.flat[0], label.flat[-1])]
        roots = np.unique(names.find(np.array(ends, dtype=np.int64)))
        free = roots[~names.frozen(roots)].tolist()
        if not free:
            return
        results = [describe_known(tensor) for tensor in tensors_within(result)]
        if hides_a_size(func, arguments) or not all(call_fits(names, func, arguments, results, name) for name in free):
            called = getattr(func, "__name__", str(func))
            for value in (*known_in(arguments), *results):
                freeze_labels(names, value.labels, f"plain Python calls {called} with sizes of its own")


class Sizes(tuple[int, ...]):
    """The shape of a tensor with names, as plain Python sees it: looking at a size freezes it."""

    read: Callable[[int], int]

    def __new__(cls, tensor: ChannelTensor) -> Self:
        """As long as the tensor has axes."""
        self = super().__new__(cls, tensor.data_.shape)
        watch = ChannelTensor.steering
        self.read = lambda axis: watch.size(tensor, axis)
        return self

    def __getitem__(self, key: Any) -> Any:
        axes = range(len(self))[key]
        return self.read(axes) if isinstance(axes, int) else torch.Size(map(self.read, axes))

    def __iter__(self) -> Iterator[int]:
        return map(self.read, range(len(self)))

    def __eq__(self, other: object) -> bool:
        return tuple(self) == other

    def __ne__(self, other: object) -> bool:
        return tuple(self) != other

    def __add__(self, other: Any) -> Any:
        return tuple(self) + tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def numel(self) -> int:
        """The product of all sizes."""
        return math.prod(self)


@dataclass(frozen=True)
class Known(Value):
    """What is known of a tensor, and the order of its axes in memory: views depend on it."""

    order: tuple[int, ...] = ()


def describe_known(tensor: Tensor) -> Known:
    """What is known of a tensor at this moment."""
    data = tensor.data_ if isinstance(tensor, ChannelTensor) else tensor
    labels = tensor.labels if isinstance(tensor, ChannelTensor) else ()
    order = tuple(sorted(range(data.ndim), key=data.stride, reverse=True))
    return Known(tuple(data.shape), labels, data.dtype, False, order)


def known_in(tree: Any) -> list[Known]:
    """The values in a tree of arguments."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Known)]


def hides_a_size(func: Any, arguments: Any) -> bool:
    """Whether the meaning of a call depends on a size of a value that none of its arguments shows."""
    if func in (F.group_norm, torch.group_norm, F.multi_head_attention_forward):
        return True
    if func is not F.scaled_dot_product_attention:
        return False
    args, kwargs = arguments
    return kwargs.get("scale") is None and label_along(args[0].labels, -1) is not None


def call_fits(names: Names, func: Any, arguments: Any, results: list[Known], name: int) -> bool:
    """Whether the call as it stands gives what is predicted where the channel of ``name`` is gone."""
    cut = Cutter(Without(names, name))

    def narrowed(value: Known) -> Tensor:
        shape = cut.value(value).shape
        dense = torch.empty([shape[axis] for axis in value.order], dtype=value.dtype, device="meta")
        return dense.permute([value.order.index(axis) for axis in range(len(shape))])

    try:
        args, kwargs = pytree.tree_map_only(Known, narrowed, arguments)
        result = func(*args, **({**kwargs, "device": "meta"} if "device" in kwargs else kwargs))
        expected = [cut.value(value).shape for value in results]
    except Exception:  # too few channels for a size that the call names, or what is left is no rectangle
        return False
    return [tuple(tensor.shape) for tensor in tensors_within(result)] == expected


class Without:
    """Stands in for the bools that say which names stay: all but the class of one."""

    def __init__(self, names: Names, name: int) -> None:
        self.names, self.name = names, name

    def __getitem__(self, label: Label) -> Bools:
        result: Bools = self.names.find(label) != self.name
        return result


def run_steered(
    model: nn.Module, inputs: Bound, state: Mapping[str, Tensor], run: NameRun
) -> tuple[dict[Mode, dict[str, Bound]], Values, str]:
    """Run ``model`` in both modes. Returns what regions were given, all values, and why train mode could not be run.

    Not every model trains on what it evaluates; then the graphs that its regions have for train mode are run alone.
    """
    steered = Steered(model, state, run)
    steered.start(Mode.EVAL, inputs)
    problem = ""
    try:
        steered.start(Mode.TRAIN, inputs)
    except AnalysisError as error:
        problem = str(error)
        logger.info("%s", problem)
    steered.other_graphs(Mode.TRAIN)
    steered.other_graphs(Mode.EVAL)
    return steered.inputs, steered.values, problem
