"""PruneTrain: group lasso from the first step, and cuts of the channels that it brings to zero."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from fxprune.budget.cost import Floats
from fxprune.channels.groups import Member
from fxprune.channels.names import Bools
from fxprune.errors import PlanError, SessionError
from fxprune.graph.layers import is_depthwise
from fxprune.plan import Plan
from fxprune.rewrite.branches import emptied_groups
from fxprune.training.distributed import mean_over_ranks
from fxprune.training.passes import Memory, TrainingPass
from fxprune.training.session import Session

EPSILON = 1e-8


@dataclass(frozen=True)
class PruneTrain(TrainingPass):
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
        for name in ("ratio", "threshold"):
            if not isinstance(getattr(self, name), (int, float)):
                raise PlanError(f"{name}={getattr(self, name)!r} must be a number")
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
        """Find the weights and the channels on each of their axes.

        Raises:
            PlanError: at the start, where no channel can ever go; says why. Or ``proximal`` with half precision.
        """
        parameters = dict(session.graph.named_parameters())
        depthwise = depthwise_weights(session.graph)
        memory.derived["slices"] = [
            _Slices(parameters[member.parameter], member, group.name, group.size)
            for group in session.analysis.groups.values()
            for member in group.members
            if member.parameter in parameters.keys() - depthwise and parameters[member.parameter].ndim > 1
        ]
        still = {each.group for each in memory.derived["slices"] if not each.weight.requires_grad}
        lasso = [each for each in memory.derived["slices"] if each.group not in still]
        memory.derived["lasso"] = {
            weight: [each for each in lasso if each.weight is weight]
            for weight in {each.weight: None for each in lasso}
        }
        if not lasso and not memory.saved:  # later, cuts may have left nothing
            raise PlanError(nothing_to_prune(session, still))
        if self.proximal and any(at_least_float32(each.weight).dtype != each.weight.dtype for each in lasso):
            raise PlanError(
                "PruneTrain(proximal=True) multiplies weights by factors just below 1, which half precision rounds to "
                "1: keep the weights in float32, and compute in half precision with torch.autocast"
            )
        memory.saved.setdefault("groups", len({each.group for each in lasso}))

    def penalty(self, session: Session, memory: Memory, task: Tensor) -> Tensor | None:
        """Lambda P, a scalar; None with ``proximal``. Sets lambda at the first call.

        Raises:
            SessionError: the first loss is not a positive number.
        """
        weights: dict[nn.Parameter, list[_Slices]] = memory.derived["lasso"]
        if not weights:
            return None
        if "lambda" not in memory.saved:
            with torch.no_grad():
                initial = float(sum_norms(weights))
            loss = float(mean_over_ranks(at_least_float32(task.detach())))
            if not (math.isfinite(loss) and loss > 0):
                raise SessionError(
                    f"PruneTrain sets lambda from the first task loss, which must be a positive number; it is {loss!r}"
                )
            memory.saved["lambda"] = self.ratio * loss / ((1 - self.ratio) * initial)
            self._warn(session, memory.saved["lambda"])
        if self.proximal:
            return None
        coefficient: float = memory.saved["lambda"]
        return sum_norms(weights) * coefficient

    def after_step(self, session: Session, memory: Memory) -> None:
        """The proximal step, for each weight once along each of its axes."""
        if not self.proximal or "lambda" not in memory.saved:
            return
        rates = {p: float(group["lr"]) for group in param_groups(session) for p in group["params"]}
        for weight, slices in memory.derived["lasso"].items():
            for each in slices if weight in rates else ():
                each.shrink(rates[weight] * memory.saved["lambda"])

    def after_epoch(self, session: Session, memory: Memory) -> Plan | None:
        """Every ``interval`` epochs, the plan that keeps what some layer still uses."""
        if (session.epoch + 1) % self.interval:
            return None
        if "lambda" not in memory.saved and memory.derived["lasso"]:
            warnings.warn(
                "PruneTrain: session.penalty(task) has not been called yet, so nothing brings channels to zero. Add it "
                "to the loss: (task + session.penalty(task)).backward()",
                stacklevel=3,
            )
        return self.plan(session, memory)

    def plan(self, session: Session, memory: Memory) -> Plan:
        """Keep the channels that have a weight of at least ``threshold`` on some layer that writes or reads them."""
        peaks: dict[str, list[Tensor]] = {}
        for each in memory.derived["slices"]:
            peaks.setdefault(each.group, []).append(each.peak())
        highest = {name: torch.stack(its).amax(0).double().cpu().numpy() for name, its in peaks.items()}
        highest = {name: np.nan_to_num(peak, nan=np.inf, posinf=np.inf) for name, peak in highest.items()}
        gone: set[str] = set()
        if self.branches != "keep":
            dead = {name for name, peak in highest.items() if not self._used(peak).any()}
            gone = emptied_groups(session.analysis, dead, constants=self.branches == "fold")
        keep = {name: () if name in gone else self._kept(peak) for name, peak in highest.items()}
        dropped = sorted(gone) if self.branches == "remove" else ()
        return Plan(keep, session.analysis.sizes, session.analysis.options, dropped)

    def _used(self, peak: Floats) -> Bools:
        """Whether each channel has a weight that counts; zeros never do."""
        result: Bools = (peak >= self.threshold) & (peak > 0)
        return result

    def _kept(self, peak: Floats) -> tuple[int, ...]:
        """Channels of one group: those above the threshold, filled up with the largest of the others."""
        count = max(int(self._used(peak).sum()), min(self.minimum, len(peak)))
        count = min(-(-count // self.round_to) * self.round_to, len(peak))
        return tuple(sorted(np.argsort(-peak, kind="stable")[:count].tolist()))

    def report(self, session: Session, memory: Memory) -> Mapping[str, float]:
        """Lambda."""
        return {"lambda": memory.saved["lambda"]} if "lambda" in memory.saved else {}

    def _warn(self, session: Session, coefficient: float) -> None:
        """Say so where momentum SGD can't bring a channel below the threshold: the smoothed lasso is unstable there."""
        for optimizer in () if self.proximal else optimizers_of(session):
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


