"""Normalizations: a norm over channels is allowed, and marked inexact; the others pin the axes that they run over."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.channels.labels import (
    Labels,
    Operand,
    freeze_labels,
    join_labels,
    pin_axes,
    reshape_label,
    settle_labels,
    varying_axes,
)
from fxprune.channels.tensor import (
    STEPS,
    WHOLE,
    Call,
    ChannelTensor,
    apply_operator,
    as_operand,
    mark_norm,
    rule,
)
from fxprune.graph.layers import BATCH_NORMS
from fxprune.graph.lowering import Lowered, Tensors, lowering
from fxprune.graph.shapes import Shape, plain_shape
from fxprune.ops.pointwise import add_vector, with_vectors
from fxprune.rewrite.attributes import attributes
from fxprune.rewrite.fit import CompactRun, find_argument, fitter, old_value, set_argument, value_of
from fxprune.rewrite.kept import Kept
from fxprune.rewrite.kinds import mark_kind
from fxprune.rewrite.norms import norm_over_kept, put_back, take_kept

aten = torch.ops.aten
mark_kind("norm", *BATCH_NORMS)


def for_first_result(call: Call, labels: Labels) -> Any:
    """``labels`` for the first result of an operator that may have others, statistics without names."""
    return [labels] + [()] * (len(call.out) - 1) if isinstance(call.out, (tuple, list)) else labels


@rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
      "cudnn_batch_norm", "_batch_norm_with_update", "_native_batch_norm_legit_functional")  # fmt: skip
def batch_norm(call: Call) -> Any:
    value = as_operand(call.args[0])
    batch_and_space = [axis for axis in range(len(value.shape)) if axis != 1]
    if call.arg("running_mean") is None:  # of a weight, for one: a norm like any other
        labels = value.labels
        for label in labels:
            mark_norm(call, label, tuple(axis for axis in batch_and_space if label.shape[axis] > 1))
    else:
        labels = settle_labels(
            call.names, (pin_axes(call.names, label, batch_and_space, "normalized") for label in value.labels)
        )
    labels = with_vectors(call, Operand(labels, value.shape, value.source), call.args[1:5], 1)
    weight = call.args[1]
    affine = weight is not None and as_operand(weight).zero and add_vector(labels, call.args[2], 1)
    call.zero = affine or (value.zero and weight is None and call.arg("running_mean") is None)
    if isinstance(weight, ChannelTensor) and weight.parameter is not None:
        call.run.batch_norm_scales.add(weight.parameter)
    return for_first_result(call, labels)


def batch_norm_in_steps(
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    *rest: Any,
    **more: Any,
) -> Any:
    """``F.batch_norm`` as a whole: of an empty batch torch makes another operator, of the first channel alone."""
    if input.numel():
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, *rest, **more)
    arguments = (input, weight, bias, running_mean, running_var, training, 0.1, 1e-5, False)
    return apply_operator(aten.batch_norm.default, arguments, {})


STEPS[F.batch_norm] = batch_norm_in_steps
WHOLE[torch.batch_norm] = aten.batch_norm.default


@plain_shape("batch_norm")
def batch_norm_shape(x: Tensor, *vectors: Any) -> Shape | None:
    fits = x.ndim > 1 and all(vector is None or vector.shape == x.shape[1:2] for vector in vectors[:4])
    return x.shape if fits else None


@lowering(nn.BatchNorm2d)
def lower_batch_norm(layer: Any, tensors: Tensors, x: Tensor, training: bool) -> Lowered | None:
    if x.ndim != 4 or not layer.track_running_stats or (training and x.numel() == x.shape[1]):
        return None
    vectors = (tensors(name) for name in ("weight", "bias", "running_mean", "running_var"))
    return aten.batch_norm.default, (x, *vectors, training, layer.momentum, layer.eps, False)


@attributes(nn.modules.batchnorm._NormBase)
def batch_norm_attributes(layer: Any, input: Shape, out: Shape) -> dict[str, Any]:
    return {"num_features": input[1] if len(input) > 1 else layer.num_features}


@norm_over_kept(F.batch_norm)
def batch_norm_over_kept(
    kept: Kept, input: Tensor, mean: Any, var: Any, weight: Any = None, bias: Any = None, *rest: Any, **more: Any
) -> Tensor:
    weight, bias = take_vectors(kept[1:2], weight, bias)
    return put_back(F.batch_norm(take_kept(input, kept), mean, var, weight, bias, *rest, **more), kept, input)


@norm_over_kept(F.instance_norm)
def instance_norm_over_kept(
    kept: Kept,
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    *rest: Any,
    **more: Any,
) -> Tensor:
    weight, bias = take_vectors(kept[1:2], weight, bias)
    small = F.instance_norm(take_kept(input, kept), running_mean, running_var, weight, bias, *rest, **more)
    return put_back(small, kept, input)


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def layer_norm(call: Call) -> Any:
    value = as_operand(call.args[0])
    ndim = len(value.shape)
    axes = range(ndim - len(call.args[1]), ndim)
    vectors = [as_operand(vector) for vector in (call.arg("weight"), call.arg("bias")) if vector is not None]
    labels = join_labels(call.names, [value, *vectors], ndim)
    for label in labels:
        mark_norm(call, label, tuple(axis for axis in varying_axes(label) if axis in axes))
    call.zero = all(set(varying_axes(label)) <= set(axes) for label in labels)
    return for_first_result(call, labels)


WHOLE |= {
    F.layer_norm: aten.layer_norm.default,
    torch.layer_norm: aten.layer_norm.default,
    F.rms_norm: aten.rms_norm.default,
    torch.rms_norm: aten.rms_norm.default,
}


@plain_shape("layer_norm", F.layer_norm)
def layer_norm_shape(x: Tensor, shape: Sequence[int], weight: Any = None, bias: Any = None, *rest: Any) -> Shape | None:
    normalized = tuple(shape)
    fits = x.shape[-len(normalized) :] == normalized and all(
        vector is None or vector.shape == normalized for vector in (weight, bias)
    )
    return x.shape if fits else None


@lowering(nn.LayerNorm)
def lower_layer_norm(layer: Any, tensors: Tensors, x: Tensor, training: bool) -> Lowered | None:
    shape = list(layer.normalized_shape)
    return aten.layer_norm.default, (x, shape, tensors("weight"), tensors("bias"), layer.eps, False)


@fitter("layer_norm", "rms_norm")
def fit_layer_norm(run: CompactRun, node: fx.Node) -> None:
    """The normalized shape is that of the trailing axes."""
    shape = value_of(run, find_argument(node, 1, "normalized_shape"))
    set_argument(node, 1, "normalized_shape", tuple(run.after[node.name].shape[-len(tuple(shape)) :]))


@attributes(nn.LayerNorm, nn.RMSNorm)
def layer_norm_attributes(layer: Any, input: Shape, out: Shape) -> dict[str, Any]:
    if not input:  # nothing is known of what it is input
        return {} if layer.weight is None else {"normalized_shape": tuple(layer.weight.shape)}
    return {"normalized_shape": tuple(input[-len(layer.normalized_shape) :])}


@norm_over_kept(F.layer_norm)
def layer_norm_over_kept(
    kept: Kept, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    small, axes = take_kept(input, kept), len(normalized_shape)
    weight, bias = take_vectors(kept[-axes:], weight, bias)
    return put_back(F.layer_norm(small, small.shape[-axes:], weight, bias, eps), kept, input)


@norm_over_kept(F.rms_norm)
def rms_norm_over_kept(
    kept: Kept, input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Tensor:
    small, axes = take_kept(input, kept), len(normalized_shape)
    (weight,) = take_vectors(kept[-axes:], weight)
    return put_back(F.rms_norm(small, small.shape[-axes:], weight, eps), kept, input)


@rule("native_group_norm")
def group_norm(call: Call) -> Any:
    """Whole groups go, which is exact; with a single group it is a layer norm over the channels."""
    value = as_operand(call.args[0])
    groups = call.arg("group")
    batch, channels, *space = value.shape
    labels = with_vectors(call, value, (call.arg("weight"), call.arg("bias")), 1)
    labels = settle_labels(
        call.names, (pin_axes(call.names, label, range(2, len(value.shape)), "normalized") for label in labels)
    )
    for label in labels:
        if groups == 1:
            mark_norm(call, label, (1,))
        elif label.shape[1] > 1:
            split = reshape_label(label, value.shape, (batch, groups, channels // groups, *space))
            pin_axes(call.names, split, [2], "normalized in one group")
    affine = call.arg("weight") is not None and add_vector(labels, call.arg("bias"), 1)
    call.zero = groups == 1 or affine or (value.zero and call.arg("weight") is None)
    return for_first_result(call, labels)


@fitter("group_norm")
def fit_group_norm(run: CompactRun, node: fx.Node) -> None:
    """Whole groups went; a single group stays one."""
    groups = old_value(run, find_argument(node, 1, "num_groups"))
    if groups > 1:
        per_group = run.before[node.name].shape[1] // groups
        set_argument(node, 1, "num_groups", run.after[node.name].shape[1] // per_group)


@attributes(nn.GroupNorm)
def group_norm_attributes(layer: Any, input: Shape, out: Shape) -> dict[str, Any]:
    size = layer.num_channels // layer.num_groups
    return {"num_groups": 1 if layer.num_groups == 1 else input[1] // size, "num_channels": input[1]}


@norm_over_kept(F.group_norm)
def group_norm_over_kept(
    kept: Kept, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    weight, bias = take_vectors(kept[1:2], weight, bias)
    return put_back(F.group_norm(take_kept(input, kept), num_groups, weight, bias, eps), kept, input)


def take_vectors(kept: Kept, *vectors: Any) -> list[Any]:
    """What is kept of weights and biases, where a norm has them."""
    return [None if vector is None else take_kept(vector, kept) for vector in vectors]


@rule("_weight_norm_interface", "_weight_norm", keeps_zero=True)
def weight_norm(call: Call) -> Any:
    """V * g / |v|: a filter that is set to zero has no direction, so no cut could be compared with that."""
    for tensor in call.tensors:
        freeze_labels(call.names, tensor.labels, "weight_norm: remove the parametrization before pruning")
    return for_first_result(call, ())
