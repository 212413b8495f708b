"""PruneTrain: group lasso from the first step, and cuts of the channels that it brings to zero."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.branches import emptied
from fxprune.channels.groups import Member
from fxprune.cost import Floats
from fxprune.distributed import mean
from fxprune.errors import PlanError
from fxprune.plan import Plan
from fxprune.session import Session
from fxprune.training import Memory, TrainingPass

EPSILON = 1e-8


@dataclass(frozen=True)
class PruneTrain(TrainingPass):
    """Lym et al., "PruneTrain: Fast Neural Network Training by Dynamic Sparse Model Reconfiguration" (2019).

    The loss is ``task + lambda * P`` with P = sum over weights and channels of sqrt(sum w^2 + 1e-8): each weight counts
    in its input channel and in its output channel. Depthwise weights, biases and norms are left out, and so are
    channels that can't be pruned. lambda is set once, from the first batch, so that P is ``ratio`` of the whole loss.
    Every ``interval`` epochs the channels go whose weights are all below ``threshold``, on every layer that writes or
    reads them (the channel union).

    Attributes:
        ratio: lambda P / (task + lambda P) at the first batch, in (0, 1).
        interval: epochs between cuts.
        threshold: the largest absolute weight of a channel that goes.
        proximal: take the penalty out of the loss and shrink each channel after each step instead, by
            max(0, 1 - lr lambda / norm): gives exact zeros at any learning rate.
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
        if not 0 < self.ratio < 1:
            raise PlanError(f"ratio={self.ratio!r} must lie between 0 and 1: the share of the penalty in the loss")
        for name in ("interval", "minimum", "round_to"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError(f"{name}={value!r} must be a positive integer")
        if self.branches not in ("remove", "fold", "keep"):
            raise PlanError(f"branches={self.branches!r} is not known; use 'remove', 'fold' or 'keep'")
        if not self.threshold >= 0:
            raise PlanError(f"threshold={self.threshold!r} must not be negative")

    def prepare(self, session: Session, memory: Memory) -> None:
        """Find the weights and the channels on each of their axes."""
        parameters = dict(session.graph.named_parameters())
        depthwise = depthwise_weights(session.graph)
        memory.derived["slices"] = [
            Slices(parameters[member.parameter], member, group.name, group.size)
            for group in session.analysis.groups.values()
            for member in group.members
            if member.parameter in parameters.keys() - depthwise
            and parameters[member.parameter].ndim > 1
            and parameters[member.parameter].requires_grad
        ]

    def penalty(self, session: Session, memory: Memory, task: Tensor) -> Tensor | None:
        """Lambda P, a scalar; None with ``proximal``. Sets lambda at the first call."""
        slices: list[Slices] = memory.derived["slices"]
        if not slices:
            return None
        if "lambda" not in memory.saved:
            with torch.no_grad():
                initial = float(sum(each.lasso() for each in slices))
            loss = float(mean(task.detach().float()))
            memory.saved["lambda"] = self.ratio * loss / ((1 - self.ratio) * initial)
            self._warn(session, memory.saved["lambda"])
        if self.proximal:
            return None
        coefficient: float = memory.saved["lambda"]
        return torch.stack([each.lasso() for each in slices]).sum() * coefficient

    def after_step(self, session: Session, memory: Memory) -> None:
        """The proximal step, for each weight once along each of its axes."""
        if not self.proximal or "lambda" not in memory.saved:
            return
        rates = {p: float(group["lr"]) for group in session.optimizer.param_groups for p in group["params"]}
        for each in memory.derived["slices"]:
            if each.weight in rates:
                each.shrink(rates[each.weight] * memory.saved["lambda"])

    def after_epoch(self, session: Session, memory: Memory) -> Plan | None:
        """Every ``interval`` epochs, the plan that keeps what some layer still uses."""
        if (session.epoch + 1) % self.interval:
            return None
        return self.plan(session, memory)

    def plan(self, session: Session, memory: Memory) -> Plan:
        """Keep the channels that have a weight of at least ``threshold`` on some layer that writes or reads them."""
        peaks: dict[str, list[Tensor]] = {}
        for each in memory.derived["slices"]:
            peaks.setdefault(each.group, []).append(each.peak())
        highest = {name: torch.stack(its).amax(0).double().cpu().numpy() for name, its in peaks.items()}
        gone: set[str] = set()
        if self.branches != "keep":
            dead = {name for name, peak in highest.items() if (peak < self.threshold).all()}
            gone = emptied(session.analysis, dead, constants=self.branches == "fold")
        keep = {name: () if name in gone else self._kept(peak) for name, peak in highest.items()}
        dropped = sorted(gone) if self.branches == "remove" else ()
        return Plan(keep, session.analysis.sizes, session.analysis.options, dropped)

    def _kept(self, peak: Floats) -> tuple[int, ...]:
        """Channels of one group: those above the threshold, filled up with the largest of the others."""
        count = max(int((peak >= self.threshold).sum()), min(self.minimum, len(peak)))
        count = min(-(-count // self.round_to) * self.round_to, len(peak))
        return tuple(sorted(np.argsort(-peak, kind="stable")[:count].tolist()))

    def report(self, session: Session, memory: Memory) -> Mapping[str, float]:
        """Lambda."""
        return {"lambda": memory.saved["lambda"]} if "lambda" in memory.saved else {}

    def _warn(self, session: Session, coefficient: float) -> None:
        """Say so where momentum SGD can't bring a channel below the threshold: the smoothed lasso is unstable there."""
        for group in session.optimizer.param_groups:
            if self.proximal or "momentum" not in group:
                continue
            limit = EPSILON**0.5 * (1 + group["momentum"]) / coefficient
            if group["lr"] > limit:
                warnings.warn(
                    f"PruneTrain: with lambda {coefficient:.2g}, learning rates above {limit:.2g} keep dead channels "
                    f"swinging above the threshold, so little is cut until the rate falls from {group['lr']:.2g} "
                    "below that. Lower it on the way, or use PruneTrain(proximal=True).",
                    stacklevel=2,
                )
                return


class Slices:
    """The channels of a group on one axis of a weight."""

    def __init__(self, weight: nn.Parameter, member: Member, group: str, size: int) -> None:
        self.weight, self.axis, self.group, self.size = weight, member.axis, group, size
        self.others = [axis for axis in range(weight.ndim) if axis != member.axis]
        whole = len(member.index) == weight.shape[member.axis]
        self.index = None if whole else torch.from_numpy(member.index).to(weight.device)
        each = len(member.channel) == size and (member.channel == np.arange(size)).all()
        self.channel = None if each else torch.from_numpy(member.channel).to(weight.device)

    def norms(self) -> Tensor:
        """float32[channels]: sqrt(sum w^2 + 1e-8) of each."""
        squares = self.weight.float().square().sum(self.others)
        squares = squares if self.index is None else squares[self.index]
        if self.channel is not None:
            squares = squares.new_zeros(self.size).index_add(0, self.channel, squares)
        return (squares + EPSILON).sqrt()

    def lasso(self) -> Tensor:
        """The sum of the norms, a scalar."""
        return self.norms().sum()

    @torch.no_grad()
    def peak(self) -> Tensor:
        """float[channels]: the largest absolute weight of each."""
        peaks = self.weight.detach().abs().amax(self.others)
        peaks = peaks if self.index is None else peaks[self.index]
        if self.channel is not None:
            peaks = peaks.new_zeros(self.size).index_reduce(0, self.channel, peaks, "amax")
        return peaks

    @torch.no_grad()
    def shrink(self, by: float) -> None:
        """Multiply each channel by max(0, 1 - by / norm)."""
        factors = (1 - by / self.norms()).clamp(min=0)
        factors = factors if self.channel is None else factors[self.channel]
        if self.index is not None:
            factors = factors.new_ones(self.weight.shape[self.axis]).index_copy(0, self.index, factors)
        shape = [-1 if axis == self.axis else 1 for axis in range(self.weight.ndim)]
        self.weight.mul_(factors.reshape(shape).to(self.weight.dtype))


def depthwise_weights(model: nn.Module) -> set[str]:
    """The weights of depthwise convolutions: one input channel a filter."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and module.weight.shape[1] == 1
    }
