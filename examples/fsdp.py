"""A model that fully_shard splits over processes, cut by half between two epochs.

    torchrun --nproc-per-node 2 examples/fsdp.py

About a minute. Runs alone too. The optimizer's state goes along."""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from shared import accuracy, batches, console, digits, few, say
from torch.distributed.fsdp import fully_shard
from torchvision.models import resnet18

import fxprune
from fxprune import passes
from fxprune.fsdp import prune_sharded

EPOCHS = few(4, 2)


def build():
    return resnet18(weights=None, num_classes=10)


def shard(model):
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        fully_shard(stage)
    fully_shard(model)


def optimize(model):
    return torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)


def main():
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:  # torchrun sets it
        dist.init_process_group("gloo")  # "nccl" on GPUs
    else:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    rank, ranks = dist.get_rank(), dist.get_world_size()
    console.quiet = rank > 0
    train_set, test_set = digits()
    torch.manual_seed(0)
    model = build()
    shard(model)
    optimizer = optimize(model)
    for epoch in range(EPOCHS):
        if epoch == EPOCHS // 2:
            budget, example, criterion = fxprune.Budget(flops=0.5), test_set[0][:16], passes.Magnitude()
            made_by = {"build": build, "shard": shard, "optimize": optimize}
            model, optimizer = prune_sharded(model, optimizer, example, criterion, budget=budget, **made_by)
        model.train()
        for x, y in batches(train_set, epoch, f"epoch {epoch + 1}"):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rank::ranks]), y[rank::ranks]).backward()
            optimizer.step()
        own = sum(parameter.to_local().numel() for parameter in model.parameters())
        say(f"epoch {epoch + 1}: {accuracy(model.eval(), test_set):.1%}, {own / 1e6:.1f} M parameters on each process")
    dist.barrier()  # gloo's threads have let go of the last tensors: a process that ends before aborts
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
