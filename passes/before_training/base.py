"""BeforeTraining: methods that prune a network that is not trained yet, and the weights that it starts from."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from fxprune.errors import PlanError
from fxprune.options import allow_words, check_options
from fxprune.rewrite.param_map import ParamMap

from .._fresh import check_fresh, draw_weights
from ..base import Criterion, input_axis


@dataclass(frozen=True, kw_only=True)
class BeforeTraining(Criterion):
    """A criterion for a network that is not trained yet.

    Attributes:
        weights: what the compact network starts from. "keep": the initial weights of the channels that stay. "reinit":
            every layer draws new ones (``reset_parameters``), for the widths that it has now. "rescale": each weight
            times sqrt(inputs before / inputs now), so that its layer's output keeps its variance.
    """

    weights: str = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, PlanError, weights=allow_words("keep", "reinit", "rescale"))

    def finish(self, graph: nn.Module, compact: nn.Module, param_map: ParamMap) -> None:
        """Give ``compact``, cut from ``graph``, its initial weights. ``fxprune.prune`` calls this after the cut.

        Raises:
            PlanError: "reinit" can't, because a parameter belongs to a module without ``reset_parameters``.
        """
        if self.weights == "reinit":
            check_fresh(compact)
            draw_weights(compact)
        if self.weights == "rescale":
            before = dict(graph.named_parameters())
            for name, weight in compact.named_parameters():
                axis = input_axis(graph, name)
                if axis is not None and param_map[name][axis] is not None:
                    with torch.no_grad():
                        weight.mul_(math.sqrt(before[name].shape[axis] / weight.shape[axis]))
