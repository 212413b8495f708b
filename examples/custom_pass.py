"""A training pass and a rewrite of your own: cut a little after every epoch, then replace an activation.

About a minute on one CPU core. `Gradual` stands in a session beside any other pass; `Relu6` is a torch.fx pass, which a
Pipeline runs and checks."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from shared import BATCH, accuracy, batches, console, digits, few, say
from torch import nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.optim.swa_utils import update_bn
from torchvision.models import resnet18

import fxprune
from fxprune import passes


@dataclass
class Cuts:
    """What Gradual remembers; goes into checkpoints."""

    made: int = 0


@dataclass(frozen=True)
class Gradual(fxprune.TrainingPass[Cuts]):
    """After each epoch ``share`` of the present FLOPs stay, ``cuts`` times."""

    share: float = 0.8
    cuts: int = 3

    def begin(self, run):
        return Cuts()

    def after_epoch(self, run, memory):
        if memory.made == self.cuts:
            return None
        memory.made += 1
        return passes.Magnitude().plan(run.analysis, fxprune.Budget(flops=self.share))

    def report(self, run, memory):
        return {"cuts": memory.made}


class Relu6(PassBase):
    """Every ReLU becomes a ReLU6, which changes what the model computes where a value is above 6."""

    def call(self, graph_module):
        paths = [path for path, module in graph_module.named_modules() if isinstance(module, nn.ReLU)]
        for path in paths:
            graph_module.set_submodule(path, nn.ReLU6(inplace=True))
        return PassResult(graph_module, bool(paths))

    def reference(self, graph):
        """What the result must equal: the same change by another way."""
        for module in graph.modules():
            if isinstance(module, nn.ReLU):
                module.forward = lambda x: x.clamp(0, 6)
        return graph


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train_set, test_set = digits()
    example = test_set[0][:16]
    model = resnet18(weights=None, num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)
    with fxprune.Session(model, example, optimizer, [Gradual()], batch_size=BATCH, verify=True) as session:
        for epoch in range(few(6, 2)):
            session.model.train()
            for x, y in batches(train_set, epoch, f"epoch {epoch + 1}"):
                optimizer.zero_grad()
                F.cross_entropy(session.model(x), y).backward()
                optimizer.step()
            update_bn(train_set[0].split(BATCH)[:8], session.model)
            session.epoch_end(accuracy=accuracy(session.model.eval(), test_set))
        console.print(str(session.log), soft_wrap=True)

    pipeline = fxprune.Pipeline([Relu6(), passes.FoldBatchNorm()], example)
    small = pipeline(session.graph.eval()).graph_module
    say("\n        ".join(map(str, pipeline.steps)))
    say(f"{accuracy(small, test_set):.1%} with ReLU6 and folded norms")


if __name__ == "__main__":
    main()
