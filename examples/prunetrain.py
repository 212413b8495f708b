"""Train resnet18 on handwritten digits with PruneTrain, a checkpoint after every epoch.

Run it again after an interruption and it goes on where it was. About a minute on one CPU core; the checkpoint, the
picture of the run and the ONNX file are left in out/prunetrain/. `quickstart.py` has the dense network beside it."""

from pathlib import Path

import torch
import torch.nn.functional as F
from shared import BATCH, accuracy, batches, console, digits, few, say
from torch.optim.lr_scheduler import LambdaLR
from torchvision.models import resnet18

import fxprune
from fxprune import passes

OUT, EPOCHS = Path("out/prunetrain"), few(14, 3)


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # weights on their way to zero pass through numbers that a CPU is slow at
    OUT.mkdir(parents=True, exist_ok=True)
    train_set, test_set = digits()
    session = start_or_resume(test_set[0][:16])
    model, optimizer = session.model, session.optimizer
    for epoch in range(session.epoch, EPOCHS):
        model.train()
        for x, y in batches(train_set, epoch, f"epoch {epoch + 1}"):
            optimizer.zero_grad()
            task = F.cross_entropy(model(x), y)
            (task + session.penalty(task)).backward()
            optimizer.step()
        model.eval()
        session.registered["scheduler"].step()
        record = session.epoch_end(accuracy=accuracy(model, test_set))
        session.save(OUT / "run.pt")
        say(f"epoch {record.epoch}: {record.values['accuracy']:.1%} at {record.flops / 1e6:.1f} MFLOPs an image")
    console.print(str(session.log), soft_wrap=True)
    session.log.plot(OUT / "run.png")
    say(fxprune.export_onnx(session.graph, test_set[0][:2], OUT / "small.onnx"))


def start_or_resume(example):
    pruner = passes.PruneTrain(budget=fxprune.Budget(flops=0.5), by=0.6, round_to=16)
    model = resnet18(weights=None, num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)
    scheduler = LambdaLR(optimizer, lambda epoch: 1 - epoch / EPOCHS)
    if (OUT / "run.pt").exists():
        session = fxprune.Session.load(OUT / "run.pt", model, example, optimizer)
        say(f"{OUT / 'run.pt'}: {session.epoch} epochs done before")
    else:
        session = fxprune.Session(model, example, optimizer, [pruner], batch_size=BATCH, epochs=EPOCHS, verify=True)
    session.register(scheduler=scheduler)
    return session


if __name__ == "__main__":
    main()
