"""Train resnet18 on handwritten digits with PruneTrain: the network gets smaller while it trains. Then ONNX.

The dense network is trained beside it, on the same batches and in turns, so that the times compare. About two minutes
on one CPU core. The ONNX files, and pictures of the run and of the widths, are left in out/quickstart/."""

import time
from pathlib import Path

import shared
import torch
import torch.nn.functional as F
from shared import BATCH, accuracy, compare, few, say
from torch.optim.lr_scheduler import LambdaLR
from torchvision.models import resnet18

import fxprune
from fxprune import passes

OUT, EPOCHS = Path("out/quickstart"), few(14, 3)
PRUNER = passes.PruneTrain(budget=fxprune.Budget(flops=0.5), by=0.6, round_to=16)


def main():
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # weights on their way to zero pass through numbers that a CPU is slow at
    OUT.mkdir(parents=True, exist_ok=True)
    train_set, test_set = shared.digits()
    example = test_set[0][:BATCH]

    dense, pruned = Run([], example), Run([PRUNER], example)
    runs = {"dense": dense, "PruneTrain": pruned}
    for epoch in range(EPOCHS):
        for name, run in runs.items():
            say(f"epoch {epoch + 1:2}  {name:10} {run.epoch(train_set, test_set)}")
    before, after = dense.session.analysis.sizes, pruned.session.analysis.sizes
    say(f"of {sum(before.values())} channels {sum(after.values())} are left; each cut was proved before it was made")
    models, files = [dense.model, pruned.model], [OUT / f"{name}.onnx" for name in runs]
    for model, file in zip(models, files, strict=True):
        say(fxprune.export_onnx(model, example, file))
    onnx = [shared.in_onnxruntime(file) for file in files]
    times = shared.milliseconds([*models, *onnx], example)
    rows = shared.table(*runs, "ratio", caption=f"ms: a batch of {BATCH}, one CPU thread, median of 30")
    compare(rows, "parameters", "{:,}", *map(fxprune.cost.params, models))
    compare(rows, "FLOPs an image", "{:,}", *(fxprune.cost.flops(model, example[:1]) for model in models))
    compare(rows, "ONNX file, bytes", "{:,}", *(file.stat().st_size for file in files))
    compare(rows, "PyTorch, ms", "{:.1f}", *times[:2])
    compare(rows, "onnxruntime, ms", "{:.1f}", *times[2:])
    logs = [run.session.log for run in runs.values()]
    work = (sum(3 * record.flops * record.steps * BATCH for record in log) for log in logs)  # backward is twice forward
    compare(rows, f"training FLOPs, {EPOCHS} epochs", "{:.3g}", *work)
    compare(rows, f"training time, {EPOCHS} epochs, s", "{:.1f}", dense.seconds, pruned.seconds)
    cutting = (sum(record.cut_time for record in log) for log in logs)
    compare(rows, "of that, cuts and their proofs, s", "{:.1f}", *cutting)
    compare(rows, "test accuracy", "{:.1%}", *(accuracy(model, test_set) for model in models))
    shared.console.print(rows)
    pruned.session.log.plot(OUT / "timeline.png")
    shared.draw_widths(before, after, OUT / "widths.png")
    say(f"done; ONNX files and pictures are in {OUT}")


class Run:
    """A network in training: its session, and the seconds that training took."""

    def __init__(self, pruners, example):
        torch.manual_seed(0)  # the same weights for both
        model = resnet18(weights=None, num_classes=10)
        sgd = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)
        self.session = fxprune.Session(
            model, example[:16], sgd, pruners, batch_size=BATCH, epochs=EPOCHS, verify=True, progress=False
        )
        self.session.register(scheduler=LambdaLR(sgd, lambda epoch: 1 - epoch / EPOCHS))
        self.model, self.seconds = self.session.model, 0.0

    def epoch(self, train_set, test_set):
        """Train for one epoch, test, and cut. Returns what happened in words."""
        session, begin = self.session, time.perf_counter()
        self.model.train()
        for x, y in shared.batches(train_set, session.epoch, f"epoch {session.epoch + 1} of {EPOCHS}"):
            session.optimizer.zero_grad()
            task = F.cross_entropy(self.model(x), y)
            (task + session.penalty(task)).backward()
            session.optimizer.step()
        self.seconds += time.perf_counter() - begin
        record = session.epoch_end(accuracy=accuracy(self.model.eval(), test_set))
        session.registered["scheduler"].step()
        self.seconds += record.cut_time
        return f"{record.values['accuracy']:6.1%} at {record.flops / 1e6:.1f} MFLOPs, {record.removed:3} channels cut"


if __name__ == "__main__":
    main()
