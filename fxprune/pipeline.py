"""Pipeline: rewrite passes in a row, anyone's, with the graph checked after each.

A rewrite pass takes a GraphModule and returns a ``torch.fx`` PassResult: any ``PassBase`` will do. This is the only
file that uses torch's pass infrastructure.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.errors import PassError
from fxprune.graph.inputs import bind_inputs, map_tensors
from fxprune.graph.trace import trace
from fxprune.graph.traced import Mode, TracedModule, copy_model, device_of, regions_of
from fxprune.report.dump import Dump
from fxprune.rewrite.verify import TOLERANCE, outputs_of, relative_difference

logger = logging.getLogger("fxprune")
Pass = Callable[[fx.GraphModule], Any]
EXAMPLE = "example_inputs"  # where a pass finds the Pipeline's, in the meta of its module


@dataclass(frozen=True)
class Step:
    """What one pass did: seconds it took, and the largest relative difference it made to the outputs."""

    name: str
    modified: bool
    seconds: float
    difference: float | None

    def __str__(self) -> str:
        did = "changed the graph" if self.modified else "left the graph as it was"
        same = "" if self.difference is None else f", outputs equal to {self.difference:.1e}"
        return f"{self.name}: {did} in {self.seconds:.2f} s{same}"


class Pipeline:
    """Runs rewrite passes on a copy of a traced model.

    After each pass the graph is linted and recompiled, a pass that says it changed nothing is held to it, and with
    ``example_inputs`` the shapes and values of the outputs are compared with those before, in float64, in every mode
    that the pass keeps (one with ``inference_only = True`` answers for eval mode only), to 1e-10; where the pass has
    ``computes_weights = True``, to what rounding them to the model's dtype does. A pass that means to change
    what the model computes has a method ``reference(graph)``, and the comparison is with the module that this returns.
    Where the environment variable FXPRUNE_DUMP names a folder, graph and groups are written there after each pass.

    Attributes:
        steps: what each pass of the last call did.
    """

    def __init__(self, passes: Sequence[Pass], example_inputs: Any = None) -> None:
        """``passes``: callables that take a GraphModule and return a PassResult, a GraphModule, or None if in place."""
        self.passes = tuple(passes)
        self.example_inputs = example_inputs
        self.steps: list[Step] = []

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        """Run the passes. Returns PassResult(TracedModule, whether any changed it); ``graph`` is unchanged.

        Raises:
            PassError: a pass raised, broke the graph, or changed what the model computes; names it and those before.
        """
        module = copy_model(trace(graph, () if self.example_inputs is None else self.example_inputs))
        if not isinstance(module, TracedModule):
            raise PassError(
                f"{type(module).__name__} is no single graph; run the pipeline on its regions: "
                f"{', '.join(regions_of(module))}, and put them back with set_submodule"
            )
        self.steps = []
        dump = Dump.from_environment(self.example_inputs)
        dump.write("before", module)
        for pass_ in self.passes:
            module = self.step(pass_, module)
            dump.write(self.steps[-1].name, module)
            logger.info("%s", self.steps[-1])
        return PassResult(module, any(step.modified for step in self.steps))

    def step(self, pass_: Pass, module: TracedModule) -> TracedModule:
        """Run and check one pass."""
        name = type(pass_).__name__ if not hasattr(pass_, "__name__") else pass_.__name__
        module.meta[EXAMPLE] = self.example_inputs
        before = copy_model(module)
        start = time.perf_counter()
        try:
            expected = pass_.reference(before) if hasattr(pass_, "reference") else before
            after, modified = apply_pass(pass_, module)
            for graph in after.distinct_graphs().values():
                graph.lint()
            after.recompile()
        except Exception as error:
            raise PassError(f"{self.place(name)} failed: {type(error).__name__}: {error}") from error
        for held in (module, before, expected, after):
            held.meta.pop(EXAMPLE, None)
        seconds = time.perf_counter() - start
        if not modified and code_of(after) != code_of(before):
            raise PassError(f"{self.place(name)} says it changed nothing, but the graph is another one")
        gap = None
        if self.example_inputs is not None:
            dtype = device_of(before)[1] if getattr(pass_, "computes_weights", False) else torch.float64
            modes = (Mode.EVAL,) if getattr(pass_, "inference_only", False) else tuple(Mode)
            gap = self.compare(name, expected, after, modes, TOLERANCE.get(dtype, 1e-2))
        self.steps.append(Step(name, modified, seconds, gap))
        return after

    def compare(
        self, name: str, before: TracedModule, after: TracedModule, modes: Sequence[Mode], tolerance: float
    ) -> float:
        """The largest relative difference of the outputs in ``modes``; raises PassError above ``tolerance``."""
        inputs = map_tensors(
            lambda t: t.double() if t.is_floating_point() else t, bind_inputs(self.example_inputs, before)
        )
        old, new = before.double(), copy_model(after).double()
        worst = 0.0
        for mode in modes:
            where = f"{mode.value} mode"
            expected = outputs_of(old, mode, inputs, False, None).outputs
            try:
                outputs = outputs_of(new, mode, inputs, False, None).outputs
            except Exception as error:
                raise PassError(
                    f"{self.place(name)} broke the graph: in {where} it does not run: {type(error).__name__}: {error}"
                ) from error
            shapes, were = [tuple(t.shape) for t in outputs], [tuple(t.shape) for t in expected]
            if shapes != were:
                raise PassError(f"{self.place(name)} changed the output shapes in {where} from {were} to {shapes}")
            for a, b in zip(expected, outputs, strict=True):
                gap = relative_difference(a, b)
                if not gap <= tolerance:
                    raise PassError(f"{self.place(name)} changed the outputs in {where} by {gap:.2e} (relative)")
                worst = max(worst, gap)
        return worst

    def place(self, name: str) -> str:
        """The pass and those that ran before it."""
        before = ", ".join(step.name for step in self.steps)
        return f"pass {name} (after {before})" if before else f"pass {name} (the first)"


def example_of(module: fx.GraphModule, inputs: Any = None) -> Any:
    """The example inputs for a pass over ``module``: ``inputs``, the pass's own, or those of the Pipeline that runs it.

    Raises:
        PassError: there are none.
    """
    example = module.meta.get(EXAMPLE) if inputs is None else inputs
    if example is None:
        raise PassError(
            "this pass needs example inputs: Pipeline([...], example_inputs), or example_inputs= of the pass"
        )
    return example


def code_of(module: TracedModule) -> list[str]:
    """The source of each mode's graph."""
    return [graph.python_code("self").src for graph in module.distinct_graphs().values()]


def apply_pass(pass_: Pass, module: TracedModule) -> tuple[TracedModule, bool]:
    """Run a pass on every mode's graph. Returns the module and whether the pass says it changed it."""
    modified = False
    training = module.training
    for mode in module.distinct_graphs():
        module.training = mode.training if len(module.distinct_graphs()) > 1 else training
        untouched = module.graph.python_code("self").src
        result = pass_(module)
        changed = getattr(result, "modified", None)
        new = result if isinstance(result, fx.GraphModule) else getattr(result, "graph_module", module)
        module = new if isinstance(new, TracedModule) else adopt_graph(module, new)
        modified |= bool(module.graph.python_code("self").src != untouched if changed is None else changed)
    module.training = training
    return module, modified


def adopt_graph(module: TracedModule, source: fx.GraphModule) -> TracedModule:
    """``module`` with the graph of ``source`` in the current mode, and what that graph refers to."""
    for node in source.graph.nodes:
        if node.op == "call_module":
            module.add_submodule(node.target, source.get_submodule(node.target))
        elif node.op == "get_attr":
            path, _, name = node.target.rpartition(".")
            setattr(module.get_submodule(path), name, getattr(source.get_submodule(path), name))
    module.graph = source.graph
    return module
