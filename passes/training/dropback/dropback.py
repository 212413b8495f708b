"""DropBack: train on a weight budget. All weights but k keep the start value that their seed and index give them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, NAdam, RAdam, RMSprop

from fxprune.errors import InitializeError, PlanError
from fxprune.files.start import Start, remember_start, start_of
from fxprune.rewrite.param_map import ParamMap
from fxprune.training.passes import Memory, TrainingPass
from fxprune.training.session import Session

from ..clicktrain.clicktrain import ClickTrain
from ._largest import about_largest, select_largest
from ._layout import Layout, from_bits, to_bits
from ._sparse_state import empty_state, pack_state, unpack_state

DECAYING = (SGD, Adam, RMSprop, Adagrad, Adadelta, Adamax, NAdam, RAdam, ASGD)  # of these it is known how they decay


@dataclass(frozen=True)
class DropBack(TrainingPass):
    """Golub, Lemieux and Lis, "Full Deep Neural Network Training on a Pruned Weight Budget" (2018), algorithm 1.

    After each step the k weights that are furthest from their start value stay, of all parameters of the network
    together, biases and norms included; the others go back to that value:

        tracked = the k largest of |w - start|, without zeros;  w = w where tracked, start elsewhere.

    For plain SGD that is the paper's choice by accumulated gradients. At most k weights ever differ from what the seed
    gives, and ``fxprune.save`` writes only those. The model must come from ``fxprune.initialize``, and DropBack must be
    the last pass of the session. A cut leaves each weight the start value of its original index, and k as it is.

    Weight decay acts on tracked weights only. An Adam-type optimizer gives weights without history the same step
    whatever their gradient, so with ``tracked_state`` the choice hardly sees the gradients of untracked weights there.

    Attributes:
        budget: k: a count, or a fraction (a float up to 1) of the weights at the start of the session.
        rule: "exact", ties to the first weight in memory; or "quantile": the bound is estimated from one weight in 17,
            with at most k weights above it, some 1 % fewer as a rule. It takes less time.
        select_every: steps from one choice to the next; between them the tracked weights stay the same.
        freeze: epochs after which the tracked weights stay the same for good. Gradients of others don't matter then.
        start_decay: the start values are multiplied by this at each step, and are zero below 1e-10, so in the end all
            but k weights are zero. 1: they stay.
        decay_in_score: weight decay moves untracked weights too before the choice, as in the authors' code.
        tracked_state: keep the optimizer's state of tracked weights only; that of a weight that comes in is zero.
        regenerate: make the start values anew at each step: a number less a weight in memory, and more time. With
            ``start_decay`` it is always so.
    """

    budget: int | float
    rule: str = "exact"
    select_every: int = 1
    freeze: int | None = None
    start_decay: float = 1.0
    decay_in_score: bool = False
    tracked_state: bool = False
    regenerate: bool = False

    def __post_init__(self) -> None:
        count = isinstance(self.budget, int) and not isinstance(self.budget, bool) and self.budget >= 0
        if not count and not (isinstance(self.budget, float) and 0 < self.budget <= 1):
            raise PlanError(f"budget={self.budget!r} must be a count of weights, or a fraction of them up to 1.0")
        if self.rule not in ("exact", "quantile"):
            raise PlanError(f"rule={self.rule!r} is not known; use 'exact' or 'quantile'")
        for name in ("select_every", "freeze"):
            value = getattr(self, name)
            if name == "freeze" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError(f"{name}={value!r} must be a positive integer")
        if not (isinstance(self.start_decay, (int, float)) and 0 <= self.start_decay <= 1):
            raise PlanError(f"start_decay={self.start_decay!r} must lie between 0 and 1")

    # ------------------------------------------------------------------------------------------------------- hooks

    def prepare(self, session: Session, memory: Memory) -> None:
        """Lay the weights out side by side, with their start values.

        Raises:
            InitializeError: the model does not come from ``fxprune.initialize``.
            PlanError: another pass comes after this one, the budget is larger than the model, or it is not known how
                the optimizer decays weights.
        """
        layout = Layout({name: p for name, p in session.graph.named_parameters() if p.requires_grad})
        self._check(session, layout)
        if "budget" not in memory.saved:
            budget = self.budget if isinstance(self.budget, int) else int(self.budget * layout.size)
            if budget > layout.size:
                raise PlanError(f"budget={budget} is more than the {layout.size} weights that train in this model")
            memory.saved |= {"budget": budget, "factor": known_start(session).factor}
        tracked = layout.buffer(torch.bool)
        memory.derived |= {"layout": layout, "tracked": tracked, "masks": layout.views(tracked), "settled": False}
        if "tracked" in memory.saved:
            for name, mask in memory.derived["masks"].items():
                mask.copy_(from_bits(memory.saved["tracked"][name], mask.shape))
        if not self.regenerate and self.start_decay == 1:
            views = layout.views(layout.buffer(layout.dtype))
            for name, view in views.items():
                view.copy_(self._start(session, memory, name))
            memory.derived["start"] = views

    def after_backward(self, session: Session, memory: Memory) -> None:
        """Give the optimizer its state back, and spare untracked weights the decay that it adds to their gradients."""
        if memory.derived["layout"].stale():  # the model moved to another device or memory format
            self.before_save(session, memory)
            memory.derived.clear()
            self.prepare(session, memory)
        if not memory.derived["settled"]:
            self._settle(session, memory)
        layout, masks = memory.derived["layout"], memory.derived["masks"]
        if "state" in memory.saved:
            unpack_state(session.optimizer, layout.parameters, masks, memory.saved.pop("state"))
        scale = getattr(session.optimizer, "grad_scale", None)  # a fused optimizer takes the GradScaler's factor off
        for name, p, decay, group in self._decays(session, memory):
            if p.grad is not None and not group.get("decoupled_weight_decay"):
                decay *= (-1.0 if group.get("maximize") else 1.0) * (1.0 if scale is None else float(scale))
                p.grad.addcmul_(p.detach(), count_untracked(masks[name], p), value=-decay)

    @torch.no_grad()
    def after_step(self, session: Session, memory: Memory) -> None:
        """Choose the tracked weights, and put the others back."""
        if self._all(memory):
            return
        layout, masks = memory.derived["layout"], memory.derived["masks"]
        for name, p, decay, group in self._decays(session, memory):
            if p.grad is not None and group.get("decoupled_weight_decay"):
                begin = self._start(session, memory, name)
                p.addcmul_(begin, count_untracked(masks[name], p), value=float(group["lr"]) * decay)
        frozen = self.freeze is not None and session.epoch >= self.freeze
        if not frozen and (session.step - 1) % self.select_every == 0:
            self._choose(session, memory)
        self._decay_start(session, memory)
        for name, p in layout.parameters.items():
            torch.where(masks[name], p, self._start(session, memory, name).to(p.dtype), out=p)
        if self.tracked_state:
            memory.saved["state"] = pack_state(session.optimizer, layout.parameters, masks)

    def after_cut(self, session: Session, memory: Memory, param_map: ParamMap) -> None:
        """Cut what is known of each weight as the weights were cut."""
        masks = memory.derived["masks"]
        stays = {name: param_map.slice(name, mask) for name, mask in masks.items() if name not in param_map.gone}
        if memory.derived["settled"]:
            memory.saved["tracked"] = {name: to_bits(mask) for name, mask in stays.items()}
        if "state" in memory.saved:
            memory.saved["state"] = {
                name: {
                    key: param_map.slice(name, scatter_values(values, mask))[stays[name]]
                    for key, values in memory.saved["state"][name].items()
                }
                for name, mask in masks.items()
                if name in stays
            }
            empty_state(session.optimizer, dict(session.graph.named_parameters()), memory.saved["state"])

    def before_save(self, session: Session, memory: Memory) -> None:
        """Note which weights are tracked, one bit each."""
        if memory.derived["settled"]:
            memory.saved["tracked"] = {name: to_bits(mask) for name, mask in memory.derived["masks"].items()}

    def report(self, session: Session, memory: Memory) -> Mapping[str, float]:
        """How many weights are tracked."""
        return {"tracked": float(torch.count_nonzero(memory.derived["tracked"]))}

    # ------------------------------------------------------------------------------------------------------ within

    def _check(self, session: Session, layout: Layout) -> None:
        start, optimizer = start_of(session.graph), session.optimizer
        lost = [name for name in layout.parameters if start is None or name not in start.origins]
        if lost:
            raise InitializeError(
                f"DropBack does not know how {len(lost)} parameters started, such as {lost[0]}: call "
                "fxprune.initialize(model, seed) before the session is made"
            )
        if session.passes[-1] is not self:
            raise PlanError(
                f"DropBack must be the last pass of a session, so that nothing moves weights after it; here "
                f"{type(session.passes[-1]).__name__} is"
            )
        if self.start_decay == 1 and any(isinstance(each, ClickTrain) for each in session.passes):
            raise PlanError(
                "DropBack puts weights back to their start values, ClickTrain sets them to zero: they can't stand in "
                "one session, unless the start values fall to zero too, as with DropBack(start_decay=0.99)"
            )
        decays = any(group.get("weight_decay") for group in optimizer.param_groups)
        if decays and not self.decay_in_score and not isinstance(optimizer, DECAYING):
            raise PlanError(
                f"DropBack does not know how {type(optimizer).__name__} decays weights, so it can't spare untracked "
                "ones: use weight_decay=0, or DropBack(decay_in_score=True)"
            )

    def _all(self, memory: Memory) -> bool:
        """Whether the budget is enough for every weight: then nothing is to be done."""
        return bool(memory.saved["budget"] >= memory.derived["layout"].size)

    def _start(self, session: Session, memory: Memory, name: str) -> Tensor:
        """The start values of a parameter, rounded to its dtype, in that of the layout."""
        if "start" in memory.derived:
            kept: Tensor = memory.derived["start"][name]
            return kept
        layout = memory.derived["layout"]
        p = layout.parameters[name]
        return known_start(session).values(name, p.device).to(p.dtype).to(layout.dtype)

    def _decay_start(self, session: Session, memory: Memory) -> None:
        """Bring the start values to where they are after so many steps."""
        if self.start_decay < 1:
            factor = memory.saved["factor"] * self.start_decay**session.step
            remember_start(session.graph, known_start(session).decayed(factor))

    @torch.no_grad()
    def _settle(self, session: Session, memory: Memory) -> None:
        """Before the first step, and the first after a cut or a checkpoint: see that the others are at their start.

        Where it is not known which weights are tracked, those are that differ from their start.

        Raises:
            InitializeError: other weights differ, or more than the budget.
        """
        layout, masks, budget = memory.derived["layout"], memory.derived["masks"], memory.saved["budget"]
        self._decay_start(session, memory)
        for name, p in layout.parameters.items():
            differs = p.detach() != self._start(session, memory, name)
            if self._all(memory):
                masks[name].fill_(True)
            elif "tracked" not in memory.saved:
                masks[name].copy_(differs)
            elif count := int(torch.count_nonzero(differs & ~masks[name])):
                raise InitializeError(
                    f"{count} weights of {name} that are not tracked differ from their start value: with DropBack, "
                    "nothing but the optimizer may change weights during a session"
                )
        count = int(torch.count_nonzero(memory.derived["tracked"]))
        if count > budget and not self._all(memory):
            raise InitializeError(
                f"{count} weights differ from their start value at the first step, and the budget is {budget}: call "
                "fxprune.initialize(model, seed) after weights were loaded or changed, and before the session is made"
            )
        memory.derived["settled"] = True

    def _choose(self, session: Session, memory: Memory) -> None:
        """Track the weights that are furthest from their start."""
        layout, tracked, budget = memory.derived["layout"], memory.derived["tracked"], memory.saved["budget"]
        scores = memory.derived.get("scores")
        scores = layout.buffer(layout.dtype) if scores is None else scores
        for name, score in layout.views(scores).items():
            torch.sub(layout.parameters[name].detach(), self._start(session, memory, name), out=score).abs_()
        if self.rule == "exact":
            select_largest(scores, budget, tracked)
        else:
            about_largest(scores, budget, tracked, turn=session.step)
        if not self.regenerate:
            memory.derived["scores"] = scores

    def _decays(self, session: Session, memory: Memory) -> Iterator[tuple[str, nn.Parameter, float, dict[str, Any]]]:
        """The parameters with weight decay, which untracked weights are to be spared: (name, itself, decay, group)."""
        if self.decay_in_score or self._all(memory):
            return
        names = memory.derived["layout"].names
        for group in session.optimizer.param_groups:
            for p in group["params"] if group.get("weight_decay") else ():
                if p in names:
                    yield names[p], p, float(group["weight_decay"]), group


def scatter_values(values: Tensor, mask: Tensor) -> Tensor:
    """``values``, in order, where the mask is set, and zeros elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=mask.device).masked_scatter_(mask, values.to(mask.device))


def count_untracked(mask: Tensor, p: Tensor) -> Tensor:
    """1 where a weight is not tracked, else 0, in the dtype of the parameter."""
    return (~mask).to(p.dtype)


def known_start(session: Session) -> Start:
    """The start of the session's model, which ``prepare`` has seen."""
    start = start_of(session.graph)
    if start is None:
        raise InitializeError("the model has lost its start values: make the session anew")
    return start
