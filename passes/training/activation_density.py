"""ActivationDensity: layers are resized, while they train, to the share of their activations that is not zero."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.budget.budget import patterns_of
from fxprune.budget.cost import Channels, Floats
from fxprune.budget.solver import held_groups
from fxprune.channels.analysis import Analysis, abridge_list
from fxprune.channels.interpret import name_within
from fxprune.channels.labels import Label
from fxprune.channels.values import Value
from fxprune.errors import PlanError
from fxprune.graph.traced import Mode, regions_of
from fxprune.plan import Plan
from fxprune.rewrite.param_map import ParamMap
from fxprune.training.distributed import gather_values, mean_over_ranks
from fxprune.training.meter import count_per_sample
from fxprune.training.passes import Memory, TrainingPass
from fxprune.training.session import Session, copies_in

# What gives exact zeros.
LAYERS = (nn.ReLU, nn.ReLU6, nn.Hardswish)
FUNCTIONS: tuple[Any, ...] = (torch.relu, torch.relu_, F.relu, F.relu6, F.hardswish, "relu", "relu_")


@dataclass(frozen=True)
class ActivationDensity(TrainingPass):
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

    def __post_init__(self) -> None:
        for name in ("saturation", "stop"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise PlanError(f"{name}={value!r} must be a number above 0 and at most 1: a share of the activations")
        for name in ("patience", "cooldown", "cuts", "minimum", "round_to"):
            value = getattr(self, name)
            if name == "cuts" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError(f"{name}={value!r} must be a positive integer")
        for name, known in (("several", ("max", "mean")), ("weights", ("keep", "reinit"))):
            if getattr(self, name) not in known:
                raise PlanError(f"{name}={getattr(self, name)!r} is not known; use {known[0]!r} or {known[1]!r}")
        object.__setattr__(self, "keep", tuple(patterns_of(self.keep)))

    def prepare(self, session: Session, memory: Memory) -> None:
        """Count, in train mode, the values and the non-zero values of each channel at each activation.

        Raises:
            PlanError: at the start, where there is nothing to resize, or to start again from new weights.
        """
        measured = list(find_activations(session.analysis))
        if not memory.saved:
            memory.saved |= {"settled": 0, "since": 0, "cuts": 0, "densities": {}, "counts": {}}
            memory.saved["left"] = self._left(session, measured)
        counts = memory.saved["counts"]
        device = next(session.graph.parameters()).device
        for name, label in measured:
            fresh = torch.zeros(label.size, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
            counts[name] = [tensor.to(device) for tensor in counts.get(name, fresh)]
        memory.derived["measured"] = measured
        counters = {name: make_counter(label, *counts[name]) for name, label in measured}
        for path, region in regions_of(session.graph).items():
            nodes = {node.name: name_within(path, node.name) for node in region.graphs[Mode.TRAIN].nodes}
            region.observe({node: counters[name] for node, name in nodes.items() if name in counters})

    def close(self, session: Session, memory: Memory) -> None:
        """Count no more."""
        for region in regions_of(session.graph).values():
            region.observe({})

    def after_epoch(self, session: Session, memory: Memory) -> Plan | None:
        """The plan, when the densities have settled and are not all near 1."""
        channels = self.measure(session, memory)
        for tensor in (tensor for pair in memory.saved["counts"].values() for tensor in pair):
            tensor.zero_()
        saved = memory.saved
        saved["planned"] = False
        if not channels:
            return None
        now, before = {name: density for name, (density, _) in channels.items()}, saved["densities"]
        moved = max((abs(density - before[name]) for name, density in now.items() if name in before), default=1.0)
        saved["settled"] = saved["settled"] + 1 if moved < self.saturation else 0
        saved["since"] += 1
        saved["densities"] = now
        over = min(now.values()) >= self.stop or (self.cuts is not None and saved["cuts"] >= self.cuts)
        if over or saved["settled"] < self.patience or saved["since"] < self.cooldown:
            return None
        keep = {name: self._kept(*its) for name, its in channels.items()}
        saved["planned"] = True
        return Plan(keep, session.analysis.sizes, session.analysis.options)

    def measure(self, session: Session, memory: Memory) -> dict[str, tuple[float, Floats]]:
        """For each measured group its density, and float64[channels]: the sum of those of each channel.

        Over all ranks, since the last epoch ended. Empty where the model was not called.
        """
        measured: list[tuple[str, Label]] = memory.derived["measured"]
        counts = [tensor.flatten() for name, _ in measured for tensor in memory.saved["counts"][name]]
        flat = mean_over_ranks(torch.cat(counts).double()).cpu().numpy() if counts else np.zeros(0)
        parts = iter(np.split(flat, np.cumsum([len(each) for each in counts])))
        rows = Channels.of(session.analysis)
        found: dict[str, tuple[list[float], Floats]] = {}
        bounds = np.cumsum([0, *session.analysis.sizes.values()])
        for _, label in measured:
            nonzero, values = next(parts), next(parts)
            if not values:
                return {}
            channel = rows.of_root[session.analysis.names.find(label).ravel()]
            mine = channel >= 0
            total = np.bincount(channel[mine], minlength=len(rows.group)) * values
            share = np.bincount(channel[mine], nonzero[mine], minlength=len(rows.group))
            for number in np.unique(rows.group[channel[mine]]):
                here = slice(bounds[number], bounds[number + 1])
                its, each = found.setdefault(rows.names[number], ([], np.zeros(here.stop - here.start)))
                its.append(share[here].sum() / total[here].sum())
                each += share[here] / np.maximum(total[here], 1)
        combine: Callable[[list[float]], Any] = np.max if self.several == "max" else np.mean
        left = set(memory.saved["left"])
        return {name: (float(combine(its)), each) for name, (its, each) in found.items() if name not in left}

    def _kept(self, density: float, channels: Floats) -> tuple[int, ...]:
        """round(density * C) channels of one group, those of the highest density."""
        size = len(channels)
        count = max(int(density * size + 0.5), min(self.minimum, size))
        count = min(-(-count // self.round_to) * self.round_to, size)
        return tuple(sorted(np.argsort(-channels, kind="stable")[:count].tolist()))

    def _left(self, session: Session, measured: list[tuple[str, Label]]) -> list[str]:
        """The groups that stay whole, because an option says so or because they can't be measured; the latter named."""
        analysis = session.analysis
        rows = Channels.of(analysis)
        seen = np.zeros(len(rows.group) + 1, dtype=bool)  # the last place is for what is frozen
        for _, label in measured:
            seen[rows.of_root[analysis.names.find(label).ravel()]] = True
        blind = {rows.names[number] for number in np.unique(rows.group[~seen[:-1]])}
        chosen = {name for name, whole in zip(analysis.groups, held_groups(analysis, self.keep), strict=True) if whole}
        if blind | chosen == set(analysis.groups):
            raise PlanError(
                f"ActivationDensity finds nothing to resize: of {len(analysis.groups)} groups, {len(blind)} have no "
                f"activation that gives zeros (ReLU, ReLU6, hardswish), and keep= holds {len(chosen)}"
            )
        if self.weights == "reinit":
            check_fresh(session.graph)
        if blind - chosen:
            warnings.warn(
                f"ActivationDensity leaves {len(blind - chosen)} of {len(analysis.groups)} groups whole, where no "
                f"activation gives zeros: {abridge_list(sorted(blind - chosen))}",
                stacklevel=4,
            )
        return sorted(blind | chosen)

    def after_cut(self, session: Session, memory: Memory, param_map: ParamMap) -> None:
        """Begin to count anew; with "reinit", to train anew where the cut was this pass's own."""
        if not memory.saved:  # a checkpoint is being loaded
            return
        own = memory.saved.get("planned", False)
        cuts = memory.saved["cuts"] + own
        memory.saved |= {"settled": 0, "since": 0, "cuts": cuts, "planned": False, "densities": {}, "counts": {}}
        if own and self.weights == "reinit":
            start_again(session)

    def report(self, session: Session, memory: Memory) -> Mapping[str, float]:
        """The lowest density, and the paper's training complexity until now.

        That is the sum of epochs x MACs of a sample, over what it would be had each epoch cost as much as the first.
        """
        epochs = [each.flops / 2 for each in session.log] + [count_per_sample(session, "macs")[0]]
        densities = memory.saved["densities"].values()
        lowest = {"density": min(densities)} if densities else {}
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


