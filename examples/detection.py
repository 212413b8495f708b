"""Prune a Faster R-CNN, which torch.fx can't trace as a whole, to half its parameters, and train it on.

About two minutes on one CPU core. The images are noise with one bright square, and the task is to find it; the measure
is the detector's own loss on images that it has not seen. The backbone, the proposals' head and the box head become
graphs and are cut; the model's own Python, which proposes and selects boxes, stays as it is."""

import torch
from shared import console, few, milliseconds, say, table
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

import fxprune
from fxprune import passes

SIZE, SQUARES, STEPS = 96, 4, 60


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dense = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=2, min_size=SIZE, max_size=SIZE
    )
    say(f"loss {loss(dense):.2f} before training")
    train(dense, few(STEPS, 2))

    example = squares()  # with targets: the model will train on
    print(fxprune.analyze(dense, example))
    compact = fxprune.prune(dense, example, passes.Magnitude(), budget=fxprune.Budget(params=0.5))
    cut = loss(compact)
    train(compact, few(STEPS // 2, 2))

    rows = table(
        "parameters",
        "ms for four images",
        "loss after the cut",
        "loss",
        caption="one CPU thread; half has trained for longer",
    )
    losses = loss(dense), loss(compact)
    times = milliseconds([dense.eval(), compact.eval()], squares()[0])
    sizes = [f"{fxprune.cost.params(model):,}" for model in (dense, compact)]
    rows.add_row("dense", sizes[0], f"{times[0]:.1f}", "", f"{losses[0]:.2f}")
    rows.add_row("half", sizes[1], f"{times[1]:.1f}", f"{cut:.2f}", f"{losses[1]:.2f}")
    console.print(rows)


def squares():
    """A list of images with a square each, and a list of its targets."""
    images, targets = [], []
    for _ in range(SQUARES):
        side = int(torch.randint(24, 48, ()))
        left, top = (int(at) for at in torch.randint(0, SIZE - side, (2,)))
        image = 0.2 * torch.rand(3, SIZE, SIZE)
        image[:, top : top + side, left : left + side] += 0.8
        images.append(image)
        box = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
        targets.append({"boxes": box, "labels": torch.ones(1, dtype=torch.int64)})
    return images, targets


def train(model, steps):
    """A detector in train mode returns its losses; their sum is what is trained."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    model.train()
    for step in range(steps):
        task = sum(model(*squares()).values())
        optimizer.zero_grad()
        task.backward()
        optimizer.step()
        if step % 20 == 0:
            say(f"step {step}: loss {task.item():.2f}")


@torch.no_grad()
def loss(model):
    """The mean over images not seen before."""
    model.train()
    return sum(sum(model(*squares()).values()).item() for _ in range(few(8))) / few(8)


if __name__ == "__main__":
    main()
