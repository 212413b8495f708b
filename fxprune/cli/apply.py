"""``fxprune apply``: a plan is read and carried out."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

import fxprune
from fxprune.atomic import named_errors, replace_files
from fxprune.cli import options
from fxprune.cli.models import Source, UsageError, build_model, make_example, open_model, usual_input
from fxprune.cli.preprocessing import Asked
from fxprune.cli.results import Wanted, carry_out_plan, check_folder, images_for
from fxprune.cli.say import print_note, print_progress
from fxprune.errors import FileError
from fxprune.files.stream import list_tensors
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
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="For large models: the weights, of safetensors, are cut from file to file, one at a time. Only "
            "plan.json and model.safetensors are written, and nothing is verified.",
        ),
    ] = False,
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
    if stream:
        if images is not None:
            raise UsageError(
                "--data restores layers, for which the model must be in memory: leave out --stream or --data"
            )
        source = replace(source, classes=classes or source.classes, input=tuple(example or source.input))
        stream_weights(loaded, source, weights, out)
        return
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


def stream_weights(plan: Plan, source: Source, weights: str | None, out: Path) -> None:
    """Cut the file ``weights`` as ``plan`` says; the model is built on the meta device, without values."""
    if weights is None:
        raise UsageError("--stream cuts a file of weights: give it with --weights")
    list_tensors(weights)  # refused before the work begins
    source = source if source.input else replace(source, input=usual_input(source.model))
    with torch.device("meta"):
        model, _ = build_model(source, None)
        inputs = make_example(source, model)
    print_progress(f"analysing {source.model}")
    graph = fxprune.trace(model.eval(), inputs)
    analysis = fxprune.analyze(graph, inputs, **plan.options)
    print_progress("rewriting")
    compact, param_map = fxprune.rewrite(graph, analysis, replace(plan, source={**plan.source, **source.to_plain()}))
    with named_errors(out, "the results"):
        out.mkdir(parents=True, exist_ok=True)
    with named_errors(out, "the results"), replace_files(out) as partial:
        Plan.from_json(compact.meta["fxprune"]["plan"]).save(partial / "plan.json")
        fxprune.cut_weights(graph, compact, param_map, weights, partial / "model.safetensors")
    print_note(f"written to {out}: model.safetensors, plan.json")
