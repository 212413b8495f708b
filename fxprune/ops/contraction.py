"""Contractions: convolution, matrix products and attention, all one kernel on einsum letters.

The contracted letter's names merge, free letters pass, and groups and heads are batch letters. Where the names of an
operand vary along a batch letter and the contracted one, a policy chooses what is removed as a whole: the batch index
with all that belongs to it (a head, a group), or the same contracted index in every head or group.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.channels.labels import (
    Label,
    Labels,
    Operand,
    join_labels,
    label_along,
    pin_axes,
    reshape_label,
    settle_labels,
    varying_axes,
)
from fxprune.channels.tensor import WHOLE, Call, Term, as_operand, rule
from fxprune.graph.layers import CONVOLUTIONS, TRANSPOSED
from fxprune.graph.lowering import Lowered, Tensors, lowering
from fxprune.graph.shapes import Shape, plain_shape
from fxprune.graph.traced import Mode
from fxprune.ops.pointwise import add_vector, with_vectors
from fxprune.rewrite.attributes import attributes
from fxprune.rewrite.fit import CompactRun, find_argument, fitter, old_value, set_argument
from fxprune.rewrite.kinds import mark_kind

aten = torch.ops.aten
mark_kind("contraction", *CONVOLUTIONS, *TRANSPOSED, nn.Linear)


@dataclass
class Factor:
    """An operand of a contraction: its labels have one axis for each of ``letters``."""

    letters: str
    labels: Labels
    source: str
    zero: bool

    def along(self, letter: str) -> Label | None:
        """The label that varies along ``letter``."""
        return label_along(self.labels, self.letters.index(letter)) if letter in self.letters else None

    def varies(self, label: Label) -> set[str]:
        """The letters along which ``label`` varies."""
        return {self.letters[axis] for axis in varying_axes(label)}

    def pin(self, call: Call, letters: str, why: str) -> None:
        """No pruning may change the size of ``letters``."""
        axes = [self.letters.index(letter) for letter in letters if letter in self.letters]
        self.labels = settle_labels(call.names, (pin_axes(call.names, label, axes, why) for label in self.labels))


def contract_letters(
    call: Call, a: Factor, b: Factor, out: str, sizes: dict[str, int], policy: str, extra: int = 1
) -> Labels:
    """The labels of ``einsum(a, b -> out)``, over the letters of ``out``. ``extra`` multiplies the FLOPs."""
    both = [letter for letter in a.letters if letter in b.letters and sizes[letter] > 1]
    batch = [letter for letter in both if letter in out]
    contracted = [letter for letter in both if letter not in out]
    site = f"{call.names.node} {a.letters},{b.letters}"
    for letter in contracted:
        for group in batch:
            choose_policy(call, a, b, group, letter, sizes, policy, site)
        if call.run.policies.get(site) == "whole":  # also where one is left: it has no parts now
            for side in (a, b):
                side.pin(call, letter, "shared by all groups")
        agree_letters(call, a, b, letter)
        if not (a.zero or b.zero):
            for side in (a, b):
                side.pin(call, letter, "summed where it is not zero")
    for letter in batch:
        agree_letters(call, a, b, letter)

    # Along a letter of both, their labels have the same names now, and vary along nothing else: one stands for both.
    factors = [(a, label) for label in a.labels]
    factors += [(b, label) for label in b.labels if b.varies(label).isdisjoint(a.letters)]
    if call.run.mode is Mode.EVAL:
        named = {letter for side, label in factors for letter in side.varies(label)}
        constant = math.prod(sizes[letter] for letter in {*a.letters, *b.letters} - named)
        call.run.flops.append(Term(2 * constant * extra, tuple(label for _, label in factors), call.names.node))
    results = [(side, label) for side, label in factors if side.varies(label) <= set(out)]
    for _, label in results:
        call.names.produce(label)
    call.zero = all(
        side.zero or (partner.zero and all(partner.along(letter) is not None for letter in side.varies(label)))
        for side, label in results
        for partner in (a, b)
        if partner is not side
    )
    return tuple(label_over(out, side, label) for side, label in results)


def choose_policy(
    call: Call, a: Factor, b: Factor, group: str, letter: str, sizes: dict[str, int], policy: str, site: str
) -> None:
    """Make each operand's names vary along ``group`` (a batch letter) or along ``letter`` (contracted), not both.

    What was chosen at ``site`` before, in a model that this one was cut from, stands.
    """
    # The names of a grouped convolution's input fill a grid, (groups, channels of a group), and so do those of
    # attention's queries, (heads, features). What stays must be a rectangle of it, or the compact model would need
    # groups of unequal sizes. There are two ways to ensure that, and both merge names now, while the letters are known.
    sides = [side for side in (a, b) if (label := side.along(letter)) is not None and group in side.varies(label)]
    if not sides:
        return
    # "whole": all of a group is one channel. "within": the same place in every group is one. The longer axis leaves
    # more channels to choose from.
    if policy == "auto":
        policy = "whole" if sizes[group] >= sizes[letter] else "within"
    # Where one operand can't lose a group (it is a constant there, or frozen), no group can go: only places can.
    if any(is_fixed(call, side, group) for side in (a, b)):
        policy = "within"
    policy = call.run.policies.setdefault(site, policy)
    for side in sides:
        side.pin(call, letter if policy == "whole" else group, "shared by all groups")


def agree_letters(call: Call, a: Factor, b: Factor, letter: str) -> None:
    """Both operands vary along ``letter``, by the same names alone, or neither may."""
    for factor, partner in ((a, b), (b, a)):
        label = factor.along(letter)
        partner_label = partner.along(letter)
        if partner_label is not None and (
            label is None or (len(varying_axes(partner_label)) > 1 and is_fixed(call, factor, letter))
        ):
            partner.pin(call, letter, f"meets {factor.source}")
    for side in (a, b):
        label = side.along(letter)
        if label is not None and len(varying_axes(label)) > 1:
            side.pin(call, "".join(side.varies(label) - {letter}), "shared by all groups")
    one, two = a.along(letter), b.along(letter)
    if one is not None and two is not None:
        call.names.merge(one.ravel(), two.ravel())


def is_fixed(call: Call, side: Factor, letter: str) -> bool:
    """Whether ``side`` can't be pruned along ``letter`` whatever is decided here."""
    label = side.along(letter)
    return label is None or bool(call.names.frozen(label).all())


