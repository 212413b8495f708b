"""PatternConv: convolutions with pattern-pruned kernels become dense ones with smaller kernels."""

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxprune.constants import kind
from fxprune.errors import PlanError
from fxprune.inputs import bind
from fxprune.pipeline import example_of
from fxprune.timing import forward, in_turns, ratio
from fxprune.trace import trace
from fxprune.traced import TracedModule

logger = logging.getLogger("fxprune")
MEASURES = ("inference", "training", None)
SPEEDUP = 1.05  # that a layer must gain at least
SECONDS = 0.1  # that each is run for, at least


@dataclass(frozen=True)
class PatternConv(PassBase):
    """A rewrite that does not compute the zeros of pattern-pruned kernels, such as ``passes.ClickTrain`` leaves.

    Where the taps that are not zero fit a smaller box, and all kernels that read an input channel have theirs in the
    same place, the channel is moved to that place, and a dense convolution with kernels of the size of the box does the
    rest: for the 2×2 corners of 3×3 kernels with 4/9 of the work. A depthwise convolution with a 1 at one tap does the
    moving. Where instead all kernels of a filter have their box in the same place, the result is moved, if the stride
    is 1. Both are ordinary convolutions: the rewritten model trains, compiles, is analysed and exports like any other.
    Equal to the original up to rounding, at any stride, zero padding, dilation and number of groups. The weight keeps
    its name and loses the zeros, so an optimizer must be made anew.

    A layer is rewritten only where that is measured to be at least 1.05 times as fast here, on the example inputs: the
    median of alternating runs. ``choices(graph)`` says which, and by how much; so does the log "fxprune".

    Attributes:
        measure: what should be faster: "inference", a forward pass; "training", a forward and a backward pass; or
            None, to rewrite all that can be without measuring.
        example_inputs: as for ``trace``; by default those of the Pipeline.
    """

    measure: str | None = "inference"
    example_inputs: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise PlanError(f"measure={self.measure!r} is not known; use {', '.join(map(repr, MEASURES))}")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Returns a new module; the rewritten layers keep their names and have a buffer ``pack``, what moves."""
        copied, choices = self._choose(graph_module)
        chosen = [choice for choice in choices if choice.taken]
        for choice in chosen:
            assert choice.form is not None
            copied.set_submodule(choice.layer, choice.form.conv)
            for graph in copied.distinct_graphs().values():
                for node in [node for node in graph.nodes if calls(node, choice.layer)]:
                    choice.form.put(graph, node)
        if not chosen:
            return PassResult(graph_module, False)
        copied.meta.pop("fxprune", None)  # no plan leads to this
        copied.recompile()
        return PassResult(copied, True)

    def choices(self, graph_module: fx.GraphModule) -> "list[Choice]":
        """What ``call`` does with each convolution, and why; timed anew. The model is unchanged."""
        return self._choose(graph_module)[1]

    def _choose(self, graph_module: fx.GraphModule) -> "tuple[TracedModule, list[Choice]]":
        """A copy of the model, and what to do with it."""
        example = example_of(graph_module, self.example_inputs)
        model = copy.deepcopy(trace(graph_module, example))
        result = []
        timed: dict[Any, float] = {}
        for path, conv, x in convolutions(model, example):
            why = refusal(model, path, conv)
            forms = [] if why else [form for form in (Form.of(conv, True), Form.of(conv, False)) if form]
            if not forms:
                result.append(Choice(path, None, None, why or "its kernels, with what they share, fill their box"))
                continue
            for form in forms if self.measure else ():
                if form.key(x) not in timed:
                    timed[form.key(x)] = speedup(conv, form, x, self.measure == "training")
            best = max(forms, key=lambda form: timed.get(form.key(x), -form.conv.weight.numel()))
            result.append(Choice(path, best, timed.get(best.key(x)), f"measured: {self.measure}"))
        for choice in result:
            logger.info("PatternConv: %s", choice)
        return model, result


@dataclass(frozen=True)
class Choice:
    """What becomes of a convolution.

    Attributes:
        layer: its path.
        form: what could take its place, or None.
        speedup: seconds of the layer over seconds of that; None where it was not measured.
        why: the layer stays, in words.
    """

    layer: str
    form: "Form | None" = None
    speedup: float | None = None
    why: str = ""

    @property
    def taken(self) -> bool:
        """Whether the layer is rewritten."""
        return self.form is not None and (self.speedup is None or self.speedup >= SPEEDUP)

    def __str__(self) -> str:
        if self.form is None:
            return f"{self.layer} stays: {self.why}"
        size = "×".join(map(str, self.form.conv.kernel_size))
        times = "" if self.speedup is None else f", {self.speedup:.2f} times as fast"
        return f"{self.layer} {'becomes' if self.taken else 'does not become'} {size}{times}"


@dataclass(frozen=True)
class Form:
    """A dense convolution with smaller kernels, and the depthwise one that moves channels.

    Attributes:
        conv: its buffer ``pack``, float[channels, 1, h, w], is the kernel of the depthwise one.
        before: whether that comes first, and moves input channels; else it moves output channels.
        padding: of the depthwise one.
    """

    conv: nn.Conv2d
    before: bool
    padding: tuple[int, ...]

    @classmethod
    def of(cls, conv: nn.Conv2d, before: bool) -> "Form | None":
        """What does the same as ``conv``; None where that saves nothing."""
        if not before and conv.stride != (1, 1):
            return None  # all that the stride leaves out would have to be computed
        weight, groups = conv.weight.detach(), conv.groups
        out, inner, *kernel = weight.shape
        used = (weight != 0).reshape(groups, out // groups, inner, *kernel).any(1 if before else 2)
        (rows, height), (columns, width) = box(used.any(3).flatten(0, 1)), box(used.any(2).flatten(0, 1))
        if [height, width] == kernel:
            return None
        along = (groups, 1, inner) if before else (groups, -1, 1)  # where the channels are on (group, filter, kernel)
        first, second = (
            at.reshape(along).expand(groups, out // groups, inner).reshape(out, inner) for at in (rows, columns)
        )
        boxes = weight.unfold(2, height, 1).unfold(3, width, 1)
        small = boxes[torch.arange(out)[:, None], torch.arange(inner), first, second]
        pack = weight.new_zeros(len(rows), 1, kernel[0] - height + 1, kernel[1] - width + 1)
        pack[torch.arange(len(rows)), 0, rows, columns] = 1
        padding = padding_of(conv)
        return cls(resized(conv, small, pack, (0, 0) if before else padding), before, padding if before else (0, 0))

    def __call__(self, x: Tensor) -> Tensor:
        """The result of the convolution."""
        pack: Any = self.conv.pack
        result: Tensor = self.conv(self.move(x, pack)) if self.before else self.move(self.conv(x), pack)
        return result

    def move(self, x: Any, pack: Any, call: Any = F.conv2d) -> Any:
        """Channels in their places."""
        return call(x, pack, None, (1, 1), self.padding, self.conv.dilation, len(self.conv.get_buffer("pack")))

    def put(self, graph: fx.Graph, node: fx.Node) -> None:
        """Replace a call of the original, ``node``."""

        def call(*args: Any) -> fx.Node:
            moved = graph.call_function(F.conv2d, args)
            moved.meta = dict(node.meta)
            return moved

        with graph.inserting_before(node):
            pack = graph.get_attr(f"{node.target}.pack")
            if self.before:
                node.args = (self.move(node.args[0], pack, call),)
        if not self.before:
            with graph.inserting_after(node):
                moved = self.move(node, pack, call)
            node.replace_all_uses_with(moved, lambda user: user is not moved)

    def key(self, x: Tensor) -> Any:
        """What the time depends on."""
        conv = self.conv
        own = conv.weight.shape, conv.stride, conv.padding, conv.dilation, conv.groups, self.padding
        return self.before, own, conv.get_buffer("pack").shape, x.shape, x.stride(), x.dtype


def box(used: Tensor) -> tuple[Tensor, int]:
    """Where along one axis the box of each channel begins, int64[channels], and its size.

    Args:
        used: bool[channels, taps], the taps that are not zero.
    """
    taps = used.shape[1]
    first = used.int().argmax(1)
    last = torch.where(used.any(1), taps - 1 - used.flip(1).int().argmax(1), first)
    size = int((last - first).max()) + 1
    return first.clamp(max=taps - size), size


def resized(conv: nn.Conv2d, weight: Tensor, pack: Tensor, padding: tuple[int, ...]) -> nn.Conv2d:
    """``conv`` with another weight and padding, and the buffer ``pack``."""
    new = copy.copy(conv)
    new.__dict__.update({name: dict(vars(conv)[name]) for name in ("_parameters", "_buffers")})
    new._non_persistent_buffers_set = set(conv._non_persistent_buffers_set)
    layout = torch.channels_last if conv.weight.stride(1) == 1 and conv.weight.shape[1] > 1 else torch.contiguous_format
    new.weight = nn.Parameter(weight.contiguous(memory_format=layout), conv.weight.requires_grad)
    new.kernel_size, new.padding = tuple(weight.shape[2:]), padding
    new._reversed_padding_repeated_twice = [each for each in reversed(padding) for _ in range(2)]
    new.register_buffer("pack", pack)
    return new


def padding_of(conv: nn.Conv2d) -> tuple[int, ...]:
    """The zeros on each side, in numbers."""
    if conv.padding == "same":
        return tuple(each * (size - 1) // 2 for each, size in zip(conv.dilation, conv.kernel_size, strict=True))
    return (0, 0) if isinstance(conv.padding, str) else tuple(conv.padding)


def refusal(model: TracedModule, path: str, conv: nn.Conv2d) -> str:
    """Why a convolution can't be rewritten, or ""."""
    nodes = [node for graph in model.distinct_graphs().values() for node in graph.nodes if calls(node, path)]
    if any(kind(model, node) != "contraction" for node in nodes):
        return "it has hooks, or is called in another way than with one tensor"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}"
    if conv.padding == "same" and any(d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)):
        return "padding='same' is not the same on both sides"
    if conv.groups > 1 and conv.weight.shape[1] == 1:
        return "it is depthwise"
    return "" if conv.weight.any() else "all its weights are zero"


