"""Train resnet18 on handwritten digits with ClickTrain: half of the kernels stay, and four of nine weights in each.

About two minutes on one CPU core. Then `PatternConv` turns kernels whose weights lie in one corner into dense 2×2 ones,
where that is faster here. The file of the weights that are not zero, and the ONNX file, are left in out/clicktrain/."""

from pathlib import Path

import torch
import torch.nn.functional as F
from shared import BATCH, accuracy, batches, console, digits, few, milliseconds, say, table
from torchvision.models import resnet18

import fxprune
from fxprune import passes

OUT = Path("out/clicktrain")
EPOCHS, SELECT, HARD = few((12, 3, 8), instead=(3, 1, 2))


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    train_set, test_set = digits()
    example = test_set[0][:BATCH]
    model = resnet18(weights=None, num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    pruner = passes.ClickTrain(select=SELECT, hard=HARD, kernels=0.5, share="input_channel", strength=1e-3)
    with fxprune.Session(model, example, optimizer, [pruner], batch_size=BATCH, progress=False) as session:
        for epoch in range(EPOCHS):
            session.model.train()
            for x, y in batches(train_set, epoch, f"epoch {epoch + 1} of {EPOCHS}"):
                optimizer.zero_grad()
                task = F.cross_entropy(session.model(x), y)
                (task + session.penalty(task)).backward()
                optimizer.step()
            scheduler.step()
            record = session.epoch_end(accuracy=accuracy(session.model.eval(), test_set))
            values = ", ".join(f"{name} {value:.3g}" for name, value in record.values.items())
            say(f"epoch {record.epoch}: {values}{' (chosen)' * (epoch == SELECT)}{' (zero)' * (epoch == HARD)}")

    path, dense = OUT / "patterns.safetensors", OUT / "dense.pt"
    fxprune.save(session.graph, path)
    torch.save(session.graph.state_dict(), dense)
    say(f"{path}: {path.stat().st_size:,} bytes; with its zeros it would be {dense.stat().st_size:,}")
    trained = fxprune.load(path, resnet18(num_classes=10)).eval()
    pipeline = fxprune.Pipeline([passes.PatternConv()], example)
    small = pipeline(fxprune.trace(trained, example)).graph_module
    say(pipeline.steps[0])
    say(fxprune.export_onnx(small, example, OUT / "patterns.onnx"))

    rows = table("FLOPs an image", "ms", "test accuracy", caption=f"ms: a batch of {BATCH}, one CPU thread, medians")
    times = milliseconds([trained, small], example)
    for name, model, ms in zip(("ClickTrain", "PatternConv"), (trained, small), times, strict=True):
        flops = fxprune.cost.flops(model, example[:1])
        rows.add_row(name, f"{flops:,}", f"{ms:.1f}", f"{accuracy(model, test_set):.1%}")
    console.print(rows)


if __name__ == "__main__":
    main()
