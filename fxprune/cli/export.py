"""``fxprune export``: a model as ONNX, compared with PyTorch."""

from pathlib import Path
from typing import Annotated

import typer

import fxprune
from fxprune.cli import options
from fxprune.cli.models import UsageError, open_model
from fxprune.cli.say import print_output, print_progress, show_json
from fxprune.errors import FileError


def export(
    model: options.Model,
    path: Annotated[
        Path | None, typer.Argument(metavar="FILE.onnx", help="Where to write.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE.onnx", help="The same.")] = None,
    weights: options.Weights = None,
    classes: options.Classes = None,
    example: options.Input = None,
    named: options.Named = None,
    seed: options.Seed = 0,
    fixed_batch: Annotated[bool, typer.Option("--fixed-batch", help="Only for the batch size of the example.")] = False,
    as_json: options.Json = False,
) -> None:
    """Write a model as ONNX. The file appears only if onnxruntime gives what PyTorch gives.

    Example: fxprune export out/model.safetensors out/model.onnx
    """
    if path and out:
        raise UsageError(f"write to {path} or to -o {out}? Say it once")
    path = path or out
    if path is None:
        raise UsageError(f"where to? fxprune export {model} FILE.onnx")
    if path.suffix != ".onnx":
        raise FileError(f"the file must end in .onnx, but it is {path}")
    opened = open_model(model, weights=weights, classes=classes, inputs=example, named=named, seed=seed)
    print_progress(f"exporting {model}")
    result = fxprune.export_onnx(opened.model, opened.inputs, path, dynamic_batch=not fixed_batch)
    if as_json:
        return show_json(
            {"path": str(path), "difference": result.difference, "batches": list(result.batches), "flat": result.flat}
        )
    return print_output(str(result))