def optimizers_of(session: Session) -> Iterator[Optimizer]:
    """The session's optimizer, and those that were registered."""
    yield session.optimizer
    yield from (thing for thing in session.registered.values() if isinstance(thing, Optimizer))


def param_groups(session: Session) -> Iterator[dict[str, Any]]:
    """The parameter groups of all of them."""
    for optimizer in optimizers_of(session):
        yield from optimizer.param_groups


def nothing_to_prune(session: Session, still: set[str]) -> str:
    """Why PruneTrain can't do anything with this model."""
    analysis = session.analysis
    if still:
        return (
            f"PruneTrain finds nothing to prune: each of the {len(analysis.groups)} groups of channels has a weight "
            f"that does not train, as {min(still)!r} has. Set requires_grad before the session is made."
        )
    reasons = sorted({each.reason.text for each in analysis.frozen})
    why = f"; every channel is frozen: {', '.join(reasons[:5])}" if not analysis.groups else " among its weights"
    return f"PruneTrain finds nothing to prune in this model{why}. print(fxprune.analyze(...)) shows each axis."


def sum_norms(weights: Mapping[nn.Parameter, "Sequence[_Slices]"]) -> Tensor:
    """P, a scalar: the sum of the norms of all channels of ``weights``."""
    result: Tensor = _Lasso.apply(list(weights.values()), *weights)
    return result


