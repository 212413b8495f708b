"""Summary: what a plan does to a model, as tables: by group, by layer and in all."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from fxprune.budget.cost import Channels, cost_of, count_flops
from fxprune.budget.staircase import Staircase
from fxprune.channels.analysis import Analysis
from fxprune.channels.groups import layers_of
from fxprune.graph.layers import writes_second_axis
from fxprune.graph.traced import Mode, Model, in_eval, regions_of
from fxprune.plan import Plan
from fxprune.report.bench import Bench, bench_table, idle_table
from fxprune.tables import (
    UNITS,
    Pair,
    format_amount,
    format_change,
    format_milliseconds,
    format_share,
    make_table,
    render_facts,
    render_html,
    render_text,
)
from fxprune.training.log import Log

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = "fxprune report 1"
LONG = 25  # layers: a longer table starts folded
NO_PICTURES = "<p><code>pip install 'fxprune[plots]'</code> shows the pictures: without matplotlib there are none.</p>"


@dataclass(frozen=True)
class Layer:
    """A layer with weights before and after the cut; after it, all is 0 where the layer is gone.

    Attributes:
        name: its path.
        kind: its class.
        outputs: channels that it writes.
        inputs: channels that it reads; of a grouped convolution, those of one of its groups.
        params: parameters.
        flops: of a forward pass on the example inputs.
        groups: the groups whose channels go through it.
    """

    name: str
    kind: str
    outputs: Pair
    inputs: Pair
    params: Pair
    flops: Pair
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """What a plan does to a model. Printing it gives the table by layer.

    Attributes:
        groups: channels of each group.
        layers: those with weights.
        totals: "flops", "params", "memory" (bytes) and "channels".
        bench: times, where they were taken.
        accuracy: on data that the user gave.
        about: anything else in words, by title: the model, the criterion, what was verified.
    """

    groups: Mapping[str, Pair]
    layers: tuple[Layer, ...]
    totals: Mapping[str, Pair]
    bench: Bench | None = None
    accuracy: Pair | None = None
    about: Mapping[str, str] = field(default_factory=dict)

    def paths(self) -> dict[str, list[str]]:
        """The layers that the channels of each group go through."""
        return {name: [layer.name for layer in self.layers if name in layer.groups] for name in self.groups}

    def to_html(
        self,
        path: str | Path,
        analysis: Analysis,
        *,
        log: Log | None = None,
        stairs: Sequence[Staircase] = (),
        accuracies: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        """Write one HTML page that needs nothing from elsewhere: the tables, pictures, and the graph of the model.

        Args:
            path: where to write.
            analysis: of the model before the cut.
            log: of a session, for the pictures of a training run.
            stairs: what ``fxprune.staircase`` measured of some groups.
            accuracies: by name, seconds and accuracy of models that should be compared.

        Raises:
            FileError: nothing can be written there.
        """
        from fxprune.report.page import write_html

        title = f"report on {self.about['model']}" if "model" in self.about else "report"
        parts = [
            render_facts(self.about),
            render_html("In all", totals_table(self)),
            draw_summary(self, log, stairs, accuracies or {}),
            render_html("Layers", layers_table(self), is_open=len(self.layers) <= LONG),
        ]
        if self.bench is not None:
            idle = idle_table(self.bench.idle(self.paths()), "groups")
            parts[-1:-1] = [
                render_html("Time", bench_table(self.bench)),
                render_html("Groups that save FLOPs but hardly any time", idle),
            ]
        write_html(analysis, path, title, "".join(parts))

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON data."""
        return {"format": FORMAT, **asdict(self)}

    def __str__(self) -> str:
        return render_text(layers_table(self), totals_table(self))


def summarize(
    analysis: Analysis,
    plan: Plan,
    compact: Model,
    *,
    bench: Bench | None = None,
    about: Mapping[str, str] | None = None,
) -> Summary:
    """What ``plan`` does to the model of ``analysis``, of which ``rewrite`` made ``compact``.

    Args:
        analysis: of the model before the cut.
        plan: that was carried out.
        compact: the model after it.
        bench: what ``fxprune.bench`` measured of both.
        about: anything else that should stand in the report, by title.

    Raises:
        PlanError: the plan was made for another model.
    """
    plan.check(analysis.sizes)
    after = analysis.after(plan, compact)
    counts = [total_costs(analysed) for analysed in (analysis, after)]
    return Summary(
        groups={name: (size, plan.widths.get(name, 0)) for name, size in analysis.sizes.items()},
        layers=layer_rows(analysis, after),
        totals={kind: (before, counts[1][kind]) for kind, before in counts[0].items()},
        bench=bench,
        about=dict(about or {}),
    )