def gives_zeros(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node is an activation that gives exact zeros."""
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), LAYERS)
    return node.op in ("call_function", "call_method") and node.target in FUNCTIONS


def make_counter(label: Label, nonzero: Tensor, values: Tensor) -> Callable[[Tensor], None]:
    """What adds the non-zero elements of a value to ``nonzero``, int64[names of ``label``], and all to ``values``."""
    others = [axis for axis, size in enumerate(label.shape) if size == 1]

    def count_nonzero(value: Tensor) -> None:
        # As float32, which is exact up to 16 million and is summed ten times as fast as bool on a CPU.
        ones = torch.ne(value.detach(), 0, out=torch.empty_like(value, dtype=torch.float32, requires_grad=False))
        nonzero.add_(ones.sum(others).flatten().to(nonzero))
        values.add_(value.numel() // len(nonzero))

    return count_nonzero


def check_fresh(model: nn.Module) -> None:
    """Raise PlanError where parameters belong to a module that can't give them new values."""
    for name, module in model.named_modules():
        own = [parameter for parameter, its in module._parameters.items() if its is not None]
        if own and not hasattr(module, "reset_parameters"):
            where = f"{name}.{own[0]}".removeprefix(".")
            raise PlanError(
                f'weights="reinit" can\'t start {where} again: its module has no reset_parameters(). Use weights="keep"'
            )


def start_again(session: Session) -> None:
    """New weights for all layers, the same in every copy, and optimizers without state."""
    draw_weights(session.graph)
    for optimizer in session._optimizers():
        for parameter in session.graph.parameters():
            optimizer.state.pop(parameter, None)
    for copied in (copied for thing in session.registered.values() for copied in copies_in(thing)):
        copied.load_state_dict(session.graph.state_dict())


def draw_weights(model: nn.Module) -> None:
    """New weights for all layers, the same on every rank: torch's random numbers give the seed."""
    seed = gather_values(int(torch.randint(2**62, ())))[0]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in model.modules():
            getattr(module, "reset_parameters", lambda: None)()
