"""Activation: channels that carry little signal matter little."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.channels.analysis import Analysis
from fxprune.channels.interpret import placeholders
from fxprune.channels.labels import Label
from fxprune.channels.values import Value
from fxprune.cost import Channels, Floats
from fxprune.errors import PlanError
from fxprune.inputs import bind

from ._data import Batch, batches, mean_over
from .base import Criterion, detached, normalized

STATISTICS = ("mean", "variance")


@dataclass(frozen=True)
class Activation(Criterion):
    """The mean absolute value, or the variance, of a channel's activations, where layers with weights read them.

    That is behind norm and activation function; over all samples, positions and layers that read the channel, divided
    by the mean of the group. Groups that no such layer reads stay whole. The mean is after Molchanov et al., "Pruning
    Convolutional Neural Networks for Resource Efficient Inference" (2017), the variance after Polyak and Wolf,
    "Channel-Level Acceleration of Deep Face Representations" (2015). How the model runs is as for ``Taylor``.

    Attributes:
        data: as for ``Taylor``; y is not looked at.
        statistic: "mean" or "variance".
    """

    data: Any
    statistic: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.statistic not in STATISTICS:
            raise PlanError(f"statistic={self.statistic!r} is not known; use 'mean' or 'variance'")

    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group that some layer reads."""
        channels = Channels.of(analysis)
        reads = readings(analysis)

        def sums(model: fx.GraphModule, batch: Batch) -> dict[str, Floats]:
            watcher = _Watcher(model, reads, analysis, channels)
            with torch.no_grad():
                try:
                    watcher.run(*placeholders(model.graph, bind(batch[0])))
                except Exception as error:
                    raise PlanError(f"model(x) fails on this data: {type(error).__name__}: {error}") from error
            return watcher.sums

        found = mean_over(analysis, batches(self.data, "Activation"), "Activation", sums)
        count = np.maximum(found["count"], 1)
        values = found["size"] / count
        if self.statistic == "variance":
            values = np.maximum(found["square"] / count - (found["sum"] / count) ** 2, 0)
        sizes = list(analysis.sizes.values())
        split, seen = (np.split(each, np.cumsum(sizes)[:-1]) for each in (values, found["count"]))
        return {
            name: normalized(its) for name, its, there in zip(analysis.groups, split, seen, strict=True) if there.all()
        }


def readings(analysis: Analysis) -> dict[str, list[tuple[str, Label]]]:
    """The nodes that have weights of some group -> the nodes that they read, and their labels; each is read once."""
    graph, mode = analysis.graph, analysis.graph.training
    values = analysis.values[mode if mode in analysis.values else False]
    weights = {
        member.parameter
        for group in analysis.groups.values()
        for member in group.members
        if len(analysis.shapes[member.parameter]) > 1
    }
    weights = {name for name, first in analysis.aliases.items() if first in weights}
    owners = {name.rpartition(".")[0] for name in weights}
    found: dict[str, list[tuple[str, Label]]] = {}
    taken: set[str] = set()
    for node in graph.graph.nodes:
        sources = [each for each in node.all_input_nodes if each.op != "get_attr"]
        constants = [each.target for each in node.all_input_nodes if each.op == "get_attr"]
        layer = node.op == "call_module" and node.target in owners
        if not layer and weights.isdisjoint(constants):
            continue
        for source in sources:
            value = values[source.name]
            if source.name not in taken and isinstance(value, Value):
                taken.add(source.name)
                found.setdefault(node.name, []).extend((source.name, label) for label in value.labels)
    return found


class _Watcher(fx.Interpreter):
    """Runs the model, and sums over each channel what the nodes with weights read.

    ``sums``: "count", "sum", "size" (of absolute values) and "square", each float64[channels].
    """

    def __init__(
        self,
        model: fx.GraphModule,
        reads: Mapping[str, list[tuple[str, Label]]],
        analysis: Analysis,
        channels: Channels,
    ) -> None:
        super().__init__(model, graph=model.graph)
        self.reads, self.analysis, self.channels = reads, analysis, channels
        self.sums = {name: np.zeros(len(channels.group)) for name in ("count", "sum", "size", "square")}

    def run_node(self, n: fx.Node) -> Any:
        """Look at what the node reads, and run it."""
        for source, label in self.reads.get(n.name, ()):
            value = next(self.env[each] for each in n.all_input_nodes if each.name == source)
            self.take(value, label)
        return super().run_node(n)

    def take(self, value: Tensor, label: Label) -> None:
        """Add the values of each channel of ``label``."""
        channel = self.channels.of_root[self.analysis.names.find(label).ravel()]
        here = channel >= 0
        size = len(self.channels.group)
        over = [axis for axis, size in enumerate(label.shape) if size == 1]
        value = detached(value)
        for name, each in (("sum", value), ("size", value.abs()), ("square", value.square())):
            total = (each.sum(over) if over else each).double().cpu().numpy().ravel()
            self.sums[name] += np.bincount(channel[here], total[here], minlength=size)
        self.sums["count"] += value.numel() / label.size * np.bincount(channel[here], minlength=size)
