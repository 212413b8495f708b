"""PruneTrain in several processes: each trains on its part of every batch, and all make the same cuts.

    torchrun --nproc-per-node 2 examples/ddp.py

About a minute. Runs alone too. The checkpoint is left in out/ddp/; run it again, with any number of processes, and it
goes on from there."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from shared import BATCH, accuracy, batches, console, digits, few, say
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet18

import fxprune
from fxprune import passes

PATH, EPOCHS = Path("out/ddp/run.pt"), few(6, 3)
ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))  # torchrun sets them


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    PATH.parent.mkdir(parents=True, exist_ok=True)
    console.quiet = rank > 0
    if ranks > 1:
        dist.init_process_group("gloo")  # "nccl" on GPUs
    train_set, test_set = digits()
    example = test_set[0][:16]

    model = resnet18(weights=None, num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    if PATH.exists():
        session = fxprune.Session.load(PATH, wrapped, example, optimizer)
        say(f"{PATH}: {session.epoch} epochs done before")
    else:
        pruner = passes.PruneTrain(budget=fxprune.Budget(flops=0.5), by=0.6, round_to=16)
        session = fxprune.Session(wrapped, example, optimizer, [pruner], batch_size=BATCH // ranks, epochs=EPOCHS)
    for epoch in range(session.epoch, EPOCHS):
        session.model.train()  # wrapped anew after each cut: always by this name
        for x, y in batches(train_set, epoch, f"epoch {epoch + 1}"):
            x, y = x[rank::ranks], y[rank::ranks]  # this process's part of the batch
            optimizer.zero_grad()
            task = F.cross_entropy(session.model(x), y)
            (task + session.penalty(task)).backward()
            optimizer.step()
        record = session.epoch_end(accuracy=accuracy(session.model.eval(), test_set))
        session.save(PATH)  # all call it, the first writes
        say(f"epoch {record.epoch}: {record.values['accuracy']:.1%}, {record.removed} channels cut")
    say(f"{ranks} processes; gradients sent in the last epoch: {session.log[-1].sent / 1e6:.1f} MB a process")
    if ranks > 1:
        dist.barrier()  # gloo's threads have let go of the last tensors: a process that ends before aborts
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
