"""FoldConstants: channels that hold a constant go; what they add moves to where it is read."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxprune.budget.cost import Channels
from fxprune.channels.analysis import Analysis, abridge_list, analyze
from fxprune.channels.labels import label_along
from fxprune.channels.names import Ints
from fxprune.channels.values import Value, values_in
from fxprune.graph.layers import TRANSPOSED, channel_axis, is_depthwise
from fxprune.graph.places import describe_place
from fxprune.graph.trace import trace
from fxprune.graph.traced import Mode, TracedModule, copy_model
from fxprune.pipeline import example_of
from fxprune.plan import Plan
from fxprune.rewrite.kinds import kind_of
from fxprune.rewrite.rewrite import rewrite

from ._constants import Constants, Reading, is_padded


@dataclass(frozen=True)
class FoldConstants(PassBase):
    """A rewrite that takes out every channel that is the same constant at each position, whatever the input.

    Such is a channel whose weights are zero and whose bias a ReLU cuts off, or one behind a norm with scale zero. A
    layer that reads the constant v through weights w gets the sum of v * w added to its bias; to the mean of the batch
    norm that follows instead, if it has no bias. That is exact where the layer reads no zeros beyond the border. Where
    it does, one such channel stays, and carries the others: its weights become the sum of v / v0 * w, and padding does
    to it what it did to them. A constant that is zero just goes.

    Channels that hold a constant and can't go, because something else than a plain convolution or linear layer reads
    them, are named in a warning. Nothing is approximated.

    Attributes:
        example_inputs: as for ``trace``; by default those of the Pipeline. The result is right for other sizes too.
        inference_only: fold what is constant in eval mode only, for a model that is not trained any more. Behind a
            batch norm a dead channel has another value in training, unless the norm's scale is zero.
    """

    computes_weights = True
    example_inputs: Any = field(default=None, repr=False)
    inference_only: bool = False

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Returns a new module, with the names of the old one for all that stays."""
        example = example_of(graph_module, self.example_inputs)
        graph = trace(graph_module, example)
        analysis = analyze(graph, example)
        constants = _Constants(graph, analysis, example, (Mode.EVAL,) if self.inference_only else tuple(Mode))
        keep, carriers = constants.decide()
        constants.warn()
        plan = Plan(keep, analysis.sizes, analysis.options)
        if not plan.keep:
            return PassResult(graph_module, False)
        copied = copy_model(graph)
        biases = constants.move(copied, plan, carriers)
        compact, param_map = rewrite(copied, analysis, plan)
        for path, bias in biases.items():
            rows = param_map[f"{path}.weight"][0]
            layer = compact.get_submodule(path)
            layer.bias = nn.Parameter(bias if rows is None else bias[rows], layer.weight.requires_grad)
            compact.meta.pop("fxprune", None)  # the plan does not tell of this parameter
        return PassResult(compact, True)


