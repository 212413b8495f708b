"""``fxprune inspect``: what can be pruned, what is frozen, and why."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

import fxprune
from fxprune.budget.cost import marginal
from fxprune.channels.analysis import Analysis
from fxprune.channels.groups import layers_of
from fxprune.cli import options
from fxprune.cli.models import open_model
from fxprune.cli.say import print_note, print_output, print_progress, show_json
from fxprune.report.summary import total_costs
from fxprune.tables import make_table, shorten_name

if TYPE_CHECKING:
    from rich.table import Table


def inspect(
    model: options.Model,
    explain: Annotated[
        list[str] | None, typer.Option("--explain", metavar="NAME", help="Say why the channels of a layer go together.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the graph with its groups as a page.")] = None,
    classes: options.Classes = None,
    example: options.Input = None,
    named: options.Named = None,
    as_json: options.Json = False,
) -> None:
    """Say which channels can be pruned and go together, and what is frozen and why. Ends with 1 if nothing can.

    Example: fxprune inspect torchvision:resnet50 --explain layer3.0.conv2
    """
    opened = open_model(model, classes=classes, inputs=example, named=named, weights_matter=False)
    print_progress(f"analysing {model}")
    analysis = fxprune.analyze(fxprune.trace(opened.model, opened.inputs), opened.inputs)
    if html is not None:
        analysis.to_html(html)
    if as_json:
        why = {"explain": {name: analysis.explain(name) for name in explain}} if explain else {}
        show_json(analysis_facts(analysis, opened.source.model) | why)
    elif explain:
        print_output(*(analysis.explain(name) for name in explain))
    else:
        costs = total_costs(analysis)
        shape = " and ".join(opened.source.input)
        print_output(f"{model} on {shape}: {costs['flops']:,.0f} FLOPs, {costs['params']:,.0f} parameters")
        print_output(str(analysis).partition("\n")[0], "")
        print_output(groups_table(analysis), "", frozen_table(analysis))
    if not analysis.groups:
        print_note("nothing in this model can be pruned")
        raise typer.Exit(1)


def groups_table(analysis: Analysis) -> "Table":
    """A row a group: its channels, the layers that they go through, and what one of them costs."""
    costs = {kind: marginal(analysis, kind) for kind in ("flops", "params")}
    rows = []
    for group in analysis.groups.values():
        paths = layers_of(group)
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        means = (float(np.mean(costs[kind][group.name])) for kind in costs)
        rows.append((group.name, ", ".join(paths[:3]) + more, str(group.size), *map(shorten_name, means)))
    return make_table(("group", "goes through"), ("channels", "FLOPs each", "parameters each"), rows)


def frozen_table(analysis: Analysis) -> "Table":
    """A row a reason: how many axes it froze, and where it arose."""
    axes_of: dict[str, list[Any]] = {}
    for frozen in analysis.frozen:
        axes_of.setdefault(frozen.reason.text, []).append(frozen)
    rows = [
        (reason, ", ".join(f"{axis.parameter}[{axis.axis}]" for axis in axes[:3]), str(len(axes)))
        for reason, axes in axes_of.items()
    ]
    return make_table(("frozen, because", "for example"), ("axes",), rows)


def analysis_facts(analysis: Analysis, model: str) -> dict[str, Any]:
    """An analysis as JSON data."""
    return {
        "format": "fxprune analysis 1",
        "model": model,
        "totals": total_costs(analysis),
        "groups": {
            group.name: {
                "channels": group.size,
                "inexact": group.inexact,
                "members": [f"{member.parameter}[{member.axis}]" for member in group.members],
            }
            for group in analysis.groups.values()
        },
        "frozen": [
            {
                "axis": f"{axis.parameter}[{axis.axis}]",
                "channels": len(axis.index),
                "reason": axis.reason.text,
                "place": analysis.place(axis.reason),
            }
            for axis in analysis.frozen
        ],
        "unknown": dict(analysis.unknown),
    }
