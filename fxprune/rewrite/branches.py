"""Branches: what becomes of a residual branch when a plan empties a group inside it.

A convolution or linear layer without input channels gives a constant: its bias, or zero. What follows it up to the
residual sum, a norm and elementwise layers, makes another constant of it, the same in every position. So the branch
goes out of the graph: with its constant (the sum becomes its other operand), or all but its constant.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.channels.analysis import Analysis
from fxprune.channels.depth import find_residuals, is_sum, nodes_for
from fxprune.channels.values import Value
from fxprune.errors import PlanError
from fxprune.graph.guards import erase_guards
from fxprune.graph.layers import BATCH_NORMS, CONTRACTIONS, ELEMENTWISE
from fxprune.graph.places import describe_place
from fxprune.graph.trace import named_tensors
from fxprune.graph.traced import Mode, Model, TracedModule, Values, places_of, regions_of
from fxprune.plan import Plan
from fxprune.rewrite.fit import name_of_target

PRODUCTS: tuple[Any, ...] = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_")


class Constant(nn.Module):
    """A layer without input channels that has a bias: gives the bias, for every position."""

    bias: Tensor

    def __init__(self, layer: "nn.modules.conv._ConvNd | nn.Linear") -> None:
        """Take over the bias of ``layer``."""
        super().__init__()
        self.register_parameter("bias", layer.bias if isinstance(layer.bias, nn.Parameter) else None)
        self.shape = (1, -1) + (1,) * (layer.weight.ndim - 2)
        self.training = layer.training

    def forward(self) -> Tensor:
        """float[1, C, 1, 1], or with as many dimensions as the layer's output has."""
        return self.bias.reshape(self.shape)


class ConstantNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm over a constant: in training its batch has that mean and no variance."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        """Take over all that ``norm`` holds."""
        nn.Module.__init__(self)
        self.__dict__.update(norm.__dict__)
        self.ndim = {nn.BatchNorm1d: 2, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}[type(norm)]

    def forward(self, input: Tensor | None = None) -> Tensor:
        """``input``: float[1, C, 1, 1], or nothing for zero; gives the norm's output at every position, likewise."""
        shape = (1, -1, *(1 for _ in range(self.ndim - 2)))
        constant = self.zero() if input is None else input.flatten()
        if self.training:
            with torch.no_grad():
                self.move(constant)
        mean = constant if self.training or self.running_mean is None else self.running_mean
        variance = torch.zeros_like(mean) if self.training or self.running_var is None else self.running_var
        scale = (variance + self.eps).rsqrt() * (1 if self.weight is None else self.weight)
        shifted = (constant - mean) * scale + (0 if self.bias is None else self.bias)
        return shifted.reshape(shape)

    def zero(self) -> Tensor:
        """float[C] of zeros."""
        like = next(t for t in (self.bias, self.weight, self.running_mean) if t is not None)
        return torch.zeros_like(like.detach())

    def move(self, constant: Tensor) -> None:
        """Move the running statistics."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        rate = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.mul_(1 - rate).add_(rate * constant)
        self.running_var.mul_(1 - rate)


@dataclass(frozen=True)
class Branch:
    """A branch from ``end`` over ``tail`` to the sum ``join``.

    Its last contraction, ``end``, has no input channels; or it goes ``whole``, whatever it has.
    """

    end: fx.Node
    tail: tuple[fx.Node, ...]
    join: fx.Node
    whole: bool = False

    @property
    def other(self) -> fx.Node:
        """The operand of the sum that stays."""
        last = (self.end, *self.tail)[-1]
        first, second = self.join.args[:2]
        other = second if first is last else first
        assert isinstance(other, fx.Node)
        return other

    def nodes(self) -> set[fx.Node]:
        """Everything that is computed for this branch alone."""
        return nodes_for({self.end, *self.tail})


def dead_branches(model: nn.Module, graph: fx.Graph, values: Mapping[str, Any]) -> list[Branch]:
    """The branches that ``values``, the predicted shapes, leave without channels.

    Raises:
        PlanError: a group was emptied that is not inside a residual branch.
    """
    found = []
    for node in graph.nodes:
        if is_empty(values.get(node.name)):
            for user in node.users:
                if user.op == "output" or (is_sum(user) and not is_empty(values.get(user.name))):
                    raise PlanError(why_not_empty(user))
            continue
        if not any(is_empty(values.get(source.name)) for source in node.all_input_nodes):
            continue
        if node.op != "call_module" or not isinstance(model.get_submodule(str(node.target)), CONTRACTIONS):
            raise PlanError(why_not_empty(node))
        if not ends_inside(node, values):
            found.append(follow_branch(node))
    joins = [branch.join for branch in found]
    for branch in found:
        if joins.count(branch.join) > 1 or is_empty(values.get(branch.other.name)):
            raise PlanError(why_not_empty(branch.join))
    return found


def ends_inside(end: fx.Node, values: Mapping[str, Any]) -> bool:
    """Whether what ``end`` gives goes only into values without channels, as a squeeze-and-excitation's scale does."""
    constant, waiting = {end}, [end]
    while waiting:
        for user in waiting.pop().users:
            if is_empty(values.get(user.name)) or user in constant:
                continue
            if not constant.issuperset(user.all_input_nodes) or user.op == "output":
                return False
            constant.add(user)
            waiting.append(user)
    return True


