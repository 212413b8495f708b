"""Say what an operator of your own does to channels, so that they can be pruned.

A few seconds. `examples::gate` multiplies each channel by a learned number. fxprune does not know it: it freezes what
the operator touches. Told its letters, it prunes through it, and proves that the result is right."""

import torch
from shared import say
from torch import nn

import fxprune
from fxprune import passes


@torch.library.custom_op("examples::gate", mutates_args=())
def gate(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(scale)[:, None, None]


@gate.register_fake
def _(x, scale):
    return torch.empty_like(x)


def setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, grad):
    x, scale = ctx.saved_tensors
    share = torch.sigmoid(scale)
    return grad * share[:, None, None], (grad * x).sum((0, 2, 3)) * share * (1 - share)


gate.register_autograd(backward, setup_context=setup)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Linear(32, 10)
        self.scale = nn.Parameter(torch.randn(32))

    def forward(self, x):
        x = gate(self.a(x).relu(), self.scale)
        return self.fc(self.b(x).relu().mean((2, 3)))


def main():
    torch.manual_seed(0)
    model, example = Net(), torch.randn(2, 3, 16, 16)
    before = fxprune.analyze(model, example)
    say(f"unknown: {', '.join(before.unknown)}; {sum(before.sizes.values())} channels can go")
    say(before.explain("a.bias"))

    fxprune.register_operator(torch.ops.examples.gate, "n c h w, c -> n c h w")

    after = fxprune.analyze(model, example)
    say(f"registered; {sum(after.sizes.values())} channels can go")
    graph = fxprune.trace(model, example)
    plan = passes.Magnitude().plan(after, fxprune.Budget(channels=0.5))
    compact, param_map = fxprune.rewrite(graph, after, plan)
    say(fxprune.verify(graph, compact, param_map, example))
    say(f"scale has {compact.scale.numel()} of {model.scale.numel()} numbers")


if __name__ == "__main__":
    main()
