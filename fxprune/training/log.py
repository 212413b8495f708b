"""The log of a session: one record an epoch, a table, scalars for TensorBoard, and the picture of the run."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fxprune.atomic import replace_file
from fxprune.errors import FileError
from fxprune.hints import check_fields


@dataclass(frozen=True)
class Epoch:
    """What one epoch cost, and what happened at its end.

    Attributes:
        epoch: its number, from 1.
        steps: steps of the optimizer.
        step_time: median seconds from one step to the next.
        samples: samples a step on this rank, or None where the session was not told.
        flops: of a forward pass on one sample.
        params: parameters of the model.
        memory: bytes; on a GPU the peak that was measured, else what weights, gradients, the optimizer's state and the
            values of a forward pass take.
        widths: channels of each group.
        lr: learning rate of the first parameter group.
        first_step: seconds from the end of the last epoch to the first step; compilation falls into it.
        predicted: seconds that a step was expected to take after the cut, where someone predicted it.
        sent: bytes of gradients that one rank gave to others in the epoch (0 for one rank).
        saved: seconds saved since the start, against going on at the step time before the first cut; what the cuts took
            is subtracted in the epoch after.
        removed: channels removed at the end of this epoch.
        cut_time: seconds that this took.
        notes: predictions and reasons, in words.
        norms: for each group the median norm of its channels' weights, before what was removed.
        values: numbers from the passes and from the caller.
    """

    epoch: int
    steps: int
    step_time: float
    samples: int | None
    flops: float
    params: int
    memory: float
    widths: Mapping[str, int]
    lr: float
    first_step: float = 0.0
    predicted: float | None = None
    sent: float = 0.0
    saved: float = 0.0
    removed: int = 0
    cut_time: float = 0.0
    notes: tuple[str, ...] = ()
    norms: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)

    def scalars(self) -> dict[str, float]:
        """The numbers of the record by name."""
        numbers = {
            "step_time": self.step_time,
            "flops": self.flops,
            "params": float(self.params),
            "memory": self.memory,
            "channels": float(sum(self.widths.values())),
            "lr": self.lr,
            "sent": self.sent,
            "saved": self.saved,
        }
        return numbers | ({} if self.samples is None else {"samples": float(self.samples)}) | dict(self.values)


COLUMNS = """saved s: of training, by smaller steps, less what cuts took; below 0 they are not paid back yet
first s: from the end of the epoch before to the first step, with what is compiled then"""


class ScalarWriter(Protocol):
    """What writes scalars, such as ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one number."""


class Log:
    """The records of a session, in order. Printing it gives a table."""

    def __init__(self, epochs: Iterable[Epoch] = ()) -> None:
        self.epochs = list(epochs)

    def __len__(self) -> int:
        return len(self.epochs)

    def __iter__(self) -> Iterator[Epoch]:
        return iter(self.epochs)

    def __getitem__(self, at: int) -> Epoch:
        return self.epochs[at]

    def to_json(self) -> list[dict[str, Any]]:
        """The records as JSON data."""
        return [{**asdict(epoch), "notes": list(epoch.notes)} for epoch in self.epochs]

    @classmethod
    def from_json(cls, data: Iterable[Mapping[str, Any]]) -> "Log":
        """The opposite of ``to_json``. Raises FileError, LookupError or TypeError on anything else."""
        records = list(data)
        for record in records:
            check_fields(Epoch, record)
        return cls(Epoch(**{**record, "notes": tuple(record["notes"])}) for record in records)

    def write(self, writer: ScalarWriter) -> None:
        """Write the last record as scalars under ``fxprune/``."""
        for name, value in self.epochs[-1].scalars().items():
            writer.add_scalar(f"fxprune/{name}", value, self.epochs[-1].epoch)

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for epoch in self for name in epoch.values))
        heads = ["epoch", "step ms", "batch", "MFLOPs", "params", "channels", "lr", *names]
        heads += ["saved s", "first s", "cut", "cut s"]
        rows = [
            [
                str(epoch.epoch),
                f"{epoch.step_time * 1e3:.1f}",
                "" if epoch.samples is None else str(epoch.samples),
                f"{epoch.flops / 1e6:.1f}",
                f"{epoch.params:,}",
                str(sum(epoch.widths.values())),
                f"{epoch.lr:.3g}",
                *(f"{epoch.values[name]:.4g}" if name in epoch.values else "" for name in names),
                f"{epoch.saved:.1f}",
                f"{epoch.first_step:.2f}",
                f"-{epoch.removed}" if epoch.removed else "",
                f"{epoch.cut_time:.2f}" if epoch.removed else "",
            ]
            for epoch in self
        ]
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [heads, *rows]
        ]
        notes = [f"epoch {epoch.epoch}: {note}" for epoch in self for note in epoch.notes]
        return "\n".join([*lines, *notes, *([COLUMNS] if self.epochs else [])])

    def plot(self, path: str | Path) -> None:
        """Draw the run: widths, step time and the caller's numbers by epoch; cuts are vertical lines.

        Needs matplotlib (the extra ``plots``).

        Raises:
            FileError: nothing can be written there, or the log is empty.
        """
        from matplotlib.figure import Figure

        if not self.epochs:
            raise FileError("the log is empty: there is nothing to draw before the first session.epoch_end()")
        names = [name for name in dict.fromkeys(n for epoch in self for n in epoch.values) if name != "lambda"]
        at = [epoch.epoch for epoch in self]
        groups = dict.fromkeys(group for epoch in self for group in epoch.widths)
        figure = Figure(figsize=(8, 5.5 + 1.2 * bool(names)), layout="constrained")
        rows = figure.subplots(3 if names else 2, 1, sharex=True, squeeze=False)[:, 0]
        rows[0].stackplot(at, *[[epoch.widths.get(group, 0) for epoch in self] for group in groups], ec="white", lw=0.3)
        rows[0].set_ylabel("channels, by group")
        rows[1].plot(at, [epoch.step_time * 1e3 for epoch in self], "o-", ms=3, color="C0", label="step time, ms")
        rows[1].set(ylabel="ms a step", ylim=(0, None))
        flops = rows[1].twinx()
        flops.plot(at, [epoch.flops / 1e6 for epoch in self], "--", color="C1", label="MFLOPs a sample")
        flops.set(ylabel="MFLOPs (dashed)", ylim=(0, None))
        for name in names:
            points = [(epoch.epoch, epoch.values[name]) for epoch in self if name in epoch.values]
            rows[2].plot(*zip(*points, strict=True), "o-", ms=3, label=name)
        if names:
            rows[2].legend()
        rows[-1].set_xlabel("epoch")
        for axes in rows:
            for epoch in self:
                if epoch.removed:
                    axes.axvline(epoch.epoch + 0.5, color="grey", lw=0.8, ls=":")
        figure.suptitle(f"{self.epochs[-1].saved:,.0f} s of training saved; dotted lines are cuts", fontsize=10)
        with replace_file(path, "a picture") as partial:
            figure.savefig(partial, dpi=150)
