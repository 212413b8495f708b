"""Pruning under the Trainer of Hugging Face Transformers.

.. code-block:: python

    trainer = Trainer(model, args, train_dataset=dataset)
    pruning = Pruning(trainer, "net", example_inputs, [passes.PruneTrain()])
    trainer.train()
    trainer.train(resume_from_checkpoint="out/checkpoint-900")  # goes on, with a dense model
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from fxprune.errors import SessionError
from fxprune.training.run import TrainingPass
from fxprune.training.session import Session
from fxprune.training.state import RunState, state_of
from fxprune.training.trainers.shared import put_session, read_progress, resume_run, write_progress


class Pruning(TrainerCallback):
    """Has a session over one module of the trainer's model; cuts are made at the ends of epochs.

    It adds itself to the trainer, and the penalty to what ``trainer.compute_loss`` returns in training. Each checkpoint
    folder gets a file ``fxprune.pt``. The log of the session, ``session.log``, goes to ``trainer.log``.

    Attributes:
        session: while and after ``train``.
    """

    session: Session

    def __init__(
        self, trainer: Trainer, part: str, example_inputs: Any, passes: Sequence[TrainingPass[Any]], **options: Any
    ) -> None:
        """Hook onto ``trainer``.

        Args:
            trainer: with a model, not a model_init.
            part: name of the module of ``trainer.model`` to prune. It is replaced by its trace; its parameters stay the
                same objects under the same names.
            example_inputs: of that module: a tensor, a tuple or dict of arguments, (args, kwargs), or a loader's batch.
            passes: training passes, such as ``passes.PruneTrain()``.
            options: other arguments of ``fxprune.Session``.

        Raises:
            SessionError: the trainer makes its model anew or loads the best one at the end, which is wider.
        """
        for name, setting in (
            ("model_init", trainer.model_init),
            ("load_best_model_at_end", trainer.args.load_best_model_at_end),
        ):
            if setting:
                raise SessionError(f"{name}= loads other shapes than a model that is cut has; leave it out")
        self.trainer = cast(Any, trainer)
        self.part, self.example_inputs, self.passes = part, example_inputs, passes
        self.options = {"progress": False, **options}
        self._progress: RunState | None = None
        put_session(self.trainer.model, part, example_inputs, None)
        self._train, self._compute_loss = trainer.train, trainer.compute_loss
        self.trainer.train, self.trainer.compute_loss = self.train, self.compute_loss
        trainer.add_callback(self)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """What ``trainer.train`` has become: cuts the model before weights of a checkpoint are loaded into it."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.trainer.args.output_dir)  # type: ignore[no-untyped-call]
        if folder:
            self._progress = read_progress(folder)
            made = [inner_optimizer(self.trainer.optimizer)] if self.trainer.optimizer is not None else []
            put_session(self.trainer.model, self.part, self.example_inputs, self._progress.plan, made)
        return self._train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """What ``trainer.compute_loss`` has become: with the penalty, in training."""
        trainer = self.trainer
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # over all batches before a step
        if scaled is None:
            items = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = items or trainer.compute_loss_func is not None
        result: Any = self._compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        if not model.training:
            return result
        loss, *rest = result if return_outputs else (result,)
        batches = trainer.current_gradient_accumulation_steps if scaled else 1
        loss = loss + self.session.penalty(loss * batches) / batches
        return (loss, *rest) if return_outputs else loss

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the session, now that there is an optimizer."""
        trainer = self.trainer
        if hasattr(self, "session"):
            self.session.close()
        graph = trainer.model.get_submodule(self.part)
        optimizer = inner_optimizer(trainer.optimizer)
        options = {"around": trainer.model_wrapped, "epochs": state.num_train_epochs, **self.options}
        self.session = Session(graph, self.example_inputs, optimizer, self.passes, **options)
        if self._progress is not None:
            resume_run(self.session, self._progress)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the session's epoch; this may cut. Checkpoints of the epoch's end are written after it."""
        record = self.session.epoch_end()
        self.trainer.log({f"fxprune/{name}": value for name, value in record.scalars().items()})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the session to a checkpoint."""
        if state.is_world_process_zero:
            write_progress(self.session, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the optimizer."""
        self._progress = state_of(self.session)
        self.session.close()


def inner_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer without Accelerate's wrapper."""
    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
