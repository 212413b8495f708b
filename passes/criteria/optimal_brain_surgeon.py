"""Optimal Brain Surgeon: channels whose part the others can play, once they are adjusted, matter little."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.budget.cost import Floats
from fxprune.channels.analysis import Analysis
from fxprune.channels.groups import Group, Member
from fxprune.graph.inputs import Bound
from fxprune.graph.traced import observed_values, regions_of
from fxprune.progress import track_progress
from fxprune.rewrite.restore import read_arguments
from fxprune.rewrite.rows import find_linear_layer

from .._data import mean_over
from ..base import Criterion, detach_weights, run_forward, share_in_layers

RIDGE = 1e-3  # times the mean variance of what is read
LARGE = 6000  # inputs: of a layer with more, no square matrix is made


@dataclass(frozen=True)
class OptimalBrainSurgeon(Criterion):
    """The part of what its readers give that is lost with a channel, after their other weights have made up for it.

    Of each layer that reads a group, let W, [outputs * offsets, inputs], be its weight and H, [inputs, inputs], the
    covariance of its inputs, with a ridge. Without channel c it loses tr(W_c ([H^-1]_cc)^-1 W_c^T) of the variance
    tr(W H W^T), if the least squares of ``restore`` make up for the rest; one coefficient for all offsets of a kernel
    does. The loss of all readers together decides which channel goes first. H^-1 and W are brought up to date then, so
    that of two channels that can stand in for each other one stays. Shares and costs are as for ``Magnitude``.

    Grouped convolutions, and layers with more than 6,000 inputs, are not looked at; groups that no other layer reads
    stay whole. After Hassibi and Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon" (1992),
    and Kurtic et al., "ZipLM" (2023), on whole groups. It belongs to ``prune(..., data=)``, which makes up for it.

    Attributes:
        data: batches as ``restore`` takes them; labels are not needed.
    """

    per_cost: ClassVar[bool] = True
    scores_layers: ClassVar[bool] = False
    data: Any

    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group that some layer reads."""
        readers = {reader.name: reader for reader in find_readers(analysis)}
        products = sum_products(analysis, readers, self.data)
        scores = {}
        for name, group in analysis.groups.items():
            read = list(lay_out_readers(analysis, group, readers, products))
            if read:
                scores[name] = share_in_layers(analysis, group, remove_in_turn(group.size, read))
        return scores


@dataclass(frozen=True)
class _Reader:
    """A layer whose inputs are looked at.

    Attributes:
        name: of its weight in the analysis.
        region: the path of the traced module that it is in.
        source: the node that it reads there.
        channel_axis: the axis of channels of what it reads, from the end.
        input_axis: that of its weight.
        weight: float64[outputs * offsets, inputs].
    """

    name: str
    region: str
    source: str
    channel_axis: int
    input_axis: int
    weight: Tensor


@dataclass
class _Read:
    """What a reader makes of the channels of one group, as channels go.

    Attributes:
        inverse: float64[inputs, inputs], of the covariance of the inputs that are left.
        weight: float64[outputs * offsets, inputs], adjusted; what it gave before had the variance 1.
        places: int64[channels, places], the inputs of each channel.
    """

    inverse: Tensor
    weight: Tensor
    places: Tensor

    def measure_losses(self, channels: list[int]) -> Tensor:
        """float64[channels]: the variance that is lost with each of ``channels``."""
        places = self.places[channels]
        blocks = self.inverse[places[:, :, None], places[:, None, :]]
        weights = self.weight[:, places].permute(1, 2, 0)
        losses: Tensor = (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))
        return losses

    def remove(self, channel: int) -> None:
        """Take a channel out, and let the others make up for it: a step of Gaussian elimination."""
        gone = self.places[channel]
        share = torch.linalg.solve(self.inverse[gone][:, gone], self.inverse[gone])
        self.weight = self.weight - self.weight[:, gone] @ share
        self.inverse = self.inverse - self.inverse[:, gone] @ share


def find_readers(analysis: Analysis) -> Iterator[_Reader]:
    """The layers whose inputs are looked at, each once."""
    for path, region in regions_of(analysis.graph).items():
        for node in region.graph.nodes:
            layer = find_linear_layer(region, node)
            if layer is None or layer.groups > 1:
                continue
            axis = 0 if layer.is_transposed else 1  # of its weight, along which it reads
            if layer.weight.shape[axis] > LARGE:
                continue
            name = f"{path}.{layer.name}".strip(".")
            weight = detach_weights(layer.weight).double().movedim(axis, -1).flatten(0, -2)
            channel_axis = -1 if layer.convolution is None else 1 - layer.weight.ndim
            source = node.all_input_nodes[0].name
            yield _Reader(analysis.aliases.get(name, name), path, source, channel_axis, axis, weight)


