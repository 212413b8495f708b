"""Analyze: run the traced model on channel names, and read off what belongs together.

``analyze`` returns an Analysis: the groups of channels that may go, the frozen ones with their reasons, the labels of
every value in the graph (so that the rewrite knows each new shape), and what the model costs as a function of the plan.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fxprune.channels.labels import Label, Labels, freeze, varying
from fxprune.channels.names import Bools, Ints, Names, Reason
from fxprune.channels.tensor import ChannelTensor, Norm, Run, Term
from fxprune.errors import AnalysisError, FxpruneError
from fxprune.inputs import Bound, bind, map_tensors
from fxprune.plan import Plan
from fxprune.trace import TracedModule, is_users, trace


@dataclass(frozen=True)
class Member:
    """The positions of a group on one axis of one parameter or buffer.

    ``index[i]`` is a position on the axis, ``channel[i]`` the channel of the group that it belongs to; both
    int64[positions], ``index`` sorted.
    """

    parameter: str
    axis: int
    index: Ints
    channel: Ints


@dataclass(frozen=True)
class Group:
    """Channels that live on the same parameter axes. ``inexact``: a norm runs over them, so no pruning is exact."""

    name: str
    size: int
    members: tuple[Member, ...]
    inexact: bool
    roots: Ints = field(repr=False)  # int64[size]: the name that stands for each channel

    def __str__(self) -> str:
        axes = " · ".join(f"{member.parameter}[{member.axis}]" for member in self.members)
        return f"{self.name}: {self.size} channels{' (inexact)' if self.inexact else ''} on {axes}"


@dataclass(frozen=True)
class Frozen:
    """Positions of a parameter axis that may not go, and why. index: int64[positions], sorted."""

    parameter: str
    axis: int
    index: Ints
    reason: Reason


@dataclass(frozen=True)
class Value:
    """What is known of one tensor in the graph: its shape and the labels of its positions."""

    shape: tuple[int, ...]
    labels: Labels
    dtype: torch.dtype
    owner: bool  # False for views and results of in-place operators, which hold no memory of their own


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter or buffer and the names of its positions. ``weak``: it belongs to a buffer."""

    parameter: str
    axis: int
    names: Ints
    weak: bool

    @property
    def size(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Analysis:
    """The channels of a traced model. Plain data; printing it gives the groups and what is frozen, with reasons."""

    graph: TracedModule
    example_inputs: Bound
    groups: Mapping[str, Group]
    frozen: tuple[Frozen, ...]
    unknown: Mapping[str, str]  # operator without a rule -> the first node that calls it
    values: Mapping[bool, Mapping[str, Any]] = field(repr=False)  # mode -> node -> tree of Value or plain values
    options: Mapping[str, str] = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)  # of every parameter and buffer
    batch_norm_scales: frozenset[str] = field(repr=False)
    norms: tuple[Norm, ...] = field(repr=False)
    flops: tuple[Term, ...] = field(repr=False)
    names: Names = field(repr=False)
    axes: Mapping[tuple[str, int], Axis] = field(repr=False)
    aliases: Mapping[str, str] = field(repr=False)  # every name of a parameter -> its first name
    origin: "tuple[Analysis, Plan] | None" = field(default=None, repr=False)  # what this is ``after`` of

    def stays(self, plan: Plan) -> Bools:
        """bool[names]: whether each name stays under ``plan``."""
        removed = np.zeros(len(self.names), dtype=bool)
        for name, kept in plan.keep.items():
            group = self.groups[name]
            gone = np.ones(group.size, dtype=bool)
            gone[np.asarray(kept, dtype=np.int64)] = False
            removed[group.roots[gone]] = True
        return ~removed[self.names.find(np.arange(len(self.names)))]

    def after(self, plan: Plan, graph: "TracedModule | None" = None) -> "Analysis":
        """The analysis of the compact model that ``plan`` leads to: the same groups, labels and costs, cut to what stays.

        The compact model need not be analysed again. ``graph`` is that model; without it the result keeps this graph,
        and serves to predict shapes and costs only.
        """
        plan.check(self.sizes)
        if self.origin:  # from the start again: a label that was cut to one position does not know along which axis
            first, before = self.origin
            return first.after(before.then(plan), graph or self.graph)
        stays = self.stays(plan)
        cut = Cutter(stays)
        groups = {}
        for group in self.groups.values():
            kept = np.asarray(plan.keep.get(group.name, range(group.size)), dtype=np.int64)
            new_channel = np.full(group.size, -1)
            new_channel[kept] = np.arange(len(kept))
            members = []
            for member in group.members:
                mine = new_channel[member.channel] >= 0
                at = np.cumsum(stays[self.axes[member.parameter, member.axis].names]) - 1
                members.append(replace(member, index=at[member.index[mine]], channel=new_channel[member.channel[mine]]))
            groups[group.name] = replace(group, size=len(kept), members=tuple(members), roots=group.roots[kept])
        frozen = []
        for item in self.frozen:
            at = np.cumsum(stays[self.axes[item.parameter, item.axis].names]) - 1
            frozen.append(replace(item, index=at[item.index]))
        axes = {key: replace(axis, names=axis.names[stays[axis.names]]) for key, axis in self.axes.items()}
        shapes = {
            name: tuple(
                axes[self.aliases[name], at].size if (self.aliases[name], at) in axes else size
                for at, size in enumerate(shape)
            )
            for name, shape in self.shapes.items()
        }
        return replace(
            self,
            graph=graph or self.graph,
            groups=groups,
            frozen=tuple(frozen),
            values={mode: map_values(cut.value, values) for mode, values in self.values.items()},
            shapes=shapes,
            norms=tuple(replace(norm, label=cut(norm.label)) for norm in self.norms),
            flops=tuple(replace(term, factors=tuple(map(cut, term.factors))) for term in self.flops),
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
        lines = []
        for group in self.groups.values():
            touched = [m for m in group.members if m.parameter == name or m.parameter.startswith(name + ".")]
            if group.name == name or touched:
                where = ", ".join(f"{m.parameter}[{m.axis}]" for m in touched or group.members[:1])
                others = [m for m in group.members if m not in touched]
                lines.append(
                    f"{where}: the {group.size} channels of group {group.name!r} can be pruned. They go together with"
                )
                lines += [f"    {m.parameter}[{m.axis}]" for m in others] or ["    nothing else"]
                if group.inexact:
                    lines.append("    A normalization runs over them: its statistics change when channels go.")
        for frozen in self.frozen:
            if frozen.parameter == name or frozen.parameter.startswith(name + "."):
                size = self.axes[frozen.parameter, frozen.axis].size
                count = "all" if len(frozen.index) == size else f"{len(frozen.index)} of {size}"
                lines.append(f"{frozen.parameter}[{frozen.axis}]: {count} frozen: {frozen.reason}")
        if lines:
            return "\n".join(lines)
        if name in self.shapes or any(key.startswith(name + ".") for key in self.shapes):
            return f"{name}: every axis has size 1, there is nothing to prune"
        raise AnalysisError(f"nothing called {name!r} in this model. Names are those of its state_dict or its modules.")

    def to_networkx(self) -> nx.Graph:
        """Groups (kind="group", size) and parameter axes (kind="axis", size, frozen) as a bipartite graph."""
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

    def __str__(self) -> str:
        total = sum(group.size for group in self.groups.values())
        lines = [f"{len(self.groups)} groups, {total} channels that can be pruned"]
        lines += [f"  {group}" for group in self.groups.values()]
        by_reason: dict[str, list[str]] = {}
        for frozen in self.frozen:
            by_reason.setdefault(frozen.reason.text, []).append(f"{frozen.parameter}[{frozen.axis}]")
        lines += [f"frozen, {reason}: {abridged(axes)}" for reason, axes in by_reason.items()]
        return "\n".join(lines)


class Cutter:
    """Cuts labels and values to the names that stay; a label shared by many values is cut once."""

    def __init__(self, stays: Bools) -> None:
        self.stays = stays
        self._done: dict[int, tuple[Label, Label]] = {}

    def __call__(self, label: Label) -> Label:
        """The label without the positions that go."""
        if id(label) not in self._done:
            self._done[id(label)] = label, self.cut(label)
        return self._done[id(label)][1]

    def cut(self, label: Label) -> Label:
        """Positions that go are whole slabs: the analysis has seen to that."""
        kept = torch.from_numpy(self.stays[label.numpy()])
        if kept.all():
            return label
        for axis in varying(label):
            others = [at for at in range(label.ndim) if at != axis]
            here = kept.any(dim=others) if others else kept
            label, kept = (each.index_select(axis, here.nonzero().flatten()) for each in (label, kept))
        if not kept.all():
            raise AnalysisError("what stays of a value is not a rectangle: please report this model")
        return label

    def value(self, value: Value) -> Value:
        """A value with its labels cut and its shape to match."""
        labels = tuple(map(self, value.labels))
        shape = list(value.shape)
        for before, label in zip(value.labels, labels, strict=True):
            for axis in varying(before):
                shape[axis] = label.shape[axis]
        return Value(tuple(shape), labels, value.dtype, value.owner)


def map_values(function: Callable[[Value], Value], values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with ``function`` applied to each Value in them."""
    return {name: pytree.tree_map_only(Value, function, tree) for name, tree in values.items()}


def abridged(items: Sequence[str], limit: int = 6) -> str:
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
    for option, value, known in (
        ("heads", heads, ("whole", "within")),
        ("groups", groups, ("whole", "within", "auto")),
    ):
        if value not in known:
            raise AnalysisError(f"{option}={value!r} is not known; use one of {', '.join(map(repr, known))}")
    graph = trace(model, example_inputs)
    run = Run(heads=heads, groups=groups)
    state, axes, aliases = name_parameters(graph, run)
    inputs = bind(example_inputs)
    values = {mode: run_on_names(graph, mode, inputs, state, run) for mode in graph.distinct_graphs()}
    settle_grids(run)
    freeze_leftovers(run, axes)
    found, frozen = read_groups(run, list(axes.values()))
    return Analysis(
        graph=graph,
        example_inputs=map_tensors(on_meta, inputs),
        groups={group.name: group for group in found},
        frozen=tuple(frozen),
        unknown=dict(run.unknown),
        values=values,
        options={"heads": heads, "groups": groups},
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        batch_norm_scales=frozenset(run.batch_norm_scales),
        norms=tuple(run.norms),
        flops=tuple(run.flops),
        names=run.names,
        axes=axes,
        aliases=aliases,
    )


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor like ``tensor`` without data."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def name_parameters(
    graph: nn.Module, run: Run
) -> tuple[dict[str, Tensor], dict[tuple[str, int], Axis], dict[str, str]]:
    """Each parameter and floating-point buffer as a ChannelTensor with fresh names along every axis.

    A tensor that is registered under several names gets one ChannelTensor. Integer buffers stay tensors, as copies:
    they are read as indices, and the model may write into them.
    """
    state: dict[str, Tensor] = {}
    axes: dict[tuple[str, int], Axis] = {}
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    parameters = graph.named_parameters(remove_duplicate=False)
    buffers = graph.named_buffers(remove_duplicate=False)
    for weak, (name, tensor) in itertools.chain(
        ((False, item) for item in parameters), ((True, item) for item in buffers)
    ):
        aliases[name] = first.setdefault(id(tensor), name)
        if aliases[name] != name:
            state[name] = state[aliases[name]]
        elif not (tensor.is_floating_point() or tensor.is_complex()):
            state[name] = tensor.clone()
        else:
            labels = []
            for axis, size in enumerate(tensor.shape):
                if size > 1:
                    names = run.names.fresh(size)
                    axes[name, axis] = Axis(name, axis, names, weak)
                    labels.append(
                        torch.from_numpy(names).reshape([-1 if at == axis else 1 for at in range(tensor.ndim)])
                    )
            state[name] = ChannelTensor(on_meta(tensor), tuple(labels), run, name, name)
    return state, axes, aliases


class Recorder(fx.Interpreter):
    """Runs a graph on ChannelTensors and keeps the shape and labels of every value."""

    def __init__(self, module: fx.GraphModule, graph: fx.Graph, run: Run) -> None:
        super().__init__(module, graph=graph)
        self.run_, self.values = run, dict[str, Any]()
        self._storages: dict[int, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, with errors that name it and the user's line."""
        self.run_.names.node = n.name
        try:
            result = super().run_node(n)
        except FxpruneError:
            raise
        except Exception as error:
            raise AnalysisError(
                f"node {where(n)} does not run on channel names: {type(error).__name__}: {error}"
            ) from error
        self.values[n.name] = map_tensors(self.as_value, result)
        return result

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Inputs have no names, and say so."""
        value = super().placeholder(target, args, kwargs)
        return map_tensors(lambda tensor: ChannelTensor(on_meta(tensor), (), self.run_, f"input {target}"), value)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        """What the model returns keeps its shape."""
        result = super().output(target, args, kwargs)
        map_tensors(lambda tensor: self.freeze_output(tensor), result)
        return result

    def as_value(self, tensor: Tensor) -> Value:
        """What is known of a tensor; a plain tensor has no labels."""
        labels = tensor.labels if isinstance(tensor, ChannelTensor) else ()
        data = tensor.data_ if isinstance(tensor, ChannelTensor) else tensor
        storage = data.untyped_storage()
        owner = storage._cdata not in self._storages
        self._storages[storage._cdata] = storage  # kept alive, so that its address is not used again
        return Value(tuple(tensor.shape), labels, tensor.dtype, owner)

    def freeze_output(self, tensor: Tensor) -> None:
        """Freeze the names of one returned tensor."""
        if isinstance(tensor, ChannelTensor):
            freeze(self.run_.names, tensor.labels, "output")


def where(node: fx.Node) -> str:
    """A node's name and the line of the user's model that it comes from."""
    frames = re.findall(r'File "(.+)", line (\d+), in .+\n *(.+)', node.stack_trace or "")
    users = [frame for frame in frames if is_users(frame[0])]
    return "{} ({}:{}: `{}`)".format(node.name, *users[-1]) if users else node.name


class _Runner(nn.Module):
    """A module whose forward interprets a graph, so that ``functional_call`` can swap its parameters."""

    def __init__(self, interpreter: fx.Interpreter, module: nn.Module) -> None:
        super().__init__()
        self.interpreter, self.module = [interpreter], module

    def forward(self, *args: Any) -> Any:
        return self.interpreter[0].run(*args, enable_io_processing=False)


def run_on_names(graph: TracedModule, mode: bool, inputs: Bound, state: dict[str, Tensor], run: Run) -> dict[str, Any]:
    """Run one mode's graph. Returns, for each node, its result with tensors replaced by Values."""
    run.mode = mode
    recorder = Recorder(graph, graph.graphs[mode], run)
    interpret(recorder, graph, mode, inputs, state)
    return recorder.values


def interpret(
    interpreter: fx.Interpreter, module: TracedModule, mode: bool, inputs: Bound, state: dict[str, Tensor]
) -> None:
    """Run ``interpreter`` on ``module`` in one mode, with the tensors of ``state`` for its parameters and buffers.

    A module that has several names is swapped under its first: ``functional_call`` would not restore it otherwise.
    """
    swapped = {}
    for path, part in module.named_modules():
        for leaf in (*part._parameters, *part._buffers):
            name = f"{path}.{leaf}".removeprefix(".")
            if name in state:
                swapped[f"module.{name}"] = state[name]
    modes = {part: part.training for part in module.modules()}
    arguments = tuple(placeholders(module.graphs[mode], inputs))
    try:
        module.train(mode)
        with torch.inference_mode(False), torch.no_grad():
            functional_call(_Runner(interpreter, module), swapped, arguments, tie_weights=False)
    finally:
        for part, training in modes.items():
            part.training = training


def placeholders(graph: fx.Graph, inputs: Bound) -> Iterator[Any]:
    """The arguments for each placeholder of ``graph``, in order."""
    args, kwargs = inputs
    given = iter(args)
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target)
        if name.startswith("**"):
            yield {key: value for key, value in kwargs.items()}
        elif name.startswith("*"):
            yield from given
        elif name in kwargs:
            yield kwargs[name]
        else:
            missing = object()
            value = next(given, missing)
            if value is missing:
                if not node.args:
                    raise AnalysisError(f"example_inputs give no value for argument {name!r} of the model")
                value = node.args[0]
            yield value


def settle_grids(run: Run) -> None:
    """Merge names until, on every label that varies along several axes, what may stay is always a rectangle.

    That holds when along one axis each slab is of one class. Where it does not, the axis is chosen that leaves most
    classes, and each of its slabs is merged.
    """
    grids = [label.squeeze() for label in run.grids]
    changed = True
    while changed:
        changed = False
        for grid in grids:
            roots = run.names.find(grid.numpy())
            if any(uniform(roots, axis).all() for axis in range(roots.ndim)):
                continue
            best = max(range(roots.ndim), key=lambda axis: classes_after(roots, axis))
            slabs = np.moveaxis(roots, best, 0).reshape(roots.shape[best], -1)
            run.names.merge(slabs, slabs[:, :1])
            changed = True


def uniform(roots: Ints, axis: int) -> Bools:
    """bool[size]: whether each slab along ``axis`` is of one class."""
    slabs = np.moveaxis(roots, axis, 0).reshape(roots.shape[axis], -1)
    result: Bools = (slabs == slabs[:, :1]).all(1)
    return result


def classes_after(roots: Ints, axis: int) -> int:
    """How many classes are left when each slab along ``axis`` is merged."""
    _, compact = np.unique(roots, return_inverse=True)
    slabs = np.moveaxis(compact.reshape(roots.shape), axis, 0).reshape(roots.shape[axis], -1)
    scratch = Names()
    scratch.fresh(int(compact.max()) + 1)
    scratch.merge(slabs, slabs[:, :1])
    return len(np.unique(scratch.find(slabs)))


def freeze_leftovers(run: Run, axes: Mapping[tuple[str, int], Axis]) -> None:
    """Freeze what no operator touched, what only buffers know, and classes that are a whole axis."""
    names = run.names
    names.node = ""
    for axis in axes.values():
        if axis.parameter not in run.used:
            names.freeze(axis.names, "unused")
    for axis in axes.values():
        if axis.weak:
            names.freeze(axis.names[~names.produced(axis.names)], "a buffer that no layer produces")
        roots = names.find(axis.names)
        if (roots == roots[0]).all():
            names.freeze(roots[:1], f"all of {axis.parameter}[{axis.axis}] hangs together")


def read_groups(run: Run, axes: Sequence[Axis]) -> tuple[list[Group], list[Frozen]]:
    """Classes that live on the same axes are a group; what is frozen is listed by axis and reason."""
    if not axes:
        return [], []
    names = run.names
    atoms = np.concatenate([axis.names for axis in axes])
    owner = np.repeat(np.arange(len(axes)), [axis.size for axis in axes])
    position = np.concatenate([np.arange(axis.size) for axis in axes])
    roots, reasons = names.find(atoms), names.reason_numbers(atoms)
    frozen = []
    for axis, its in zip(axes, np.split(reasons, np.cumsum([axis.size for axis in axes])[:-1]), strict=True):
        for reason in set(its.tolist()) - {-1}:
            frozen.append(Frozen(axis.parameter, axis.axis, np.flatnonzero(its == reason), names.reasons[reason]))

    free = reasons < 0
    roots, owner, position = roots[free], owner[free], position[free]
    inexact = norm_classes(run)
    # A class's signature is the set of axes it lives on, as a sum of one random number for each axis.
    present = np.zeros(len(names), dtype=bool)
    present[roots] = True
    classes = np.flatnonzero(present)
    class_of = (np.cumsum(present) - 1)[roots]
    weights = np.random.default_rng(0).integers(1 << 62, size=len(axes))
    signature = np.zeros(len(classes), dtype=np.int64)
    for weight, its in zip(weights, np.split(class_of, np.searchsorted(owner, range(1, len(axes)))), strict=True):
        signature[its] = signature[its] + weight  # a class that is there twice counts once
    _, first, group_of = np.unique(signature, return_index=True, return_inverse=True)
    order = np.argsort(first)  # classes are sorted by their smallest name, so this is the model's order
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    group_of = rank[group_of]

    channel_of = np.zeros(len(classes), dtype=np.int64)
    sizes = np.bincount(group_of, minlength=len(order))
    sorted_classes = np.argsort(group_of, kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    channel_of[sorted_classes] = np.arange(len(classes)) - starts[group_of[sorted_classes]]

    atom_group = group_of[class_of]
    by_group = np.argsort(atom_group * len(axes) + owner, kind="stable")
    key = (atom_group * len(axes) + owner)[by_group]
    cuts = np.flatnonzero(np.diff(key)) + 1
    members: list[list[Member]] = [[] for _ in order]
    for part in np.split(by_group, cuts) if len(by_group) else []:
        axis = axes[owner[part[0]]]
        channel = channel_of[class_of[part]]
        members[atom_group[part[0]]].append(Member(axis.parameter, axis.axis, position[part], channel))
    groups = []
    taken: set[str] = set()
    for number, its in enumerate(members):
        mine = classes[sorted_classes[starts[number] : starts[number + 1]]]
        name = unique_name(its[0].parameter, taken)
        groups.append(Group(name, len(mine), tuple(its), bool(np.isin(mine, inexact).any()), mine))
    return groups, frozen


def norm_classes(run: Run) -> Ints:
    """The classes over which some norm runs."""
    touched = [
        run.names.find(norm.label.numpy()).ravel()
        for norm in run.norms
        if any(norm.label.shape[axis] > 1 for axis in norm.axes)
    ]
    return np.unique(np.concatenate(touched)) if touched else np.zeros(0, dtype=np.int64)


def unique_name(parameter: str, taken: set[str]) -> str:
    """A group is called after the first module it lives in; a second group there gets a number."""
    base = parameter.removesuffix(".weight")
    name = next(name for i in itertools.count() if (name := base if i == 0 else f"{base}:{i}") not in taken)
    taken.add(name)
    return name