def label_over(letters: str, side: Factor, label: Label) -> Label:
    """``label`` with one axis for each of ``letters``, in their order; letters it lacks get size 1."""
    order = [side.letters.index(letter) for letter in letters if letter in side.letters]
    dropped = [axis for axis in range(label.ndim) if axis not in order]
    shape = [label.shape[side.letters.index(letter)] if letter in side.letters else 1 for letter in letters]
    return label.transpose([*order, *dropped]).reshape(shape)


@rule("mm")
def mm(call: Call) -> Labels:
    return contract_matrices(call, as_operand(call.args[0]), as_operand(call.args[1]), "mk", "kn", "mn")


@rule("bmm")
def bmm(call: Call) -> Labels:
    return contract_matrices(call, as_operand(call.args[0]), as_operand(call.args[1]), "bmk", "bkn", "bmn")


@rule("addmm", "baddbmm")
def addmm(call: Call) -> Labels:
    bias, a, b = (as_operand(value) for value in call.args[:3])
    batch = "b" if len(a.shape) == 3 else ""
    labels = contract_matrices(call, a, b, f"{batch}mk", f"{batch}kn", f"{batch}mn")
    labels = join_labels(call.names, [Operand(labels, call.shape), bias], len(call.shape))
    call.zero = call.zero and add_vector(labels, call.args[0], len(call.shape) - 1)
    return labels


@rule("linear")
def linear(call: Call) -> Labels:
    x, w = as_operand(call.args[0]), as_operand(call.args[1])
    rest = "abdefghijl"[: len(x.shape) - 1]
    labels = contract_matrices(call, x, w, f"{rest}k", "ok"[-len(w.shape) :], f"{rest}o"[: len(call.shape)])
    return with_bias(call, labels, call.arg("bias"), len(call.shape) - 1)


WHOLE[F.linear] = aten.linear.default


@plain_shape("linear", F.linear)
def linear_shape(x: Tensor, w: Tensor, bias: Any = None) -> Shape | None:
    fits = w.ndim == 2 and x.ndim > 0 and x.shape[-1] == w.shape[1] and (bias is None or bias.shape == w.shape[:1])
    return (*x.shape[:-1], w.shape[0]) if fits else None


