"""``fxprune apply``: a plan is read and carried out."""

from pathlib import Path
from typing import Annotated

import typer

import fxprune
from fxprune.cli import options
from fxprune.cli.models import Source, UsageError, open_model
from fxprune.cli.preprocessing import Asked
from fxprune.cli.results import Wanted, carry_out_plan, check_folder, images_for
from fxprune.cli.say import print_progress
from fxprune.errors import FileError
from fxprune.plan import Plan


def apply(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="plan.json that fxprune wrote.", show_default=False)],
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="As --model.", show_default=False)] = None,
    weights: options.Weights = None,
    classes: options.Classes = None,
    example: options.Input = None,
    named: options.Named = None,
    images: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="Images to restore the layers on after the cut.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    samples: options.Samples = 512,
    mean: options.Mean = None,
    std: options.Std = None,
    size: options.Size = None,
    resize: options.Resize = None,
    seed: options.Seed = 0,
    out: options.Out = Path("out"),
    verify: options.Verify = True,
    onnx: options.Onnx = True,
    measure: options.Measure = True,
    as_json: options.Json = False,
) -> None:
    """Carry out a plan on the model that it was made for, with other weights.

    Example: fxprune apply out/plan.json --weights finetuned.pth -o out2
    """
    loaded = Plan.load(plan)
    if model and named and model != named:
        raise UsageError(f"the model is {model} or --model {named}? Say it once")
    source = Source.of(loaded, model or named, plan)
    if out.resolve() == plan.parent.resolve():
        raise FileError(f"{out} has the plan and the model that it was made for: say with -o where the new one goes")
    check_folder(out)
    opened = open_model(
        source.model,
        weights=weights,
        classes=classes or source.classes,
        inputs=example or list(source.input) or None,
        seed=seed,
    )
    given_images = images_for(opened, images, samples, seed, weights, Asked(mean, std, size, resize))
    print_progress(f"analysing {source.model}")
    analysis = fxprune.analyze(fxprune.trace(opened.model, opened.inputs), opened.inputs, **loaded.options)
    carry_out_plan(analysis, loaded, opened, given_images, options.read_fields(Wanted, {**context.params, "out": out}))
