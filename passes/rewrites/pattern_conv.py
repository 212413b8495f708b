"""PatternConv: convolutions with pattern-pruned kernels become dense ones with smaller kernels."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxprune.budget.timing import in_turns, make_forward, ratio_of_times
from fxprune.errors import PlanError
from fxprune.graph.inputs import bind_inputs
from fxprune.graph.layers import is_depthwise
from fxprune.graph.trace import trace
from fxprune.graph.traced import TracedModule, copy_model, in_eval
from fxprune.options import allow_words, check_options
from fxprune.pipeline import example_of
from fxprune.rewrite.kinds import kind_of

from ._boxes import Choice, Form

logger = logging.getLogger("fxprune")
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
        check_options(self, PlanError, measure=allow_words("inference", "training").or_none())

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Returns a new module; the rewritten layers keep their names and have a buffer ``pack``, what moves."""
        copied, choices = self._choose(graph_module)
        chosen = [choice for choice in choices if choice.taken]
        for choice in chosen:
            assert choice.form is not None
            copied.set_submodule(choice.layer, choice.form.conv)
            for graph in copied.distinct_graphs().values():
                for node in [node for node in graph.nodes if calls_module(node, choice.layer)]:
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
        model = copy_model(trace(graph_module, example))
        result = []
        timed: dict[Any, float] = {}
        for path, conv, x in find_pattern_convolutions(model, example):
            why = why_not_rewritten(model, path, conv)
            forms = [] if why else [form for form in (Form.of(conv, True), Form.of(conv, False)) if form]
            if not forms:
                result.append(Choice(path, None, None, why or "its kernels, with what they share, fill their box"))
                continue
            for form in forms if self.measure else ():
                if form.key(x) not in timed:
                    timed[form.key(x)] = measure_speedup(conv, form, x, self.measure == "training")
            best = max(forms, key=lambda form: timed.get(form.key(x), -form.conv.weight.numel()))
            result.append(Choice(path, best, timed.get(best.key(x)), f"measured: {self.measure}"))
        for choice in result:
            logger.info("PatternConv: %s", choice)
        return model, result


def why_not_rewritten(model: TracedModule, path: str, conv: nn.Conv2d) -> str:
    """Why a convolution can't be rewritten, or ""."""
    nodes = [node for graph in model.distinct_graphs().values() for node in graph.nodes if calls_module(node, path)]
    if any(kind_of(model, node) != "contraction" for node in nodes):
        return "it has hooks, or is called in another way than with one tensor"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}"
    if conv.padding == "same" and any(d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)):
        return "padding='same' is not the same on both sides"
    if is_depthwise(conv):
        return "it is depthwise"
    return "" if conv.weight.any() else "all its weights are zero"


def calls_module(node: fx.Node, path: str) -> bool:
    """Whether a node calls the module at ``path``."""
    return node.op == "call_module" and node.target == path


@torch.no_grad()
def find_pattern_convolutions(model: TracedModule, example: Any) -> Iterator[tuple[str, nn.Conv2d, Tensor]]:
    """Each two-dimensional convolution that runs in eval mode: its path, itself, and what it reads of ``example``."""
    read: dict[str, Tensor] = {}
    convolutions = {path: module for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}

    def reading(path: str, x: Tensor) -> None:
        read.setdefault(path, x)

    hooks = [
        module.register_forward_pre_hook(lambda _, args, path=path: reading(path, *args[:1]))
        for path, module in convolutions.items()
    ]
    args, kwargs = bind_inputs(example)
    with in_eval(model):
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    yield from ((path, convolutions[path], x) for path, x in read.items())


def measure_speedup(conv: nn.Conv2d, form: Form, x: Tensor, training: bool) -> float:
    """Seconds of ``conv`` over seconds of ``form`` on ``x``: the median over runs in turns."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(training)

    def run(layer: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        if not training:
            return make_forward(layer, (x,))
        gradient = torch.ones_like(layer(x))
        return lambda: torch.autograd.backward(layer(x), gradient)

    times = in_turns({"form": run(form), "conv": run(conv)}, seconds=SECONDS)
    return ratio_of_times(times["form"], times["conv"]).median
