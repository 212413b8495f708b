"""Analyze: run the traced model on channel names, and read off what belongs together.

``analyze`` returns an Analysis: the groups of channels that may go, the frozen ones with their reasons, the labels of
every value in the graph (so that the rewrite knows each new shape), and what the model costs as a function of the plan.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from fxprune.channels.depth import Residual, find_residuals
from fxprune.channels.groups import (
    Axis,
    Frozen,
    Group,
    channels_after,
    freeze_leftovers,
    place_of,
    read_groups,
    settle_grids,
    tie_channels,
)
from fxprune.channels.interpret import name_parameters, name_within, run_on_names
from fxprune.channels.names import Bools, Names, Reason
from fxprune.channels.steered import run_steered
from fxprune.channels.tensor import NameRun, Norm, Term, on_meta, without_names
from fxprune.channels.values import Cutter, map_values, values_in
from fxprune.errors import AnalysisError, PlanError, require_type
from fxprune.graph.inputs import Bound, bind_inputs, for_mode, map_tensors
from fxprune.graph.places import describe_place
from fxprune.graph.trace import trace
from fxprune.graph.traced import Mode, Place, TracedModule, Values, places_of, reasons_of, regions_of
from fxprune.options import allow_words, check_options
from fxprune.plan import Plan

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True)
class Analysis:
    """The channels of a traced model. Plain data; printing it gives the groups and what is frozen, with reasons."""

    graph: Any  # the traced model: a TracedModule, or one with regions
    example_inputs: Bound
    groups: Mapping[str, Group]
    frozen: tuple[Frozen, ...]
    unknown: Mapping[str, str]  # operator without a rule -> the first node that calls it
    not_run: str  # why plain Python could not be run in train mode; "" where all is well
    inputs: Mapping[Mode, Mapping[str, Bound]] = field(repr=False)  # mode -> region -> what its graph was run with
    values: Values = field(repr=False)  # the leaves are trees of Value or plain values
    options: Mapping[str, str] = field(repr=False)
    policies: Mapping[str, str] = field(repr=False)  # contraction -> "whole" or "within": what goes there
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)  # of every parameter and buffer
    batch_norm_scales: frozenset[str] = field(repr=False)
    norms: tuple[Norm, ...] = field(repr=False)
    flops: tuple[Term, ...] = field(repr=False)
    names: Names = field(repr=False)
    axes: Mapping[tuple[str, int], Axis] = field(repr=False)
    aliases: Mapping[str, str] = field(repr=False)  # every name of a parameter -> its first name
    origin: "tuple[Analysis, Plan] | None" = field(default=None, repr=False)  # what this is ``after`` of

    @cached_property
    def layers(self) -> Mapping[str, Mapping[Mode, Residual]]:
        """The residual branches that may go whole in each mode's graph, by the path of their last layer."""
        return find_residuals(self.graph, self.values)

    def stays(self, plan: Plan) -> Bools:
        """bool[names]: whether each name stays under ``plan``."""
        removed = np.zeros(len(self.names), dtype=bool)
        for name, kept in plan.keep.items():
            group = self.groups[name]
            gone = np.ones(group.size, dtype=bool)
            gone[np.asarray(kept, dtype=np.int64)] = False
            removed[group.roots[gone]] = True
        return ~removed[self.names.find(np.arange(len(self.names)))]

    def values_after(self, plan: Plan) -> Values:
        """The ``values`` of the model that ``plan`` leads to."""
        plan.check(self.sizes)
        if self.origin:  # from the start again: a label that was cut to one position does not know along which axis
            first, before = self.origin
            return first.values_after(before.then(plan))
        cut = Cutter(self.stays(plan))
        gone = self.nodes_within(plan.layers)
        return {
            mode: {
                region: map_values(cut.value, {name: tree for name, tree in nodes.items() if (mode, name) not in gone})
                for region, nodes in regions.items()
            }
            for mode, regions in self.values.items()
        }

    def nodes_within(self, layers: Sequence[str]) -> set[tuple[Mode, str]]:
        """The nodes of residual branches, each with its mode. Raises PlanError where there is no such branch."""
        if missing := [name for name in layers if name not in self.layers]:
            raise PlanError(
                f"the plan takes out the branch of {missing[0]!r}, which is no residual branch that may go; these "
                f"are: {abridge_list(list(self.layers)) or 'none'}"
            )
        residuals = [(mode, residual) for name in layers for mode, residual in self.layers[name].items()]
        return {(mode, node.name) for mode, residual in residuals for node in residual.nodes}

    def places(self) -> list[Place]:
        """The graphs of the model, with the values of their nodes."""
        return places_of(self.graph, self.values)

    def after(self, plan: Plan, graph: nn.Module | None = None) -> "Analysis":
        """The analysis of the model that ``plan`` leads to: the same groups, labels and costs, cut to what stays.

        The compact model need not be analysed again. ``graph`` is that model; without it the result keeps this graph,
        and serves to predict shapes and costs only.
        """
        plan.check(self.sizes)
        if self.origin:
            first, before = self.origin
            return first.after(before.then(plan), graph or self.graph)
        stays = self.stays(plan)
        cut = Cutter(stays)
        graph = graph or self.graph
        gone = self.nodes_within(plan.layers)
        tensors = {name for name, _ in (*graph.named_parameters(), *graph.named_buffers())}  # a branch may be gone
        tensors -= {name for layer in plan.layers for name in self.layers[layer][Mode.EVAL].state}
        groups = {}
        for group in self.groups.values():
            kept = np.asarray(plan.keep.get(group.name, range(group.size)), dtype=np.int64)
            new_channel = channels_after(group, kept)
            members = []
            for member in group.members:
                if member.parameter not in tensors:
                    continue
                remaining = new_channel[member.channel] >= 0
                at = np.cumsum(stays[self.axes[member.parameter, member.axis].names]) - 1
                members.append(
                    replace(member, index=at[member.index[remaining]], channel=new_channel[member.channel[remaining]])
                )
            if len(kept) and members:  # else it went with its branch
                groups[group.name] = replace(group, size=len(kept), members=tuple(members), roots=group.roots[kept])
        frozen = []
        for item in self.frozen:
            if item.parameter not in tensors:
                continue
            at = np.cumsum(stays[self.axes[item.parameter, item.axis].names]) - 1
            frozen.append(replace(item, index=at[item.index]))
        axes = {key: replace(axis, names=axis.names[stays[axis.names]]) for key, axis in self.axes.items()}
        shapes = {
            name: tuple(
                axes[self.aliases[name], at].size if (self.aliases[name], at) in axes else size
                for at, size in enumerate(shape)
            )
            for name, shape in self.shapes.items()
            if self.aliases[name] in tensors
        }
        return replace(
            self,
            graph=graph,
            groups=groups,
            frozen=tuple(frozen),
            values=self.values_after(plan),
            shapes=shapes,
            norms=tuple(
                replace(norm, label=cut(norm.label)) for norm in self.norms if (norm.mode, norm.node) not in gone
            ),
            flops=tuple(
                replace(term, factors=tuple(map(cut, term.factors)))
                for term in self.flops
                if (Mode.EVAL, term.node) not in gone
            ),
            axes=axes,
            origin=(self, plan),
        )

    @property
    def sizes(self) -> dict[str, int]:
        """The number of channels of each group."""
        return {name: group.size for name, group in self.groups.items()}

    def explain(self, name: str) -> str:
        """Say in words why the channels of a module, parameter or group hang together, or what froze them.

        Args:
            name: a module path ("layer3.0.conv2"), a parameter, or a group.

        Raises:
            AnalysisError: the model has nothing of that name.
        """
        require_type(name, str, "name", AnalysisError)
        named = {first for alias, first in self.aliases.items() if f"{alias}.".startswith(f"{name}.")}
        lines = []
        for group in self.groups.values():
            matching = [m for m in group.members if m.parameter in named]
            if group.name == name or matching:
                where = ", ".join(f"{m.parameter}[{m.axis}]" for m in matching or group.members[:1])
                partners = [m for m in group.members if m not in matching]
                lines.append(
                    f"{where}: the {group.size} channels of group {group.name!r} can be pruned. They go together with"
                )
                lines += [f"    {m.parameter}[{m.axis}]" for m in partners] or ["    nothing else"]
                if group.inexact:
                    lines.append("    A normalization runs over them: its statistics change when channels go.")
        for frozen in self.frozen:
            if frozen.parameter in named:
                size = self.axes[frozen.parameter, frozen.axis].size
                count = "all" if len(frozen.index) == size else f"{len(frozen.index)} of {size}"
                lines.append(f"{frozen.parameter}[{frozen.axis}]: {count} frozen: {self.place(frozen.reason)}")
        if lines:
            return "\n".join(lines)
        if named:
            return f"{name}: every axis has size 1, there is nothing to prune"
        raise AnalysisError(f"nothing called {name!r} in this model. Names are those of its state_dict or its modules.")

    def place(self, reason: Reason) -> str:
        """A reason with the node at which it arose and the line of the user's model."""
        nodes = ((name_within(place.region, node.name), node) for place in self.places() for node in place.graph.nodes)
        node = next((node for name, node in nodes if name == reason.node), None)
        return f"{reason.text} (at {describe_place(node)})" if node is not None else str(reason)

    def to_networkx(self) -> "nx.Graph":
        """Groups (kind="group", size) and parameter axes (kind="axis", size, frozen) as a bipartite graph."""
        import networkx as nx

        graph = nx.Graph()
        for (parameter, axis), at in self.axes.items():
            graph.add_node(f"{parameter}[{axis}]", kind="axis", size=at.size, frozen=0, reasons=())
        for group in self.groups.values():
            graph.add_node(group.name, kind="group", size=group.size, inexact=group.inexact)
            for member in group.members:
                graph.add_edge(group.name, f"{member.parameter}[{member.axis}]", positions=len(member.index))
        for frozen in self.frozen:
            node = graph.nodes[f"{frozen.parameter}[{frozen.axis}]"]
            node["frozen"] += len(frozen.index)
            node["reasons"] = (*node["reasons"], str(frozen.reason))
        return graph

    def to_html(self, path: str | Path) -> None:
        """Write one HTML page that needs nothing from elsewhere: the graph, groups by colour, what is frozen and why.

        Raises:
            FileError: nothing can be written there.
        """
        from fxprune.report.page import write_html

        write_html(self, path)

    def __str__(self) -> str:
        total = sum(group.size for group in self.groups.values())
        lines = [f"{len(self.groups)} groups, {total} channels that can be pruned"]
        lines += [f"  {group}" for group in self.groups.values()]
        by_reason: dict[str, list[str]] = {}
        for frozen in self.frozen:
            by_reason.setdefault(frozen.reason.text, []).append(f"{frozen.parameter}[{frozen.axis}]")
        lines += [f"frozen, {reason}: {abridge_list(axes)}" for reason, axes in by_reason.items()]
        if not isinstance(self.graph, TracedModule):
            graphs = abridge_list(list(regions_of(self.graph)), limit=20) or "none"
            lines.append(f"graphs: {graphs}. The rest of {type(self.graph).__name__} is plain Python")
            lines += [
                f"plain Python, {path or 'the whole'}: {reason}" for path, reason in reasons_of(self.graph).items()
            ]
        if self.not_run:
            lines.append(f"not run: {self.not_run}")
        return "\n".join(lines)


