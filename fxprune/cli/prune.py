"""``fxprune prune`` and ``fxprune apply``: a plan is made, or read, and carried out; the results go to a folder."""

import datetime
import json
import os
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import fxprune
from fxprune import passes
from fxprune.budget import Budget
from fxprune.channels.analysis import Analysis
from fxprune.cli import data, options
from fxprune.cli.models import Opened, Source, nearest, open_model
from fxprune.cli.say import note, progress, show, show_json
from fxprune.errors import BudgetError, FileError, FxpruneError
from fxprune.inputs import tensors_in
from fxprune.plan import Plan
from fxprune.staircase import staircase, tallest
from fxprune.summary import Summary, summarize
from fxprune.tables import layers_table, totals_table

CRITERIA: dict[str, type[passes.Criterion]] = {
    "magnitude": passes.Magnitude,
    "batch-norm-scale": passes.BatchNormScale,
    "geometric-median": passes.GeometricMedian,
    "taylor": passes.Taylor,
    "fisher": passes.Fisher,
    "activation": passes.Activation,
    "single-shot": passes.SingleShot,
    "random": passes.Random,
    "uniform": passes.Uniform,
    "erdos-renyi": passes.ErdosRenyi,
    "precrop": passes.PreCrop,
}

Measure = Annotated[bool, typer.Option(help="Time both models, in turns, in PyTorch.")]

MISSED = 0.05  # of a budget of time: by so much may it be exceeded when it is measured again


class UsageError(FxpruneError):
    """Options that do not go together."""


def limit(what: str) -> Any:
    """An option that says how much of something may remain."""
    return typer.Option(parser=options.amount, metavar="AMOUNT", help=what)


def prune(
    model: options.Model,
    flops: Annotated[float | None, limit("FLOPs that may remain: 0.5, 50% or 2G.")] = None,
    macs: Annotated[float | None, limit("Multiply-accumulates that may remain; half the FLOPs.")] = None,
    params: Annotated[float | None, limit("Parameters that may remain: 0.5 or 5M.")] = None,
    channels: Annotated[float | None, limit("Channels that may remain, of all groups together.")] = None,
    memory: Annotated[float | None, limit("Bytes of weights and of all values computed that may remain.")] = None,
    latency: Annotated[
        float | None, limit("The fraction of the time of a forward pass that may remain; measured.")
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="The time of a forward pass that may remain; measured.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", metavar="PATTERN", help='Layers that stay whole, such as "layer4.*".')
    ] = None,
    criterion: Annotated[str, typer.Option(help=f"Says which channels matter: {', '.join(CRITERIA)}.")] = "magnitude",
    round_to: Annotated[
        int | None, typer.Option(min=1, help="Widths are multiples of this; default, what suits the device.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="How much of a limit may be left unused, as a fraction of it.")
    ] = 0.01,
    minimum: Annotated[float, typer.Option(help="The fraction of each group that stays at least.")] = 0.1,
    images: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="Images, a folder for each class: criteria look at them, batch norm's averages are renewed on them, "
            "and the accuracy is told.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many of the images are used, at most.")] = 512,
    weights: options.Weights = None,
    classes: options.Classes = None,
    example: options.Input = None,
    named: options.Named = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    out: options.Out = Path("out"),
    verify: Annotated[bool, typer.Option(help="Check in float64 that only what was removed has changed.")] = True,
    onnx: Annotated[bool, typer.Option(help="Write model.onnx, and compare it with PyTorch.")] = True,
    measure: Measure = True,
    as_json: options.Json = False,
) -> None:
    """Prune a model to a budget, and write plan.json, model.safetensors, model.onnx and a report to a folder.

    Example: fxprune prune torchvision:resnet50 --weights resnet50.pth --flops 0.5 -o out
    """
    if threads is not None:
        torch.set_num_threads(threads)
    budget = budget_of(flops, macs, params, channels, memory, latency, latency_ms, tolerance)
    scorer = criterion_of(criterion, images is not None)
    free(out)
    opened = open_model(model, weights=weights, classes=classes, inputs=example, named=named, seed=seed)
    batches = None if images is None else data.images(images, shape_for_images(opened), samples, seed)
    bounds: dict[str, Any] = {"minimum": minimum, "keep": tuple(keep or ()), "round_to": round_to or "auto"}
    own = {"data": batches, "loss": data.loss, "seed": seed}
    bounds |= {field.name: own[field.name] for field in fields(scorer) if field.name in own}

    progress(f"analysing {model}")
    analysis = fxprune.analyze(fxprune.trace(opened.model, opened.inputs), opened.inputs)
    progress("planning")
    plan = scorer(**bounds).plan(analysis, budget)
    summary = carry_out(analysis, plan, opened, out, batches, verify, onnx, measure, as_json, criterion=criterion)
    check_latency(summary, budget)


