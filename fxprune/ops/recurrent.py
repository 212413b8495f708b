"""Recurrent layers. They run on names as what torch makes of them: matrix products, chunks and pointwise operators."""

from typing import Any

from torch import nn

from fxprune.rewrite.attributes import Shape, attributes


@attributes(nn.RNNBase)
def recurrent_attributes(layer: Any, input: Shape, out: Shape) -> dict[str, Any]:
    return {"input_size": layer.get_parameter("weight_ih_l0").shape[1]}
