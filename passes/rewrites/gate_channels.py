"""GateChannels: PruneTrain's channel gating. Each convolution reads and writes only the channels that it uses."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxprune.channels.depth import is_sum
from fxprune.errors import PlanError
from fxprune.graph.layers import BATCH_NORMS, CONVOLUTIONS
from fxprune.graph.traced import TracedModule, copy_model
from fxprune.options import allow_number, check_options


@dataclass(frozen=True)
class _Gate:
    """What a convolution uses: ``reads`` and ``writes``, int64, sorted; ``norm``, which alone follows it, or ""."""

    reads: Tensor
    writes: Tensor
    norm: str


@dataclass(frozen=True)
class GateChannels(PassBase):
    """Lym et al., "PruneTrain" (2019), channel gating: for after training, on what the channel union leaves.

    A rewrite, for ``fxprune.Pipeline`` or alone. Every convolution with one group selects the input channels that it
    has weights for (``index_select``). Where a convolution and its batch norm feed a sum, they compute only the
    channels that the convolution has weights for, and zeros stand for the others in the sum. The result equals the
    model with the other slices, and the scale and shift of the norm there, set to zero: ``reference``. Norms that
    shifted such channels make that another function than before.

    It takes FLOPs off and adds copies, so measure whether it is faster: its authors found the union faster. What comes
    out is for running and exporting; a Session and ``fxprune.save`` need the model before.

    Attributes:
        threshold: a slice whose weights are all smaller counts as zero. One is kept where all are.
    """

    threshold: float = 1e-4

    def __post_init__(self) -> None:
        check_options(self, PlanError, threshold=allow_number(least=0))

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graphs of all modes, and the layers, in place."""
        gates = self.gates(graph_module)
        for graph in graphs_of(graph_module):
            for node in list(graph.nodes):
                if node.op == "call_module" and node.target in gates:
                    gate_node(graph_module, graph, node, gates[node.target])
        for path, gate in gates.items():
            cut_convolution(graph_module, path, gate)
        if gates:
            graph_module.meta.pop("fxprune", None)  # the plan does not describe it any more
        graph_module.recompile()
        return PassResult(graph_module, bool(gates))

    def reference(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """A copy of the model that the rewritten one equals: the slices that are not used are zero."""
        copied = copy_model(graph_module)
        with torch.no_grad():
            for path, gate in self.gates(graph_module).items():
                kept = torch.zeros_like(copied.get_parameter(f"{path}.weight"))
                kept[gate.writes[:, None], gate.reads] = 1
                copied.get_parameter(f"{path}.weight").mul_(kept)
                if gate.norm:
                    written = torch.zeros(len(kept)).to(kept).index_fill(0, gate.writes, 1.0)
                    copied.get_parameter(f"{gate.norm}.weight").mul_(written)
                    copied.get_parameter(f"{gate.norm}.bias").mul_(written)
        return copied

    def gates(self, model: fx.GraphModule) -> Mapping[str, _Gate]:
        """The convolutions that do not use everything, and what they use. ``model`` is not changed."""
        calls: dict[str, list[fx.Node]] = {}
        twice: set[str] = set()  # called more than once in one graph
        for graph in graphs_of(model):
            nodes = [node for node in graph.nodes if node.op == "call_module"]
            for node in nodes:
                calls.setdefault(str(node.target), []).append(node)
            twice |= {path for path, count in Counter(str(node.target) for node in nodes).items() if count > 1}
        owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        result = {}
        for path, nodes in calls.items():
            conv: Any = model.get_submodule(path)
            if type(conv) not in CONVOLUTIONS or conv.groups > 1 or conv._buffers:  # gated already
                continue
            if owners[id(conv.weight)] > 1 or any(len(node.args) != 1 for node in nodes):
                continue
            size = conv.weight.detach().abs()
            used = ((size >= self.threshold) & (size > 0)).flatten(2).any(2)
            norms = {name_norm_after(model, node, twice) for node in nodes}
            norm = norms.pop() if len(norms) == 1 else ""
            unchanged = torch.ones_like(used[:, 0])
            gate = _Gate(at_least_one(used.any(0)), at_least_one(used.any(1) if norm else unchanged), norm)
            if (len(gate.writes), len(gate.reads)) != used.shape:
                result[path] = gate
        return result


def graphs_of(model: fx.GraphModule) -> list[fx.Graph]:
    """The graph of each mode."""
    return [*model.distinct_graphs().values()] if isinstance(model, TracedModule) else [model.graph]


def at_least_one(used: Tensor) -> Tensor:
    """The positions of what is used, the first where nothing is: int64, sorted."""
    return used.nonzero().flatten() if used.any() else torch.zeros(1, dtype=torch.int64, device=used.device)


def name_norm_after(model: nn.Module, node: fx.Node, twice: set[str]) -> str:
    """The batch norm that alone uses what ``node`` gives, and that only a sum uses; "" if there is none."""
    norm = next(iter(node.users)) if len(node.users) == 1 else node
    layer = model.get_submodule(str(norm.target)) if norm.op == "call_module" else None
    alone = isinstance(layer, BATCH_NORMS) and layer.affine and str(norm.target) not in twice
    sums = len(norm.users) == 1 and is_sum(next(iter(norm.users)))
    return str(norm.target) if alone and sums else ""


def gate_node(model: nn.Module, graph: fx.Graph, node: fx.Node, gate: _Gate) -> None:
    """Select what the convolution ``node`` reads, and put what its norm gives where it belongs."""
    weight = model.get_parameter(f"{node.target}.weight")
    axis = 1 - weight.ndim
    if len(gate.reads) < weight.shape[1]:
        model.get_submodule(f"{node.target}").register_buffer("reads", gate.reads, persistent=False)
        with graph.inserting_before(node):
            reads = graph.get_attr(f"{node.target}.reads")
            node.args = (graph.call_function(torch.index_select, (node.args[0], axis, reads)),)
    if len(gate.writes) < weight.shape[0]:
        position = torch.full((len(weight),), len(gate.writes), device=weight.device)  # past the end: zero
        position[gate.writes] = torch.arange(len(gate.writes), device=weight.device)
        model.get_submodule(f"{node.target}").register_buffer("position", position, persistent=False)
        norm = next(iter(node.users))
        with graph.inserting_before(norm.next):
            padded = graph.call_function(F.pad, (norm, (0, 0) * (weight.ndim - 2) + (0, 1)))
            where = graph.get_attr(f"{node.target}.position")
            result = graph.call_function(torch.index_select, (padded, axis, where))
        norm.replace_all_uses_with(result, delete_user_cb=lambda user: user is not padded)


def cut_convolution(model: nn.Module, path: str, gate: _Gate) -> None:
    """Make the convolution at ``path`` and its norm as small as what they use."""
    conv: Any = model.get_submodule(path)
    conv.weight = slice_tensor(conv.weight, (slice(None), gate.reads))
    conv.in_channels = len(gate.reads)
    if not gate.norm:
        return
    norm: Any = model.get_submodule(gate.norm)
    for layer in (conv, norm):
        for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            if tensor.ndim and name not in ("reads", "position"):
                setattr(layer, name, slice_tensor(tensor, (gate.writes,)))
    conv.out_channels = norm.num_features = len(gate.writes)


def slice_tensor(tensor: Tensor, at: tuple[Any, ...]) -> Tensor:
    """The part of a parameter or buffer, as one."""
    part = tensor.detach()[at].contiguous()
    return nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part
