"""Rewrite: (graph, analysis, plan) -> compact GraphModule and ParamMap. The original is untouched.

Parameters are sliced, module attributes set from them, and each graph is run once on meta tensors: on the way, sizes
baked into it are replaced where they no longer fit, and every value is compared with its predicted shape.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.channels.analysis import Analysis
from fxprune.channels.groups import Group
from fxprune.channels.interpret import Runner, describe_cause
from fxprune.channels.labels import stays_along
from fxprune.channels.names import Bools
from fxprune.channels.tensor import name_of, on_meta
from fxprune.channels.values import Value, values_in
from fxprune.errors import FxpruneError, PlanError, RewriteError, require_type
from fxprune.graph.guards import GUARDS, erase_guard
from fxprune.graph.inputs import describe_inputs, tensors_in
from fxprune.graph.places import describe_place
from fxprune.graph.shapes import Shape, shape_of_result
from fxprune.graph.trace import copy_modules, named_tensors
from fxprune.graph.traced import (
    START,
    Mode,
    Model,
    Place,
    TracedModule,
    Values,
    copy_graph,
    hooks_of,
    places_of,
    regions_of,
    require_traced,
)
from fxprune.plan import Plan
from fxprune.rewrite.attributes import layer_attributes
from fxprune.rewrite.branches import is_empty, remove_branches, remove_layers
from fxprune.rewrite.fit import fit_node
from fxprune.rewrite.kept import Kept, cut_tensor
from fxprune.rewrite.param_map import ParamMap


def rewrite(graph: Model, analysis: Analysis, plan: Plan) -> tuple[Model, ParamMap]:
    """Carry out ``plan``.

    Args:
        graph: the traced model that was analysed, or another trace of the same architecture with weights of its own.
        analysis: of that model.
        plan: for that analysis.

    Returns:
        The compact model, a GraphModule with parameters of its own, and the map of what was kept.

    Raises:
        PlanError: the plan is for another model.
        RewriteError: ``graph`` is not the model that was analysed, or a shape is not as predicted.
    """
    require_traced(graph, "graph", RewriteError)
    require_type(analysis, Analysis, "analysis", RewriteError)
    require_type(plan, Plan, "plan", RewriteError)
    predicted = analysis.values_after(plan)
    stays = analysis.stays(plan)
    kept = kept_indices(analysis, stays)
    state = named_tensors(graph)
    check_shapes(state, analysis)
    tensors, parameters = cut_tensors(state, kept)
    compact = copy_onto(graph, tensors)
    if plan.layers:
        remove_layers(compact, predicted, plan.layers)
    if any(not channels for channels in plan.keep.values()):
        dropped = {member.parameter for name in plan.dropped for member in analysis.groups[name].members}
        remove_branches(compact, predicted, frozenset(name.rpartition(".")[0] for name in dropped))
    gone = state.keys() - named_tensors(compact).keys()
    no_index = torch.zeros(0, dtype=torch.int64)
    kept |= {name: tuple(no_index for _ in kept[name]) for name in gone}
    set_attributes(compact, predicted)
    for place in places_of(compact, predicted):
        arguments = analysis.inputs[place.mode].get(place.region)
        if arguments is not None:
            Fitter(place, analysis.values[place.mode][place.region], stays).start(arguments)
    for region in regions_of(compact).values():
        region.recompile()
    param_map = ParamMap(kept, parameters, kept_by_norms(analysis, stays), gone)
    record_cut(compact, analysis, plan)
    if START in compact.meta:
        compact.meta[START] = compact.meta[START].after(param_map)
    return compact, param_map


def copy_onto(graph: Model, tensors: dict[int, Tensor]) -> Model:
    """A copy of ``graph`` and its modules, with ``tensors`` (by the id of the original) for its own."""
    if not isinstance(graph, TracedModule):
        return copy_modules(graph, tensors)
    root = copy_modules(graph.root(), tensors)
    train, evaluate = graph.graphs[Mode.TRAIN], graph.graphs[Mode.EVAL]
    new_train = copy_graph(train)
    new_evaluate = new_train if evaluate is train else copy_graph(evaluate)
    return TracedModule(root, new_train, new_evaluate)


def kept_indices(analysis: Analysis, stays: Bools) -> dict[str, Kept]:
    """For every parameter and buffer, under all its names, the kept indices of each axis."""
    kept: dict[str, Kept] = {}
    for name, shape in analysis.shapes.items():
        axes: list[Tensor | None] = [None] * len(shape)
        for at in range(len(shape)):
            axis = analysis.axes.get((analysis.aliases[name], at))
            if axis is not None and not (mask := stays[axis.names]).all():
                axes[at] = torch.from_numpy(mask.nonzero()[0])
        kept[name] = tuple(axes)
    return kept


def kept_by_norms(analysis: Analysis, stays: Bools) -> dict[tuple[Mode, str], Kept]:
    """For each (mode, node) with a norm whose statistics change: what is kept on each axis of the normalized value."""
    kept: dict[tuple[Mode, str], Kept] = {}
    for norm in analysis.norms:
        mask = stays[norm.label]
        if not mask.all():
            before = kept.get((norm.mode, norm.node), (None,) * mask.ndim)
            kept[norm.mode, norm.node] = tuple(
                torch.from_numpy(stays_along(mask, axis).nonzero()[0]) if size > 1 else before[axis]
                for axis, size in enumerate(mask.shape)
            )
    return kept


def check_shapes(state: Mapping[str, Tensor], analysis: Analysis) -> None:
    """Raise RewriteError unless the tensors ``state`` have the shapes that were analysed."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes == dict(analysis.shapes):
        return
    name = next(iter({*shapes.items()} ^ {*analysis.shapes.items()}))[0]
    raise RewriteError(
        f"this is not the model that was analysed: {name} has shape {shapes.get(name)}, the analysis says "
        f"{analysis.shapes.get(name)}. Analyse it again, or rewrite the model that you analysed."
    )


