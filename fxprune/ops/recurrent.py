"""Recurrent layers. They run on names as what torch makes of them: matrix products, chunks and pointwise operators.

So the rows of a unit in all gates, of all layers and both directions, go together: a layer has one ``hidden_size``.
"""

from typing import Any

import torch
from torch import nn

from fxprune.channels.labels import on_axis
from fxprune.channels.tensor import STEPS, ChannelTensor, states
from fxprune.graph.shapes import Shape
from fxprune.rewrite.attributes import attributes


@states(nn.RNN, nn.GRU, nn.LSTM)
def layer_states(layer: Any, x: ChannelTensor) -> Any:
    """float[layers * directions, batch, hidden], without batch where ``x`` has none: zeros at the first step."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    batch = () if x.ndim == 2 else (x.shape[0 if layer.batch_first else 1],)
    if not isinstance(layer, nn.LSTM):
        return named_zeros(x, (count, *batch, layer.hidden_size))
    return tuple(
        named_zeros(x, (count, *batch, size)) for size in (layer.proj_size or layer.hidden_size, layer.hidden_size)
    )


@states(nn.RNNCell, nn.GRUCell, nn.LSTMCell)
def cell_states(layer: Any, x: ChannelTensor) -> Any:
    """float[batch, hidden], without batch where ``x`` has none."""
    shape = (*x.shape[:-1], layer.hidden_size)
    return (named_zeros(x, shape), named_zeros(x, shape)) if isinstance(layer, nn.LSTMCell) else named_zeros(x, shape)


def named_zeros(x: ChannelTensor, shape: Shape) -> ChannelTensor:
    """Zeros in the precision of ``x`` with names of their own along the last axis."""
    label = on_axis(x.run.names.fresh(shape[-1]), len(shape) - 1, len(shape))
    return ChannelTensor(torch.zeros(shape, dtype=x.dtype, device=x.data_.device), (label,), x.run, "a first state")


def steps_first(function: Any) -> Any:
    """``function`` with steps on the first axis, whatever it is told: torch turns its result in place."""

    def call(x: Any, state: Any, weights: Any, has_biases: Any, *options: Any) -> Any:
        *settings, batch_first = options
        if not isinstance(has_biases, bool) or not batch_first:  # packed sequences have weights there, and no such flag
            return function(x, state, weights, has_biases, *options)
        result, *states = function(x.transpose(0, 1), state, weights, has_biases, *settings, False)
        return result.transpose(0, 1), *states

    return call


STEPS.update({function: steps_first(function) for function in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)})


@attributes(nn.RNNBase)
def recurrent_attributes(layer: Any, input: Shape, out: Shape) -> dict[str, Any]:
    gates = {"LSTM": 4, "GRU": 3}.get(layer.mode, 1)  # rows of its weights that a hidden unit has
    sizes = {"input_size": layer.weight_ih_l0.shape[1], "hidden_size": layer.weight_hh_l0.shape[0] // gates}
    return sizes | ({"proj_size": layer.weight_hh_l0.shape[1]} if layer.proj_size else {})


@attributes(nn.RNNCellBase)
def cell_attributes(layer: Any, input: Shape, out: Shape) -> dict[str, Any]:
    return {"input_size": layer.weight_ih.shape[1], "hidden_size": layer.weight_hh.shape[1]}
