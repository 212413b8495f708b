"""Activation: channels that carry little signal matter little."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from fxprune.budget.cost import Channels, Floats
from fxprune.channels.analysis import Analysis
from fxprune.channels.labels import Label
from fxprune.channels.values import Value
from fxprune.errors import PlanError
from fxprune.graph.batches import Batch
from fxprune.graph.traced import Mode, observed_values, regions_of

from .._data import mean_over, read_labelled
from ..base import Criterion, detach_weights, run_forward, share_in_layers

STATISTICS = ("mean", "variance")


@dataclass(frozen=True)
class Activation(Criterion):
    """The mean absolute value, or the variance, of a channel's activations, where layers with weights read them.

    That is behind norm and activation function; over all samples, positions and layers that read the channel. Shares
    and costs are as for ``Magnitude``; groups that no such layer reads stay whole. The mean is after Molchanov et al.,
    "Pruning Convolutional Neural Networks for Resource Efficient Inference" (2017), the variance after Polyak and Wolf,
    "Channel-Level Acceleration of Deep Face Representations" (2015). How the model runs is as for ``Taylor``.

    Attributes:
        data: as for ``Taylor``; y is not looked at.
        statistic: "mean" or "variance".
    """

    per_cost: ClassVar[bool] = True
    scores_layers: ClassVar[bool] = False
    data: Any
    statistic: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.statistic not in STATISTICS:
            raise PlanError(f"statistic={self.statistic!r} is not known; use 'mean' or 'variance'")

    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group that some layer reads."""
        channels = Channels.of(analysis)
        watch = _Watch(analysis, channels)

        def sums(model: nn.Module, batch: Batch) -> dict[str, Floats]:
            watch.put_on(model)
            run_forward(model, batch[0])
            return watch.sums

        totals = mean_over(analysis, read_labelled(self.data, analysis, "Activation"), "Activation", sums)
        if not totals:
            return {}
        count = np.maximum(totals["count"], 1)
        values = totals["size"] / count
        if self.statistic == "variance":
            values = np.maximum(totals["square"] / count - (totals["sum"] / count) ** 2, 0)
        sizes = list(analysis.sizes.values())
        split, seen = (np.split(numbers, np.cumsum(sizes)[:-1]) for numbers in (values, totals["count"]))
        return {
            name: share_in_layers(analysis, analysis.groups[name], numbers)
            for name, numbers, counts in zip(analysis.groups, split, seen, strict=True)
            if counts.all()
        }


def find_values_read(analysis: Analysis, region: str) -> list[tuple[str, Label]]:
    """The nodes of a region that layers with weights of some group read, with the label of their channels."""
    graph = regions_of(analysis.graph)[region]
    values = analysis.values.get(Mode.of(graph), {}).get(region) or analysis.values[Mode.EVAL][region]
    members = {member.parameter for group in analysis.groups.values() for member in group.members}
    known = {name for name, first in analysis.aliases.items() if first in members and len(analysis.shapes[first]) > 1}
    weights = {name.removeprefix(f"{region}.") for name in known}
    owners = {name.rpartition(".")[0] for name in weights}
    of_node: dict[str, list[Label]] = {}
    for node in graph.graph.nodes:
        constants = [source.target for source in node.all_input_nodes if source.op == "get_attr"]
        if (node.op == "call_module" and node.target in owners) or not weights.isdisjoint(constants):
            for source in node.all_input_nodes:
                if source.op != "get_attr" and isinstance(value := values[source.name], Value):
                    of_node[source.name] = list(value.labels)
    return [(name, label) for name, labels in of_node.items() for label in labels]


class _Watch:
    """``sums`` over each channel: "count", "sum", "size" (of absolute values) and "square", each float64[channels]."""

    def __init__(self, analysis: Analysis, channels: Channels) -> None:
        self.analysis, self.channels = analysis, channels
        self.model: nn.Module | None = None
        self.sums: dict[str, Floats] = {}

    def put_on(self, model: nn.Module) -> None:
        """Begin anew, and have ``model``, a copy that runs in this mode alone, say what is read."""
        self.sums = {name: np.zeros(len(self.channels.group)) for name in ("count", "sum", "size", "square")}
        if model is self.model:
            return
        for path, region in regions_of(model).items():
            graph = observed_values(
                region.graph, {name: self.of(label) for name, label in find_values_read(self.analysis, path)}
            )
            region.set_graphs(graph, graph)
        self.model = model

    def of(self, label: Label) -> Callable[[Tensor], None]:
        """What adds a value with that label."""
        channel = self.channels.of_root[self.analysis.names.find(label).ravel()]
        grouped, size = channel >= 0, len(self.channels.group)
        over = [axis for axis, length in enumerate(label.shape) if length == 1]

        def add(value: Tensor) -> None:
            value = detach_weights(value)
            for name, numbers in (("sum", value), ("size", value.abs()), ("square", value.square())):
                total = (numbers.sum(over) if over else numbers).double().cpu().numpy().ravel()
                self.sums[name] += np.bincount(channel[grouped], total[grouped], minlength=size)
            self.sums["count"] += value.numel() / label.size * np.bincount(channel[grouped], minlength=size)

        return add
