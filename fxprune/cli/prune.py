"""``fxprune prune``: a plan that meets a budget is made and carried out."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import fxprune
from fxprune import passes
from fxprune.budget.budget import Budget
from fxprune.budget.solver import describe_rounding
from fxprune.cli import data, options
from fxprune.cli.models import UsageError, open_model, suggest_names
from fxprune.cli.preprocessing import Asked
from fxprune.cli.results import Wanted, carry_out_plan, check_folder, images_for
from fxprune.cli.say import print_note, print_progress
from fxprune.errors import BudgetError
from fxprune.report.summary import Summary

CRITERIA: dict[str, type[passes.Criterion]] = {
    "magnitude": passes.Magnitude,
    "batch-norm-scale": passes.BatchNormScale,
    "geometric-median": passes.GeometricMedian,
    "optimal-brain-surgeon": passes.OptimalBrainSurgeon,
    "taylor": passes.Taylor,
    "fisher": passes.Fisher,
    "activation": passes.Activation,
    "single-shot": passes.SingleShot,
    "grasp": passes.GraSP,
    "synflow": passes.SynFlow,
    "combined": passes.Combined,
    "random": passes.Random,
    "uniform": passes.Uniform,
    "erdos-renyi": passes.ErdosRenyi,
    "precrop": passes.PreCrop,
}

MISSED = 0.05  # of a budget of time: by so much may it be exceeded when it is measured again


def read_limit(what: str) -> Any:
    """An option that says how much of something may remain."""
    return typer.Option(parser=options.read_amount, metavar="AMOUNT", help=what, rich_help_panel=options.BUDGET)


def complete_criterion(incomplete: str) -> list[str]:
    """Names of criteria that begin so."""
    return [name for name in CRITERIA if name.startswith(incomplete)]


def prune(
    given: typer.Context,
    model: options.Model,
    flops: Annotated[float | None, read_limit("FLOPs that may remain: 0.5, 50% or 2G.")] = None,
    macs: Annotated[float | None, read_limit("Multiply-accumulates that may remain; half the FLOPs.")] = None,
    params: Annotated[float | None, read_limit("Parameters that may remain: 0.5 or 5M.")] = None,
    channels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="AMOUNT",
            help='Channels that may remain, of all groups together. Or of those that a pattern names: "layer4.*=0.5", '
            "once for each pattern.",
        ),
    ] = None,
    memory: Annotated[float | None, read_limit("Bytes of weights and of all values computed that may remain.")] = None,
    layers: Annotated[
        float | None, read_limit("Residual branches (blocks, attentions, MLPs) that may remain; others go whole.")
    ] = None,
    latency: Annotated[
        float | None, read_limit("The fraction of the time of a forward pass that may remain; measured.")
    ] = None,
    latency_ms: Annotated[
        float | None,
        typer.Option(
            metavar="MS", help="The time of a forward pass that may remain; measured.", rich_help_panel=options.BUDGET
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            metavar="PATTERN",
            help='Layers that stay whole, such as "layer4.*".',
            rich_help_panel=options.CHOICE,
        ),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"Says which channels matter: {', '.join(CRITERIA)}. Default, magnitude; with --data magnitude, "
            "optimal-brain-surgeon and fisher are tried, and the best is taken.",
            rich_help_panel=options.CHOICE,
            autocompletion=complete_criterion,
        ),
    ] = None,
    round_to: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Widths are multiples of this, but for narrow groups and a few that use up the rest of the limit; "
            "default, what suits the device.",
            rich_help_panel=options.CHOICE,
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            metavar="X",
            help="How much of a limit may be left unused, as a fraction of it.",
            rich_help_panel=options.BUDGET,
        ),
    ] = 0.01,
    scope: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Where scores are compared: global (the default), isomorphic (among groups of the same kinds of "
            "layers), or local (within each group).",
            rich_help_panel=options.CHOICE,
        ),
    ] = None,
    minimum: Annotated[
        float,
        typer.Option(
            metavar="X", help="The fraction of each group that stays at least.", rich_help_panel=options.CHOICE
        ),
    ] = 0.1,
    images: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="Images, a folder for each class, or package.module:loader. Criteria look at them, layers are "
            "restored on them after the cut, and the accuracy is told.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    samples: options.Samples = 512,
    mean: options.Mean = None,
    std: options.Std = None,
    size: options.Size = None,
    resize: options.Resize = None,
    weights: options.Weights = None,
    classes: options.Classes = None,
    example: options.Input = None,
    named: options.Named = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    out: options.Out = Path("out"),
    verify: options.Verify = True,
    onnx: options.Onnx = True,
    measure: options.Measure = True,
    as_json: options.Json = False,
) -> None:
    """Prune a model to a budget, and write plan.json, model.safetensors, model.onnx and a report to a folder.

    Example: fxprune prune torchvision:resnet50 --weights resnet50.pth --flops 0.5 -o out
    """
    if threads is not None:
        torch.set_num_threads(threads)
    budget = read_budget(given.params)
    names = choose_names(criterion, images)
    kinds = [criterion_of(name, images is not None) for name in names]
    check_folder(out)
    opened = open_model(model, weights=weights, classes=classes, inputs=example, named=named, seed=seed)
    given_images = images_for(opened, images, samples, seed, weights, Asked(mean, std, size, resize))
    bounds: dict[str, Any] = {"minimum": minimum, "keep": tuple(keep or ()), "round_to": round_to or "auto"}
    if scope is not None:
        bounds["scope"] = scope
    own: dict[str, Any] = {
        "data": given_images and given_images.batches,
        "loss": data.compute_loss,
        "seed": seed,
    }  # of some criteria
    scorers = [
        kind(**bounds, **{field.name: own[field.name] for field in fields(kind) if field.name in own}) for kind in kinds
    ]

    print_progress(f"analysing {model}")
    analysis = fxprune.analyze(fxprune.trace(opened.model, opened.inputs), opened.inputs)
    print_progress("planning")
    if given_images and len(scorers) > 1:
        trials = passes.BestOf(given_images.batches, scorers).try_criteria(analysis, budget)
        plan = passes.BestOf.choose_plan(trials)
        chosen = next(name for name, trial in zip(names, trials, strict=True) if trial.plan is plan)
        print_note(passes.BestOf.describe_trials(trials))
    else:
        plan, chosen = scorers[0].plan(analysis, budget), names[0]
    wanted = options.read_fields(Wanted, {**given.params, "out": out})
    rounding = describe_rounding(analysis, bounds["round_to"])
    summary = carry_out_plan(analysis, plan, opened, given_images, wanted, criterion=chosen, widths=rounding)
    check_latency(summary, budget)


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


def read_budget(given: Mapping[str, Any]) -> Budget:
    """The budget, of the options that are called like its limits; what is wrong with it is wrong use."""
    latency, latency_ms = given["latency"], given["latency_ms"]
    if latency is not None and latency_ms is not None:
        raise UsageError("give --latency or --latency-ms, not both")
    if latency is not None and latency > 1:
        raise UsageError(f"--latency {latency:g} is no fraction; say milliseconds with --latency-ms")
    try:
        time = latency if latency_ms is None else datetime.timedelta(milliseconds=latency_ms)
        channels = options.read_shares(given["channels"] or [])
        return options.read_fields(Budget, {**given, "latency": time, "channels": channels})
    except BudgetError as error:
        raise UsageError(f"{error}. For example --flops 0.5") from error


def choose_names(criterion: str | None, images: str | None) -> Sequence[str]:
    """The names of the criteria to try."""
    if criterion is not None:
        return [criterion]
    return ("magnitude", "optimal-brain-surgeon", "fisher") if images else ["magnitude"]


def criterion_of(name: str, with_data: bool) -> type[passes.Criterion]:
    """The criterion called ``name``."""
    found = CRITERIA.get(name.replace("_", "-").lower())
    if found is None:
        known = suggest_names(name, list(CRITERIA)) or f"; there are {', '.join(CRITERIA)}"
        raise UsageError(f"no criterion is called {name!r}{known}")
    if not with_data and any(field.name == "data" for field in fields(found)):
        raise UsageError(f"the criterion {name} looks at data: give it images with --data FOLDER")
    return found
