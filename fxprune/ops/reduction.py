"""Reductions: reduced axes keep their size, but for sums of zeros and statistics of norms that are written by hand."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.channels.labels import Labels, freeze_labels, pin_axes, settle_labels, varying_axes
from fxprune.channels.tensor import STEPS, Call, as_operand, mark_norm, name_of, rule
from fxprune.graph.lowering import Lowered, Tensors, lowering
from fxprune.graph.shapes import Shape, plain_shape
from fxprune.ops.pointwise import same_shape
from fxprune.rewrite.kept import Kept
from fxprune.rewrite.kinds import mark_kind
from fxprune.rewrite.norms import norm_over_kept, put_back, take_kept

aten = torch.ops.aten
REDUCTIONS = (
    "sum mean amax amin aminmax prod any all logsumexp var std var_mean std_mean linalg_vector_norm norm argmax argmin "
    "max min median mode count_nonzero nansum"
)
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

mark_kind(
    "pool",
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(F.adaptive_avg_pool2d, F.max_pool2d, torch.mean, "mean"),
)


def for_each_result(call: Call, labels: Labels) -> Any:
    """``labels`` for each result of an operator that has one or several."""
    return [labels] * len(call.out) if isinstance(call.out, (tuple, list)) else labels


@rule(*REDUCTIONS.split(), keeps_zero=True)
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


@plain_shape("mean")
def mean_shape(x: Tensor, dims: Any = None, keep: bool = False, *rest: Any) -> Shape | None:
    if not isinstance(dims, (list, tuple)) or not dims or rest:
        return None
    gone = {axis % x.ndim for axis in dims}
    if len(gone) < len(dims):
        return None
    return tuple(1 if axis in gone else size for axis, size in enumerate(x.shape) if keep or axis not in gone)


def statistic_over_kept(statistic: Callable[..., Any], kept: Kept, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What norms written by hand call."""
    return statistic(take_kept(input, kept), *args, **kwargs)


for statistic in (
    *(torch.mean, Tensor.mean, torch.var, Tensor.var, torch.std, Tensor.std, torch.var_mean, torch.std_mean),
    *(torch.norm, Tensor.norm, torch.linalg.vector_norm),
):
    norm_over_kept(statistic)(partial(statistic_over_kept, statistic))


@norm_over_kept(F.normalize)
def normalize_over_kept(kept: Kept, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return put_back(F.normalize(take_kept(input, kept), *args, **kwargs), kept, input)


def normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Any:
    """``F.normalize``, which expands the lengths to the size of the channels before it divides."""
    return input / torch.linalg.vector_norm(input, p, dim, keepdim=True).clamp_min(eps)


STEPS[F.normalize] = normalize


@rule(*ALONG_AN_AXIS.split())
def along_an_axis(call: Call) -> Any:
    value = call.args[0]
    axis = call.arg("dim", -1) % value.ndim
    labels = (pin_axes(call.names, label, [axis], "normalized or ordered along") for label in as_operand(value).labels)
    return for_each_result(call, settle_labels(call.names, labels))


plain_shape("_safe_softmax")(same_shape)


@rule(*POOLS.split(), keeps_zero=True)
def pool(call: Call) -> Any:
    """Pooling and resizing mix positions of the trailing, spatial axes."""
    value = as_operand(call.args[0])
    for tensor in call.tensors:
        if tensor is not call.args[0]:  # where to sample
            freeze_labels(call.names, tensor.labels, "says where to sample")
    moved = [axis for axis, size in enumerate(value.shape) if axis >= 2 or size != call.shape[axis]]
    labels = (pin_axes(call.names, label, moved, "a spatial axis") for label in value.labels)
    return for_each_result(call, settle_labels(call.names, labels))


@plain_shape("_adaptive_avg_pool2d")
def adaptive_avg_pool2d_shape(x: Tensor, sizes: Sequence[int]) -> Shape | None:
    return (*x.shape[:-2], *sizes) if x.ndim in (3, 4) and len(sizes) == 2 else None


@lowering(nn.AdaptiveAvgPool2d)
def lower_adaptive_avg_pool2d(layer: Any, tensors: Tensors, x: Tensor, training: bool) -> Lowered | None:
    sizes = layer.output_size if isinstance(layer.output_size, tuple) else (layer.output_size,) * 2
    return None if None in sizes else (aten._adaptive_avg_pool2d.default, (x, sizes))
