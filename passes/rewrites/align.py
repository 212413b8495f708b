"""Align: widths grow to multiples that the hardware is fast at, with channels that do nothing."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxprune.budget.cost import Channels
from fxprune.budget.solver import limit_multiples, prefer_multiple
from fxprune.channels.analysis import Analysis, analyze
from fxprune.channels.groups import Group
from fxprune.channels.names import Ints
from fxprune.channels.values import values_in
from fxprune.errors import PlanError
from fxprune.graph.trace import named_tensors, trace
from fxprune.graph.traced import TracedModule, copy_model
from fxprune.options import allow_count, check_options
from fxprune.pipeline import example_of
from fxprune.rewrite.attributes import layer_attributes
from fxprune.rewrite.kinds import kind_of


@dataclass(frozen=True)
class Align(PassBase):
    """A rewrite that rounds the width of each group up, for a network that was pruned to odd widths.

    Vector units and tensor cores take channels in blocks, so 37 channels often cost as much as 48, or more. The new
    channels have zero weights and shifts, and what reads them does so with zero weights: the function is the same.
    Training leaves them at zero, unless an activation makes something of zero, as a sigmoid does. Plans can round by
    themselves (``round_to``), which costs nothing; this is for those that did not. It makes the model larger: measure
    whether it is faster.

    A group stays as it is where a shape in the graph may depend on it: views, splits, shuffles, attention, norms other
    than batch norm, convolutions with groups that are not depthwise.

    Attributes:
        round_to: the multiple; "auto" by device and dtype, at most a quarter of a group.
        example_inputs: as for ``trace``; by default those of the Pipeline.
    """

    round_to: int | str = "auto"
    example_inputs: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_options(self, PlanError, round_to=allow_count().or_auto())

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Returns a new module with the names of the old one."""
        example = example_of(graph_module, self.example_inputs)
        graph = trace(graph_module, example)
        analysis = analyze(graph, example)
        if self.round_to == "auto":
            multiple = limit_multiples(analysis, prefer_multiple(analysis), parts=4)
        else:
            multiple = np.full(len(analysis.groups), self.round_to)
        missing = {
            name: int(-group.size % multiple[number])
            for number, (name, group) in enumerate(analysis.groups.items())
            if not group.inexact and all(is_one_run(analysis, group, member) for member in range(len(group.members)))
        }
        for name in find_stiff(analysis):
            missing.pop(name, None)
        missing = {name: count for name, count in missing.items() if count}
        if not missing:
            return PassResult(graph_module, False)
        copied = copy_model(graph)
        grow_channels(copied, analysis, missing)
        copied.meta.pop("fxprune", None)  # no plan leads to this
        copied.recompile()
        return PassResult(copied, True)


def is_one_run(analysis: Analysis, group: Group, number: int) -> bool:
    """Whether the positions of a group on the axis of a member are one run, channel by channel."""
    member = group.members[number]
    repeats, rest = divmod(len(member.index), group.size)
    run = np.arange(len(member.index)) + member.index[0]
    return (
        not rest
        and np.array_equal(member.index, run)
        and np.array_equal(member.channel, np.repeat(range(group.size), repeats))
    )


def find_stiff(analysis: Analysis) -> Iterator[str]:
    """The groups that go through a node whose shapes or arguments may depend on their width."""
    graph, rows = analysis.graph, Channels.of(analysis)
    for place in analysis.places():
        values = place.values
        for node in place.graph.nodes:
            if (
                node.op in ("placeholder", "output", "get_attr")
                or not values_in(values[node.name])
                or can_grow(graph, node)
            ):
                continue
            touched = [values[source.name] for source in node.all_input_nodes] + [values[node.name]]
            for value in (value for tree in touched for value in values_in(tree)):
                for label in value.labels:
                    channel = rows.of_root[analysis.names.find(label).ravel()]
                    yield from {rows.names[number] for number in np.unique(rows.group[channel[channel >= 0]])}


def can_grow(graph: TracedModule, node: fx.Node) -> bool:
    """Whether a node is right at any width."""
    does = kind_of(graph, node)
    layer: Any = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    if does == "contraction" and getattr(layer, "groups", 1) > 1:
        return (
            layer.weight.shape[1] == 1
            and layer.in_channels == layer.out_channels == layer.groups
            and not layer.transposed
        )
    return does in ("contraction", "norm", "pointwise", "pool", "free move")


@torch.no_grad()
def grow_channels(model: TracedModule, analysis: Analysis, missing: dict[str, int]) -> None:
    """Give each group its ``missing`` channels, behind those that it has, on every axis that it lives on."""
    after: dict[tuple[str, int], Ints] = {}  # positions that come after each position of an axis
    for name, count in missing.items():
        group = analysis.groups[name]
        for member in group.members:
            size = analysis.shapes[member.parameter][member.axis]
            inserted = after.setdefault((member.parameter, member.axis), np.zeros(size, dtype=np.int64))
            inserted[member.index[-1]] += count * len(member.index) // group.size
    tensors = named_tensors(model)
    grown: dict[int, Tensor] = {}
    for (name, axis), inserted in after.items():
        old = tensors[name]
        tensor = grown.get(id(old), old.detach())
        place = torch.from_numpy(np.arange(len(inserted)) + np.cumsum(inserted) - inserted).to(tensor.device)
        shape = [*tensor.shape]
        shape[axis] += int(inserted.sum())
        fill = 1.0 if name.endswith("running_var") else 0.0
        grown[id(old)] = tensor.new_full(shape, fill).index_copy_(axis, place, tensor)
    new = {
        number: nn.Parameter(grown[number], old.requires_grad) if isinstance(old, nn.Parameter) else grown[number]
        for number, old in {id(old): old for old in tensors.values()}.items()
        if number in grown
    }
    for module in model.modules():
        both: Any = module._parameters, module._buffers
        for held in both:
            leaves = {leaf: new[id(tensor)] for leaf, tensor in held.items() if id(tensor) in new}
            held.update(leaves)
            for tensor in list(leaves.values())[:1]:
                shape = [1, len(tensor)] + [1] * (tensor.ndim - 2)
                for name, value in layer_attributes(module, tuple(shape), tuple(shape)).items():
                    setattr(module, name, value)
