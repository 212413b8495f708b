"""RemoveBranches: residual branches that add a constant, and nothing else, go out of the graph."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxprune.channels.analysis import analyze
from fxprune.channels.depth import is_sum
from fxprune.errors import PlanError
from fxprune.graph.layers import BATCH_NORMS, CONTRACTIONS, ELEMENTWISE, TRANSPOSED
from fxprune.graph.trace import trace
from fxprune.graph.traced import Mode, TracedModule, copy_model
from fxprune.options import allow_number, check_options
from fxprune.pipeline import example_of
from fxprune.rewrite.branches import Branch, remove_from


@dataclass(frozen=True)
class RemoveBranches(PassBase):
    """A rewrite that takes out residual branches whose last layer gives the same for every input.

    Such is a branch whose last convolution (or linear layer) has no weight in any channel that the norm behind it does
    not scale by zero: what PruneTrain's lasso comes to, and what ``zero_init_residual`` starts with. The constant that
    the branch adds stays, as its bias and norm, in train and in eval mode; the sum, and all that was computed for the
    branch alone, goes. This is what an emptied group of a Plan does to its branch, without a plan.

    Attributes:
        threshold: weights and scales that are all smaller count as zero. Above 0 the result is the model with those
            set to zero: ``reference``.
        example_inputs: as for ``trace``; by default those of the Pipeline.
    """

    threshold: float = 0.0
    example_inputs: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_options(self, PlanError, threshold=allow_number(least=0))

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Returns a new module, with the names of the old one for all that stays."""
        copied = self.reference(graph_module)
        branches = self.find(copied)
        if not any(branches.values()):
            return PassResult(graph_module, False)
        remove_from(copied, branches)
        copied.meta.pop("fxprune", None)  # the plan does not describe it any more
        copied.recompile()
        return PassResult(copied, True)

    def reference(self, graph_module: fx.GraphModule) -> TracedModule:
        """A copy of the model with what counts as zero set to zero: what the rewritten one equals."""
        copied: TracedModule = copy_model(trace(graph_module, example_of(graph_module, self.example_inputs)))
        with torch.no_grad():
            for branch in (branch for branches in self.find(copied).values() for branch in branches):
                for path in (str(node.target) for node in (branch.end, *branch.tail)):
                    layer: Any = copied.get_submodule(path)
                    if isinstance(getattr(layer, "weight", None), Tensor):
                        silent = self.silent(layer).reshape(
                            [-1 if at == axis_of(layer) else 1 for at in range(layer.weight.ndim)]
                        )
                        layer.weight.masked_fill_(silent, 0.0)
        return copied

    def find(self, graph: TracedModule) -> dict[Mode, list[Branch]]:
        """The branches of each mode's graph, in all that have them."""
        analysis = analyze(graph, example_of(graph, self.example_inputs))
        constant_branches = {
            place.mode: list(self.constant(graph, place.graph, place.values)) for place in analysis.places()
        }
        calls = Counter(node.target for nodes in graph.distinct_graphs().values() for node in nodes.nodes)
        within = Counter(
            path
            for branches in constant_branches.values()
            for branch in branches
            for path in find_replaced(graph, branch)
        )
        return {
            mode: [
                branch
                for branch in branches
                if all(calls[path] == within[path] for path in find_replaced(graph, branch))
            ]
            for mode, branches in constant_branches.items()
        }

    def constant(self, graph: TracedModule, nodes: fx.Graph, values: Any) -> Iterator[Branch]:
        """The branches of one graph that add a constant, at most one at each sum."""
        for join in nodes.nodes:
            for last in join.args[:2] if is_sum(join) else ():
                chain = chain_to(graph, last)
                if not chain:
                    continue
                branch = Branch(chain[0], tuple(chain[1:]), join)
                same = [getattr(values.get(node.name), "shape", None) for node in (join, branch.other)]
                if same[0] == same[1] and self.is_silent(graph, branch):
                    yield branch
                    break

    def is_silent(self, graph: TracedModule, branch: Branch) -> bool:
        """Whether each channel has no weight in the last contraction, or the scale zero in a norm behind it."""
        layers = [graph.get_submodule(str(node.target)) for node in (branch.end, *branch.tail)]
        norms = [layer for layer in layers if isinstance(layer, BATCH_NORMS) and layer.weight is not None]
        return bool(torch.stack([self.silent(layer) for layer in (layers[0], *norms)]).any(0).all())

    def silent(self, layer: Any) -> Tensor:
        """bool[output channels]: those whose weights count as zero."""
        weight = layer.weight.detach().abs().movedim(axis_of(layer), 0)
        peaks = weight.reshape(len(weight), -1).amax(1)
        silent: Tensor = peaks < self.threshold if self.threshold else peaks == 0
        return silent


def find_replaced(graph: TracedModule, branch: Branch) -> list[str]:
    """The layers of which something else stays; nobody else may call them."""
    paths = [str(node.target) for node in (branch.end, *branch.tail)]
    return [path for path in paths if isinstance(graph.get_submodule(path), (*CONTRACTIONS, *BATCH_NORMS))]


def axis_of(layer: nn.Module) -> int:
    """The axis of a weight along which its output channels are."""
    return 1 if isinstance(layer, TRANSPOSED) else 0


def chain_to(graph: TracedModule, last: fx.Node) -> list[fx.Node]:
    """From a contraction over norms and elementwise layers to ``last``, each with one user; [] if that is not there."""
    chain: list[fx.Node] = []
    node = last
    while node.op == "call_module" and len(node.users) == 1 and len(node.args) == 1 and not node.kwargs:
        layer = graph.get_submodule(str(node.target))
        chain.insert(0, node)
        if isinstance(layer, CONTRACTIONS):
            plain = "weight" in layer._parameters and not (isinstance(layer, TRANSPOSED) and layer.groups > 1)
            return chain if plain else []
        if not isinstance(layer, (*BATCH_NORMS, *ELEMENTWISE)):
            return []
        node = node.all_input_nodes[0]
    return []
