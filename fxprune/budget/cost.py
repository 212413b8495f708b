"""Cost: what a model costs, counted, measured, or as a function of the channels that stay.

FLOPs are those of ``torch.utils.flop_counter``: a multiply and an add are 2 FLOPs, 1 MAC is 2 FLOPs.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from fxprune.channels.analysis import Analysis
from fxprune.channels.interpret import Runner
from fxprune.channels.labels import Label, varying_axes
from fxprune.channels.names import Bools, Ints
from fxprune.channels.tensor import on_meta
from fxprune.channels.values import values_in
from fxprune.graph.inputs import bind_inputs, map_tensors
from fxprune.graph.keep import attributes_kept
from fxprune.graph.trace import named_tensors
from fxprune.graph.traced import Mode, TracedModule, is_traced

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

Floats = npt.NDArray[np.float64]


def flops(model: nn.Module, example_inputs: Any) -> int:
    """FLOPs of one forward pass in the model's mode, counted by ``FlopCounterMode`` on meta tensors.

    A model that looks at values runs on the example itself.
    """
    return count_flops(model, example_inputs)[""]


def count_flops(model: nn.Module, example_inputs: Any) -> Counter[str]:
    """The same for each module, by its path; what stands in a module counts for it too, and "" is the model.

    In a traced model, a function counts for the module whose forward called it: tracing went through that.
    """
    if isinstance(model, TracedModule):
        nodes = NodeCounter(model, Mode.of(model), state_on_meta(model))
        nodes.start(map_tensors(on_meta, bind_inputs(example_inputs, model)))
        return nodes.flops
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    args, kwargs = bind_inputs(example_inputs, model)
    if not is_traced(model):
        with suppress(RuntimeError), FlopCounterMode(display=False) as counter, torch.no_grad():
            functional_call(model, state_on_meta(model), *map_tensors(on_meta, (args, kwargs)))
            return flops_within("", counter)
    # On data torch may take a kernel for attention that the counter does not know; in its plain form it does.
    with (
        FlopCounterMode(display=False) as counter,
        attributes_kept(model),
        torch.no_grad(),
        torch.random.fork_rng(),
        sdpa_kernel(SDPBackend.MATH),
    ):
        model(*args, **kwargs)
    return flops_within("", counter)


def flops_within(path: str, counter: "FlopCounterMode") -> Counter[str]:
    """What a counter has seen of a module, by the paths of what stands in it. ``path`` is its own."""
    flops = Counter({path: counter.get_total_flops()})
    for name, counts in counter.get_flop_counts().items():
        if inner := name.partition(".")[2]:  # the first part is the module's class
            flops[f"{path}.{inner}".strip(".")] += sum(counts.values())
    return flops


def state_on_meta(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers under all their names, on meta but for single integers: batch norm reads its counter.

    What is shared is shared here too.
    """
    made: dict[int, Tensor] = {}
    tensors = named_tensors(model)
    for tensor in tensors.values():
        if id(tensor) not in made:
            made[id(tensor)] = on_meta(tensor) if tensor.ndim or tensor.is_floating_point() else tensor.clone()
    return {name: made[id(tensor)] for name, tensor in tensors.items()}


class NodeCounter(Runner):
    """Counts the FLOPs of each node for its module, and for the model."""

    def __init__(self, module: TracedModule, mode: Mode, state: Mapping[str, Tensor]) -> None:
        super().__init__(module, mode, state)
        self.flops = Counter({"": 0})

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, and count."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            result = super().run_node(n)
        stack = [path for path, _ in n.meta.get("nn_module_stack", {}).values()]
        path = str(n.target) if n.op == "call_module" else "".join(stack[-1:])
        self.flops[""] += counter.get_total_flops()
        if path:
            self.flops += flops_within(path, counter)
        return result