class _Constants:
    """The channels of a model, and which of them hold a constant for all that read them."""

    def __init__(self, graph: TracedModule, analysis: Analysis, example: Any, modes: tuple[Mode, ...]) -> None:
        self.graph, self.analysis, self.rows = graph, analysis, Channels.of(analysis)
        count = len(self.rows.group)
        self.read, self.constant = np.zeros(count, dtype=bool), np.ones(count, dtype=bool)
        self.stuck: dict[int, str] = {}  # channel -> what is in its way
        self.values: dict[str, tuple[Ints, Any]] = {}  # layer -> the channel at each position it reads, the constant
        self.shared = shared_weights(graph)
        for mode in modes:
            run = Constants(graph, mode, example)
            readings = {reading.node.name: reading for reading in run.readings}
            values = analysis.values.get(mode, analysis.values[Mode.EVAL])[""]
            for node in graph.graphs[mode].nodes:
                does = kind_of(graph, node)
                if does == "contraction":
                    self.look(readings[node.name], values[node.args[0].name])
                elif does == "" and values_in(values[node.name]):
                    for source in node.all_input_nodes:
                        self.block(self.channels_in(values[source.name]), f"{describe_place(node)} reads it")

    def look(self, reading: Reading, source: Value) -> None:
        """Take down what a layer reads."""
        path = str(reading.node.target)
        layer: Any = self.graph.get_submodule(path)
        label = label_along(source.labels, channel_axis(layer, len(source.shape)))
        if label is None or is_depthwise(layer):  # whose channels go along
            return
        channel = self.rows.of_root[self.analysis.names.find(label).ravel()]
        if len(channel) != len(reading.value):  # they vary along another axis too
            return self.block(channel[channel >= 0], f"{describe_place(reading.node)} reads a part of it")
        constant, value = reading.constant.cpu().numpy(), reading.value.cpu().numpy()
        first_channel, first_value = self.values.setdefault(path, (channel, value))
        if not np.array_equal(first_channel, channel):
            return self.block(np.concatenate([first_channel, channel]), f"{path} reads several")
        pruned = channel >= 0
        self.read[channel[pruned]] = True
        same = np.isclose(value, first_value, rtol=1e-12, atol=1e-12)
        self.constant[channel[pruned & ~(constant & same)]] = False
        if getattr(layer, "groups", 1) > 1 or isinstance(layer, TRANSPOSED) or path in self.shared:
            why = "shares its weights" if path in self.shared else "is grouped or transposed"
            self.block(channel[pruned & (value != 0)], f"{path}, which reads it, {why}")

    def block(self, channels: Any, why: str) -> None:
        """These can't go."""
        for channel in channels:
            self.stuck.setdefault(int(channel), why)

    def channels_in(self, tree: Any) -> Any:
        """The channels in a value."""
        labels = [label for value in values_in(tree) for label in value.labels]
        numbers = [self.rows.of_root[self.analysis.names.find(label).ravel()] for label in labels]
        every = np.unique(np.concatenate(numbers)) if numbers else np.zeros(0, dtype=np.int64)
        return every[every >= 0]

    def decide(self) -> tuple[dict[str, Any], dict[str, int]]:
        """What stays of each group, and the channel of a group that carries the others past zero padding."""
        keep, carriers = {}, {}
        inexact = np.array([group.inexact for group in self.analysis.groups.values()], dtype=bool)
        for number, name in enumerate(self.rows.names):
            channels: list[int] = np.flatnonzero(self.rows.group == number).tolist()
            gone = [
                c for c in channels if self.read[c] and self.constant[c] and c not in self.stuck and not inexact[number]
            ]
            least = {c: min(self.past_padding(c), default=0.0) for c in gone if any(self.past_padding(c))}
            if least:
                carrier = max(least, key=lambda c: least[c])
                if least[carrier]:
                    carriers[name] = carrier
                    gone.remove(carrier)
                else:
                    self.block(least, "padded layers read it, and no other channel could carry it past all of them")
                    gone = [c for c in gone if c not in least]
            gone = gone[1:] if len(gone) == len(channels) else gone  # a group keeps one
            keep[name] = [c - channels[0] for c in channels if c not in set(gone)]
        return keep, carriers

    def past_padding(self, channel: int) -> list[float]:
        """The absolute values of a channel at the layers that pad with zeros."""
        sizes = []
        for path, (channels, value) in self.values.items():
            if is_padded(self.graph.get_submodule(path)):
                sizes += [abs(float(v)) for v in value[channels == channel]]
        return sizes

    def warn(self) -> None:
        """Name the constants that stay."""
        stuck = {c: why for c, why in self.stuck.items() if c >= 0 and self.read[c] and self.constant[c]}
        if stuck:
            groups = dict.fromkeys(self.rows.names[self.rows.group[c]] for c in stuck)
            warnings.warn(
                f"FoldConstants leaves {len(stuck)} channels that hold a constant, of {abridge_list(list(groups))}: "
                f"{next(iter(stuck.values()))}",
                stacklevel=4,
            )

    @torch.no_grad()
    def move(self, copied: TracedModule, plan: Plan, carriers: dict[str, int]) -> dict[str, Tensor]:
        """Put what the removed channels add where it belongs. Returns the biases of layers that had none."""
        kept = [np.isin(range(size), plan.keep.get(name, range(size))) for name, size in plan.sizes.items()]
        gone = ~np.concatenate(kept)
        biases = {}
        for path, (channel, value) in self.values.items():
            layer: Any = copied.get_submodule(path)
            weight = layer.weight.double()
            moved = np.flatnonzero((channel >= 0) & gone[channel] & (value != 0))
            if not len(moved):
                continue
            if is_padded(layer):
                for at in moved:
                    carrier = carriers[self.rows.names[self.rows.group[channel[at]]]]
                    to = int(np.flatnonzero(channel == carrier)[0])
                    weight[:, to] += weight[:, at] * (value[at] / value[to])
                layer.weight.copy_(weight)
                continue
            added = weight[:, moved].flatten(2).sum(2) if weight.ndim > 2 else weight[:, moved]
            bias = (added * torch.from_numpy(value[moved]).to(added)).sum(1)
            norm = find_norm_behind(copied, path)
            if layer.bias is not None:
                layer.bias.add_(bias.to(layer.bias))
            elif norm is not None:
                norm.running_mean.sub_(bias.to(norm.running_mean))
            else:
                biases[path] = bias.to(layer.weight)
        return biases


def find_norm_behind(model: TracedModule, path: str) -> Any:
    """The batch norm that takes all that the convolution ``path`` gives, and nothing else; None if there is none."""
    graphs = model.distinct_graphs().values()
    nodes = [node for graph in graphs for node in graph.nodes if node.op == "call_module"]
    users = [user for node in nodes if node.target == path for user in node.users]
    norms = {user.target for user in users}
    if len(norms) != 1 or any(kind_of(model, user) != "norm" for user in users):
        return None
    calls = [node for node in nodes if node.target in norms]
    norm: Any = model.get_submodule(str(norms.pop()))
    conv = not isinstance(model.get_submodule(path), nn.Linear)  # whose channels may stand on another axis
    return norm if conv and len(calls) == len(users) and norm.running_mean is not None else None


def shared_weights(model: nn.Module) -> set[str]:
    """The layers whose weights have several names."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return {path for paths in owners.values() if len(paths) > 1 for path in paths}