def calls(node: fx.Node, path: str) -> bool:
    """Whether a node calls the module at ``path``."""
    return node.op == "call_module" and node.target == path


@torch.no_grad()
def convolutions(model: TracedModule, example: Any) -> Iterator[tuple[str, nn.Conv2d, Tensor]]:
    """Each two-dimensional convolution that runs in eval mode: its path, itself, and what it reads of ``example``."""
    read: dict[str, Tensor] = {}
    found = {path: each for path, each in model.named_modules() if isinstance(each, nn.Conv2d)}

    def reading(path: str, x: Tensor) -> None:
        read.setdefault(path, x)

    hooks = [
        each.register_forward_pre_hook(lambda _, args, path=path: reading(path, *args[:1]))
        for path, each in found.items()
    ]
    training = model.training
    args, kwargs = bind(example)
    model.eval()(*args, **kwargs)
    model.train(training)
    for hook in hooks:
        hook.remove()
    yield from ((path, found[path], x) for path, x in read.items())


def speedup(conv: nn.Conv2d, form: Form, x: Tensor, training: bool) -> float:
    """Seconds of ``conv`` over seconds of ``form`` on ``x``: the median over runs in turns."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(training)

    def run(layer: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        if not training:
            return forward(layer, (x,))
        gradient = torch.ones_like(layer(x))
        return lambda: torch.autograd.backward(layer(x), gradient)

    times = in_turns({"form": run(form), "conv": run(conv)}, seconds=SECONDS)
    return ratio(times["form"], times["conv"]).median