def layers_table(summary: Summary) -> "Table":
    """A row a layer: the channels that it reads and writes, its parameters and FLOPs, before and after."""
    heads = ["inputs", "outputs", "parameters", "FLOPs", "left", *["ms", "left"][: 2 * (summary.bench is not None)]]
    rows = []
    for layer in summary.layers:
        row = [layer.name, layer.kind, *map(format_change, (layer.inputs, layer.outputs, layer.params, layer.flops))]
        row.append(format_share(layer.flops))
        if summary.bench is not None:
            seconds = summary.bench.layers.get(layer.name, (0.0, 0.0))
            row += [" → ".join(map(format_milliseconds, seconds)), format_share(seconds)]
        rows.append(row)
    return make_table(("layer", "kind"), heads, rows)


def totals_table(summary: Summary) -> "Table":
    """A row for each cost of the whole model."""
    rows = [
        (UNITS[kind], *(format_amount(kind, value) for value in both), format_share(both))
        for kind, both in summary.totals.items()
    ]
    for row in summary.bench.rows if summary.bench is not None else ():
        if row.before is not None and row.after is not None and row.ratio is not None:
            times = (format_milliseconds(spread.median) for spread in (row.before, row.after))
            rows.append((f"ms, {row.backend}, batch {row.batch}", *times, f"{row.ratio.median:.0%}"))
    if summary.accuracy is not None:
        rows.append(("accuracy", *(f"{accuracy:.1%}" for accuracy in summary.accuracy), ""))
    return make_table(("",), ("before", "after", "left"), rows)


def draw_summary(
    summary: Summary,
    log: Log | None,
    stairs: Sequence[Staircase],
    accuracies: Mapping[str, tuple[float, float]],
) -> str:
    """The pictures of a page as HTML, or what to install for them."""
    if find_spec("matplotlib") is None:
        return NO_PICTURES
    from fxprune.report.pictures import draw_pictures

    return draw_pictures(summary.groups, log, stairs, accuracies)


def total_costs(analysis: Analysis) -> dict[str, float]:
    """What the model of ``analysis`` costs in all."""
    channels = Channels.of(analysis)
    every = np.ones(len(channels.group), dtype=bool)
    return {kind: cost_of(analysis, kind, channels)(every) for kind in ("flops", "params", "memory", "channels")}


def layer_rows(before: Analysis, after: Analysis) -> tuple[Layer, ...]:
    """The layers with weights, in the order of the model."""
    with in_eval(before.graph, after.graph):
        flops = [count_flops(analysis.graph, analysis.example_inputs) for analysis in (before, after)]
    modules = [weighted_modules(analysis.graph) for analysis in (before, after)]
    groups: dict[str, list[str]] = {}
    for group in before.groups.values():
        for path in layers_of(group):
            groups.setdefault(path, []).append(group.name)
    kinds = class_names(before.graph)
    result = []
    for path, layer in modules[0].items():
        pair = (layer, modules[1].get(path))
        outputs, inputs = zip(*map(channels_of_layer, pair), strict=True)
        result.append(
            Layer(
                name=path,
                kind=kinds.get(path, type(layer).__name__),
                outputs=outputs,
                inputs=inputs,
                params=as_pair(
                    sum(p.numel() for p in layer.parameters(recurse=False)) if layer else 0 for layer in pair
                ),
                flops=as_pair(amounts.get(path, 0) for amounts in flops),
                groups=tuple(groups.get(path, ())),
            )
        )
    return tuple(result)


def as_pair(values: Any) -> Pair:
    """Two values as a tuple."""
    before, after = values
    return before, after


def weighted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with a parameter of at least two axes, by path: convolutions, linear layers, embeddings."""
    return {
        path: module
        for path, module in model.named_modules()
        if any(p.ndim > 1 for p in module.parameters(recurse=False))
    }


def class_names(model: nn.Module) -> dict[str, str]:
    """The class that each module had which tracing went through, by path."""
    kinds = {}
    for region, traced in regions_of(model).items():
        for node in traced.graphs[Mode.EVAL].nodes:
            if node.op != "call_module":
                for path, kind in node.meta.get("nn_module_stack", {}).values():
                    kinds[f"{region}.{path}".strip(".")] = getattr(kind, "__name__", str(kind))
    return kinds


def channels_of_layer(layer: nn.Module | None) -> tuple[int, int]:
    """The channels that a layer writes and reads."""
    if layer is None:
        return 0, 0
    weight = next(p for p in layer.parameters(recurse=False) if p.ndim > 1)
    outputs, inputs = weight.shape[:2]
    return (inputs, outputs) if writes_second_axis(layer) else (outputs, inputs)
