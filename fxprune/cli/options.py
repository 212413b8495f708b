"""Options that several verbs have, and how their values are read."""

import importlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import typer

from fxprune.report.backends import BACKENDS

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def read_amount(text: str) -> float:
    """What may remain: "0.5" and "50%" are fractions, "5M" and "1200000" counts."""
    match = re.fullmatch(r"([0-9.eE+-]+)\s*(%|[kKMGT]?)B?", text.strip())
    try:
        if match is None:
            raise ValueError
        value = float(match[1])
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no amount; give a fraction such as 0.5 or 50%, or 5M, or 1200000"
        ) from None
    if not (value > 0 and math.isfinite(value)):
        raise typer.BadParameter(f"{text!r} must be positive")
    if match[2] == "%":
        return value / 100
    if match[2]:
        return round(value * UNITS[match[2].upper()])
    return int(value) if match[1].isdigit() else value


def read_shares(texts: Sequence[str]) -> float | dict[str, float] | None:
    """What may remain of all channels, or of those that patterns name, each with "=" and an amount."""
    if not texts:
        return None
    if len(texts) == 1 and "=" not in texts[0]:
        return read_amount(texts[0])
    shares: dict[str, float] = {}
    for text in texts:
        pattern, sign, amount = text.rpartition("=")
        if not sign:
            raise typer.BadParameter(f"--channels {text} beside others: give each a pattern, such as 'layer4.*={text}'")
        if pattern in shares:
            raise typer.BadParameter(f"--channels {text}: {pattern!r} has a share already, {shares[pattern]:g}")
        shares[pattern] = read_amount(amount)
    return shares


T = TypeVar("T")


def read_fields(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass, from the values of those options of a verb that are called like its fields."""
    return kind(**{field.name: values[field.name] for field in fields(cast(Any, kind))})


BUDGET, CHOICE, MODEL, DATA, OUTPUT = "Budget", "What goes", "Model", "Data", "Output"  # panels of --help


def complete_model(incomplete: str) -> list[str]:
    """Names of models that begin so. Bash takes the colon for the end of a word, so names without a place are known."""
    from torchvision.models import list_models

    place, colon, name = incomplete.rpartition(":")
    if place == "timm":
        return [f"timm:{known}" for known in list_timm_models() if known.startswith(name)]
    if colon:
        return [f"{place}:{known}" for known in list_models() if place == "torchvision" and known.startswith(name)]
    return [known for known in ("torchvision:", "timm:", *list_models()) if known.startswith(name)]


def list_timm_models() -> list[str]:
    """The models of timm; none where it is not installed."""
    try:
        names: list[str] = importlib.import_module("timm").list_models()
    except ImportError:
        return []
    return names


def complete_backend(incomplete: str) -> list[str]:
    """Names of backends that begin so."""
    return [name for name in BACKENDS if name.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="What to look at; see fxprune --help.", show_default=False, autocompletion=complete_model
    ),
]
Named = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="The model that the file was made of, where it can't say so itself.",
        rich_help_panel=MODEL,
        autocompletion=complete_model,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="A state_dict (.safetensors, .pt, .pth). Or the name of published weights, such as DEFAULT, which are "
        "downloaded. Without this the weights are random.",
        rich_help_panel=MODEL,
    ),
]
Classes = Annotated[
    int | None,
    typer.Option(
        "--classes",
        min=1,
        metavar="N",
        help="Classes that the model tells apart, if not its usual number.",
        rich_help_panel=MODEL,
    ),
]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE",
        help="Of an example input, such as 1,3,224,224, or int64:1,128 for token ids. Once for each argument.",
        rich_help_panel=MODEL,
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        "--mean", metavar="R,G,B", help="Of pixels from 0 to 1; default, that of the weights.", rich_help_panel=DATA
    ),
]
Std = Annotated[
    str | None,
    typer.Option("--std", metavar="R,G,B", help="Pixels are divided by it; default likewise.", rich_help_panel=DATA),
]
Size = Annotated[
    int | None,
    typer.Option("--size", min=1, metavar="N", help="Of the middle that is cut out of an image.", rich_help_panel=DATA),
]
Resize = Annotated[
    int | None,
    typer.Option(
        "--resize", min=1, metavar="N", help="Of the shorter side of an image, before that.", rich_help_panel=DATA
    ),
]
Samples = Annotated[
    int,
    typer.Option(
        "--samples", min=1, metavar="N", help="How many of the images are used, at most.", rich_help_panel=DATA
    ),
]
Verify = Annotated[
    bool, typer.Option(help="Check in float64 that only what was removed has changed.", rich_help_panel=OUTPUT)
]
Onnx = Annotated[bool, typer.Option(help="Write model.onnx, and compare it with PyTorch.", rich_help_panel=OUTPUT)]
Measure = Annotated[bool, typer.Option(help="Time both models, in turns, in PyTorch.", rich_help_panel=OUTPUT)]
Seed = Annotated[
    int, typer.Option("--seed", metavar="N", help="Of random weights, random scores, and the order of the data.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.", rich_help_panel=OUTPUT)]
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        metavar="FOLDER",
        help="For the results; made if it is not there.",
        rich_help_panel=OUTPUT,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, metavar="N", help="CPU threads for measuring; default, those that torch uses."),
]
