"""Custom: what operators outside ATen do to channels, told in the letters of an einsum."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from fxprune.channels.labels import Label, Labels, Operand, join_labels, pin_axes, settle_labels, varying_axes
from fxprune.channels.tensor import Call, as_operand, rule
from fxprune.errors import AnalysisError
from fxprune.graph.inputs import tensors_in


def register_operator(operator: Any, letters: str) -> None:
    """Say what a custom operator does to the channels of its arguments, so that they need not be frozen.

    ``letters`` names every axis of every tensor that the operator takes, in the order of its arguments, and of every
    one that it returns: ``"b c h w, c -> b c h w"``. Where a letter stands in several tensors their channels go
    together, from all of them. A letter that only one argument has, and no result, is an axis that the operator mixes:
    its channels stay. You say by this that the operator does the same, channel by channel, with fewer of them.

    Args:
        operator: a ``torch.library`` operator, ``torch.ops.mylib.myop`` or ``"mylib::myop"``.
        letters: of all its tensors; those that are None in a call are passed over.

    Raises:
        AnalysisError: there is no such operator, or the letters can't be read.

    >>> register_operator("torchvision::roi_align", "n c h w, k r -> k c p q")
    """
    packet = operator.overloadpacket if isinstance(operator, OpOverload) else operator
    name = str(packet._qualified_op_name if isinstance(packet, OpOverloadPacket) else packet)
    library, _, short = name.partition("::")
    if not short or library == "aten" or not hasattr(getattr(torch.ops, library), short):
        raise AnalysisError(
            f"operator={operator!r:.60} is no custom operator: give torch.ops.mylib.myop or 'mylib::myop', made with "
            "torch.library"
        )
    inputs, outputs = parse_letters(letters)
    for part in (*inputs, *outputs):
        sound = all(len(letter) == 1 and letter.isalpha() for letter in part) and len({*part}) == len(part)
        if "->" not in letters or not sound:
            raise AnalysisError(
                f"letters={letters!r} can't be read: write 'b c h w, c -> b c h w', each axis one letter, no letter "
                "twice in one tensor"
            )
    rule(name)(partial(apply_letters, letters))


def parse_letters(letters: str) -> tuple[list[list[str]], list[list[str]]]:
    """The letters of each argument, and of each result."""
    arguments, _, returned = letters.partition("->")
    return [part.split() for part in arguments.split(",")], [part.split() for part in returned.split(",")]


def apply_letters(letters: str, call: Call) -> Any:
    """The rule of an operator with these letters."""
    inputs, outputs = parse_letters(letters)
    tensors, results = tensors_in((call.args, call.kwargs)), tensors_in(call.out)
    expected = [len(side) for side in (*inputs, *outputs)]
    if len(tensors) != len(inputs) or [tensor.ndim for tensor in (*tensors, *results)] != expected:
        raise AnalysisError(
            f"{call.func} is registered with letters {letters!r}, but here it takes tensors with "
            f"{[tensor.ndim for tensor in tensors]} axes and returns some with {[result.ndim for result in results]}"
        )
    seen = [letter for side in (*inputs, *outputs) for letter in side]
    order = list(dict.fromkeys(seen))
    operands = [spread_over(order, side, as_operand(tensor)) for side, tensor in zip(inputs, tensors, strict=True)]
    mixed = [order.index(letter) for letter in order if seen.count(letter) == 1]
    labels = join_labels(call.names, operands, len(order))
    labels = settle_labels(
        call.names, (pin_axes(call.names, label, mixed, f"mixed by {call.func}") for label in labels)
    )
    several = [labels_over(call, order, side, labels) for side in outputs]
    return several if not isinstance(call.out, Tensor) else several[0]


def spread_over(order: Sequence[str], letters: Sequence[str], value: Operand) -> Operand:
    """A value with one axis for each letter of ``order``; of size 1 for those that it lacks."""
    axes = [letters.index(letter) for letter in order if letter in letters]

    def shaped(sizes: Sequence[int]) -> list[int]:
        return [sizes[letters.index(letter)] if letter in letters else 1 for letter in order]

    labels = tuple(label.transpose(axes).reshape(shaped(label.shape)) for label in value.labels)
    return Operand(labels, shaped(value.shape), value.source)


def labels_over(call: Call, order: Sequence[str], letters: Sequence[str], labels: Labels) -> Labels:
    """``labels`` over the letters of one result."""
    lacking = [at for at, letter in enumerate(order) if letter not in letters]
    axes = [order.index(letter) for letter in letters]
    kept: list[Label] = []
    for label in labels:
        if {*varying_axes(label)} & {*axes}:
            label = pin_axes(call.names, label, lacking, f"mixed by {call.func}")
            kept.append(label.transpose([*axes, *lacking]).reshape([label.shape[axis] for axis in axes]))
    return settle_labels(call.names, kept)


rule("torchvision::roi_align")(partial(apply_letters, "n c h w, k r -> k c p q"))
rule("torchvision::roi_pool")(partial(apply_letters, "n c h w, k r -> k c p q, k c p q"))
