"""Results: what ``prune`` and ``apply`` do with a plan once they have one: carry it out, and write the files."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fxprune
from fxprune import Restoration
from fxprune.atomic import named_errors, replace_files
from fxprune.budget.staircase import find_tallest, staircase
from fxprune.channels.analysis import Analysis
from fxprune.cli import data
from fxprune.cli.models import Opened
from fxprune.cli.preprocessing import Asked, DataError, choose_preprocessing
from fxprune.cli.say import print_note, print_output, print_progress, show_json
from fxprune.errors import ExportError, FileError
from fxprune.files.export import Exported
from fxprune.graph.inputs import tensors_in
from fxprune.plan import Plan
from fxprune.report.summary import Summary, layers_table, summarize, totals_table

FILES = ("plan.json", "model.safetensors", "model.onnx", "report.html", "report.json")


@dataclass(frozen=True)
class Wanted:
    """What is to be made of a plan, and the folder ``out`` for it."""

    out: Path
    verify: bool
    onnx: bool
    measure: bool
    as_json: bool


def carry_out_plan(
    analysis: Analysis,
    plan: Plan,
    opened: Opened,
    images: "Images | None",
    wanted: Wanted,
    **about: str,
) -> Summary:
    """Rewrite the model of ``analysis``, check it, write all files, and print the tables.

    ``images``: to restore on, or None. ``about``: titles and words for the report.
    """
    plan = replace(plan, source={**plan.source, **opened.source.to_plain()})
    about["model"] = opened.source.model
    print_progress("rewriting")
    compact, param_map = fxprune.rewrite(analysis.graph, analysis, plan)
    if wanted.verify:
        print_progress("verifying in float64")
        about["verified"] = str(fxprune.verify(analysis.graph, compact, param_map, opened.inputs))
    if images is not None:
        print_progress("restoring")
        about["preprocessing"] = images.preprocessing
        restoration = fxprune.restore(analysis.graph, compact, param_map, images.batches)
        about["restored"] = describe_restoration(restoration)
        if not wanted.as_json:
            print_output(str(restoration), "")
    summary = summarize(analysis, plan, compact, about=about)
    if images is not None:
        summary = replace(summary, accuracy=(images.accuracy, data.measure_accuracy(compact, images.batches)))
    if wanted.measure:
        print_progress("measuring")
        batch = input_shape(opened)[0]
        timed = fxprune.bench(analysis.graph, compact, opened.inputs, batches=[batch], backends=["eager"], seconds=0.5)
        summary = replace(summary, bench=timed)
    summary, files = write_results(analysis, compact, summary, opened, wanted)
    if wanted.as_json:
        show_json(summary.to_json())
        return summary
    print_output(layers_table(summary), "", totals_table(summary), "")
    print_output(*(f"{title}: {words}" for title, words in summary.about.items() if title != "model"))
    print_note(f"written to {wanted.out}: {', '.join(files)}")
    return summary


def describe_restoration(restoration: Restoration) -> str:
    """What was restored, in one line; the errors are means over the layers, on what was held out."""
    layers = restoration.layers
    if not layers:
        return restoration.note or "no layer reads anything else than it did"
    count = sum(layer.outcome == "restored" for layer in layers)
    before = sum(layer.before for layer in layers) / len(layers)
    after = sum(layer.after for layer in layers) / len(layers)
    done = f"{count} of {len(layers)} layers by least squares, mean error {before:.1%} → {after:.1%}"
    return "; ".join([done, *restoration.note.splitlines()])


def write_results(
    analysis: Analysis, compact: Any, summary: Summary, opened: Opened, wanted: Wanted
) -> tuple[Summary, list[str]]:
    """Write the files; they appear when all of them are there, and none stays that was of another model.

    Returns the summary, with what the export found, and the names of the files.
    """
    out = wanted.out
    with named_errors(out, "the results"):
        out.mkdir(parents=True, exist_ok=True)
    with named_errors(out, "the results"), replace_files(out) as partial:
        Plan.from_json(compact.meta["fxprune"]["plan"]).save(partial / "plan.json")
        fxprune.save(compact, partial / "model.safetensors")
        if wanted.onnx:
            print_progress("exporting to ONNX")
            exported = exported_to(partial / "model.onnx", compact, opened)
            exported = replace(exported, path=Path("model.onnx"))
            summary = replace(summary, about={**summary.about, "exported": str(exported)})
        print_progress("writing the report")
        stairs = [staircase(analysis, find_tallest(analysis))] if summary.bench else []
        summary.to_html(partial / "report.html", analysis, stairs=stairs)
        (partial / "report.json").write_text(json.dumps(summary.to_json(), indent=1) + "\n", encoding="utf-8")
        files = sorted(file.name for file in partial.iterdir())
    for name in set(FILES) - set(files):
        (out / name).unlink(missing_ok=True)
    return summary, files


def exported_to(path: Path, compact: Any, opened: Opened) -> Exported:
    """Export to ONNX."""
    try:
        return fxprune.export_onnx(compact, opened.inputs, path)
    except ExportError as error:
        raise ExportError(f"{error} Nothing is written; --no-onnx writes the rest.") from error


def check_folder(out: Path) -> None:
    """Refuse a folder that can't be written to, before the work begins."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise FileError(f"can't write to {out}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK):
        raise FileError(f"can't write to {out}: permission denied")
    for name in FILES:
        if (out / name).is_dir():
            raise FileError(f"can't write to {out}: {out / name} is a folder")


@dataclass(frozen=True)
class Images:
    """What was given with ``--data``.

    Attributes:
        batches: images and their classes.
        preprocessing: how they were made, in words.
        accuracy: of the model before the cut.
    """

    batches: Any
    preprocessing: str
    accuracy: float


def images_for(
    opened: Opened, name: str | None, samples: int, seed: int, weights: str | None, asked: Asked
) -> Images | None:
    """What ``--data NAME`` means for a model; None without. Says so if the model is no better than guessing on it."""
    if name is None:
        if said := [option for option, value in vars(asked).items() if value is not None]:
            raise DataError(f"--{said[0]} is of images: give them with --data FOLDER")
        return None
    if len(tensors_in(opened.inputs)) > 1:
        raise DataError("--data gives one tensor of images, but the model takes more than one")
    if ":" in name and not Path(name).exists():
        batches, words = data.load_batches(name), f"as {name} does"
    else:
        chosen = choose_preprocessing(input_shape(opened), opened.source, weights, asked)
        batches, words = data.load_images(Path(name), chosen, samples, seed), str(chosen)
    print_progress("measuring the accuracy before the cut")
    images = Images(batches, words, data.measure_accuracy(opened.model, batches))
    if warning := data.warn_of_chance(images.accuracy, opened.model, batches, words):
        print_note(warning)
    return images


def input_shape(opened: Opened) -> tuple[int, ...]:
    """The shape of the first input."""
    return tuple(tensors_in(opened.inputs)[0].shape)