def follow_branch(end: fx.Node) -> Branch:
    """The branch that ends with the contraction ``end``."""
    tail: list[fx.Node] = []
    node = end
    while len(readers := [user for user in node.users if not reads_form(user)]) == 1:
        reader = readers[0]
        if is_sum(reader):
            return Branch(end, tuple(tail), reader)
        if reader.op == "output" or not (len(reader.all_input_nodes) == 1 or is_scaling(reader)):
            break
        tail.append(reader)
        node = reader
    raise PlanError(why_not_empty(node))


def reads_form(node: fx.Node) -> bool:
    """Whether a node asks for the size, device or dtype of a tensor, and not for its values."""
    return node.target == "size" or (node.target is getattr and node.args[1] in ("shape", "device", "dtype"))


def is_scaling(node: fx.Node) -> bool:
    """Whether a node multiplies by what is no parameter, as stochastic depth does."""
    return node.target in PRODUCTS and all(source.op != "get_attr" for source in node.all_input_nodes)


def is_empty(value: Any) -> bool:
    """Whether a predicted value has no elements."""
    return isinstance(value, Value) and 0 in value.shape


def why_not_empty(node: fx.Node) -> str:
    """Why a group can't be emptied."""
    return (
        f"the plan keeps no channel of a group, and at node {describe_place(node)} that is not a residual branch that "
        "could go whole; keep at least one"
    )


def remove_branches(compact: Model, values: Values, dropped: frozenset[str]) -> None:
    """Take the branches that ``values``, the predicted shapes, leave without channels out of ``compact``.

    Region by region; see ``remove_from``.
    """
    traced, places = regions_of(compact), places_of(compact, values)
    for path, region in traced.items():
        mine = path + "." if path else ""
        its = [place for place in places if place.region == path]
        branches = {place.mode: dead_branches(region, place.graph, place.values) for place in its}
        remove_from(region, branches, frozenset(name.removeprefix(mine) for name in dropped if name.startswith(mine)))
    for layer, ends in ((layer, ends) for regions in values.values() for layer, ends in regions.items()):
        if layer not in traced and any(map(is_empty, ends.values())):
            raise PlanError(f"the plan keeps no channel at {layer}, which is not inside a residual branch; keep one")


def remove_layers(compact: Model, values: Values, layers: Sequence[str]) -> None:
    """Take residual branches out of ``compact`` whole, by their names. ``values``: the predicted shapes."""
    residuals = find_residuals(compact, values)
    if unknown := [name for name in layers if name not in residuals]:
        raise PlanError(
            f"{unknown[0]} is no residual branch of what the rest of the plan leaves: it can't be taken out"
        )
    branches = {
        mode: [Branch(residual.end, (), residual.join, whole=True) for residual in (residuals[n][mode] for n in layers)]
        for mode in compact.distinct_graphs()
    }
    remove_from(compact, branches)
    state = {name for layer in layers for name in residuals[layer][Mode.EVAL].state}
    for name in sorted(state & named_tensors(compact).keys()):
        path, _, leaf = name.rpartition(".")
        delattr(compact.get_submodule(path), leaf)


def remove_from(
    compact: TracedModule, branches: Mapping[Mode, Sequence[Branch]], dropped: frozenset[str] = frozenset()
) -> None:
    """Take branches out of ``compact``, all but their constants, and the modules that nothing calls any more.

    Args:
        compact: changed in place.
        branches: those of each mode's graph. What their last contraction gives is its bias, or does not matter.
        dropped: the modules that belong to branches whose constant goes too.

    Raises:
        PlanError: the constant of a branch can't be kept.
    """
    before = called_function(compact)
    for mode, graph in compact.distinct_graphs().items():
        if branches[mode]:
            erase_guards(graph)  # they may read sizes of what goes
        for branch in branches[mode]:
            nodes, join, other = branch.nodes(), branch.join, branch.other
            whole = branch.whole or any(node.target in dropped for node in nodes if node.op == "call_module")
            constant = None if whole else keep_constant(compact, graph, branch)
            if constant is not None:
                join.args, join.kwargs = (other, constant), {}
                join.target = "add" if join.op == "call_method" else torch.add
            else:
                join.replace_all_uses_with(other)
                nodes.add(join)
            for node in [node for node in reversed(graph.nodes) if node in nodes]:
                graph.erase_node(node)
            if constant is None:
                free_of_writes(compact, graph, other)
        graph.lint()
    for path in before - called_function(compact):
        compact.delete_submodule(str(path))


