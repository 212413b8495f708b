"""ErdosRenyi: large layers are thinned more, by the densities of a random graph."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fxprune.budget.cost import Floats
from fxprune.budget.solver import output_axis
from fxprune.channels.analysis import Analysis
from fxprune.channels.groups import Group

from .allocator import Allocator, spread_evenly


@dataclass(frozen=True)
class ErdosRenyi(Allocator):
    """The Erdős–Rényi–Kernel (ERK) densities, as shares of channels.

    A layer whose weight has the shape (out, in, h, w) gets a density proportional to
    (out + in + h + w) / (out * in * h * w), at most 1. A group keeps this share of its channels; where several layers
    write it, numerator and denominator are summed over them. After Mocanu et al., "Scalable Training of Artificial
    Neural Networks with Adaptive Sparse Connectivity" (2018), and Evci et al., "Rigging the Lottery" (2020), who give
    it to single weights.
    """

    def worth(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group."""
        return {
            name: spread_evenly(group.size, density_of_layers(analysis, group))
            for name, group in analysis.groups.items()
        }


def density_of_layers(analysis: Analysis, group: Group) -> float:
    """The density of the layers that write ``group``, up to a factor that is the same for all groups."""
    shapes = {name: shape for name, shape in analysis.shapes.items() if len(shape) > 1}
    members = [member for member in group.members if member.parameter in shapes]
    writers = [member for member in members if member.axis == output_axis(analysis, member.parameter)]
    layer_shapes = [shapes[member.parameter] for member in writers or members]
    return sum(map(sum, layer_shapes)) / sum(map(math.prod, layer_shapes)) if layer_shapes else 1.0