class _Lasso(torch.autograd.Function):
    """P, and its gradient w * sum over axes of 1 / norm: one pass over each weight, where autograd takes a dozen."""

    @staticmethod
    def forward(ctx: Any, slices: "list[list[_Slices]]", *weights: Tensor) -> Tensor:
        """Sum the norms; they are kept for the gradient, and so are the weights."""
        norms = all_norms(slices, weights)
        ctx.slices = slices
        ctx.save_for_backward(*weights, *norms)
        return torch.stack([each.sum() for each in norms]).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of each weight, in its dtype."""
        weights, norms = ctx.saved_tensors[: len(ctx.slices)], ctx.saved_tensors[len(ctx.slices) :]
        if torch.is_grad_enabled():  # create_graph=True: as a function of the weights, to be differentiated again
            norms = all_norms(ctx.slices, weights)
        remaining = iter(norms)
        gradients: list[Tensor | None] = [None]
        for weight, axes in zip(weights, ctx.slices, strict=True):
            factor = sum(each.spread(gradient / next(remaining)) for each in axes)
            # In place where that saves memory as large as the weight.
            product = factor.mul_(weight) if factor.shape == weight.shape else weight * factor
            gradients.append(product.to(weight.dtype))
        return tuple(gradients)


def all_norms(slices: "Sequence[Sequence[_Slices]]", weights: Sequence[Tensor]) -> list[Tensor]:
    """For each weight and each of its axes, the norms of the channels."""
    norms = []
    for weight, axes in zip(weights, slices, strict=True):
        squares = at_least_float32(weight).square()
        norms += [each.norms(squares) for each in axes]
        del squares  # the next ones take its memory: half the time
    return norms


class _Slices:
    """The channels of a group on one axis of a weight."""

    def __init__(self, weight: nn.Parameter, member: Member, group: str, size: int) -> None:
        self.weight, self.axis, self.group, self.size = weight, member.axis, group, size
        self.others = [axis for axis in range(weight.ndim) if axis != member.axis]
        whole = len(member.index) == weight.shape[member.axis]
        self.index = None if whole else torch.from_numpy(member.index).to(weight.device)
        each = len(member.channel) == size and (member.channel == np.arange(size)).all()
        self.channel = None if each else torch.from_numpy(member.channel).to(weight.device)

    def norms(self, squares: Tensor, epsilon: float = EPSILON) -> Tensor:
        """float[channels]: sqrt(sum + epsilon) of each, from the squares of the weight."""
        sums = squares.sum(list(range(self.axis))) if self.axis else squares  # first what vectorizes
        sums = sums.flatten(1).sum(1) if sums.ndim > 1 else sums
        sums = sums if self.index is None else sums[self.index]
        if self.channel is not None:
            sums = sums.new_zeros(self.size).index_add(0, self.channel, sums)
        return (sums + epsilon).sqrt()

    def spread(self, values: Tensor, default: float = 0.0) -> Tensor:
        """``values``, one a channel, where the channels are on the axis; broadcasts against the weight."""
        values = values if self.channel is None else values[self.channel]
        if self.index is not None:
            whole = values.new_full((self.weight.shape[self.axis],), default)
            values = whole.index_copy(0, self.index, values)
        return values.reshape([-1 if axis == self.axis else 1 for axis in range(self.weight.ndim)])

    @torch.no_grad()
    def peak(self) -> Tensor:
        """float[channels]: the largest absolute weight of each."""
        peaks = self.weight.detach().abs().amax(self.others)
        peaks = peaks if self.index is None else peaks[self.index]
        if self.channel is not None:
            peaks = peaks.new_zeros(self.size).scatter_reduce(0, self.channel, peaks, "amax")
        return peaks

    @torch.no_grad()
    def shrink(self, by: float) -> None:
        """Multiply each channel by max(0, 1 - by / norm)."""
        if by:
            factors = (1 - by / self.norms(at_least_float32(self.weight).square(), epsilon=0.0)).clamp(min=0)
            self.weight.mul_(self.spread(factors, default=1.0).to(self.weight.dtype))


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor, in float32 where its dtype is a smaller one."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def depthwise_weights(model: nn.Module) -> set[str]:
    """The weights of depthwise convolutions: one input channel a filter."""
    return {f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False) if is_depthwise(module)}
