"""DropBack: train on a weight budget. All weights but k keep the start value that their seed and index give them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, NAdam, RAdam, RMSprop

from fxprune.errors import InitializeError, PlanError
from fxprune.files.start import Start, remember_start, start_of
from fxprune.options import Rule, allow_count, allow_number, allow_words, check_options, is_integer
from fxprune.rewrite.param_map import ParamMap
from fxprune.training.memory import derived_field
from fxprune.training.run import Run, TrainingPass

from ._largest import about_largest, select_largest
from ._layout import Layout, from_bits, to_bits
from ._sparse_state import Packed, empty_state, pack_state, unpack_state

DECAYING = (SGD, Adam, RMSprop, Adagrad, Adadelta, Adamax, NAdam, RAdam, ASGD)  # of these it is known how they decay


@dataclass
class Tracking:
    """What DropBack remembers.

    Attributes:
        budget: how many weights are tracked at most.
        factor: of the start values when the session began.
        tracked: for each parameter whether its weights are tracked, a bit each; set where it is saved or cut.
        state: the optimizer's state of the tracked weights, between steps; None where the optimizer has it itself.
        layout: the weights side by side.
        marks: bool[weights]: whether each is tracked.
        masks: the same, by parameter and in its shape.
        start: the start values by parameter, where they are kept.
        scores: room for a number a weight, where it is kept.
        settled: whether it was seen that all others are at their start values.
    """

    budget: int
    factor: float
    tracked: dict[str, Tensor] | None = None
    state: Packed | None = None
    layout: Layout = derived_field()
    marks: Tensor = derived_field()
    masks: dict[str, Tensor] = derived_field()
    start: dict[str, Tensor] = derived_field(dict)
    scores: Tensor | None = derived_field(lambda: None)
    settled: bool = derived_field(lambda: False)


@dataclass(frozen=True)
class DropBack(TrainingPass[Tracking]):
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
        check_options(
            self,
            PlanError,
            budget=Rule(is_budget, "must be a count of weights, or a fraction of them up to 1.0"),
            rule=allow_words("exact", "quantile"),
            select_every=allow_count(),
            freeze=allow_count().or_none(),
            start_decay=allow_number(least=0, most=1),
        )

    # ------------------------------------------------------------------------------------------------------- hooks

    def begin(self, run: Run) -> Tracking:
        """Count the budget.

        Raises:
            InitializeError, PlanError: as for ``prepare``; or the budget is larger than the model.
        """
        size = self._lay_out(run).size
        budget = self.budget if isinstance(self.budget, int) else int(self.budget * size)
        if budget > size:
            raise PlanError(f"budget={budget} is more than the {size} weights that train in this model")
        return Tracking(budget, known_start(run).factor)

    def prepare(self, run: Run, memory: Tracking) -> None:
        """Lay the weights out side by side, with their start values.

        Raises:
            InitializeError: the model does not come from ``fxprune.initialize``.
            PlanError: another pass comes after this one, or it is not known how the optimizer decays weights.
        """
        layout = memory.layout = self._lay_out(run)
        memory.marks = layout.buffer(torch.bool)
        memory.masks = layout.views(memory.marks)
        if memory.tracked is not None:
            for name, mask in memory.masks.items():
                mask.copy_(from_bits(memory.tracked[name], mask.shape))
        if not self.regenerate and self.start_decay == 1:
            views = layout.views(layout.buffer(layout.dtype))
            for name, view in views.items():
                view.copy_(self._start(run, memory, name))
            memory.start = views

    def after_backward(self, run: Run, memory: Tracking) -> None:
        """Give the optimizer its state back, and spare untracked weights the decay that it adds to their gradients."""
        if memory.layout.stale():  # the model moved to another device or memory format
            self.before_save(run, memory)
            run.prepare_pass(self, memory)
        if memory.state is not None:
            unpack_state(run.optimizer, memory.layout.parameters, memory.masks, memory.state)
            memory.state = None
        if not memory.settled:  # after the state is back: where a cut left no more than the budget, all get tracked
            self._settle(run, memory)
        scale = getattr(run.optimizer, "grad_scale", None)  # a fused optimizer takes the GradScaler's factor off
        for name, p, decay, group in self._decays(run, memory):
            if p.grad is not None and not group.get("decoupled_weight_decay"):
                decay *= (-1.0 if group.get("maximize") else 1.0) * (1.0 if scale is None else float(scale))
                p.grad.addcmul_(p.detach(), count_untracked(memory.masks[name], p), value=-decay)

    @torch.no_grad()
    def after_step(self, run: Run, memory: Tracking) -> None:
        """Choose the tracked weights, and put the others back."""
        if self._all(memory):
            return
        layout, masks = memory.layout, memory.masks
        for name, p, decay, group in self._decays(run, memory):
            if p.grad is not None and group.get("decoupled_weight_decay"):
                begin = self._start(run, memory, name)
                p.addcmul_(begin, count_untracked(masks[name], p), value=float(group["lr"]) * decay)
        frozen = self.freeze is not None and run.epoch >= self.freeze
        if not frozen and (run.step - 1) % self.select_every == 0:
            self._choose(run, memory)
        self._decay_start(run, memory)
        for name, p in layout.parameters.items():
            torch.where(masks[name], p, self._start(run, memory, name).to(p.dtype), out=p)
        if self.tracked_state:
            memory.state = pack_state(run.optimizer, layout.parameters, masks)

    def after_cut(self, run: Run, memory: Tracking, param_map: ParamMap) -> None:
        """Cut what is known of each weight as the weights were cut."""
        masks = {name: mask for name, mask in memory.masks.items() if name not in param_map.gone}
        stays = {name: param_map.slice(name, mask) for name, mask in masks.items()}
        if memory.settled:
            memory.tracked = {name: to_bits(mask) for name, mask in stays.items()}
        if memory.state is not None:
            memory.state = {
                name: {
                    key: param_map.slice(name, scatter_values(values, mask))[stays[name]]
                    for key, values in memory.state[name].items()
                }
                for name, mask in masks.items()
            }
            empty_state(run.optimizer, dict(run.graph.named_parameters()), memory.state)

    def before_save(self, run: Run, memory: Tracking) -> None:
        """Note which weights are tracked, one bit each."""
        if memory.settled:
            memory.tracked = {name: to_bits(mask) for name, mask in memory.masks.items()}

    def report(self, run: Run, memory: Tracking) -> Mapping[str, float]:
        """How many weights are tracked."""
        return {"tracked": float(torch.count_nonzero(memory.marks))}

    # ------------------------------------------------------------------------------------------------------ within

    def _lay_out(self, run: Run) -> Layout:
        """The weights that train, side by side, of a run that DropBack can stand in."""
        layout = Layout({name: p for name, p in run.graph.named_parameters() if p.requires_grad})
        start, optimizer = start_of(run.graph), run.optimizer
        lost = [name for name in layout.parameters if start is None or name not in start.origins]
        if lost:
            raise InitializeError(
                f"DropBack does not know how {len(lost)} parameters started, such as {lost[0]}: call "
                "fxprune.initialize(model, seed) before the session is made"
            )
        if run.passes[-1] is not self:
            raise PlanError(
                f"DropBack must be the last pass of a session, so that nothing moves weights after it; here "
                f"{type(run.passes[-1]).__name__} is"
            )
        zeroing = [type(companion).__name__ for companion in run.passes if companion.zeroes_weights]
        if self.start_decay == 1 and zeroing:
            raise PlanError(
                f"DropBack puts weights back to their start values, {zeroing[0]} sets them to zero: they can't stand "
                "in one session, unless the start values fall to zero too, as with DropBack(start_decay=0.99)"
            )
        decays = any(group.get("weight_decay") for group in optimizer.param_groups)
        if decays and not self.decay_in_score and not isinstance(optimizer, DECAYING):
            raise PlanError(
                f"DropBack does not know how {type(optimizer).__name__} decays weights, so it can't spare untracked "
                "ones: use weight_decay=0, or DropBack(decay_in_score=True)"
            )
        return layout

    def _all(self, memory: Tracking) -> bool:
        """Whether the budget is enough for every weight: then nothing is to be done."""
        return memory.budget >= memory.layout.size

    def _start(self, run: Run, memory: Tracking, name: str) -> Tensor:
        """The start values of a parameter, rounded to its dtype, in that of the layout."""
        if name in memory.start:
            return memory.start[name]
        p = memory.layout.parameters[name]
        return known_start(run).values(name, p.device).to(p.dtype).to(memory.layout.dtype)

    def _decay_start(self, run: Run, memory: Tracking) -> None:
        """Bring the start values to where they are after so many steps."""
        if self.start_decay < 1:
            factor = memory.factor * self.start_decay**run.step
            remember_start(run.graph, known_start(run).decayed(factor))

    @torch.no_grad()
    def _settle(self, run: Run, memory: Tracking) -> None:
        """Before the first step, and the first after a cut or a checkpoint: see that the others are at their start.

        Where it is not known which weights are tracked, those are that differ from their start.

        Raises:
            InitializeError: other weights differ, or more than the budget.
        """
        masks, budget = memory.masks, memory.budget
        self._decay_start(run, memory)
        for name, p in memory.layout.parameters.items():
            differs = p.detach() != self._start(run, memory, name)
            if self._all(memory):
                masks[name].fill_(True)
            elif memory.tracked is None:
                masks[name].copy_(differs)
            elif off := int(torch.count_nonzero(differs & ~masks[name])):
                raise InitializeError(
                    f"{off} weights of {name} that are not tracked differ from their start value: with DropBack, "
                    "nothing but the optimizer may change weights during a session"
                )
        total = int(torch.count_nonzero(memory.marks))
        if total > budget and not self._all(memory):
            raise InitializeError(
                f"{total} weights differ from their start value at the first step, and the budget is {budget}: call "
                "fxprune.initialize(model, seed) after weights were loaded or changed, and before the session is made"
            )
        memory.settled = True

    def _choose(self, run: Run, memory: Tracking) -> None:
        """Track the weights that are furthest from their start."""
        layout = memory.layout
        scores = layout.buffer(layout.dtype) if memory.scores is None else memory.scores
        for name, score in layout.views(scores).items():
            torch.sub(layout.parameters[name].detach(), self._start(run, memory, name), out=score).abs_()
        if self.rule == "exact":
            select_largest(scores, memory.budget, memory.marks)
        else:
            about_largest(scores, memory.budget, memory.marks, turn=run.step)
        if not self.regenerate:
            memory.scores = scores

    def _decays(self, run: Run, memory: Tracking) -> Iterator[tuple[str, nn.Parameter, float, dict[str, Any]]]:
        """The parameters with weight decay, which untracked weights are to be spared: (name, itself, decay, group)."""
        if self.decay_in_score or self._all(memory):
            return
        names = memory.layout.names
        for group in run.optimizer.param_groups:
            for p in group["params"] if group.get("weight_decay") else ():
                if p in names:
                    yield names[p], p, float(group["weight_decay"]), group


def is_budget(value: Any) -> bool:
    """Whether ``value`` is a count, or a fraction up to 1."""
    return (isinstance(value, float) and 0 < value <= 1) or (is_integer(value) and value >= 0)


def scatter_values(values: Tensor, mask: Tensor) -> Tensor:
    """``values``, in order, where the mask is set, and zeros elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=mask.device).masked_scatter_(mask, values.to(mask.device))


def count_untracked(mask: Tensor, p: Tensor) -> Tensor:
    """1 where a weight is not tracked, else 0, in the dtype of the parameter."""
    return (~mask).to(p.dtype)


def known_start(run: Run) -> Start:
    """The start of the run's model, which ``prepare`` has seen."""
    start = start_of(run.graph)
    if start is None:
        raise InitializeError("the model has lost its start values: make the session anew")
    return start
