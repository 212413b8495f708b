"""ActivationDensity: layers are resized, while they train, to the share of their activations that is not zero."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.budget.budget import Bounds, Budget, patterns_of
from fxprune.budget.cost import Channels, Floats
from fxprune.budget.solver import held_groups
from fxprune.channels.analysis import Analysis, abridge_list
from fxprune.channels.interpret import name_within
from fxprune.channels.labels import Label
from fxprune.channels.values import Value
from fxprune.errors import PlanError
from fxprune.graph.traced import Mode, regions_of
from fxprune.options import allow_count, allow_number, allow_words, check_options
from fxprune.plan import Plan
from fxprune.rewrite.kinds import gives_zeros
from fxprune.rewrite.param_map import ParamMap
from fxprune.training.distributed import mean_over_ranks
from fxprune.training.memory import derived_field
from fxprune.training.meter import count_per_sample
from fxprune.training.run import Run, TrainingPass

from .._fresh import check_fresh, draw_weights
from ._target import (
    budget_on_the_way,
    check_target,
    find_deadline,
    is_met,
    measure_costs,
    measure_plan,
    restore_budget,
    solve_near,
)
from ._widths import keep_highest


@dataclass
class Densities:
    """What ActivationDensity remembers.

    Attributes:
        left: the groups that stay whole.
        settled: how many times in a row the densities did not move.
        since: epochs since the last cut.
        cuts: how many were made.
        planned: whether the last epoch ended with a plan of this pass.
        densities: of each group, as it was at the end of the last epoch.
        dense: what the model cost when the session began, by what the budget limits.
        deadline: the epoch, from 1, by whose end the budget is met.
        counts: for each activation the non-zero values of each channel, int64[names], and all values of one, int64[].
        measured: the activations, with the names of the channels there.
    """

    left: list[str]
    settled: int = 0
    since: int = 0
    cuts: int = 0
    planned: bool = False
    densities: dict[str, float] = field(default_factory=dict)
    dense: dict[str, float] | None = None
    deadline: int = 0
    counts: dict[str, list[Tensor]] = field(default_factory=dict)
    measured: list[tuple[str, Label]] = derived_field(list)


@dataclass(frozen=True)
class ActivationDensity(TrainingPass[Densities]):
    """Foldy-Porto et al., "Activation Density driven Efficient Pruning in Training" (2020).

    The density of a layer is the share of its activations (after ReLU, ReLU6 or hardswish) that are not zero, over an
    epoch of training. When all densities have stopped changing, each group of C channels keeps round(density * C) of
    them, those of the highest density; and so on, until every density is near 1. A group that has several activations,
    as a residual stage has, takes one density for all its layers. Groups without such an activation stay whole.

    The paper's abstract and introduction name the statistic, the rule and the loop; the tests and their numbers are
    choices made here, and options.

    Attributes:
        saturation: the densities have settled when none moved by as much as this from epoch to epoch ...
        patience: ... so many times in a row.
        cooldown: epochs between cuts at least, and before the first: after a cut the densities jump.
        stop: no more cuts once every density is at least this.
        cuts: no more than so many; None for no limit. Behind a batch norm about half of the activations are zero
            whatever the width, so there the densities never come near 1 and this is what ends the cutting.
        several: the density of a group with several activations: their "max" or their "mean".
        weights: "keep" what was learned, or "reinit": after a cut every layer starts again from new weights, and the
            optimizer without state. A learning rate schedule then has to start again too, which is up to the loop.
        minimum: channels that each group keeps at least.
        round_to: keep so many more that widths are multiples of this.
        keep: patterns of what stays whole, as for the criteria.
        budget: what may remain of the model as the session found it; not of latency. Where the densities ask for less,
            the channels of the highest density stay that meet it, and then the cutting ends. Where it is not met when
            it should be, a cut meets it, whether the densities have settled or not.
        by: when the budget is met: a share of ``Session(epochs=...)``, or the number of an epoch.
    """

    saturation: float = 0.01
    patience: int = 3
    cooldown: int = 5
    stop: float = 0.95
    cuts: int | None = 2
    several: str = "max"
    weights: str = "keep"
    minimum: int = 1
    round_to: int = 1
    keep: str | Sequence[str] = ()
    budget: Budget | None = None
    by: float = 0.6

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", restore_budget(self.budget))
        check_target(self)
        check_options(
            self,
            PlanError,
            saturation=allow_number(above=0, most=1, why=": a share of the activations"),
            patience=allow_count(),
            cooldown=allow_count(),
            stop=allow_number(above=0, most=1, why=": a share of the activations"),
            cuts=allow_count().or_none(),
            several=allow_words("max", "mean"),
            weights=allow_words("keep", "reinit"),
            minimum=allow_count(),
            round_to=allow_count(),
        )
        object.__setattr__(self, "keep", tuple(patterns_of(self.keep)))

    def begin(self, run: Run) -> Densities:
        """Find the groups that stay whole.

        Raises:
            PlanError: there is nothing to resize, or to start again from new weights; or it is not known when the
                budget should be met.
            BudgetError: the budget is out of reach.
        """
        memory = Densities(left=self._left(run, list(find_activations(run.analysis))))
        if self.budget is not None:
            memory.deadline = find_deadline(run, self.by, "ActivationDensity")
            memory.dense = measure_costs(run.analysis, self.budget)
            groups = run.analysis.sizes.keys() - set(memory.left)
            solve_near(
                run.analysis, {name: np.ones(run.analysis.sizes[name]) for name in groups}, self.budget, Bounds()
            )
        return memory

    def prepare(self, run: Run, memory: Densities) -> None:
        """Count, in train mode, the values and the non-zero values of each channel at each activation."""
        memory.measured = list(find_activations(run.analysis))
        device = next(run.graph.parameters()).device
        for name, label in memory.measured:
            fresh = [torch.zeros(label.size, dtype=torch.int64), torch.zeros((), dtype=torch.int64)]
            memory.counts[name] = [tensor.to(device) for tensor in memory.counts.get(name, fresh)]
        counters = {name: make_counter(label, *memory.counts[name]) for name, label in memory.measured}
        for path, region in regions_of(run.graph).items():
            nodes = {node.name: name_within(path, node.name) for node in region.graphs[Mode.TRAIN].nodes}
            region.observe({node: counters[name] for node, name in nodes.items() if name in counters})

    def close(self, run: Run, memory: Densities) -> None:
        """Count no more."""
        for region in regions_of(run.graph).values():
            region.observe({})

    def after_epoch(self, run: Run, memory: Densities) -> Plan | None:
        """The plan, when the densities have settled and are not all near 1."""
        channels = self.measure(run, memory)
        for tensor in (tensor for pair in memory.counts.values() for tensor in pair):
            tensor.zero_()
        memory.planned = False
        if not channels:
            return None
        self._follow(memory, {name: density for name, (density, _) in channels.items()})
        full = min(memory.densities.values()) >= self.stop
        over = full or (self.cuts is not None and memory.cuts >= self.cuts)
        late, budget = False, self._budget(memory)
        if budget is not None:
            if is_met(measure_costs(run.analysis, budget), budget):
                return None
            late = run.epoch + 1 >= memory.deadline
        if not late and (over or memory.settled < self.patience or memory.since < self.cooldown):
            return None
        keep = {
            name: keep_highest(of_channels, int(density * len(of_channels) + 0.5), self.minimum, self.round_to)
            for name, (density, of_channels) in channels.items()
        }
        memory.planned = True
        plan = Plan(keep, run.analysis.sizes, run.analysis.options)
        if budget is None or not (late or is_met(measure_plan(run.analysis, plan, budget), budget)):
            return plan
        bounds = Bounds(keep=self.keep, round_to=self.round_to)
        return solve_near(run.analysis, {name: scores for name, (_, scores) in channels.items()}, budget, bounds)

    def _follow(self, memory: Densities, densities: dict[str, float]) -> None:
        """Remember the densities, and for how many epochs they have not moved."""
        before = memory.densities
        moved = max((abs(density - before[name]) for name, density in densities.items() if name in before), default=1.0)
        memory.settled = memory.settled + 1 if moved < self.saturation else 0
        memory.since += 1
        memory.densities = densities

    def _budget(self, memory: Densities) -> Budget | None:
        """The budget in absolute numbers."""
        if self.budget is None or memory.dense is None:
            return None
        return budget_on_the_way(self.budget, memory.dense, 1.0)

    def measure(self, run: Run, memory: Densities) -> dict[str, tuple[float, Floats]]:
        """For each measured group its density, and float64[channels]: the sum of those of each channel.

        Over all ranks, since the last epoch ended. Empty where the model was not called.
        """
        counts = [tensor.flatten() for name, _ in memory.measured for tensor in memory.counts[name]]
        flat = mean_over_ranks(torch.cat(counts).double()).cpu().numpy() if counts else np.zeros(0)
        parts = iter(np.split(flat, np.cumsum([len(tensor) for tensor in counts])))
        rows = Channels.of(run.analysis)
        sums: dict[str, tuple[list[float], Floats]] = {}
        bounds = np.cumsum([0, *run.analysis.sizes.values()])
        for _, label in memory.measured:
            nonzero, values = next(parts), next(parts)
            if not values:
                return {}
            channel = rows.of_root[run.analysis.names.find(label).ravel()]
            measured = channel >= 0
            total = np.bincount(channel[measured], minlength=len(rows.group)) * values
            share = np.bincount(channel[measured], nonzero[measured], minlength=len(rows.group))
            for number in np.unique(rows.group[channel[measured]]):
                stretch = slice(bounds[number], bounds[number + 1])
                of_group, of_channels = sums.setdefault(
                    rows.names[number], ([], np.zeros(stretch.stop - stretch.start))
                )
                of_group.append(share[stretch].sum() / total[stretch].sum())
                of_channels += share[stretch] / np.maximum(total[stretch], 1)
        combine: Callable[[list[float]], Any] = np.max if self.several == "max" else np.mean
        left = set(memory.left)
        return {
            name: (float(combine(of_group)), of_channels)
            for name, (of_group, of_channels) in sums.items()
            if name not in left
        }

    def _left(self, run: Run, measured: list[tuple[str, Label]]) -> list[str]:
        """The groups that stay whole, because an option says so or because they can't be measured; the latter named."""
        analysis = run.analysis
        rows = Channels.of(analysis)
        seen = np.zeros(len(rows.group) + 1, dtype=bool)  # the last place is for what is frozen
        for _, label in measured:
            seen[rows.of_root[analysis.names.find(label).ravel()]] = True
        blind = {rows.names[number] for number in np.unique(rows.group[~seen[:-1]])}
        chosen = {
            name for name, is_held in zip(analysis.groups, held_groups(analysis, self.keep), strict=True) if is_held
        }
        if blind | chosen == set(analysis.groups):
            raise PlanError(
                f"ActivationDensity finds nothing to resize: of {len(analysis.groups)} groups, {len(blind)} have no "
                f"activation that gives zeros (ReLU, ReLU6, hardswish), and keep= holds {len(chosen)}"
            )
        if self.weights == "reinit":
            check_fresh(run.graph)
        if blind - chosen:
            warnings.warn(
                f"ActivationDensity leaves {len(blind - chosen)} of {len(analysis.groups)} groups whole, where no "
                f"activation gives zeros: {abridge_list(sorted(blind - chosen))}",
                stacklevel=4,
            )
        return sorted(blind | chosen)

    def after_cut(self, run: Run, memory: Densities, param_map: ParamMap) -> None:
        """Begin to count anew; with "reinit", to train anew where the cut was this pass's own."""
        by_this_pass, memory.planned = memory.planned, False
        memory.settled, memory.since, memory.cuts = 0, 0, memory.cuts + by_this_pass
        memory.densities, memory.counts = {}, {}
        if by_this_pass and self.weights == "reinit":
            start_again(run)

    def report(self, run: Run, memory: Densities) -> Mapping[str, float]:
        """The lowest density, and the paper's training complexity until now.

        That is the sum of epochs x MACs of a sample, over what it would be had each epoch cost as much as the first.
        """
        epochs = [epoch.flops / 2 for epoch in run.log] + [count_per_sample(run, "macs")[0]]
        lowest = {"density": min(memory.densities.values())} if memory.densities else {}
        return lowest | {"complexity": sum(epochs) / (len(epochs) * epochs[0] or 1)}