def cut_tensors(
    state: Mapping[str, Tensor], kept: Mapping[str, Kept]
) -> tuple[dict[int, Tensor], dict[nn.Parameter, tuple[str, nn.Parameter]]]:
    """What is ``kept`` of ``state``, by the id of the original tensor; and by parameter its name and the new one."""
    tensors: dict[int, Tensor] = {}
    parameters: dict[nn.Parameter, tuple[str, nn.Parameter]] = {}
    for name, tensor in state.items():
        if id(tensor) in tensors:
            continue
        new = cut_tensor(tensor, kept[name])
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new)
            for register, hook in hooks_of(tensor):
                getattr(new, register)(hook)
            new.requires_grad_(tensor.requires_grad)
            parameters[tensor] = name, new
        tensors[id(tensor)] = new
    return tensors, parameters


def record_cut(compact: Model, analysis: Analysis, plan: Plan) -> None:
    """Leave on the compact model what ``save`` needs, the plan from the model that was traced first, and its groups."""
    before = compact.meta.get("fxprune")
    try:
        total = Plan.from_json(before["plan"]).then(plan) if before else plan
    except PlanError as error:
        raise PlanError(
            "this model was cut before, by groups that an analysis of it does not find again. Plan with what came of "
            f"the first analysis, analysis.after(plan, compact). ({error})"
        ) from error
    example = before["example_inputs"] if before else describe_inputs(analysis.example_inputs)
    compact.meta["fxprune"] = {
        "plan": total.to_json(),
        "example_inputs": example,
        "options": dict(analysis.options),
        "policies": dict(analysis.policies),
        "groups": {**groups_of_earlier_cuts(before or {}, analysis, plan), **analysis.groups_after(plan, compact)},
    }
    if not isinstance(compact, TracedModule):  # its Python may look at values
        compact.meta["fxprune"]["example"] = before["example"] if before else tensors_in(analysis.example_inputs)


def groups_of_earlier_cuts(before: Mapping[str, Any], analysis: Analysis, plan: Plan) -> dict[str, Group]:
    """The groups of earlier cuts that are frozen now, of a single channel mostly: what was one channel stays one."""
    stays = analysis.stays(plan)
    held = {}
    for name in before.get("groups", {}).keys() - analysis.groups.keys():
        members = []
        for member in before["groups"][name].members:
            axis = analysis.axes.get((member.parameter, member.axis))
            if axis is None or not stays[axis.names[member.index]].all():
                continue
            members.append(replace(member, index=np.cumsum(stays[axis.names])[member.index] - 1))
        held[name] = replace(before["groups"][name], members=tuple(members))
    return held


def set_attributes(compact: Model, predicted: Values) -> None:
    """Make the attributes of the layers that graphs, or the Python that steers them, call say what the weights are."""
    for layer, shape, out in layer_calls(compact, predicted):
        for name, attribute in layer_attributes(layer, shape, out).items():
            if getattr(layer, name) != attribute:
                setattr(layer, name, attribute)