def params(model: nn.Module) -> int:
    """The number of parameters; one that is used twice counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def latency(model: nn.Module, example_inputs: Any, *, seconds: float = 1.0, threads: int | None = None) -> float:
    """Median seconds of one forward pass without gradients, in the model's mode, over about ``seconds`` of runs.

    ``torch.utils.benchmark`` warms up and waits for the GPU. ``threads``: default, those that torch uses now.
    """
    from torch.utils.benchmark import Timer  # imports what builds extensions, and that warns where there is no GPU

    args, kwargs = bind_inputs(example_inputs, model)
    timer = Timer(
        "with no_grad(): model(*args, **kwargs)",
        globals={"model": model, "args": args, "kwargs": kwargs, "no_grad": torch.no_grad},
        num_threads=threads or torch.get_num_threads(),
    )
    timer.timeit(2)
    return float(timer.blocked_autorange(min_run_time=seconds).median)


@dataclass(frozen=True)
class Channels:
    """The channels of all groups in one row: ``group[i]`` is the number of the group of channel i, int64[channels]."""

    names: tuple[str, ...]
    group: Ints
    of_root: Ints  # int64[names]: channel of each representative, -1 where frozen

    @classmethod
    def of(cls, analysis: Analysis) -> "Channels":
        """Number the channels of ``analysis`` in the order of its groups."""
        sizes = list(analysis.sizes.values())
        of_root = np.full(len(analysis.names), -1)
        if sizes:
            of_root[np.concatenate([group.roots for group in analysis.groups.values()])] = np.arange(sum(sizes))
        return cls(tuple(analysis.groups), np.repeat(np.arange(len(sizes)), sizes), of_root)


class Cost:
    """A cost as a function of the channels that stay: a sum of products of counts."""

    def __init__(
        self, analysis: Analysis, channels: Channels, terms: Iterable[tuple[float, tuple[Label, ...]]]
    ) -> None:
        """Each term is a number and the labels whose kept positions it is multiplied by."""
        one = np.zeros(1, dtype=np.int64)
        numbers: dict[int, int] = {id(one): 0}
        labels = [one]
        rows: list[list[int]] = []
        scales: list[float] = []
        for scale, factors in terms:
            for label in factors:
                if numbers.setdefault(id(label), len(labels)) == len(labels):
                    labels.append(label)
            rows.append([numbers[id(label)] for label in factors])
            scales.append(scale)
        width = max([1, *map(len, rows)])
        self.scales = np.array(scales, dtype=np.float64)
        self.factors = np.array([row + [0] * (width - len(row)) for row in rows], dtype=np.int64).reshape(-1, width)
        self.group, count = channels.group, len(channels.names)
        self.fixed = np.ones(len(labels))
        self.each = np.zeros((len(labels), count))  # positions of one channel of each group
        self.uneven: dict[int, Ints] = {}  # labels whose channels have unlike numbers of positions
        sizes = np.bincount(channels.group, minlength=count)
        for number, label in enumerate(labels[1:], 1):
            channel = channels.of_root[analysis.names.find(label).ravel()]
            self.fixed[number] = (channel < 0).sum()
            channel = channel[channel >= 0]
            positions = np.bincount(channel, minlength=len(channels.group))
            mean = np.bincount(channels.group, positions, minlength=count) / np.maximum(sizes, 1)
            if (positions == mean[channels.group]).all():
                self.each[number] = mean
            else:
                self.uneven[number] = positions

    def __call__(self, kept: Bools) -> float:
        """The cost when only the channels in ``kept`` (bool[channels]) stay."""
        counts = self.fixed + self.each @ np.bincount(self.group[kept], minlength=self.each.shape[1])
        for number, positions in self.uneven.items():
            counts[number] += positions[kept].sum()
        return float((self.scales * counts[self.factors].prod(1)).sum())

    def slopes(self, widths: Ints) -> Floats:
        """float64[groups]: what one more channel of each group costs where the groups have these widths."""
        positions_of = self.each.copy()
        for number, positions in self.uneven.items():
            positions_of[number] = np.bincount(self.group, positions) / np.bincount(self.group)
        counts = (self.fixed + positions_of @ widths)[self.factors]
        total = np.zeros(len(widths))
        for at in range(counts.shape[1]):
            rest = self.scales * np.delete(counts, at, axis=1).prod(1)
            total += rest @ positions_of[self.factors[:, at]]
        return total


def cost_of(analysis: Analysis, kind: str, channels: Channels) -> Cost:
    """The cost "flops", "macs", "params", "memory" (bytes) or "channels" as a function of the channels that stay.

    Memory is that of the parameters, the buffers and every value that the eval graph computes for the example inputs,
    as if none were freed: what a training step holds, without optimizer state and workspaces.
    """
    match kind:
        case "flops" | "macs":
            factor = 1 if kind == "flops" else 0.5
            return Cost(analysis, channels, ((factor * t.scale, t.factors) for t in analysis.flops))
        case "params":
            return Cost(analysis, channels, stored_costs(analysis, dict(analysis.graph.named_parameters()), False))
        case "memory":
            tensors = dict(analysis.graph.named_parameters()) | dict(analysis.graph.named_buffers())
            return Cost(analysis, channels, [*stored_costs(analysis, tensors, True), *computed_costs(analysis)])
    every = np.flatnonzero(channels.of_root >= 0)
    return Cost(analysis, channels, [(1, (every,))] if len(every) else [])


def marginal(analysis: Analysis, kind: str) -> dict[str, Floats]:
    """What the model would cost less without each single channel: float64[channels] for each group.

    ``kind`` as for ``cost_of``. A channel takes along its part of every layer that writes or reads it.
    """
    if not analysis.groups:
        return {}
    channels = Channels.of(analysis)
    cost = cost_of(analysis, kind, channels)
    kept = np.ones(len(channels.group), dtype=bool)
    dense = cost(kept)
    # Channels of a group that have as many positions on every label cost the same: one of them is enough.
    rows = np.stack([channels.group, *cost.uneven.values()], axis=1)
    _, first, same = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    savings = np.zeros(len(first))
    for number, channel in enumerate(first):
        kept[channel] = False
        savings[number] = dense - cost(kept)
        kept[channel] = True
    saving = savings[same.ravel()]
    sizes = list(analysis.sizes.values())
    return dict(zip(analysis.groups, np.split(saving, np.cumsum(sizes)[:-1]), strict=True))


def stored_costs(
    analysis: Analysis, tensors: dict[str, Any], in_bytes: bool
) -> Iterable[tuple[float, tuple[Label, ...]]]:
    """The elements (or bytes) of parameters and buffers."""
    for name in tensors.keys() & analysis.shapes.keys():  # a branch may be gone
        tensor = tensors[name]
        axes = [analysis.axes.get((name, at)) for at in range(tensor.ndim)]
        named = tuple(axis.names for axis in axes if axis is not None)
        rest = math.prod(size for size, axis in zip(analysis.shapes[name], axes, strict=True) if axis is None)
        yield rest * (tensor.element_size() if in_bytes else 1), named


def computed_costs(analysis: Analysis) -> Iterable[tuple[float, tuple[Label, ...]]]:
    """The bytes of the values of the eval graph that hold memory of their own."""
    graphs = {place.region: place.graph for place in analysis.places() if place.mode is Mode.EVAL}
    for region, trees in analysis.values[Mode.EVAL].items():
        present = values_of_nodes(graphs[region], trees) if region in graphs else trees.values()
        for value in (value for tree in present for value in values_in(tree)):
            if value.owner:
                covered = {axis for label in value.labels for axis in varying_axes(label)}
                rest = math.prod(size for axis, size in enumerate(value.shape) if axis not in covered)
                yield rest * torch.empty(0, dtype=value.dtype).element_size(), value.labels


def values_of_nodes(graph: fx.Graph, trees: Mapping[str, Any]) -> Iterator[Any]:
    """The values of the nodes that ``graph`` has now; a copy that a cut put in has the form of what it copies."""
    for node in graph.nodes:
        while node.name not in trees and node.all_input_nodes:
            node = node.all_input_nodes[0]
        if node.name in trees:
            yield trees[node.name]