def find_activations(analysis: Analysis) -> Iterator[tuple[str, Label]]:
    """The nodes of the train graphs that give exact zeros, with the names of the channels there."""
    rows = Channels.of(analysis)
    for path, region in regions_of(analysis.graph).items():
        values = analysis.values.get(Mode.TRAIN, {}).get(path) or analysis.values[Mode.EVAL].get(path, {})
        for node in region.graphs[Mode.TRAIN].nodes:
            value = values.get(node.name)
            if not gives_zeros(region, node) or not isinstance(value, Value):
                continue
            for label in value.labels:  # two, where features vary beside channels: each group is on one
                if (rows.of_root[analysis.names.find(label)] >= 0).any() and 1 in label.shape:
                    yield name_within(path, node.name), label
                    break


def make_counter(label: Label, nonzero: Tensor, values: Tensor) -> Callable[[Tensor], None]:
    """What adds the non-zero elements of a value to ``nonzero``, int64[names of ``label``], and all to ``values``."""
    summed = [axis for axis, size in enumerate(label.shape) if size == 1]

    def count_nonzero(value: Tensor) -> None:
        if value.is_meta:  # the model runs on shapes, as where its FLOPs are counted: there is nothing to count
            return
        # As float32, which is exact up to 16 million and is summed ten times as fast as bool on a CPU.
        indicator = torch.ne(value.detach(), 0, out=torch.empty_like(value, dtype=torch.float32, requires_grad=False))
        nonzero.add_(indicator.sum(summed).flatten().to(nonzero))
        values.add_(value.numel() // len(nonzero))

    return count_nonzero


def start_again(run: Run) -> None:
    """New weights for all layers, the same in every copy, and optimizers without state."""
    draw_weights(run.graph)
    for optimizer in run.optimizers():
        for parameter in run.graph.parameters():
            optimizer.state.pop(parameter, None)
    for copied in run.copies():
        copied.load_state_dict(run.graph.state_dict())
