"""PruneTrain: group lasso from the first step, and cuts of the channels that it brings to zero."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD

from fxprune.budget.budget import Bounds, Budget
from fxprune.budget.cost import Floats
from fxprune.channels.names import Bools
from fxprune.errors import BudgetError, PlanError, SessionError
from fxprune.graph.layers import is_depthwise
from fxprune.options import allow_count, allow_number, allow_words, check_options
from fxprune.plan import Plan
from fxprune.rewrite.branches import emptied_groups
from fxprune.rewrite.param_map import ParamMap
from fxprune.training.distributed import mean_over_ranks
from fxprune.training.memory import derived_field
from fxprune.training.run import Run, TrainingPass

from ..base import divide_by_cost, input_axis
from ..criteria.magnitude import Magnitude
from ._lasso import Slices, sum_norms
from ._norms import EPSILON, at_least_float32
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
class Lasso:
    """What PruneTrain remembers.

    Attributes:
        groups: how many groups could be pruned when the session began.
        lambda_: the coefficient of the penalty, once the first loss is known.
        dense: what the model cost when the session began, by what the budget limits.
        cuts: the epochs, from 1, at whose ends a budget is approached; the last one meets it.
        leaving: the channels that are pulled to zero, by group, until the next of these cuts.
        until: the step at which they are zero.
        started: the step with which the epoch began.
        note: what there is to say of the epoch that ends.
        slices: the channels on each axis of each weight.
        penalized: those of them that the penalty counts, by weight.
    """

    groups: int | None = None
    lambda_: float | None = None
    dense: dict[str, float] | None = None
    cuts: list[int] = field(default_factory=list)
    leaving: dict[str, list[int]] | None = None
    until: int = 0
    started: int = 0
    note: str = ""
    slices: list[Slices] = derived_field(list)
    penalized: dict[nn.Parameter, list[Slices]] = derived_field(dict)


@dataclass(frozen=True)
class PruneTrain(TrainingPass[Lasso]):
    """Lym et al., "PruneTrain: Fast Neural Network Training by Dynamic Sparse Model Reconfiguration" (2019).

    The loss is ``task + lambda * P`` with P = sum over weights and channels of sqrt(sum w^2 + 1e-8): each weight counts
    in its input channel and in its output channel. Depthwise weights, biases and norms are left out, and so are
    channels that can't be pruned: those that the analysis froze, and those with a weight that does not train. lambda is
    set once, from the first batch, so that lambda P is ``ratio`` of the whole loss.
    Every ``interval`` epochs the channels go whose weights are all below ``threshold``, on every layer that writes or
    reads them (the channel union).

    How much that is depends on the optimizer, the learning rate and the length of the run. With a ``budget`` it does
    not: beside the penalty, the channels of the lowest share of their layers for what they cost are chosen after each
    cut (as ``passes.Magnitude`` chooses), and what reads them is shrunk after each step, in a straight line, so that it
    is zero before the next cut (the growing pull is that of Wang et al., "Neural Pruning via Growing Regularization",
    2021, in closed form). So a cut changes no output, and when the budget is met, penalty and cuts end.

    Attributes:
        ratio: lambda P / (task + lambda P) at the first batch, in (0, 1).
        interval: epochs between cuts; by default 10, and with a budget a quarter of the epochs until it is met.
        threshold: the largest absolute weight of a channel that goes.
        proximal: take the penalty out of the loss and shrink each channel after each step instead, by
            max(0, 1 - lr lambda / norm), with the plain norm: gives exact zeros at any learning rate.
        branches: what becomes of a residual branch with a group all below the threshold: "remove" it, with the
            constant that it still adds (as the paper does); "fold" it into that constant, which changes nothing; or
            "keep" one channel. A group that is not inside a residual branch always keeps one.
        minimum: channels that each group keeps at least otherwise.
        round_to: keep so many more that widths are multiples of this, but for a few groups that meet the budget.
        budget: what may remain of the model as the session found it; not of latency.
        by: when the budget is met: a share of ``Session(epochs=...)``, or the number of an epoch.
        most: the largest share of a group's channels that one cut takes, branches that are removed apart; what is
            left over goes with the next. By default all, and with a budget a half.
    """

    ratio: float = 0.2
    interval: int | None = None
    threshold: float = 1e-4
    proximal: bool = False
    branches: str = "remove"
    minimum: int = 1
    round_to: int = 1
    budget: Budget | None = None
    by: float = 0.6
    most: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", restore_budget(self.budget))
        check_target(self)
        check_options(
            self,
            PlanError,
            ratio=allow_number(above=0, below=1, why=": the share of the penalty in the loss"),
            interval=allow_count().or_none(),
            most=allow_number(above=0, most=1, why=": a share of the channels of a group").or_none(),
            threshold=allow_number(least=0),
            branches=allow_words("remove", "fold", "keep"),
            minimum=allow_count(),
            round_to=allow_count(),
        )

    def begin(self, run: Run) -> Lasso:
        """What the model costs, and when it is cut.

        Raises:
            PlanError: it is not known when the budget should be met, or there is no time for it.
        """
        if self.budget is None:
            return Lasso()
        deadline = find_deadline(run, self.by, "PruneTrain")
        interval = self.interval or max(1, deadline // 4)
        cuts = [epoch for epoch in range(deadline, 1, -interval)][::-1]  # the first epoch measures
        return Lasso(dense=measure_costs(run.analysis, self.budget), cuts=cuts)

    def prepare(self, run: Run, memory: Lasso) -> None:
        """Find the weights and the channels on each of their axes.

        Raises:
            PlanError: at the start, where no channel can ever go; says why. Or ``proximal`` with half precision.
        """
        parameters = dict(run.graph.named_parameters())
        depthwise = depthwise_weights(run.graph)
        memory.slices = [
            Slices(
                parameters[member.parameter],
                member,
                group.name,
                group.size,
                reads=member.axis == input_axis(run.graph, member.parameter),
            )
            for group in run.analysis.groups.values()
            for member in group.members
            if member.parameter in parameters.keys() - depthwise and parameters[member.parameter].ndim > 1
        ]
        still = {axis.group for axis in memory.slices if not axis.weight.requires_grad}
        for axis in memory.slices:
            if axis.group not in still:
                memory.penalized.setdefault(axis.weight, []).append(axis)
        if not memory.penalized and memory.groups is None:  # later, cuts may have left nothing
            raise PlanError(nothing_to_prune(run, still))
        if self.proximal and any(at_least_float32(weight).dtype != weight.dtype for weight in memory.penalized):
            raise PlanError(
                "PruneTrain(proximal=True) multiplies weights by factors just below 1, which half precision rounds to "
                "1: keep the weights in float32, and compute in half precision with torch.autocast"
            )
        if memory.groups is None:
            memory.groups = len(penalized_groups(memory))
            self._check_reach(run, memory)

    def _check_reach(self, run: Run, memory: Lasso) -> None:
        """Raise BudgetError at the start where the budget is out of reach."""
        if self.budget is not None:
            scores = {name: np.ones(run.analysis.sizes[name]) for name in penalized_groups(memory)}
            solve_near(run.analysis, scores, self.budget, Bounds())

    def penalty(self, run: Run, memory: Lasso, task: Tensor) -> Tensor | None:
        """Lambda P, a scalar; None with ``proximal``, or when the budget is met. Sets lambda at the first call.

        Raises:
            SessionError: the first loss is not a positive number.
        """
        if not memory.penalized or self._is_over(run, memory):
            return None
        if memory.lambda_ is None:
            with torch.no_grad():
                initial = float(sum_norms(memory.penalized))
            loss = float(mean_over_ranks(at_least_float32(task.detach())))
            if not (math.isfinite(loss) and loss > 0):
                raise SessionError(
                    f"PruneTrain sets lambda from the first task loss, which must be a positive number; it is {loss!r}"
                )
            memory.lambda_ = self.ratio * loss / ((1 - self.ratio) * initial)
            self._warn(run, memory.lambda_)
        return None if self.proximal else sum_norms(memory.penalized) * memory.lambda_

    def after_step(self, run: Run, memory: Lasso) -> None:
        """The proximal step, for each weight once along each of its axes; and the pull on what leaves."""
        if memory.cuts and run.epoch > 0 and memory.leaving is None:
            self._choose(run, memory)
        if memory.leaving:
            self._pull(run, memory)
        if not self.proximal or memory.lambda_ is None or self._is_over(run, memory):
            return
        groups = [group for optimizer in run.optimizers() for group in optimizer.param_groups]
        rates = {parameter: float(group["lr"]) for group in groups for parameter in group["params"]}
        for weight, axes in memory.penalized.items():
            for axis in axes if weight in rates else ():
                axis.shrink(rates[weight] * memory.lambda_)

    def after_epoch(self, run: Run, memory: Lasso) -> Plan | None:
        """Every ``interval`` epochs, the plan that keeps what some layer still uses and what does not leave."""
        epoch, steps = run.epoch + 1, run.step - memory.started
        memory.started = run.step
        if memory.lambda_ is None and memory.penalized and epoch % (self.interval or 10) == 0:
            warnings.warn(
                "PruneTrain: session.penalty(task) has not been called yet, so nothing brings channels to zero. Add it "
                "to the loss: (task + session.penalty(task)).backward()",
                stacklevel=3,
            )
        if self.budget is None:
            return None if epoch % (self.interval or 10) else self._plan_by_threshold(run, memory)
        late = memory.until - run.step if memory.leaving else 0
        ahead = [cut for cut in memory.cuts if cut > epoch]
        if ahead and (memory.leaving is None or epoch in memory.cuts):
            # A fifth of the steps until the cut is left for the others to adapt, and for epochs of fewer steps.
            memory.until = run.step + int(0.8 * steps * (ahead[0] - epoch))
        if epoch not in memory.cuts:
            return None
        plan = self.plan(run, memory)
        if late > 0:
            self._tell(memory, f"the epoch had fewer steps than the last: channels are cut {late} steps before zero")
        if epoch == memory.cuts[-1]:
            self._check_met(run, memory, plan, self.budget)
        memory.leaving = None
        return plan

    def _plan_by_threshold(self, run: Run, memory: Lasso) -> Plan:
        """The plan; where it takes nothing, say why."""
        plan = self.plan(run, memory)
        if not plan.keep and memory.penalized and memory.lambda_ is not None:
            peaks = [peak for peaks in self._highest(memory).values() for peak in peaks]
            self._tell(
                memory,
                f"none of {len(peaks)} channels has all its weights below threshold={self.threshold:g} (the nearest, "
                f"below {min(peaks):.2g}). A larger ratio=, proximal=True or a longer run bring them there; "
                "budget=fxprune.Budget(flops=0.5) meets its budget in any run",
            )
        return plan

    def _check_met(self, run: Run, memory: Lasso, plan: Plan, budget: Budget) -> None:
        """Say so where the last plan misses the budget."""
        budget = budget_on_the_way(budget, memory.dense or {}, 1.0)
        costs = measure_plan(run.analysis, plan, budget)
        if not is_met(costs, budget):
            left = " and ".join(f"{kind}={costs[kind]:.0f}, {limit} allowed" for kind, limit in budget.limits())
            self._tell(memory, f"the budget is missed: {left}. minimum={self.minimum}, or another pass, keeps more")

    def _tell(self, memory: Lasso, note: str) -> None:
        """Warn, and put it into the log."""
        memory.note = note
        warnings.warn(f"PruneTrain: {note}", stacklevel=5)

    def notes(self, run: Run, memory: Lasso) -> Sequence[str]:
        """What there was to say of the epoch, in its steps too."""
        told, memory.note = memory.note, ""
        return [f"PruneTrain: {told}"] if told else []

    def _is_over(self, run: Run, memory: Lasso) -> bool:
        """Whether the last cut for the budget was made."""
        return bool(memory.cuts) and run.epoch >= memory.cuts[-1]

    def _choose(self, run: Run, memory: Lasso) -> None:
        """Choose the channels that leave with the next cut."""
        memory.leaving = {}
        ahead = [number for number, cut in enumerate(memory.cuts, 1) if cut > run.epoch]
        if self.budget is None or memory.dense is None or not ahead:
            return
        budget = budget_on_the_way(self.budget, memory.dense, ahead[0] / len(memory.cuts))
        if is_met(measure_costs(run.analysis, budget), budget):
            return
        pulled = penalized_groups(memory)
        scores = {name: score for name, score in Magnitude().score(run.analysis).items() if name in pulled}
        bounds = Bounds(minimum=1 - self._most(), round_to=self.round_to)
        scores = divide_by_cost(run.analysis, scores, budget)
        try:
            plan = solve_near(run.analysis, scores, budget, bounds)
        except BudgetError as error:
            self._tell(memory, f"the budget will be missed: {error}")
            return
        memory.leaving = {
            name: sorted(set(range(run.analysis.sizes[name])) - set(kept)) for name, kept in plan.keep.items()
        }

    @torch.no_grad()
    def _pull(self, run: Run, memory: Lasso) -> None:
        """Shrink what reads the channels that leave; where no weight reads a group, all its weights."""
        rest = max(memory.until - run.step, 0)
        leaving, reading = memory.leaving or {}, {axis.group for axis in memory.slices if axis.reads}
        for axis in memory.slices:
            if axis.group in leaving and (axis.reads or axis.group not in reading):
                factors = torch.ones(axis.size, device=axis.weight.device, dtype=axis.weight.dtype)
                factors[leaving[axis.group]] = rest / (rest + 1)
                axis.weight.mul_(axis.spread(factors, default=1.0))

    def _highest(self, memory: Lasso) -> dict[str, Floats]:
        """For each channel the largest weight that it has on any layer; 0 if it leaves."""
        peaks: dict[str, list[Tensor]] = {}
        for axis in memory.slices:
            peaks.setdefault(axis.group, []).append(axis.peak())
        highest = {name: torch.stack(layers).amax(0).double().cpu().numpy() for name, layers in peaks.items()}
        highest = {name: np.nan_to_num(peak, nan=np.inf, posinf=np.inf) for name, peak in highest.items()}
        for name, channels in (memory.leaving or {}).items():
            highest[name][channels] = 0.0
        return highest

    def plan(self, run: Run, memory: Lasso) -> Plan:
        """Keep the channels that have a weight of at least ``threshold`` on some layer that writes or reads them."""
        highest = self._highest(memory)
        gone: set[str] = set()
        if self.branches != "keep":
            dead = {name for name, peak in highest.items() if not self._used(peak).any()}
            gone = emptied_groups(run.analysis, dead, constants=self.branches == "fold")
        leaving = {name: len(channels) for name, channels in (memory.leaving or {}).items()}
        keep = {
            name: () if name in gone else self._kept(peak, len(peak) - leaving.get(name, 0))
            for name, peak in highest.items()
        }
        dropped = sorted(gone) if self.branches == "remove" else ()
        return Plan(keep, run.analysis.sizes, run.analysis.options, dropped)

    def _most(self) -> float:
        """The largest share of a group that one cut takes."""
        return self.most or (1.0 if self.budget is None else 0.5)

    def _kept(self, peak: Floats, most: int) -> tuple[int, ...]:
        """Which channels of a group stay, by their highest weights: no more than ``most``, which the budget leaves."""
        count = max(int(self._used(peak).sum()), math.ceil((1 - self._most()) * len(peak)))
        return keep_highest(peak, count, self.minimum, self.round_to, most)

    def _used(self, peak: Floats) -> Bools:
        """Whether each channel has a weight that counts; zeros never do."""
        result: Bools = (peak >= self.threshold) & (peak > 0)
        return result

    def report(self, run: Run, memory: Lasso) -> Mapping[str, float]:
        """Lambda."""
        return {} if memory.lambda_ is None else {"lambda": memory.lambda_}

    def after_cut(self, run: Run, memory: Lasso, param_map: ParamMap) -> None:
        """Who leaves is chosen anew."""
        memory.leaving = None

    def _warn(self, run: Run, coefficient: float) -> None:
        """Say so where momentum SGD can't bring a channel below the threshold: the smoothed lasso is unstable there."""
        for optimizer in () if self.proximal else run.optimizers():
            for group in optimizer.param_groups if isinstance(optimizer, SGD) else ():
                limit = EPSILON**0.5 * (1 + group["momentum"]) / coefficient
                if group["lr"] > limit:
                    warnings.warn(
                        f"PruneTrain: with lambda {coefficient:.2g}, learning rates above {limit:.2g} keep dead "
                        "channels swinging above the threshold, so little is cut until the rate falls from "
                        f"{group['lr']:.2g} below that. Lower it on the way, or use PruneTrain(proximal=True).",
                        stacklevel=4,
                    )
                    return


def penalized_groups(memory: Lasso) -> set[str]:
    """The groups that the penalty counts."""
    return {axis.group for axes in memory.penalized.values() for axis in axes}


def nothing_to_prune(run: Run, still: set[str]) -> str:
    """Why PruneTrain can't do anything with this model."""
    analysis = run.analysis
    if still:
        return (
            f"PruneTrain finds nothing to prune: each of the {len(analysis.groups)} groups of channels has a weight "
            f"that does not train, as {min(still)!r} has. Set requires_grad before the session is made."
        )
    reasons = sorted({axis.reason.text for axis in analysis.frozen})
    why = f"; every channel is frozen: {', '.join(reasons[:5])}" if not analysis.groups else " among its weights"
    return f"PruneTrain finds nothing to prune in this model{why}. print(fxprune.analyze(...)) shows each axis."


def depthwise_weights(model: nn.Module) -> set[str]:
    """The weights of depthwise convolutions: one input channel a filter."""
    return {f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False) if is_depthwise(module)}
