"""A Lightning callback that prunes a part of the LightningModule while it trains.

.. code-block:: python

    trainer = Trainer(max_epochs=90, callbacks=[Pruning("net", example_inputs, [passes.PruneTrain()])])
    trainer.fit(module)
    trainer.fit(module, ckpt_path="last.ckpt")  # goes on, with a dense module
"""

from collections.abc import Mapping, Sequence
from functools import wraps
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from fxprune.errors import SessionError
from fxprune.training.run import TrainingPass
from fxprune.training.session import Session
from fxprune.training.state import RunState, state_of
from fxprune.training.trainers.shared import parse_progress, put_session, resume_run, run_progress


class Pruning(Callback):
    """Has a session over one module of a LightningModule; cuts are made when a training epoch ends.

    The penalty is added to what ``training_step`` returns. The state of the session is in the trainer's checkpoints,
    and the log of the session, ``session.log``, goes to the trainer's loggers as ``fxprune/...``.

    Attributes:
        session: while and after ``fit``.
    """

    session: Session

    def __init__(self, part: str, example_inputs: Any, passes: Sequence[TrainingPass[Any]], **options: Any) -> None:
        """Say what to prune.

        Args:
            part: name of the module to prune, such as "net" for ``self.net``. It is replaced by its trace; its
                parameters stay the same objects under the same names.
            example_inputs: of that module: a tensor, a tuple or dict of arguments, (args, kwargs), or a loader's batch.
            passes: training passes, such as ``passes.PruneTrain()``.
            options: other arguments of ``fxprune.Session``.
        """
        self.part, self.example_inputs, self.passes = part, example_inputs, passes
        self.options = {"progress": False, **options}
        self._progress: RunState | None = None
        self._wrapped: list[str] = []

    @property
    def state_key(self) -> str:
        """Where the checkpoint keeps the state."""
        return f"fxprune {self.part}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See to it that the part is cut before weights of a checkpoint are loaded into it."""

        def load(checkpoint: dict[str, Any]) -> None:
            data = checkpoint.get("callbacks", {}).get(self.state_key)
            if data is not None:
                plan = parse_progress(data, "the checkpoint").plan
                put_session(pl_module, self.part, self.example_inputs, plan)
            of_module(checkpoint)

        of_module = self._replace(pl_module, "on_load_checkpoint", load)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the session, now that there is an optimizer.

        Raises:
            SessionError: the module has several optimizers or steps them itself, or the strategy shards the model.
        """
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise SessionError(
                f"the Pruning callback needs automatic optimization and one optimizer, not {len(trainer.optimizers)}. "
                "Otherwise make a fxprune.Session in the module and call its epoch_end."
            )
        if hasattr(self, "session"):  # of a fit that an exception ended
            self.session.close()
        graph = put_session(pl_module, self.part, self.example_inputs, None)
        length = trainer.max_epochs if (trainer.max_epochs or 0) > 0 else None
        options = {"around": trainer.strategy.model, "epochs": length, **self.options}
        self.session = Session(graph, self.example_inputs, trainer.optimizers[0], self.passes, **options)
        if self._progress is not None:
            resume_run(self.session, self._progress)

        @wraps(pl_module.training_step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            output = of_module(*args, **kwargs)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if not isinstance(loss, Tensor):
                return output
            loss = loss + self.session.penalty(loss)
            return {**output, "loss": loss} if isinstance(output, Mapping) else loss

        of_module = self._replace(pl_module, "training_step", training_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the session's epoch; this may cut. Checkpoints of the epoch's end are written after it."""
        self.session.epoch = trainer.current_epoch
        record = self.session.epoch_end()
        for logger in trainer.loggers:
            logger.log_metrics({f"fxprune/{k}": v for k, v in record.scalars().items()}, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """The state of the session."""
        return run_progress(self.session) if hasattr(self, "session") else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it for the session to come."""
        self._progress = parse_progress(state_dict, "the checkpoint")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module and the optimizer."""
        for name in self._wrapped:
            delattr(pl_module, name)
        self._wrapped = []
        if stage == "fit":
            self._progress = state_of(self.session)
            self.session.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go, too."""
        self.teardown(trainer, pl_module, "")

    def _replace(self, pl_module: LightningModule, name: str, function: Any) -> Any:
        """Set a method of the module until ``teardown``; returns the module's own."""
        method = getattr(pl_module, name)
        setattr(pl_module, name, function)
        self._wrapped.append(name)
        return method
