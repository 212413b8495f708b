"""A cut of a whole run: model, copies, optimizers, wrappers and what the passes remember. All or nothing."""

import torch

from fxprune.errors import SessionError
from fxprune.graph.traced import Model
from fxprune.plan import Plan
from fxprune.rewrite.param_map import ParamMap
from fxprune.training import distributed
from fxprune.training.averages import shadows_of
from fxprune.training.cut import reconfigure
from fxprune.training.interrupts import shield_undo
from fxprune.training.memory import kept_memories
from fxprune.training.run import Run, find_copies
from fxprune.training.undo import Undo
from fxprune.training.wrappers import check_whole, wrap_again


def cut_run(run: Run, plan: Plan) -> ParamMap:
    """Carry out ``plan`` on the run.

    Raises:
        SessionError: the model is sharded, a copy has other shapes, or the cut failed on another rank.
        FxpruneError: the cut is refused. Nothing is changed, and so it is where anything else fails.
    """
    with distributed.all_or_none():
        check_whole(run.graph)
        copies = [copied for name, thing in run.registered.items() for copied in check_copies(run, name, thing)]
        shadows = [shadow for name, thing in run.registered.items() for shadow in shadows_of(run, name, thing)]
    optimizers = run.optimizers()
    analysis, batch_size = run.analysis, run.batch_size
    undo = Undo((run.graph, *copies), optimizers, run.registered.values(), [tensor for _, tensor in shadows])
    wrapped = False
    with shield_undo() as shield, kept_memories(run.memories):
        try:
            with distributed.all_or_none():
                run.analysis, param_map = reconfigure(
                    run.graph,
                    run.analysis,
                    plan,
                    optimizers,
                    copies,
                    shadows,
                    outer=set(run.around[1].parameters()),
                    reset_state=run.reset_state,
                    verify_with=run.example_inputs if run.verify else None,
                )
                torch.clear_autocast_cache()  # it has the old weights where the cut is made within autocast
                wrapped = True
                renew_wrappers(run)
                for training_pass, memory in run.pairs():
                    training_pass.after_cut(run, memory, param_map)
                    run.prepare_pass(training_pass, memory)
        except BaseException:  # a pass that fails, memory that runs out, control-C
            shield.hold()
            undo()
            run.analysis, run.batch_size = analysis, batch_size
            if wrapped:
                renew_wrappers(run)
            raise
    return param_map


def renew_wrappers(run: Run) -> None:
    """Make the wrappers fit the shapes of the model."""
    wrap_again(run.wrappers, run.graph)
    wrap_again(*run.around)


def check_copies(run: Run, name: str, thing: object) -> list[Model]:
    """The traced models in what was registered as ``name``; SessionError unless they have this model's shapes."""
    expected = {key: tuple(tensor.shape) for key, tensor in run.graph.state_dict().items()}
    copies = [copied for copied in find_copies(thing) if copied is not run.graph]
    for copied in copies:
        shapes = {key: tuple(tensor.shape) for key, tensor in copied.state_dict().items()}
        for key in dict.fromkeys((*expected, *shapes)):
            if shapes.get(key) != expected.get(key):
                raise SessionError(
                    f"{name} is no copy of the model as it is now: its {key} has shape {shapes.get(key)}, the "
                    f"model's {expected.get(key)}. Make it from session.model, and register it before the next cut."
                )
    return copies
