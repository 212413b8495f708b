"""Quantize after pruning: train resnet18 on handwritten digits, cut it, train on, and quantize it in onnxruntime.

About a minute on one CPU core. Four files, each with its size, accuracy and time: dense and pruned, each in float32 and
in int8 (static quantization, calibrated on training images). The files are left in out/quantize/."""

from pathlib import Path

import numpy as np
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from shared import BATCH, accuracy, console, digits, in_onnxruntime, milliseconds, say, table, train
from torch.optim.swa_utils import update_bn
from torchvision.models import resnet18

import fxprune
from fxprune import passes

OUT = Path("out/quantize")


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    train_set, test_set = digits()
    example = test_set[0][:BATCH]

    dense = fxprune.trace(resnet18(weights=None, num_classes=10), example)
    optimizer = torch.optim.SGD(dense.parameters(), momentum=0.9, weight_decay=5e-4)
    train(dense, optimizer, train_set, epochs=6, lr=0.03)
    pruned = fxprune.prune(dense, example, passes.Magnitude(), budget=fxprune.Budget(flops=0.5))
    update_bn(train_set[0].split(BATCH), pruned)
    optimizer = torch.optim.SGD(pruned.parameters(), momentum=0.9, weight_decay=5e-4)
    train(pruned, optimizer, train_set, epochs=3, lr=0.02)

    paths, fold = [], fxprune.Pipeline([passes.FoldBatchNorm()], example)
    for name, model in {"dense": dense, "pruned": pruned}.items():
        path, small = OUT / f"{name}.onnx", OUT / f"{name}-int8.onnx"
        say(fxprune.export_onnx(fold(model).graph_module, example, path))
        quant_pre_process(str(path), str(small))
        quantize_static(
            str(small),
            str(small),
            Images(train_set[0][: 4 * BATCH]),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
        paths += [path, small]

    runs = [in_onnxruntime(path) for path in paths]
    rows = table("bytes", "test accuracy", "ms", caption=f"onnxruntime, a batch of {BATCH}, one CPU thread, medians")
    for path, run, ms in zip(paths, runs, milliseconds(runs, example), strict=True):
        rows.add_row(path.stem, f"{path.stat().st_size:,}", f"{accuracy(run, test_set):.1%}", f"{ms:.1f}")
    console.print(rows)


class Images(CalibrationDataReader):
    """Batches of images, as onnxruntime's calibration asks for them."""

    def __init__(self, images):
        self.batches = iter(images.split(BATCH))

    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else {"x": np.asarray(batch)}


if __name__ == "__main__":
    main()
