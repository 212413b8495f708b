"""NaN: where a model's values stop being numbers, for which no comparison can stand."""

from typing import Any

import torch
from torch import fx

from fxprune.channels.interpret import GraphInterpreter, bind_placeholders
from fxprune.graph.inputs import Bound, for_mode, tensors_in
from fxprune.graph.places import describe_place
from fxprune.graph.traced import Mode, Model, TracedModule


class FirstNan(GraphInterpreter):
    """Runs the graph of one mode, and remembers the first node that gives NaN."""

    def __init__(self, module: TracedModule, mode: Mode) -> None:
        super().__init__(module, graph=module.graphs[mode])
        self.node: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Run a node."""
        result = super().run_node(n)
        if self.node is None and has_nan(result):
            self.node = n
        return result


def has_nan(value: Any) -> bool:
    """Whether a tensor in ``value`` holds NaN."""
    return any(bool(tensor.isnan().any()) for tensor in tensors_in(value) if tensor.is_floating_point())


def find_nan(model: Model, mode: Mode, inputs: Bound) -> str:
    """The first node of ``model``, and its line, that gives NaN for ``inputs``, in words; "" where there is none."""
    if not isinstance(model, TracedModule):
        return ""
    model.train(mode.training)
    run = FirstNan(model, mode)
    with torch.no_grad():
        run.run(*bind_placeholders(run.graph, for_mode(inputs, mode, model)), enable_io_processing=False)
    return describe_place(run.node) if run.node is not None else ""


def explain_nan(mode: Mode, kind: str, name: str, dense: str, masked: str) -> str:
    """Why nothing can be said of an output or gradient that is NaN.

    Args:
        mode: in which it is.
        kind: what it is, an output or a gradient.
        name: which one.
        dense: where the model gives NaN before anything is removed; "" where it does not.
        masked: where it does with what is removed set to zero.
    """
    said = f"{kind} {name} is NaN in {mode.value} mode, so nothing can be compared: "
    if dense:
        return f"{said}the model itself gives NaN on these example_inputs, first at {dense}. Give others, or mend that"
    if masked:
        return (
            f"{said}with the removed channels at zero the model gives NaN, first at {masked}: it divides by what is "
            "zero there, say, or takes the variance of one value. Add a small number to that, or keep more channels"
        )
    return (
        f"{said}it arises in the backward pass, from a square root or a norm of what is zero, say. Give other "
        "example_inputs, or add a small number there"
    )
