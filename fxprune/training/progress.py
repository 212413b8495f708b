"""The progress of a session: a bar for the steps of an epoch. Only on a terminal."""

import sys
from typing import Any

from fxprune.progress import is_visible
from fxprune.training.log import Epoch


class Progress:
    """A bar for the steps of each epoch and a line for each epoch that has ended; does nothing when it is not shown."""

    def __init__(self, shown: bool | None) -> None:
        """``shown``: default, where standard error is a terminal; never on any but the first rank."""
        self._shown = is_visible(shown)
        self._bar: Any = None
        self._task: Any = None
        self._steps: int | None = None

    def advance(self, epoch: int) -> None:
        """One step was made, after so many epochs."""
        if not self._shown:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(f"epoch {epoch + 1}", total=self._steps)
            self._bar.start()
        self._bar.advance(self._task)

    def epoch_ended(self, record: Epoch) -> None:
        """Take the bar away and leave a line."""
        if not self._shown:
            return
        self.close()
        self._steps = record.steps or None
        values = "  ".join(f"{name} {value:.4g}" for name, value in record.values.items())
        cut = f"  -{record.removed} channels" if record.removed else ""
        print(
            f"epoch {record.epoch:3}  {record.step_time * 1e3:7.1f} ms/step  {record.flops / 1e6:8.1f} MFLOPs"
            f"  {sum(record.widths.values()):5} channels  {values}{cut}",
            file=sys.stderr,
        )

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