def layer_calls(compact: Model, predicted: Values) -> Iterator[tuple[nn.Module, Shape, Shape]]:
    """The layers that are called, with the shapes of what they are given and give."""
    places = places_of(compact, predicted)
    for place in places:
        for node in place.graph.nodes:
            if node.op == "call_module":
                source = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
                shape = shape_of(place.values.get(source.name)) if isinstance(source, fx.Node) else ()
                yield place.module.get_submodule(node.target), shape, shape_of(place.values.get(node.name))
    traced = {place.region for place in places}
    for regions in predicted.values():
        for path in regions.keys() - traced:  # layers that plain Python calls
            yield compact.get_submodule(path), *(shape_of(regions[path].get(end)) for end in ("input", "output"))


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of a tensor; () for anything else."""
    return value.shape if isinstance(value, Value) else ()


class Fitter(Runner):
    """Runs a compact graph on meta tensors; each node is fitted before it runs and its shape checked after."""

    def __init__(self, place: Place, before: Mapping[str, Any], stays: Bools) -> None:
        super().__init__(place.module, place.mode, named_tensors(place.module))
        self.before, self.after, self.stays = before, place.values, stays
        self.node = ""

    def run_node(self, n: fx.Node) -> Any:
        """Fit, run and check one node."""
        self.node = n.name
        if n.target in GUARDS and any(self.env[source] != self.before[source.name] for source in n.all_input_nodes):
            erase_guard(n)  # what it says of a size that is cut was said of the whole model
            return None
        if n.op in ("call_function", "call_method") and n.name in self.after:
            fit_node(self, n)
        try:
            result = super().run_node(n)
        except FxpruneError:
            raise
        except Exception as error:
            if any(is_empty(self.after.get(source.name)) for source in n.all_input_nodes):
                raise RewriteError(
                    f"the plan keeps no channel of what node {describe_place(n)} reads, and torch does not run it on "
                    f"nothing: {describe_cause(error)}. The model is unchanged; keep at least one channel there."
                ) from error
            raise RewriteError(
                f"node {describe_place(n)} does not run in the compact graph: {describe_cause(error)}. The model is "
                "unchanged; keep the channels there with keep=, and please report it."
            ) from error
        return self.checked(n, result)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A region may be given fewer channels than before."""
        value = super().placeholder(target, args, kwargs)
        return pytree.tree_map(as_expected, value, self.after[self.node]) if self.node in self.after else value

    def tensor(self, name: str) -> Tensor | None:
        """Where an operator runs, it runs without data."""
        return on_meta(self.state[name]) if name in self.state else None

    def past_hooks(self, layer: nn.Module) -> bool:
        """A cut calls no hooks, except where they make the weight."""
        return "weight" in layer._parameters or not hasattr(layer, "weight")

    def fetch_attr(self, target: str) -> Any:
        """Constants that tracing left on the module come without their data, like everything here."""
        value = super().fetch_attr(target)
        return on_meta(value) if isinstance(value, Tensor) else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A layer whose shape is plain need not run."""
        lowered = None if kwargs else self.lowered(target, args)
        if lowered and (result := self.as_predicted(name_of(lowered[0]), lowered[1])) is not None:
            return result
        with torch.device("meta"):
            return super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Nor need a function."""
        if not kwargs and (result := self.as_predicted(target, args)) is not None:
            return result
        with torch.device("meta"):
            return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Methods that make tensors make them without data."""
        with torch.device("meta"):
            return super().call_method(target, args, kwargs)

    def as_predicted(self, operator: Any, args: Sequence[Any]) -> Tensor | None:
        """The result of an operator whose shape is plain, and the predicted one."""
        expected = self.after.get(self.node)
        if not isinstance(expected, Value) or shape_of_result(operator, args) != expected.shape:
            return None
        return torch.empty(expected.shape, dtype=expected.dtype, device="meta")

    def checked(self, node: fx.Node, result: Any) -> Any:
        """Compare shapes with the prediction; a float that was computed from sizes keeps its original value."""
        if node.name not in self.after:  # not of the original: what is left of a branch
            return result
        expected = self.after[node.name]
        if isinstance(expected, float) and result != expected:
            bake_scalars(node, expected)
            return expected
        if isinstance(result, Tensor) and isinstance(expected, Value) and result.shape == expected.shape:
            return result
        shapes = [tuple(tensor.shape) for tensor in tensors_in(result)]
        predicted = [value.shape for value in values_in(expected)]
        if shapes != predicted and node.op != "output":
            raise RewriteError(
                f"node {describe_place(node)} has shape {shapes} in the compact graph, predicted was {predicted}. The "
                "model is unchanged; keep the channels there with keep=, and please report it."
            )
        return result


def as_expected(value: Any, expected: Any) -> Any:
    """A tensor of the shape that is predicted for it; anything else as it is."""
    if not isinstance(value, Tensor) or not isinstance(expected, Value) or value.shape == expected.shape:
        return value
    return torch.empty(expected.shape, dtype=expected.dtype, device="meta")


def bake_scalars(node: fx.Node, value: Any) -> None:
    """Replace a node that computes a number by that number, in all its users."""
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda arg: value if arg is node else arg)
        user.kwargs = fx.map_arg(user.kwargs, lambda arg: value if arg is node else arg)
