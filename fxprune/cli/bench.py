"""``fxprune bench``: a compact model beside the dense one, measured."""

from typing import Annotated

import typer

import fxprune
from fxprune.channels.groups import layers_of
from fxprune.cli import options
from fxprune.cli.models import ModelError, open_model
from fxprune.cli.say import print_output, print_progress, show_json
from fxprune.errors import BenchError
from fxprune.report.backends import BACKENDS
from fxprune.report.bench import bench_table, idle_table


def bench(
    model: options.Model,
    vs: Annotated[
        str | None,
        typer.Option(
            "--vs", metavar="MODEL", help="What to compare with; default, the model that the file was made of."
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,32",
    backend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"Of {', '.join(BACKENDS)}; more than one with commas, or again; default, all that the device has.",
            autocompletion=options.complete_backend,
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="That each model is run for, in each row.")] = 2.0,
    threads: options.Threads = None,
    classes: options.Classes = None,
    shapes: options.Input = None,
    named: options.Named = None,
    as_json: options.Json = False,
) -> None:
    """Time a compact model beside the dense one. Efficiency is the speed-up over the reduction in FLOPs.

    Example: fxprune bench out/model.safetensors --batch 1,32 --backend eager,onnxruntime
    """
    compact = open_model(model, classes=classes, inputs=shapes, named=named, weights_matter=False)
    if vs is None and not model.endswith(".safetensors"):
        raise ModelError(f"compare {model} with what? Give a model that fxprune wrote, or say with --vs")
    reference = vs or compact.source.model
    same = {"classes": compact.source.classes, "inputs": list(compact.source.input)}
    dense = open_model(reference, **same, named=named, weights_matter=False)  # type: ignore[arg-type]
    if not all(size.strip().isdecimal() and int(size) for size in batch.split(",")):
        raise ModelError(f"--batch {batch!r} must be sizes such as 1,32")
    sizes = [int(size) for size in batch.split(",")]
    names = [name.strip() for name in ",".join(backend).split(",")] if backend else None
    print_progress(f"measuring {model} beside {reference}")
    result = fxprune.bench(
        dense.model, compact.model, compact.inputs, batches=sizes, backends=names, seconds=seconds, threads=threads
    )
    if not any(row.after for row in result.rows):
        raise BenchError(f"nothing could be measured: {'; '.join(dict.fromkeys(row.problem for row in result.rows))}")
    analysis = fxprune.analyze(fxprune.trace(dense.model, dense.inputs), dense.inputs)
    groups = {name: layers_of(group) for name, group in analysis.groups.items()}
    idle = {"groups": result.idle(groups), "layers": result.idle()}
    if as_json:
        facts = {"format": "fxprune bench 1", "before": reference, "after": model, **result.to_json(), "idle": idle}
        return show_json(facts)
    print_output(bench_table(result), "")
    for noun, shares in idle.items():
        if shares:
            print_output(idle_table(shares, noun), "")
    return print_output(result.machine)
