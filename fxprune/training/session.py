"""Session: prune while training. Hooks on the optimizer, a penalty, and cuts at the ends of epochs."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxprune.channels.analysis import analyze
from fxprune.errors import SessionError, require_type
from fxprune.files.start import remember_start
from fxprune.graph.trace import trace, unwrap_model
from fxprune.graph.traced import Model
from fxprune.options import FLAG, Rule, allow_count, allow_kind, check_options
from fxprune.plan import Plan
from fxprune.rewrite.param_map import ParamMap, check_owned
from fxprune.rewrite.rewrite import record_cut
from fxprune.training import distributed
from fxprune.training.agreement import require_same_cut
from fxprune.training.averages import shadows_of
from fxprune.training.checkpoint import read_checkpoint, restore_run, write_checkpoint
from fxprune.training.log import Epoch, ScalarWriter
from fxprune.training.memory import check_memory, kept_memories
from fxprune.training.meter import Meter, step_memory
from fxprune.training.progress import Progress
from fxprune.training.reconfigure import check_copies, cut_run
from fxprune.training.run import Run, Stateful, TrainingPass
from fxprune.training.state import plan_of
from fxprune.training.when import Decision
from fxprune.training.wrappers import wrap_again, wrappers_of

Policy = Callable[["Session", Plan, float, int], Decision]
HOOKED: WeakSet[Optimizer] = WeakSet()  # the optimizers of the sessions that are open
OPTIONS = {
    "batch_size": allow_count(why=": samples a step on this rank").or_none(),
    "epochs": allow_count(why=": epochs of the whole run").or_none(),
    "when": Rule(callable, "must be a function such as fxprune.WhenItPays(epochs)").or_none(),
    "writer": Rule(lambda value: hasattr(value, "add_scalar"), "must have add_scalar, as SummaryWriter has").or_none(),
    "reset_state": FLAG,
    "verify": FLAG,
    "progress": FLAG.or_none(),
    "around": allow_kind(nn.Module, "the module that has the model as a part").or_none(),
}


class Session(Run):
    """A training run in which passes prune the model: the state of the run, and what drives it.

    The loop calls ``model``, adds ``penalty(task)`` to its loss, steps its optimizer as always, and calls ``epoch_end``
    after each epoch, which may cut channels. The model and the optimizer stay the same objects for the whole run.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        optimizer: Optimizer = None,  # type: ignore[assignment]  # so that it can be said what is missing
        passes: Sequence[TrainingPass[Any]] = (),
        *,
        batch_size: int | None = None,
        epochs: int | None = None,
        when: Policy | None = None,
        writer: ScalarWriter | None = None,
        reset_state: bool = False,
        verify: bool = False,
        progress: bool | None = None,
        around: nn.Module | None = None,
        heads: str = "whole",
        groups: str = "auto",
    ) -> None:
        """Trace and analyse ``model`` and hook onto ``optimizer``.

        Args:
            model: a model that ``trace`` accepts, in DistributedDataParallel or torch.compile wrappers or not. Its
                parameters are shared with the session, so it is cut too: train ``session.model`` from now on.
            example_inputs: a tensor, a tuple or dict of arguments, (args, kwargs), or a loader's batch.
            optimizer: of parameters of ``model``; it must be given.
            passes: training passes, such as ``passes.PruneTrain()``.
            batch_size: samples a step on this rank; lets the log compare runs whose batches grow.
            epochs: how many there will be; a pass with a budget needs to know when it should be met.
            when: asked before each cut whether to make it, such as ``WhenItPays(epochs)``; default, always.
            writer: gets the scalars of each epoch, for example torch.utils.tensorboard.SummaryWriter().
            reset_state: where the optimizer's state of a parameter can't be sliced, drop it instead of refusing.
            verify: prove each cut in float64 on the example inputs before it is made.
            progress: a progress bar; default, on a terminal.
            around: where ``model`` is a part of a larger module in DistributedDataParallel or torch.compile wrappers,
                that module with its wrappers; they are made anew after each cut.
            heads: as for ``analyze``.
            groups: as for ``analyze``.

        Raises:
            TraceError, AnalysisError: the model can't be traced or run.
            SessionError: a pass is none, the wrapper is not supported, or another session has this optimizer.
            MigrationError: the optimizer holds other parameters.
        """
        check_arguments(model, example_inputs, optimizer, passes)
        check_options(
            {
                "batch_size": batch_size,
                "epochs": epochs,
                "when": when,
                "writer": writer,
                "reset_state": reset_state,
                "verify": verify,
                "progress": progress,
                "around": around,
            },
            SessionError,
            **OPTIONS,
        )
        wrappers = wrappers_of(model)
        graph = trace(model, example_inputs)
        outer = find_outer(graph, optimizer, around)
        analysis = analyze(graph, example_inputs, heads=heads, groups=groups)
        if plan_of(graph) is None:  # so that it can be saved before any cut
            record_cut(graph, analysis, Plan({}, analysis.sizes, analysis.options))
        super().__init__(
            model=wrap_again(wrappers, graph),
            graph=graph,
            analysis=analysis,
            optimizer=optimizer,
            example_inputs=example_inputs,
            passes=tuple(passes),
            batch_size=batch_size,
            epochs=epochs,
            wrappers=wrappers,
            around=outer,
            reset_state=reset_state,
            verify=verify,
        )
        self._when, self._writer = when, writer
        self._meter, self._progress = Meter(), Progress(progress)
        self._waiting: Plan | None = None
        self._pending = False  # gradients that no step has used yet
        self._begin()

    def _begin(self) -> None:
        """Let the passes begin, put the hooks on, and let the passes prepare; where that fails the hooks go again."""
        with distributed.all_or_none():
            for training_pass in self.passes:
                self.memories.append(training_pass.begin(self))
                check_memory(training_pass, self.memories[-1])
        self._hook()
        try:
            with distributed.all_or_none():
                for training_pass, memory in self.pairs():
                    self.prepare_pass(training_pass, memory)
        except BaseException:
            self.close()
            raise

    def _hook(self) -> None:
        """Have the optimizer and the gradients call this session."""
        HOOKED.add(self.optimizer)
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]
        for parameter in self._held():
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(self._after_gradient)  # type: ignore[no-untyped-call]
                self._handles.append(handle)

    # -------------------------------------------------------------------------------------- in the loop

    def penalty(self, task: Tensor) -> Tensor:
        """What the passes add to the task loss: a scalar, 0 where no pass penalises.

        Args:
            task: the loss of this batch, a scalar. Not changed; some passes set their coefficient from the first one.
        """
        if not isinstance(task, Tensor) or task.numel() != 1:
            raise SessionError(f"penalty(task) takes the task loss, a tensor with one element; got {task!r:.60}")
        terms = [training_pass.penalty(self, memory, task) for training_pass, memory in self.pairs()]
        return sum((term for term in terms if term is not None), start=torch.zeros((), device=task.device))

    def epoch_end(self, *, step_time: float | None = None, **values: float) -> Epoch:
        """Close an epoch: ask the passes for plans, cut, and log.

        Where gradients wait for the optimizer's next step (accumulation across the end of the epoch), the cut is made
        right after that step.

        Args:
            step_time: seconds that a step took, where you know better than the median time from step to step.
            values: your own numbers for the log, such as ``accuracy=0.93``.

        Returns:
            The record of the epoch; ``removed`` says how many channels went.

        Raises:
            SessionError: the ranks have different plans, or the cut failed on another rank.
            FxpruneError: a cut was refused. Model, optimizer and log are as they were.
        """
        self._check_open()
        with kept_memories(self.memories):
            with distributed.all_or_none():
                plan, record = self._plan_cut(step_time, values)
            notes = record.notes
            if plan is not None and plan.keep:
                if self._waits():
                    self._waiting = plan
                    notes += ("gradients wait for a step: the cut follows it",)
                else:
                    record = self._cut_in(plan, record)
        self.epoch += 1
        self.log.epochs.append(replace(record, notes=notes))
        self._meter.start_epoch()
        if self._writer is not None:
            self.log.write(self._writer)
        self._progress.epoch_ended(self.log[-1])
        return self.log[-1]

    def _plan_cut(self, step_time: float | None, values: dict[str, float]) -> tuple[Plan | None, Epoch]:
        """What to cut, and the record of the epoch: everything that asks passes and policies, and changes no model."""
        plan = merge_plans([training_pass.after_epoch(self, memory) for training_pass, memory in self.pairs()])
        require_same_cut(self, plan)
        record = self._meter.record(self, step_time, values)
        notes = self._outcome(record) + tuple(
            note for training_pass, memory in self.pairs() for note in training_pass.notes(self, memory)
        )
        if plan is not None and plan.keep and self._when is not None:
            decision = distributed.gather_values(self._when(self, plan, record.step_time, record.steps))[0]
            notes += (decision.why,)
            plan = plan if decision.go else None
            record = replace(record, predicted=decision.step_time if decision.go else None)
        return plan, replace(record, notes=notes)

    def reconfigure(self, plan: Plan) -> ParamMap:
        """Carry out ``plan``, made from ``session.analysis``, now.

        Raises:
            SessionError: gradients wait for the optimizer's step, the ranks have different plans, or the cut failed on
                another rank. Nothing is changed.
            FxpruneError: the cut is refused. Nothing is changed.
        """
        self._check_open()
        with distributed.all_or_none():
            require_type(plan, Plan, "plan", SessionError)
            if self._waits():
                raise SessionError(
                    "gradients wait for the optimizer's step: call optimizer.step() or optimizer.zero_grad() first, "
                    "then reconfigure"
                )
            require_same_cut(self, plan)
            plan.check(self.analysis.sizes)
        return self._cut(plan)

    def register(self, **things: Stateful) -> None:
        """Take along what belongs to the run: ``session.register(ema=ema, scheduler=scheduler, scaler=scaler)``.

        Copies of the model (AveragedModel, any deep copy) are cut with it. So are averages in dictionaries by the names
        of the model or in lists by its parameters, and the state of further optimizers of its parameters. Everything
        with ``state_dict`` and ``load_state_dict`` goes into checkpoints; after ``Session.load``, registering loads its
        state.

        Raises:
            SessionError: something has no state_dict, is a copy of another model, or keeps a tensor that looks like a
                parameter and is in no such place.
        """
        for name, thing in things.items():
            if not isinstance(thing, Stateful):
                raise SessionError(f"{name}={thing!r:.60} has no state_dict and load_state_dict")
            check_copies(self, name, thing)
            shadows_of(self, name, thing)
        for name, thing in things.items():
            if name in self.unclaimed:
                thing.load_state_dict(self.unclaimed[name])
                del self.unclaimed[name]
            self.registered[name] = thing

    def memory(self) -> tuple[float, float]:
        """Estimated bytes that a step takes on this rank: fixed, and for each sample.

        Fixed are weights, gradients and the optimizer's state; a sample takes all values of a forward pass.
        """
        return step_memory(self)

    def close(self) -> None:
        """Take the hooks off. The model and the optimizer go on without the session."""
        if self._handles:
            HOOKED.discard(self.optimizer)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for training_pass, memory in self.pairs():
            training_pass.close(self, memory)
        self._progress.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------- checkpoints

    def save(self, path: str | Path) -> None:
        """Write everything that the run needs to go on: model, plan, optimizer, passes, log, registered, random state.

        The file appears whole or not at all. In a distributed run every rank calls this and the first writes.

        Raises:
            FileError: nothing can be written there.
            SessionError: gradients wait for the optimizer's step; they are not saved. Or the model is a part of a
                larger one (``around``).
        """
        self._check_open()
        if self._waits() or self._waiting is not None:
            raise SessionError("gradients wait for the optimizer's step and are not saved: save after optimizer.step()")
        if not set(self.around[1].parameters()) <= set(self.graph.parameters()):
            raise SessionError(
                "the session has a part of what is trained (around=), so its checkpoint would lack the rest: save with "
                "what trains the whole, such as the Trainer of fxprune.lightning or fxprune.transformers"
            )
        write_checkpoint(self, path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module,
        example_inputs: Any,
        optimizer: Optimizer,
        passes: Sequence[TrainingPass[Any]] | None = None,
        **options: Any,
    ) -> Self:
        """Go on with a run that ``save`` wrote.

        Args:
            path: the checkpoint.
            model: the dense model, built as it was before; its weights do not matter.
            example_inputs: as before.
            optimizer: made as before, of the parameters of ``model``.
            passes: those of the checkpoint, by default. A pass of your own must be defined (imported) before.
            options: the other arguments of ``Session``, but for ``batch_size``, which goes on as it was.

        Raises:
            FileError: the file is truncated, is none, or belongs to another model. Nothing is changed.
        """
        with distributed.all_or_none():
            saved = read_checkpoint(path, model, example_inputs, optimizer, passes)
        if saved.start is not None:
            remember_start(model, saved.start)
        session = cls(model, example_inputs, optimizer, saved.passes, **{**saved.options, **options})
        try:
            restore_run(session, saved, path)
        except BaseException:
            session.close()
            raise
        return session

    # ----------------------------------------------------------------------------------------- within

    def _check_open(self) -> None:
        if not self._handles:
            raise SessionError("this session is closed")
        distributed.require_outside_join([*self.wrappers, *self.around[0]])

    def _held(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _after_gradient(self, parameter: Tensor) -> None:
        self._pending = True

    def _waits(self) -> bool:
        """Whether some rank has gradients that no step has used yet and that zero_grad has not dropped.

        Those that are not finite do not count: mixed precision has skipped their step.
        """
        gradients = [p.grad for p in self._held() if p.grad is not None] if self._pending else []
        finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
        return distributed.any_rank(finite and any(bool(gradient.any()) for gradient in gradients))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Call the passes; where a closure makes the gradients, when it has made them."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._after_backward()
            return None

        def run_closure() -> Any:
            loss = closure()
            self._after_backward()
            return loss

        return (optimizer, *args[2:]), {**kwargs, "closure": run_closure}

    def _after_backward(self) -> None:
        for training_pass, memory in self.pairs():
            training_pass.after_backward(self, memory)

    def _after_step(self, *_: Any) -> None:
        self.step += 1
        self._pending = False
        for training_pass, memory in self.pairs():
            training_pass.after_step(self, memory)
        if self._waiting is not None:
            plan, self._waiting = self._waiting, None
            self.log.epochs[-1] = self._cut_in(plan, self.log[-1])
        self._meter.stepped()
        self._progress.advance(self.epoch)

    def _outcome(self, record: Epoch) -> tuple[str, ...]:
        """What became of the prediction for the last cut."""
        last = self.log[-1] if len(self.log) else None
        if last is None or last.predicted is None or not last.removed or last.samples != record.samples:
            return ()
        expected, measured = last.predicted * 1e3, record.step_time * 1e3
        return (f"the last cut: a step was expected to take {expected:.1f} ms, it takes {measured:.1f} ms",)

    def _cut_in(self, plan: Plan, record: Epoch) -> Epoch:
        """Carry out ``plan`` at the end of an epoch, and the record of it."""
        start = time.perf_counter()
        before = sum(self.analysis.sizes.values())
        self._cut(plan)
        removed = before - sum(self.analysis.sizes.values())
        return replace(record, removed=removed, cut_time=time.perf_counter() - start)

    def _cut(self, plan: Plan) -> ParamMap:
        param_map = cut_run(self, plan)
        self._waiting = None  # a plan that waited was for the model before
        return param_map


def check_arguments(
    model: nn.Module, example_inputs: Any, optimizer: Optimizer | None, passes: Sequence[TrainingPass[Any]]
) -> None:
    """Raise SessionError unless these are a model, an optimizer that is free, and training passes."""
    require_type(model, nn.Module, "model", SessionError)
    if optimizer is None and isinstance(example_inputs, Optimizer):
        raise SessionError(
            f"example_inputs are missing: Session(model, example_inputs, optimizer, passes) got the optimizer "
            f"{type(example_inputs).__name__} in their place. Give a batch, as a tensor"
        )
    require_type(optimizer, Optimizer, "optimizer", SessionError)
    require_type(passes, Sequence, "passes", SessionError)
    for training_pass in passes:
        if not isinstance(training_pass, TrainingPass):
            raise SessionError(
                f"{training_pass!r:.80} can't stand in a session: it needs training passes such as "
                "passes.PruneTrain(). Criteria make plans: use fxprune.prune, or "
                "session.reconfigure(criterion.plan(...))."
            )
    if optimizer in HOOKED:
        raise SessionError("another session has this optimizer: close() that one first, or give one all passes")


def find_outer(graph: Model, optimizer: Optimizer, around: nn.Module | None) -> tuple[list[nn.Module], nn.Module]:
    """What ``optimizer`` trains: the module ``around`` the model and its wrappers; without one ``graph``, and none.

    Raises:
        SessionError: ``around`` does not have the model as a part.
        MigrationError: the optimizer holds other parameters.
    """
    outer = ([], graph) if around is None else (wrappers_of(around), unwrap_model(around))
    check_owned(optimizer, set(outer[1].parameters()))
    if around is not None and not set(graph.parameters()) <= set(around.parameters()):
        raise SessionError(f"around= is a {type(around).__name__} that does not have the parameters of the model")
    return outer


def merge_plans(plans: Sequence[Plan | None]) -> Plan | None:
    """One plan that keeps what all of ``plans`` keep; where that is nothing, what those before the last one keep."""
    present = [plan for plan in plans if plan is not None]
    if not present:
        return None
    keep = dict(present[0].keep)
    for plan in present[1:]:
        for name, kept in plan.keep.items():
            both = sorted(set(keep.get(name, kept)) & set(kept))
            keep[name] = tuple(both) or keep.get(name, tuple(range(plan.sizes[name])))
    dropped = {name for plan in present for name in plan.dropped if not keep[name]}
    return Plan(keep, present[0].sizes, present[0].options, sorted(dropped))