@lowering(nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
def lower_linear(layer: Any, tensors: Tensors, x: Tensor, training: bool) -> Lowered | None:
    return aten.linear.default, (x, tensors("weight"), tensors("bias"))


@attributes(nn.Linear)
def linear_attributes(layer: Any, input: Shape, out: Shape) -> dict[str, Any]:
    return {"in_features": layer.weight.shape[1], "out_features": layer.weight.shape[0]}


@rule("mv", "dot")
def mv(call: Call) -> Labels:
    a, b = (as_operand(value) for value in call.args[:2])
    return contract_matrices(call, a, b, "mk"[-len(a.shape) :], "k", "m"[: len(call.shape)])


def contract_matrices(call: Call, a: Operand, b: Operand, left: str, right: str, out: str) -> Labels:
    sizes = dict(zip(left, a.shape, strict=True)) | dict(zip(right, b.shape, strict=True))
    policy = call.run.heads
    one, two = Factor(left, a.labels, a.source, a.zero), Factor(right, b.labels, b.source, b.zero)
    return contract_letters(call, one, two, out, sizes, policy)


@rule("convolution", "_convolution")
def convolution(call: Call) -> Labels:
    x, w = as_operand(call.args[0]), as_operand(call.args[1])
    transposed, groups = call.arg("transposed"), call.arg("groups")
    a = cost_factor(call, x, "bgc", 1, groups, "a spatial axis")
    b = cost_factor(call, w, "gco" if transposed else "goc", 0, groups, "a kernel's axis")
    sizes = {"b": x.shape[0], "g": groups, "c": x.shape[1] // groups, "o": call.shape[1] // groups}
    window = math.prod(w.shape[2:]) * math.prod((x if transposed else call).shape[2:])
    labels = contract_letters(call, a, b, "bgo", sizes, call.run.groups, window)
    across = [label for label in labels if label.shape[1] > 1]
    if across:
        shared = (pin_axes(call.names, label, [2], "shared by all groups") for label in labels if label.shape[1] == 1)
        labels = settle_labels(call.names, (*across, *shared))
    before, after = (x.shape[0], groups, sizes["o"]), (*call.shape[:2], *[1] * len(x.shape[2:]))
    labels = tuple(reshape_label(label, before, after) for label in labels)
    return with_bias(call, labels, call.args[2], 1)


@plain_shape("convolution")
def convolution_shape(
    x: Tensor, w: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, more: Any, groups: int
) -> Shape | None:
    space = w.ndim - 2
    if transposed or x.ndim != w.ndim or x.shape[1] != w.shape[1] * groups or w.shape[0] % groups:
        return None
    steps = (list(of) * space if len(of) == 1 else of for of in (padding, dilation, stride))
    sizes = zip(x.shape[2:], w.shape[2:], *steps, strict=True)
    after = [(size + 2 * pad - gap * (window - 1) - 1) // step + 1 for size, window, pad, gap, step in sizes]
    return (x.shape[0], w.shape[0], *after) if min(after) > 0 else None


@lowering(*CONVOLUTIONS)
def lower_convolution(layer: Any, tensors: Tensors, x: Tensor, training: bool) -> Lowered | None:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or x.ndim != len(layer.kernel_size) + 2:
        return None
    zeros = (0,) * len(layer.kernel_size)
    steps = layer.stride, layer.padding, layer.dilation
    return aten.convolution.default, (x, tensors("weight"), tensors("bias"), *steps, False, zeros, layer.groups)


@fitter("conv1d", "conv2d", "conv3d")
def fit_convolution(run: CompactRun, node: fx.Node) -> None:
    """The groups that stay."""
    if old_value(run, find_argument(node, 6, "groups", 1)) != 1:
        source, weight = (run.env[find_argument(node, at, name)] for at, name in enumerate(("input", "weight")))
        set_argument(node, 6, "groups", source.shape[1 - weight.ndim] // weight.shape[1])


@fitter("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def fit_transposed(run: CompactRun, node: fx.Node) -> None:
    """The groups that stay."""
    if old_value(run, find_argument(node, 6, "groups", 1)) != 1:
        weight = run.env[find_argument(node, 1, "weight")]
        set_argument(node, 6, "groups", run.after[node.name].shape[1 - weight.ndim] // weight.shape[1])


@attributes(nn.MultiheadAttention)
def attention_attributes(layer: Any, input: Shape, out: Shape) -> dict[str, Any]:
    width = layer.out_proj.weight.shape[0]
    widths = [weight if weight is None else weight.shape[1] for weight in (layer.k_proj_weight, layer.v_proj_weight)]
    key, value = (width if given_width is None else given_width for given_width in widths)
    return {"embed_dim": width, "kdim": key, "vdim": value, "head_dim": width // layer.num_heads}


@attributes(*CONVOLUTIONS)
def convolution_attributes(layer: Any, input: Shape, out: Shape) -> dict[str, Any]:
    weight = layer.weight.shape
    groups = 1 if layer.groups == 1 else input[1 - len(weight)] // weight[1]
    return {"in_channels": weight[1] * groups, "out_channels": weight[0], "groups": groups}


@attributes(*TRANSPOSED)
def transposed_attributes(layer: Any, input: Shape, out: Shape) -> dict[str, Any]:
    weight = layer.weight.shape
    groups = 1 if layer.groups == 1 else out[1 - len(weight)] // weight[1]
    return {"in_channels": weight[0], "out_channels": weight[1] * groups, "groups": groups}


def with_bias(call: Call, labels: Labels, bias: Any, axis: int) -> Labels:
    """The labels of a contraction's result when ``bias``, if given, is added along ``axis``."""
    labels = with_vectors(call, Operand(labels, call.shape), [bias], axis)
    call.zero = call.zero and add_vector(labels, bias, axis)
    return labels


def cost_factor(call: Call, value: Operand, letters: str, axis: int, groups: int, why: str) -> Factor:
    """An operand of a convolution: its first two axes, ``axis`` viewed as (groups, rest). The others are pinned."""
    pinned = (pin_axes(call.names, label, range(2, label.ndim), why) for label in value.labels)
    labels = (label.reshape(label.shape[:2]) for label in settle_labels(call.names, pinned))
    before = value.shape[:2]
    after = (*before[:axis], groups, before[axis] // groups, *before[axis + 1 :])
    return Factor(letters, tuple(reshape_label(label, before, after) for label in labels), value.source, value.zero)


ATTENTION = (
    "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_attention_math _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable"
)


@rule(*ATTENTION.split())
def attention(call: Call) -> Any:
    """softmax(q k^T + mask) v, its leading axes batch letters."""
    query, *sources = (as_operand(tensor) for tensor in call.args[:3])
    key, value = (repeat_heads(source, tuple(query.shape)) for source in sources)
    letters = "bhij"[: len(query.shape) - 2]
    scores = contract_matrices(call, query, key, f"{letters}mk", f"{letters}nk", f"{letters}mn")
    shape = (*query.shape[:-1], key.shape[-2])
    mask = call.arg("attn_mask", call.arg("attn_bias"))
    operands: Sequence[Operand] = [Operand(scores, shape)] + ([as_operand(mask)] if mask is not None else [])
    weights = Operand(join_labels(call.names, operands, len(shape)), shape, "attention weights", zero=False)
    labels = contract_matrices(call, weights, value, f"{letters}mn", f"{letters}nk", f"{letters}mk")
    return [labels] + [()] * (len(call.out) - 1) if isinstance(call.out, (tuple, list)) else labels


def repeat_heads(value: Operand, shape: Shape) -> Operand:
    """Keys or values of fewer heads than the queries of ``shape`` have: each for as many queries."""
    if len(shape) < 3 or value.shape[-3] == shape[-3]:
        return value
    times = shape[-3] // value.shape[-3]
    labels = (label.repeat(times, -3) if label.shape[-3] > 1 else label for label in value.labels)
    return replace(value, labels=tuple(labels), shape=(*value.shape[:-3], shape[-3], *value.shape[-2:]))


@fitter("scaled_dot_product_attention")
def fit_attention(run: CompactRun, node: fx.Node) -> None:
    """The default scale is that of the original head size."""
    query = find_argument(node, 0, "query").name
    size = run.before[query].shape[-1]
    if node.kwargs.get("scale") is None and run.after[query].shape[-1] != size:
        node.kwargs = {**node.kwargs, "scale": size**-0.5}
