"""``fxprune diff``: two plans, reports or models side by side."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fxprune.cli import options
from fxprune.cli.say import print_output, show_json
from fxprune.errors import FileError
from fxprune.files.model import read_model
from fxprune.plan import Plan
from fxprune.report.summary import FORMAT
from fxprune.tables import UNITS, format_amount, make_table

File = Annotated[
    Path, typer.Argument(help="plan.json, report.json or model.safetensors that fxprune wrote.", show_default=False)
]


def diff(
    a: File,
    b: File,
    show_all: Annotated[bool, typer.Option("--all", help="Show what is the same too.")] = False,
    as_json: options.Json = False,
    named: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Not needed: the files say what is compared.")
    ] = None,
) -> None:
    """Compare two plans, two reports or two models: the widths of each group, and what it all costs.

    Example: fxprune diff out/plan.json out2/plan.json
    """
    sides = [widths_and_totals(path) for path in (a, b)]
    (groups_a, totals_a), (groups_b, totals_b) = sides
    if not groups_a.keys() & groups_b.keys():
        raise FileError(f"{a} and {b} have no group in common: they are of different models")
    if as_json:
        return show_json({"groups": side_by_side(groups_a, groups_b), "totals": side_by_side(totals_a, totals_b)})
    rows = [
        (name, *("–" if width is None else f"{width:g}" for width in both), format_difference(*both))
        for name, both in side_by_side(groups_a, groups_b).items()
        if show_all or both[0] != both[1]
    ]
    same = len(groups_a.keys() | groups_b.keys()) - len(rows)
    if rows:
        print_output(make_table(("group",), (str(a), str(b), ""), rows))
    if not show_all:
        print_output(f"{same} groups are the same" if rows else f"all {same} groups are the same")
    if totals_a and totals_b:
        costs = [
            (
                UNITS[kind],
                *("–" if value is None else format_amount(kind, value) for value in both),
                format_difference(*both),
            )
            for kind, both in side_by_side(totals_a, totals_b).items()
        ]
        print_output("", make_table(("",), (str(a), str(b), ""), costs))
    return None


def widths_and_totals(path: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The widths after the cut, and what the model costs then, as far as the file knows."""
    if path.suffix == ".safetensors":
        record, _ = read_model(path)
        if "plan" not in record:
            raise FileError(f"{path} was not pruned: there is no plan in it")
        return dict(widths_after(Plan.from_json(record["plan"]))), {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"can't read {path}: {error}") from error
    if isinstance(data, dict) and data.get("format") == FORMAT:
        try:
            return tuple({name: float(both[1]) for name, both in data[key].items()} for key in ("groups", "totals"))  # type: ignore[return-value]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise FileError(f"{path} is a damaged report: {error!r}") from error
    try:
        return dict(widths_after(Plan.from_json(data))), {}
    except FileError as error:
        raise FileError(f"{path} is neither a plan nor a report that fxprune wrote ({error})") from error


def widths_after(plan: Plan) -> dict[str, float]:
    """The width of each group after the plan, 0 where it is gone."""
    return {name: plan.widths.get(name, 0) for name in plan.sizes}


def side_by_side(a: dict[str, float], b: dict[str, float]) -> dict[str, tuple[Any, Any]]:
    """Both values of each name, None where one has none."""
    return {name: (a.get(name), b.get(name)) for name in (a | b)}


def format_difference(a: float | None, b: float | None) -> str:
    """How much more the second is."""
    if not a or b is None or a == b:
        return ""
    return f"{b / a - 1:+.0%}"
