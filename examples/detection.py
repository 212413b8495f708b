"""Prune a Faster R-CNN, which torch.fx can't trace as a whole, to half its parameters, and train it on.

Some minutes on one CPU core. The images are noise with one bright square, and the task is to find it: the score is the
mean overlap (intersection over union) of the best box with the square. The backbone, the pyramid and the heads become
graphs and are cut; the model's own Python, which proposes and selects boxes, stays as it is."""

import torch
from shared import console, few, milliseconds, say, table
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.ops import box_iou

import fxprune
from fxprune import passes

SIZE, SQUARES, STEPS = 96, 4, 150


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dense = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=2, min_size=SIZE, max_size=SIZE
    )
    train(dense, few(STEPS, 2))
    say(f"trained; the best boxes overlap the squares by {overlap(dense):.2f}")

    example = squares()  # with targets: the model will train on
    print(fxprune.analyze(dense, example))
    compact = fxprune.prune(dense, example, passes.Magnitude(), budget=fxprune.Budget(params=0.5))
    cut = overlap(compact)
    train(compact, few(STEPS // 2, 2))

    rows = table(
        "parameters", "ms for four images", "overlap after the cut", "overlap", caption="one CPU thread, medians"
    )
    times = milliseconds([dense.eval(), compact.eval()], squares()[0])
    sizes = [f"{fxprune.cost.params(model):,}" for model in (dense, compact)]
    rows.add_row("dense", sizes[0], f"{times[0]:.1f}", "", f"{overlap(dense):.2f}")
    rows.add_row("half", sizes[1], f"{times[1]:.1f}", f"{cut:.2f}", f"{overlap(compact):.2f}")
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
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, momentum=0.9)
    model.train()
    for step in range(steps):
        loss = sum(model(*squares()).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 30 == 0:
            say(f"step {step}: loss {loss.item():.3f}")


@torch.no_grad()
def overlap(model):
    """The mean, over squares not seen before, of how well the box of the highest score covers the square."""
    model.eval()
    found = []
    for _ in range(few(8)):
        images, targets = squares()
        for output, target in zip(model(images), targets, strict=True):
            best = output["boxes"][:1]  # they come by score
            found.append(box_iou(best, target["boxes"]).item() if len(best) else 0.0)
    return sum(found) / len(found)


if __name__ == "__main__":
    main()