def abridge_list(items: Sequence[str], limit: int = 6) -> str:
    """The first ``limit`` items, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def analyze(model: nn.Module, example_inputs: Any, *, heads: str = "whole", groups: str = "auto") -> Analysis:
    """Find the groups of coupled channels of ``model``.

    Args:
        model: a traced model, or any model that ``trace`` accepts.
        example_inputs: a tensor, a tuple of arguments, or (args, kwargs). Only shapes and dtypes matter. The batch
            should be that of real use; the cost is reported for it.
        heads: "whole" removes whole attention heads, "within" the same positions within every head.
        groups: of grouped convolutions: "whole" groups, "within" the same channels of every group, "auto" the finer.

    Raises:
        AnalysisError: the model does not run on these inputs, or depends on their values.
    """
    check_options({"heads": heads}, AnalysisError, heads=allow_words("whole", "within"))
    check_options({"groups": groups}, AnalysisError, groups=allow_words("whole", "within", "auto"))
    graph = trace(model, example_inputs)
    before = graph.meta.get("fxprune", {})  # of a compact model: it has the groups that it was cut by
    same = before.get("options") == {"heads": heads, "groups": groups}
    policies = dict(before["policies"]) if same else {}
    run = NameRun(heads=heads, groups=groups, policies=policies, real=not isinstance(graph, TracedModule))
    state, axes, aliases = name_parameters(graph, run)
    cuts: dict[str, Group] = before["groups"] if same else {}
    for group in cuts.values():
        tie_channels(run.names, axes, group)
    inputs = bind_inputs(example_inputs)
    if run.real:
        bound_of, values, problem = run_steered(graph, inputs, state, run)
    else:
        runs = {mode: run_mode(graph, mode, inputs, state, run) for mode in graph.distinct_graphs()}
        bound_of = {mode: {"": bound} for mode, (bound, _) in runs.items()}
        values = {mode: {"": nodes} for mode, (_, nodes) in runs.items()}
        problem = ""
    settle_grids(run)
    trees = (tree for regions in values.values() for nodes in regions.values() for tree in nodes.values())
    freeze_leftovers(run, axes, (value for tree in trees for value in values_in(tree)))
    names = {frozenset(map(place_of, group.members)): name for name, group in cuts.items()}
    free, frozen = read_groups(run, list(axes.values()), names)
    return Analysis(
        graph=graph,
        example_inputs=inputs if run.real else map_tensors(on_meta, inputs),
        inputs={
            mode: {region: map_tensors(strip_names, bound_inputs) for region, bound_inputs in calls.items()}
            for mode, calls in bound_of.items()
        },
        groups={group.name: group for group in free},
        frozen=tuple(frozen),
        unknown=dict(run.unknown),
        values=values,
        options={"heads": heads, "groups": groups},
        policies=run.policies,
        not_run=problem,
        shapes={name: tuple(without_names(tensor).shape) for name, tensor in state.items()},
        batch_norm_scales=frozenset(run.batch_norm_scales),
        norms=tuple(run.norms),
        flops=tuple(run.flops),
        names=run.names,
        axes=axes,
        aliases=aliases,
    )


def run_mode(
    graph: TracedModule, mode: Mode, inputs: Bound, state: dict[str, Tensor], run: NameRun
) -> tuple[Bound, dict[str, Any]]:
    """Run one mode's graph on the example, or on a batch of two where batch norm can't train on the example."""
    try:
        return inputs, run_on_names(graph, mode, inputs, state, run)
    except AnalysisError as error:
        double = for_mode(inputs, mode, graph)
        if double is inputs or not isinstance(error.__cause__, ValueError):
            raise
        return double, run_on_names(graph, mode, double, state, run)


def strip_names(tensor: Tensor) -> Tensor:
    """A tensor on meta, without names."""
    return on_meta(without_names(tensor))