def apply(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="plan.json that fxprune wrote.", show_default=False)],
    weights: options.Weights = None,
    classes: options.Classes = None,
    example: options.Input = None,
    named: options.Named = None,
    images: Annotated[
        Path | None, typer.Option("--data", metavar="FOLDER", help="Images to renew batch norm's averages on.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many of the images are used, at most.")] = 512,
    seed: options.Seed = 0,
    out: options.Out = Path("out"),
    verify: Annotated[bool, typer.Option(help="Check in float64 that only what was removed has changed.")] = True,
    onnx: Annotated[bool, typer.Option(help="Write model.onnx, and compare it with PyTorch.")] = True,
    measure: Measure = True,
    as_json: options.Json = False,
) -> None:
    """Carry out a plan on the model that it was made for, with other weights.

    Example: fxprune apply out/plan.json --weights finetuned.pth -o out2
    """
    found = Plan.load(plan)
    source = Source.of(found, named, plan)
    free(out)
    opened = open_model(
        source.model,
        weights=weights,
        classes=classes or source.classes,
        inputs=example or list(source.input) or None,
        seed=seed,
    )
    batches = None if images is None else data.images(images, shape_for_images(opened), samples, seed)
    progress(f"analysing {source.model}")
    chosen = {key: value for key, value in found.options.items() if key in ("heads", "groups")}
    analysis = fxprune.analyze(fxprune.trace(opened.model, opened.inputs), opened.inputs, **chosen)
    carry_out(analysis, found, opened, out, batches, verify, onnx, measure, as_json)


def carry_out(
    analysis: Analysis,
    plan: Plan,
    opened: Opened,
    out: Path,
    batches: Any,
    verify: bool,
    onnx: bool,
    measure: bool,
    as_json: bool,
    **about: str,
) -> Summary:
    """Rewrite the model of ``analysis``, check it, write all files, and print the tables."""
    plan = replace(plan, options={**plan.options, **opened.source.options()})
    about["model"] = opened.source.model
    progress("rewriting")
    compact, param_map = fxprune.rewrite(analysis.graph, analysis, plan)
    if verify:
        progress("verifying in float64")
        about["verified"] = str(fxprune.verify(analysis.graph, compact, param_map, opened.inputs))
    summary = summarize(analysis, plan, compact, about=about)
    if batches is not None:
        progress("renewing batch norm's averages")
        torch.optim.swa_utils.update_bn(batches, compact)
        compact.eval()
        summary = replace(summary, accuracy=(data.accuracy(analysis.graph, batches), data.accuracy(compact, batches)))
    if measure:
        progress("measuring")
        batch = shape_of(opened)[0]
        timed = fxprune.bench(analysis.graph, compact, opened.inputs, batches=[batch], backends=["eager"], seconds=0.5)
        summary = replace(summary, bench=timed)
    summary = write(out, analysis, compact, summary, opened, onnx)
    if as_json:
        show_json(summary.to_json())
        return summary
    show(layers_table(summary), "", totals_table(summary), "")
    show(*(f"{title}: {words}" for title, words in summary.about.items() if title != "model"))
    note(f"written to {out}: {', '.join(sorted(each.name for each in out.iterdir() if each.name[0] != '.'))}")
    return summary


