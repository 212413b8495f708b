"""FoldBatchNorm: batch norms go into the convolutions and linear layers before them. For inference only."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from fxprune.channels.analysis import analyze
from fxprune.graph.layers import BATCH_NORMS, TRANSPOSED
from fxprune.graph.trace import trace
from fxprune.graph.traced import Mode, TracedModule, copy_model
from fxprune.pipeline import EXAMPLE
from fxprune.rewrite.kinds import KINDS


@dataclass(frozen=True)
class FoldBatchNorm(PassBase):
    """A rewrite, for inference only: a batch norm in eval mode is a scale and a shift of each channel.

    They go into the weights and bias of the layer that the norm alone follows, w' = w * gamma / sqrt(var + eps) and
    b' = (b - mean) * gamma / sqrt(var + eps) + beta, and the norm leaves the graph. The layer keeps its name; it has a
    bias then. A layer or norm that is called at several places stays as it is.

    Attributes:
        example_inputs: as for ``trace``; by default those of the Pipeline. Without, norms behind linear layers stay:
            only shapes tell whether both mean the same axis.
    """

    inference_only = computes_weights = True
    example_inputs: Any = field(default=None, repr=False)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Returns a new module, with the names of the old one for all that stays."""
        example = self.example_inputs if self.example_inputs is not None else graph_module.meta.get(EXAMPLE)
        copied = copy_model(trace(graph_module, () if example is None else example)).eval()
        pairs = dict(self.find(copied, example))
        for norm, layer in pairs.items():
            module: Any = copied.get_submodule(layer)
            fuse: Any = fuse_linear_bn_eval if isinstance(module, nn.Linear) else fuse_conv_bn_eval
            transposed = {"transpose": True} if isinstance(module, TRANSPOSED) else {}
            copied.set_submodule(layer, fuse(module, copied.get_submodule(norm), **transposed))
            for graph in copied.distinct_graphs().values():
                for node in [node for node in graph.nodes if node.op == "call_module" and node.target == norm]:
                    node.replace_all_uses_with(node.args[0])
                    graph.erase_node(node)
            copied.delete_submodule(norm)
        if not pairs:
            return PassResult(graph_module, False)
        copied.meta.pop("fxprune", None)  # the plan does not describe it any more
        copied.train(graph_module.training).recompile()
        return PassResult(copied, True)

    def find(self, model: TracedModule, example: Any) -> Iterator[tuple[str, str]]:
        """Each norm that can go, and the layer that takes it."""
        graphs = model.distinct_graphs()
        calls: dict[str, list[fx.Node]] = {}
        for graph in graphs.values():
            for node in graph.nodes:
                if node.op == "call_module":
                    calls.setdefault(str(node.target), []).append(node)
        shapes = analyze(model, example).values[Mode.EVAL][""] if example is not None else {}
        for path, nodes in calls.items():
            norm = model.get_submodule(path)
            if type(norm) not in BATCH_NORMS or norm.running_mean is None:
                continue
            before = {str(node.args[0].target) if isinstance(node.args[0], fx.Node) else "" for node in nodes}
            layer = before.pop() if len(before) == 1 else ""
            if layer not in calls or len(calls[layer]) != len(nodes) or len(nodes) > len(graphs):
                continue
            if any(len(node.users) != 1 for node in calls[layer]):
                continue
            module: Any = model.get_submodule(layer)
            if KINDS.get(type(module)) != "contraction" or "weight" not in module._parameters:
                continue
            flat = isinstance(module, nn.Linear) and len(getattr(shapes.get(nodes[0].name), "shape", ())) == 2
            conv = not isinstance(module, nn.Linear) and not (isinstance(module, TRANSPOSED) and module.groups > 1)
            if flat or conv:
                yield path, layer
