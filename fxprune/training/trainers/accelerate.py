"""Sessions with Hugging Face Accelerate.

.. code-block:: python

    session = fxprune.Session(model, example_inputs, optimizer, [passes.PruneTrain()])
    model, optimizer, loader = prepare(accelerator, session, loader)  # instead of accelerator.prepare(model, ...)
    for epoch in range(epochs):
        for x, y in loader:
            task = criterion(model(x), y)
            accelerator.backward(task + session.penalty(task))
            optimizer.step()
            optimizer.zero_grad()
        session.epoch_end()
        accelerator.save_state("checkpoint")  # accelerator.load_state before the first step goes on from there
"""

from types import MethodType
from typing import Any

from accelerate import Accelerator
from torch import nn

from fxprune.errors import SessionError, require_type
from fxprune.graph.trace import unwrap_model
from fxprune.training.session import Session
from fxprune.training.trainers.shared import read_progress, resume_run, write_progress
from fxprune.training.wrappers import wrappers_of


def prepare(accelerator: Accelerator, session: Session, *companions: Any) -> tuple[Any, ...]:
    """Prepare a session's model and optimizer, and ``companions``, with Accelerate; cuts pass through its wrappers.

    ``accelerator.save_state`` then saves the session too, and ``accelerator.load_state`` cuts the model to what it was
    before it loads the weights.

    Args:
        accelerator: with no parallelism but DistributedDataParallel.
        session: new, of a model and an optimizer that are not prepared yet.
        companions: loaders, schedulers and whatever else ``accelerator.prepare`` takes.

    Returns:
        (model, optimizer, *companions), prepared. The model is ``session.model`` from now on.

    Raises:
        SessionError: the model is sharded, or in wrappers already.
    """
    require_type(accelerator, Accelerator, "accelerator", SessionError)
    require_type(session, Session, "session", SessionError)
    if session.model is not session.graph:
        raise SessionError(
            f"the session's model is in a {type(session.model).__name__} already; give the bare model to the session "
            "and let prepare() wrap it"
        )
    graph = session.graph

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    # For mixed precision Accelerate wraps graph.forward as it is now; a cut makes the class's anew.
    vars(graph)["forward"] = MethodType(forward, graph)
    prepared = tuple(accelerator.prepare(graph, session.optimizer, *companions))
    wrappers = wrappers_of(prepared[0])
    if unwrap_model(prepared[0]) is not graph:
        raise SessionError(f"Accelerate put a {type(prepared[0]).__name__} around the model, which can't be cut")
    session.model, session.wrappers = prepared[0], wrappers

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        if accelerator.is_main_process:
            write_progress(session, folder)

    def load(models: list[nn.Module], folder: str) -> None:
        resume_run(session, read_progress(folder))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    return prepared
