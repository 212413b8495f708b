"""Staircase: the time that a group's layers take, by the group's width. It rises in steps, not in a line."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxprune.budget.timing import LAYERS, by_module, stand_in
from fxprune.channels.analysis import Analysis
from fxprune.channels.groups import layers_of
from fxprune.errors import BenchError
from fxprune.graph.inputs import map_tensors
from fxprune.graph.traced import device_of
from fxprune.plan import Plan
from fxprune.rewrite.rewrite import rewrite

WIDTHS = 8  # that are tried


@dataclass(frozen=True)
class Staircase:
    """Times of the layers that a group's channels go through, all other groups whole.

    Attributes:
        group: its name.
        widths: that were tried, ascending.
        seconds: that all its layers together took at each width.
    """

    group: str
    widths: tuple[int, ...]
    seconds: tuple[float, ...]


def staircase(
    analysis: Analysis, group: str, *, widths: Sequence[int] | None = None, seconds: float = 1.0
) -> Staircase:
    """Measure ``group`` of the model at several widths, which take turns.

    Args:
        analysis: of the model, whose weights have values.
        group: its name.
        widths: default, 8 from an eighth of the group to all of it.
        seconds: that each width is run for, about.

    Raises:
        BenchError: there is no such group, or no such width.
    """
    if group not in analysis.groups:
        raise BenchError(f"no group is called {group!r}; there are {', '.join(analysis.groups)}")
    size = analysis.groups[group].size
    if widths is None:
        step = max(1, size // WIDTHS)
        widths = range(size, max(0, size // WIDTHS - 1), -step)
    tried = sorted(set(widths))
    if not tried or tried[0] < 1 or tried[-1] > size:
        raise BenchError(f"group {group!r} has widths from 1 to {size}; {list(widths)} is not among them")
    device, _ = device_of(analysis.graph)
    inputs = map_tensors(lambda tensor: stand_in(tensor, device), analysis.example_inputs)
    models = {}
    for width in tried:
        plan = Plan({group: range(width)}, analysis.sizes, analysis.options)
        models[str(width)] = rewrite(analysis.graph, analysis, plan)[0].eval()
    with torch.no_grad():
        times = by_module(models, inputs, LAYERS * seconds)
    paths = layers_of(analysis.groups[group])
    taken = [sum(times[str(width)].get(path, 0.0) for path in paths) for width in tried]
    return Staircase(group, tuple(tried), tuple(taken))


def find_tallest(analysis: Analysis) -> str:
    """The group whose channels cost the most FLOPs in all: the one whose steps matter most."""
    from fxprune.budget.cost import marginal

    costs = marginal(analysis, "flops")
    return max(costs, key=lambda name: float(costs[name].sum()))