def check_latency(summary: Summary, budget: Budget) -> None:
    """Say where a budget of time, measured again after the cut, is missed."""
    measured = summary.bench and summary.bench.rows[0]
    if budget.latency is None or not measured or measured.after is None or measured.ratio is None:
        return
    if isinstance(budget.latency, datetime.timedelta):
        taken, limit, unit = measured.after.median * 1e3, budget.latency.total_seconds() * 1e3, " ms"
    else:
        taken, limit, unit = measured.ratio.median, budget.latency, " of the time"
    if taken > (1 + MISSED) * limit:
        raise BudgetError(
            f"measured again after the cut, a forward pass takes {taken:.3g}{unit}; {limit:.3g}{unit} was asked for. "
            "Is the machine busy? The files are written."
        )


def write(out: Path, analysis: Analysis, compact: Any, summary: Summary, opened: Opened, onnx: bool) -> Summary:
    """Write the files; they appear in ``out`` when all of them are there. The summary, with what the export found."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as folder:
            partial = Path(folder)
            Plan.from_json(compact.meta["fxprune"]["plan"]).save(partial / "plan.json")
            fxprune.save(compact, partial / "model.safetensors")
            if onnx:
                progress("exporting to ONNX")
                exported = fxprune.export_onnx(compact, opened.inputs, partial / "model.onnx")
                exported = replace(exported, path=Path("model.onnx"))
                summary = replace(summary, about={**summary.about, "exported": str(exported)})
            progress("writing the report")
            stairs = [staircase(analysis, tallest(analysis))] if summary.bench else []
            summary.to_html(partial / "report.html", analysis, stairs=stairs)
            (partial / "report.json").write_text(json.dumps(summary.to_json(), indent=1) + "\n", encoding="utf-8")
            for each in list(partial.iterdir()):
                os.replace(each, out / each.name)
    except OSError as error:
        raise FileError(f"can't write to {out}: {error.strerror}") from error
    return summary


def free(out: Path) -> None:
    """Refuse a folder that can't be written to, before the work begins."""
    if out.exists() and not out.is_dir():
        raise FileError(f"can't write to {out}: it is a file, not a folder")
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise FileError(f"can't write to {out}: permission denied")


def budget_of(
    flops: float | None,
    macs: float | None,
    params: float | None,
    channels: float | None,
    memory: float | None,
    latency: float | None,
    latency_ms: float | None,
    tolerance: float,
) -> Budget:
    """The budget; what is wrong with it is wrong use."""
    if latency is not None and latency_ms is not None:
        raise UsageError("give --latency or --latency-ms, not both")
    if latency is not None and latency > 1:
        raise UsageError(f"--latency {latency:g} is no fraction; say milliseconds with --latency-ms")
    try:
        time = latency if latency_ms is None else datetime.timedelta(milliseconds=latency_ms)
        return Budget(
            flops=flops,
            macs=macs,
            params=params,
            channels=channels,
            memory=memory,
            latency=time,
            tolerance=tolerance,
        )
    except BudgetError as error:
        raise UsageError(f"{error}. For example --flops 0.5") from error


def criterion_of(name: str, with_data: bool) -> type[passes.Criterion]:
    """The criterion called ``name``."""
    found = CRITERIA.get(name.replace("_", "-").lower())
    if found is None:
        known = nearest(name, list(CRITERIA)) or f"; there are {', '.join(CRITERIA)}"
        raise UsageError(f"no criterion is called {name!r}{known}")
    if not with_data and any(field.name == "data" for field in fields(found)):
        raise UsageError(f"the criterion {name} looks at data: give it images with --data FOLDER")
    return found


def shape_for_images(opened: Opened) -> tuple[int, ...]:
    """The shape of what the model takes, for images to be made of."""
    if len(tensors_in(opened.inputs)) > 1:
        raise data.DataError("--data gives one tensor of images, but the model takes more than one")
    return shape_of(opened)


def shape_of(opened: Opened) -> tuple[int, ...]:
    """The shape of the first input."""
    return tuple(tensors_in(opened.inputs)[0].shape)
