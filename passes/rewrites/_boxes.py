"""Convolutions whose kernels have their weights in boxes, as dense ones with kernels of that size."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

SPEEDUP = 1.05  # that a layer must gain at least


@dataclass(frozen=True)
class Choice:
    """What becomes of a convolution.

    Attributes:
        layer: its path.
        form: what could take its place, or None.
        speedup: seconds of the layer over seconds of that; None where it was not measured.
        why: the layer stays, in words.
    """

    layer: str
    form: "Form | None" = None
    speedup: float | None = None
    why: str = ""

    @property
    def taken(self) -> bool:
        """Whether the layer is rewritten."""
        return self.form is not None and (self.speedup is None or self.speedup >= SPEEDUP)

    def __str__(self) -> str:
        if self.form is None:
            return f"{self.layer} stays: {self.why}"
        size = "×".join(map(str, self.form.conv.kernel_size))
        times = "" if self.speedup is None else f", {self.speedup:.2f} times as fast"
        return f"{self.layer} {'becomes' if self.taken else 'does not become'} {size}{times}"


@dataclass(frozen=True)
class Form:
    """A dense convolution with smaller kernels, and the depthwise one that moves channels.

    Attributes:
        conv: its buffer ``pack``, float[channels, 1, h, w], is the kernel of the depthwise one.
        before: whether that comes first, and moves input channels; else it moves output channels.
        padding: of the depthwise one.
    """

    conv: nn.Conv2d
    before: bool
    padding: tuple[int, ...]

    @classmethod
    def of(cls, conv: nn.Conv2d, before: bool) -> "Form | None":
        """What does the same as ``conv``; None where that saves nothing."""
        if not before and conv.stride != (1, 1):
            return None  # all that the stride leaves out would have to be computed
        weight, groups = conv.weight.detach(), conv.groups
        out, inner, *kernel = weight.shape
        used = (weight != 0).reshape(groups, out // groups, inner, *kernel).any(1 if before else 2)
        (rows, height), (columns, width) = (
            bounding_box(used.any(3).flatten(0, 1)),
            bounding_box(used.any(2).flatten(0, 1)),
        )
        if [height, width] == kernel:
            return None
        along = (groups, 1, inner) if before else (groups, -1, 1)  # where the channels are on (group, filter, kernel)
        first, second = (
            at.reshape(along).expand(groups, out // groups, inner).reshape(out, inner) for at in (rows, columns)
        )
        boxes = weight.unfold(2, height, 1).unfold(3, width, 1)
        small = boxes[torch.arange(out)[:, None], torch.arange(inner), first, second]
        pack = weight.new_zeros(len(rows), 1, kernel[0] - height + 1, kernel[1] - width + 1)
        pack[torch.arange(len(rows)), 0, rows, columns] = 1
        padding = padding_of(conv)
        return cls(
            resize_convolution(conv, small, pack, (0, 0) if before else padding), before, padding if before else (0, 0)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """The result of the convolution."""
        pack: Any = self.conv.pack
        result: Tensor = self.conv(self.move(x, pack)) if self.before else self.move(self.conv(x), pack)
        return result

    def move(self, x: Any, pack: Any, call: Any = F.conv2d) -> Any:
        """Channels in their places."""
        return call(x, pack, None, (1, 1), self.padding, self.conv.dilation, len(self.conv.get_buffer("pack")))

    def put(self, graph: fx.Graph, node: fx.Node) -> None:
        """Replace a call of the original, ``node``."""

        def call(*args: Any) -> fx.Node:
            moved = graph.call_function(F.conv2d, args)
            moved.meta = dict(node.meta)
            return moved

        with graph.inserting_before(node):
            pack = graph.get_attr(f"{node.target}.pack")
            if self.before:
                node.args = (self.move(node.args[0], pack, call),)
        if not self.before:
            with graph.inserting_after(node):
                moved = self.move(node, pack, call)
            node.replace_all_uses_with(moved, lambda user: user is not moved)

    def key(self, x: Tensor) -> Any:
        """What the time depends on."""
        conv = self.conv
        settings = conv.weight.shape, conv.stride, conv.padding, conv.dilation, conv.groups, self.padding
        return self.before, settings, conv.get_buffer("pack").shape, x.shape, x.stride(), x.dtype


def bounding_box(used: Tensor) -> tuple[Tensor, int]:
    """Where along one axis the box of each channel begins, int64[channels], and its size.

    Args:
        used: bool[channels, taps], the taps that are not zero.
    """
    taps = used.shape[1]
    first = used.int().argmax(1)
    last = torch.where(used.any(1), taps - 1 - used.flip(1).int().argmax(1), first)
    size = int((last - first).max()) + 1
    return first.clamp(max=taps - size), size


def resize_convolution(conv: nn.Conv2d, weight: Tensor, pack: Tensor, padding: tuple[int, ...]) -> nn.Conv2d:
    """``conv`` with another weight and padding, and the buffer ``pack``."""
    new = copy.copy(conv)
    new.__dict__.update({name: dict(vars(conv)[name]) for name in ("_parameters", "_buffers")})
    new._non_persistent_buffers_set = set(conv._non_persistent_buffers_set)
    layout = torch.channels_last if conv.weight.stride(1) == 1 and conv.weight.shape[1] > 1 else torch.contiguous_format
    new.weight = nn.Parameter(weight.contiguous(memory_format=layout), conv.weight.requires_grad)
    new.kernel_size, new.padding = tuple(weight.shape[2:]), padding
    new._reversed_padding_repeated_twice = [side for side in reversed(padding) for _ in range(2)]
    new.register_buffer("pack", pack)
    return new


def padding_of(conv: nn.Conv2d) -> tuple[int, ...]:
    """The zeros on each side, in numbers."""
    if conv.padding == "same":
        return tuple(dilation * (size - 1) // 2 for dilation, size in zip(conv.dilation, conv.kernel_size, strict=True))
    return (0, 0) if isinstance(conv.padding, str) else tuple(conv.padding)