def sum_products(analysis: Analysis, readers: Mapping[str, _Reader], data: Any) -> dict[str, Floats]:
    """Products of all inputs of each reader, and of a 1 behind them: float64[inputs + 1, inputs + 1], flat."""
    sums: dict[str, Floats] = {}
    observed: list[nn.Module] = []

    def watch(reader: _Reader) -> Callable[[Tensor], None]:
        def add(value: Tensor) -> None:
            rows = value.detach().double().movedim(reader.channel_axis, -1).flatten(0, -2)
            rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
            products: Floats = (rows.mT @ rows).cpu().numpy().ravel()
            sums[reader.name] = sums[reader.name] + products if reader.name in sums else products

        return add

    def run(model: nn.Module, batch: Bound) -> dict[str, Floats]:
        sums.clear()
        if not observed:
            observe(model, {name: (reader, watch(reader)) for name, reader in readers.items()})
            observed.append(model)
        run_forward(model, batch)
        return dict(sums)

    batches = track_progress(read_arguments(data, analysis.graph), "OptimalBrainSurgeon")
    return mean_over(analysis, batches, "OptimalBrainSurgeon", run)


def observe(model: nn.Module, watches: Mapping[str, tuple[_Reader, Callable[[Tensor], None]]]) -> None:
    """Have ``model``, a copy that runs in this mode alone, show each reader's input to its watch."""
    for path, region in regions_of(model).items():
        of_source: dict[str, list[Callable[[Tensor], None]]] = {}
        for reader, add in watches.values():
            if reader.region == path:
                of_source.setdefault(reader.source, []).append(add)
        graph = observed_values(region.graph, {source: call_all(adds) for source, adds in of_source.items()})
        region.set_graphs(graph, graph)


def call_all(functions: list[Callable[[Tensor], None]]) -> Callable[[Tensor], None]:
    """One function that calls all."""

    def call(value: Tensor) -> None:
        for function in functions:
            function(value)

    return call


def lay_out_readers(
    analysis: Analysis, group: Group, readers: Mapping[str, _Reader], products: Mapping[str, Floats]
) -> Iterator[_Read]:
    """The readers of a group, before any channel goes."""
    for member in group.members:
        reader = readers.get(member.parameter)
        places = find_places(group, member)
        if reader is None or member.axis != reader.input_axis or reader.name not in products or places is None:
            continue
        weight = reader.weight.cpu()
        covariance = find_covariance(products[reader.name])
        variance = (weight @ covariance * weight).sum()
        if variance > 0:
            yield _Read(torch.linalg.inv(covariance), weight / variance.sqrt(), places)


def find_places(group: Group, member: Member) -> Tensor | None:
    """int64[channels, places]: the inputs of each channel; None where channels have unlike numbers of them."""
    counts = np.bincount(member.channel, minlength=group.size)
    if len(set(counts.tolist())) > 1:
        return None
    order = np.argsort(member.channel, kind="stable")
    return torch.from_numpy(np.asarray(member.index)[order].reshape(group.size, -1))


def find_covariance(products: Floats) -> Tensor:
    """float64[inputs, inputs]: from ``sum_products``, with the ridge."""
    size = round(len(products) ** 0.5)
    sums = torch.from_numpy(products).view(size, size)
    mean = sums[-1:, :-1] / sums[-1, -1]
    covariance = sums[:-1, :-1] / sums[-1, -1] - mean.mT @ mean
    ridge = (RIDGE * covariance.diagonal().mean()).clamp_min(torch.finfo(torch.float64).tiny)
    return covariance + ridge * torch.eye(size - 1, dtype=torch.float64)


def remove_in_turn(size: int, readers: list[_Read]) -> Floats:
    """float64[channels]: what is lost with each when it goes, of all that are left the one with the least loss first.

    A channel scores no less than those that went before it.
    """
    scores, left, least = np.zeros(size), list(range(size)), 0.0
    while left:
        losses = torch.stack([reader.measure_losses(left) for reader in readers]).sum(0)
        channel = left.pop(int(losses.argmin()))
        scores[channel] = least = max(least, float(losses.min()))
        for reader in readers:
            reader.remove(channel)
    return scores
