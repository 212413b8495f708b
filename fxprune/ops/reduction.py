"""Reductions and normalizations: reduced axes keep their size; a norm over channels is allowed, and marked inexact."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.channels.labels import (
    Label,
    Labels,
    Operand,
    condense_label,
    freeze_labels,
    join_labels,
    pin_axes,
    reshape_label,
    settle_labels,
    varying_axes,
)
from fxprune.channels.tensor import Call, ChannelTensor, Norm, as_operand, name_of, register_rule
from fxprune.ops.pointwise import add_vector, with_vectors

REDUCTIONS = (
    "sum mean amax amin aminmax prod any all logsumexp var std var_mean std_mean linalg_vector_norm norm argmax argmin "
    "max min median mode count_nonzero nansum"
)
# What norms written by hand call. Where a node of the graph calls one, verify takes it over what is kept.
STATISTICS = {
    torch.mean,
    Tensor.mean,
    torch.var,
    Tensor.var,
    torch.std,
    Tensor.std,
    torch.var_mean,
    torch.std_mean,
    torch.norm,
    Tensor.norm,
    torch.linalg.vector_norm,
    F.normalize,
}
NOT_OF_ZEROS = "prod logsumexp mode any all count_nonzero argmax argmin".split()  # or not of zeros alone
ALONG_AN_AXIS = "_softmax _log_softmax softmax log_softmax _safe_softmax cumsum cumprod logcumsumexp sort topk kthvalue"
POOLS = (
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d "
    "avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d "
    "upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d "
    "_upsample_bicubic2d_aa reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d grid_sampler_2d grid_sampler_3d"
)


def for_each_result(call: Call, labels: Labels) -> Any:
    """``labels`` for each result of an operator that has one or several."""
    return [labels] * len(call.out) if isinstance(call.out, (tuple, list)) else labels


def for_first_result(call: Call, labels: Labels) -> Any:
    """``labels`` for the first result of an operator that may have others, statistics without names."""
    return [labels] + [()] * (len(call.out) - 1) if isinstance(call.out, (tuple, list)) else labels


@register_rule(*REDUCTIONS.split())
def reduce(call: Call) -> Any:
    value = as_operand(call.args[0])
    ndim = len(value.shape)
    dims = call.arg("dim")
    axes = range(ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    axes = sorted({axis % ndim for axis in axes})
    exact = value.zero and adds_up(call)
    labels = []
    for label in value.labels:
        if not varying_axes(label) or not set(varying_axes(label)) <= set(axes):
            labels.append(pin_axes(call.names, label, axes, "reduced"))
        elif call.run.statistic and not exact:
            mark_norm(call, label, tuple(varying_axes(label)))
        elif not exact:
            pin_axes(call.names, label, axes, "reduced")
    if len(call.shape) < ndim:
        kept = [axis for axis in range(ndim) if axis not in axes]
        labels = [label.reshape([label.shape[axis] for axis in kept]) for label in labels]
    call.zero = call.zero and name_of(call.func) not in NOT_OF_ZEROS
    return for_each_result(call, settle_labels(call.names, labels))


def adds_up(call: Call) -> bool:
    """Whether this is a sum, or the length of a vector: zeros add nothing to these."""
    name = name_of(call.func)
    return name == "sum" or (name in ("norm", "linalg_vector_norm") and (call.arg("ord", call.arg("p")) or 2) > 0)


@register_rule(*ALONG_AN_AXIS.split())
def along_an_axis(call: Call) -> Any:
    value = call.args[0]
    axis = call.arg("dim", -1) % value.ndim
    labels = (pin_axes(call.names, label, [axis], "normalized or ordered along") for label in as_operand(value).labels)
    call.zero = False
    return for_each_result(call, settle_labels(call.names, labels))


@register_rule("_weight_norm_interface", "_weight_norm")
def weight_norm(call: Call) -> Any:
    """V * g / |v|: a filter that is set to zero has no direction, so no cut could be compared with that."""
    for tensor in call.tensors:
        freeze_labels(call.names, tensor.labels, "weight_norm: remove the parametrization before pruning")
    return for_first_result(call, ())


@register_rule(*POOLS.split())
def pool(call: Call) -> Any:
    """Pooling and resizing mix positions of the trailing, spatial axes."""
    value = as_operand(call.args[0])
    moved = [axis for axis, size in enumerate(value.shape) if axis >= 2 or size != call.shape[axis]]
    labels = (pin_axes(call.names, label, moved, "a spatial axis") for label in value.labels)
    return for_each_result(call, settle_labels(call.names, labels))


@register_rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
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


@register_rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
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


@register_rule("native_group_norm")
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


def mark_norm(call: Call, label: Label, axes: tuple[int, ...]) -> None:
    """Note that the statistics of this norm change when channels of ``label`` go."""
    if any(label.shape[axis] > 1 for axis in axes):
        call.run.norms.append(Norm(call.run.mode, call.names.node, condense_label(label), axes))