def free_of_writes(compact: TracedModule, graph: fx.Graph, value: fx.Node) -> None:
    """The users of a sum may write into it, but not into the operand that takes its place, which others may need."""
    rectifies = is_relu(compact, value)
    for user in list(value.users):
        if rectifies and is_relu(compact, user):
            user.replace_all_uses_with(value)  # once is enough
            graph.erase_node(user)
        elif writes_in_place(compact, user):
            with graph.inserting_before(user):
                user.replace_input_with(value, graph.call_function(torch.clone, (value,)))


def is_relu(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node is a rectifier."""
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), nn.ReLU)
    return node.target in (torch.relu, torch.relu_, F.relu, "relu", "relu_")


def writes_in_place(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node writes into its first input."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    in_name = name_of_target(node).endswith("_")
    return bool(node.kwargs.get("inplace", False)) or in_name or node.target is operator.iadd


def keep_constant(compact: TracedModule, graph: fx.Graph, branch: Branch) -> fx.Node | None:
    """Insert what computes the constant of a branch, None where that is zero."""
    check_tail(compact, branch)
    value: fx.Node | None = None

    def insert(node: fx.Node, module: nn.Module) -> fx.Node:
        if compact.get_submodule(str(node.target)) is not module:
            compact.set_submodule(str(node.target), module)
        args = () if value is None else (value,)
        return graph.create_node("call_module", node.target, args, name=f"{node.name}_constant")

    with graph.inserting_before(branch.join):
        layer: Any = compact.get_submodule(str(branch.end.target))
        if layer.bias is not None:
            value = insert(branch.end, layer if isinstance(layer, Constant) else Constant(layer))
        for node in branch.tail:
            module = compact.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, BATCH_NORMS):
                value = insert(node, ConstantNorm(module))
            elif module is not None and (value is not None or isinstance(module, ConstantNorm)):
                value = insert(node, module)
        return value


def check_tail(model: nn.Module, branch: Branch) -> None:
    """Raise PlanError where the constant of ``branch`` passes something else than norms and elementwise layers."""
    for node in branch.tail:
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, (*BATCH_NORMS, ConstantNorm, *ELEMENTWISE)):
            raise PlanError(
                f"the constant of a branch can't be kept over node {describe_place(node)}; drop it with the branch "
                '(dropped= of a Plan, branches="remove" of PruneTrain), or keep one channel'
            )


def called_function(model: TracedModule) -> set[Any]:
    """The modules that some graph calls."""
    nodes = [node for graph in model.distinct_graphs().values() for node in graph.nodes]
    return {node.target for node in nodes if node.op == "call_module"}


def emptied_groups(analysis: Analysis, dead: set[str], constants: bool) -> set[str]:
    """Which groups to empty so that the residual branches with the ``dead`` groups go whole.

    A dead group that is not inside a residual branch is left out, and so is, where ``constants`` should stay, one whose
    branch has a constant that can't. Groups that live only in a branch that goes are added.
    """
    result: set[str] = set()
    for name in sorted(dead):
        try:
            result |= whole_branches(analysis, {name}, constants)
        except PlanError:
            continue
    return result


def whole_branches(analysis: Analysis, groups: set[str], constants: bool) -> set[str]:
    """``groups`` and all that live only in the branches that go with them. Raises PlanError where none can go."""
    plan = Plan({name: () for name in groups}, analysis.sizes, analysis.options)
    after = analysis.after(plan)
    gone: set[str] = set()
    for place in after.places():
        found = dead_branches(place.module, place.graph, place.values)
        if constants:
            for branch in found:
                check_tail(place.module, branch)
        nodes = (node for branch in found for node in branch.nodes() if node.op == "call_module")
        gone |= {f"{place.region}.{node.target}".removeprefix(".") for node in nodes}
    if not gone:
        raise PlanError(f"no branch goes with {groups}")
    inside = {
        group.name
        for group in analysis.groups.values()
        if all(member.parameter.rpartition(".")[0] in gone for member in group.members)
    }
    return groups | inside if inside <= groups else whole_branches(analysis, groups | inside, constants)
