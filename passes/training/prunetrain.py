"""PruneTrain: group lasso from the first step, and cuts of the channels that it brings to zero."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD

from fxprune.budget.cost import Floats
from fxprune.channels.names import Bools
from fxprune.errors import PlanError, SessionError
from fxprune.graph.layers import is_depthwise
from fxprune.options import allow_count, allow_number, allow_words, check_options
from fxprune.plan import Plan
from fxprune.rewrite.branches import emptied_groups
from fxprune.training.distributed import mean_over_ranks
from fxprune.training.memory import derived_field
from fxprune.training.run import Run, TrainingPass

from ._lasso import Slices, sum_norms
from ._norms import EPSILON, at_least_float32
from ._widths import keep_highest


@dataclass
class Lasso:
    """What PruneTrain remembers.

    Attributes:
        groups: how many groups could be pruned when the session began.
        lambda_: the coefficient of the penalty, once the first loss is known.
        slices: the channels on each axis of each weight.
        penalized: those of them that the penalty counts, by weight.
    """

    groups: int | None = None
    lambda_: float | None = None
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

    Attributes:
        ratio: lambda P / (task + lambda P) at the first batch, in (0, 1).
        interval: epochs between cuts.
        threshold: the largest absolute weight of a channel that goes.
        proximal: take the penalty out of the loss and shrink each channel after each step instead, by
            max(0, 1 - lr lambda / norm), with the plain norm: gives exact zeros at any learning rate.
        branches: what becomes of a residual branch with a group all below the threshold: "remove" it, with the
            constant that it still adds (as the paper does); "fold" it into that constant, which changes nothing; or
            "keep" one channel. A group that is not inside a residual branch always keeps one.
        minimum: channels that each group keeps at least otherwise.
        round_to: keep so many more that widths are multiples of this.
    """

    ratio: float = 0.2
    interval: int = 10
    threshold: float = 1e-4
    proximal: bool = False
    branches: str = "remove"
    minimum: int = 1
    round_to: int = 1

    def __post_init__(self) -> None:
        check_options(
            self,
            PlanError,
            ratio=allow_number(above=0, below=1, why=": the share of the penalty in the loss"),
            interval=allow_count(),
            threshold=allow_number(least=0),
            branches=allow_words("remove", "fold", "keep"),
            minimum=allow_count(),
            round_to=allow_count(),
        )

    def begin(self, run: Run) -> Lasso:
        """Nothing is known yet."""
        return Lasso()

    def prepare(self, run: Run, memory: Lasso) -> None:
        """Find the weights and the channels on each of their axes.

        Raises:
            PlanError: at the start, where no channel can ever go; says why. Or ``proximal`` with half precision.
        """
        parameters = dict(run.graph.named_parameters())
        depthwise = depthwise_weights(run.graph)
        memory.slices = [
            Slices(parameters[member.parameter], member, group.name, group.size)
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
            memory.groups = len({axis.group for axes in memory.penalized.values() for axis in axes})

    def penalty(self, run: Run, memory: Lasso, task: Tensor) -> Tensor | None:
        """Lambda P, a scalar; None with ``proximal``. Sets lambda at the first call.

        Raises:
            SessionError: the first loss is not a positive number.
        """
        if not memory.penalized:
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
        """The proximal step, for each weight once along each of its axes."""
        if not self.proximal or memory.lambda_ is None:
            return
        groups = [group for optimizer in run.optimizers() for group in optimizer.param_groups]
        rates = {parameter: float(group["lr"]) for group in groups for parameter in group["params"]}
        for weight, axes in memory.penalized.items():
            for axis in axes if weight in rates else ():
                axis.shrink(rates[weight] * memory.lambda_)

    def after_epoch(self, run: Run, memory: Lasso) -> Plan | None:
        """Every ``interval`` epochs, the plan that keeps what some layer still uses."""
        if (run.epoch + 1) % self.interval:
            return None
        if memory.lambda_ is None and memory.penalized:
            warnings.warn(
                "PruneTrain: session.penalty(task) has not been called yet, so nothing brings channels to zero. Add it "
                "to the loss: (task + session.penalty(task)).backward()",
                stacklevel=3,
            )
        return self.plan(run, memory)

    def plan(self, run: Run, memory: Lasso) -> Plan:
        """Keep the channels that have a weight of at least ``threshold`` on some layer that writes or reads them."""
        peaks: dict[str, list[Tensor]] = {}
        for axis in memory.slices:
            peaks.setdefault(axis.group, []).append(axis.peak())
        highest = {name: torch.stack(layers).amax(0).double().cpu().numpy() for name, layers in peaks.items()}
        highest = {name: np.nan_to_num(peak, nan=np.inf, posinf=np.inf) for name, peak in highest.items()}
        gone: set[str] = set()
        if self.branches != "keep":
            dead = {name for name, peak in highest.items() if not self._used(peak).any()}
            gone = emptied_groups(run.analysis, dead, constants=self.branches == "fold")
        keep = {
            name: () if name in gone else keep_highest(peak, int(self._used(peak).sum()), self.minimum, self.round_to)
            for name, peak in highest.items()
        }
        dropped = sorted(gone) if self.branches == "remove" else ()
        return Plan(keep, run.analysis.sizes, run.analysis.options, dropped)

    def _used(self, peak: Floats) -> Bools:
        """Whether each channel has a weight that counts; zeros never do."""
        result: Bools = (peak >= self.threshold) & (peak > 0)
        return result

    def report(self, run: Run, memory: Lasso) -> Mapping[str, float]:
        """Lambda."""
        return {} if memory.lambda_ is None else {"lambda": memory.lambda_}

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
