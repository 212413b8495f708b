"""Tiny networks that cover, one idea each, what real models do to their channels.

Each runs in about a millisecond. ``MODELS`` lists them by name; ``prepare(MODELS[name])`` gives a model with random,
nowhere blind, parameters and its inputs. Where a path is frozen by nature, another layer of the same model stays
prunable, unless ``prunable`` is False.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One network: how to make it, what to feed it, and what may be expected of it."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]  # args, or (args, kwargs) where the model needs keywords
    prunable: bool = True  # False: every channel is frozen by nature
    inexact: bool = False  # a norm across channels runs over an axis that may be pruned
    random: bool = False  # train mode draws random numbers whose shape holds prunable channels
    note: str = ""
    steered: bool = False  # plain Python calls its parts: it is no single graph


MODELS: dict[str, Case] = {}


def register(
    name: str,
    make: Callable[[], nn.Module],
    note: str,
    inputs: Callable[[], tuple[Any, ...]] | None = None,
    *,
    prunable: bool = True,
    inexact: bool = False,
    random: bool = False,
    steered: bool = False,
) -> None:
    assert name not in MODELS, f"two cases are called {name}"
    MODELS[name] = Case(name, make, inputs or IMAGE, prunable, inexact, random, note, steered)


def normal(*shapes: tuple[int, ...]) -> Callable[[], tuple[Any, ...]]:
    """Inputs of these shapes: the same values at every call, in the default dtype."""

    def inputs() -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(shape, generator=generator) for shape in shapes)

    return inputs


def words() -> tuple[Any, ...]:
    return (torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0)),)


IMAGE = normal((2, 3, 8, 8))
VECTOR = normal((4, 10))  # four rows: BatchNorm1d over two would give only +1 and -1
TOKENS = normal((2, 5, 10))


# ------------------------------------------------------------------------------------------ helpers


def args_kwargs(inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split what ``Case.inputs`` returns into positional and keyword arguments."""
    if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
        return inputs
    return inputs, {}


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """The same inputs with every floating tensor in ``dtype``; token ids stay integers."""
    if isinstance(inputs, tuple):
        return tuple(cast(value, dtype) for value in inputs)
    if isinstance(inputs, dict):
        return {key: cast(value, dtype) for key, value in inputs.items()}
    return inputs.to(dtype) if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs


def prepare(case: Case, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[Any, ...]]:
    """A randomized model of this case in eval mode, and inputs of the same dtype."""
    model = randomize(case.make(), seed).to(dtype).eval()
    return model, cast(case.inputs(), dtype)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter and BatchNorm statistic so that no channel is blind; returns ``model``.

    Initial values hide mistakes: zero biases, unit scales and equal statistics look alike in every
    channel.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a tied parameter is listed once
            owner = model.get_submodule(name.rpartition(".")[0])
            parameter.copy_(_values(owner, name.rpartition(".")[2], parameter, draw(parameter)))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * draw(buffer))
            elif name.endswith("running_var"):
                uniform = torch.rand(buffer.shape, generator=generator, dtype=torch.float64)
                buffer.copy_(0.5 + uniform)
    return model


def _values(owner: nn.Module, leaf: str, parameter: Tensor, noise: Tensor) -> Tensor:
    """Turn unit normal noise into values that keep activations near one."""
    if isinstance(owner, nn.PReLU):
        return 0.25 + 0.1 * noise
    if isinstance(owner, nn.Embedding):
        return 0.5 * noise
    if "bias" in leaf and parameter.dim() == 1:
        return 0.3 * noise
    if parameter.dim() < 2 or max(parameter.shape) == parameter.numel():
        return 1 + 0.3 * noise  # a scale, such as (C,) or (1, C, 1, 1)
    if parameter.shape[0] == 1:  # a bare token or position table
        return 0.5 * noise
    fan_in = parameter.numel() // parameter.shape[0]
    if isinstance(owner, nn.modules.conv._ConvTransposeNd):  # (in, out / groups, ...)
        window = parameter[0, 0].numel() / math.prod(owner.stride)
        fan_in = max(1, round(parameter.shape[0] // owner.groups * window))
    return noise * (1.5 / fan_in) ** 0.5


def conv(cin: int, cout: int, k: int = 3, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, k, stride, k // 2, groups=groups, bias=bias)


def conv_bn(cin: int, cout: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(cin, cout, k, stride, groups), nn.BatchNorm2d(cout), nn.ReLU())


def head(cin: int, classes: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(cin, classes))


def image_net(*middle: nn.Module, cin: int = 8, cout: int = 8) -> nn.Sequential:
    """Stem, the part under test, a second convolution, a head: channels on both sides can go."""
    return nn.Sequential(conv_bn(3, cin), *middle, conv_bn(cout, 8), head(8))


# ------------------------------------------------------------------------------------- plain chains

register("chain", lambda: image_net(conv_bn(8, 12, stride=2), cout=12), "conv-bn-relu chain")
register(
    "conv_bias",
    lambda: nn.Sequential(conv(3, 8, bias=True), nn.ReLU(), conv(8, 12, bias=True), nn.ReLU(), head(12)),
    "no BatchNorm: the bias belongs to the channel",
)
register(
    "vgg_flatten",
    lambda: nn.Sequential(
        conv_bn(3, 8),
        nn.MaxPool2d(2),
        conv_bn(8, 12),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 16),
        nn.ReLU(),
        nn.Dropout(0.0),
        nn.Linear(16, 4),
    ),
    "flatten -> fc: a channel is a run of four columns",
)
register(
    "frozen_parameters",
    lambda: image_net(conv_bn(8, 12), cout=12).requires_grad_(False),
    "requires_grad False everywhere",
)
register(
    "only_linear",
    lambda: nn.Linear(10, 4),
    "input to output, nothing between",
    VECTOR,
    prunable=False,
)


class Pools(nn.Module):
    """Four ways to reach a vector, each with its own classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = conv_bn(3, 8), nn.AdaptiveAvgPool2d((2, 2))
        self.fc = nn.ModuleList([nn.Linear(n, 4) for n in (32, 8, 8, 32)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.fc[0](self.pool(x).flatten(1)) + self.fc[1](x.mean([2, 3]))
        y = y + self.fc[2](torch.amax(x, (2, 3), keepdim=True).view(x.size(0), -1))
        return y + self.fc[3](F.max_pool2d(x, 4).reshape(-1, 32))


register("pools", Pools, "flatten(1), mean([2, 3]), amax + view, max_pool + reshape(-1, 32)")


class Activations(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([conv(3, 8, bias=True)] + [conv(8, 8, bias=True) for _ in range(8)])
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        functions = (
            F.hardswish,
            F.silu,
            F.gelu,
            F.mish,
            F.elu,
            F.softplus,
            torch.tanh,
            F.hardsigmoid,
            F.leaky_relu,
        )
        for layer, function in zip(self.convs, functions, strict=True):
            x = function(layer(x))
        return self.head(x)


register(
    "activations",
    Activations,
    "hardswish, silu, gelu, mish, elu, softplus, tanh, hardsigmoid, leaky",
)
register("prelu", lambda: image_net(conv(8, 12), nn.PReLU(12), cout=12), "a slope for each channel")
register(
    "prelu_shared",
    lambda: image_net(conv(8, 12), nn.PReLU(), cout=12),
    "one slope for all channels",
)
register("glu", lambda: image_net(conv(8, 16, bias=True), nn.GLU(1)), "halves of an axis gate each other")


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = conv_bn(3, 8), head(8)
        self.b = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x)
        y += x
        y.mul_(0.5).clamp_(max=3.0)
        return self.head(F.relu(y, inplace=True))


register("in_place", InPlace, "+=, mul_, clamp_, relu(inplace)")


class Merges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(3, 8), conv(3, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.a(x), self.b(x), self.c(x)
        return self.head(torch.where(a > 0, torch.maximum(a, b), torch.lerp(b, c, 0.3)))


register("merges", Merges, "where, maximum, lerp couple three convolutions")


# ----------------------------------------------------------------------- residual, concat, branches


class Residual(nn.Module):
    """One block; a projection where width or stride change, as in ResNet."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn(cin, 12, stride=stride), conv(12, cout)
        self.bn = nn.BatchNorm2d(cout)
        plain = cin == cout and stride == 1
        project = nn.Sequential(conv(cin, cout, 1, stride), nn.BatchNorm2d(cout))
        self.down = nn.Identity() if plain else project

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv2(self.conv1(x))) + self.down(x))


register("residual", lambda: image_net(Residual(8, 8), Residual(8, 8)), "identity shortcuts: one stage")
register(
    "residual_projection",
    lambda: image_net(Residual(8, 8), Residual(8, 16, 2), Residual(16, 16), cout=16),
    "two stages joined by a projection",
)


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(8), conv(8, 12)
        self.bn2, self.conv2 = nn.BatchNorm2d(12), conv(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(self.bn2(y)))


register("pre_activation", lambda: image_net(PreActivation(), PreActivation()), "norm first, bare stream")


class OptionA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(8, 16, stride=2), conv(16, 16), nn.BatchNorm2d(16))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))


register(
    "zero_pad_shortcut",
    lambda: image_net(OptionA(), cout=16),
    "ResNet option A: channels padded by 0",
)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for cin in (8, 12, 16):
            self.layers.append(nn.Sequential(nn.BatchNorm2d(cin), nn.ReLU(), conv(cin, 4)))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


register("densenet", lambda: image_net(Dense(), cout=20), "every layer reads all that came before")


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(8, 4, 1), nn.Sequential(conv_bn(8, 6, 1), conv_bn(6, 8))
        self.c = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv_bn(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x), F.max_pool2d(x, 3, 1, 1)], dim=-3)


register(
    "inception",
    lambda: image_net(Inception(), cout=24),
    "four branches, one a bare pool; negative dim",
)


class CatInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv_bn(3, 8), conv_bn(11, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.cat([x, self.a(x)], 1)))


register("cat_input", CatInput, "frozen and prunable channels on one axis")


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc1 = conv_bn(3, 8)
        self.enc2 = conv_bn(8, 12, stride=2)
        self.mid = conv_bn(12, 16, stride=2)
        self.up2, self.dec2 = nn.ConvTranspose2d(16, 12, 2, 2), conv_bn(24, 12)
        self.up1, self.dec1 = nn.ConvTranspose2d(12, 8, 2, 2), conv_bn(16, 8)
        self.out = conv(8, 2, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        a = self.enc1(x)
        b = self.enc2(a)
        y = self.dec2(torch.cat([self.up2(self.mid(b)), b], 1))
        return self.out(self.dec1(torch.cat([self.up1(y), a], 1)))


register("unet", UNet, "skips, transposed convolution, dense output")


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = conv_bn(3, 8), conv_bn(8, 12, stride=2)
        self.lat1, self.lat2, self.out = conv(8, 10, 1), conv(12, 10, 1), conv(10, 4, bias=True)

    def forward(self, x: Tensor) -> list[Tensor]:
        a = self.c1(x)
        b = self.c2(a)
        top = self.lat2(b)
        low = self.lat1(a) + F.interpolate(top, size=a.shape[-2:], mode="nearest")
        return [self.out(low), self.out(F.interpolate(top, scale_factor=0.5, mode="bilinear"))]


register("pyramid", Pyramid, "FPN: interpolate + add, one head on two levels, list output")


class RepVGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k3 = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8))
        self.k1 = nn.Sequential(conv(8, 8, 1), nn.BatchNorm2d(8))
        self.identity = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.k3(x) + self.k1(x) + self.identity(x))


register("repvgg", lambda: image_net(RepVGG(), RepVGG()), "3x3 + 1x1 + BatchNorm branches")


class StackedSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix = conv_bn(8, 12), conv_bn(8, 12, 1), nn.Parameter(torch.rand(2))

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.a(x), self.b(x)], dim=1)
        return (both * self.mix.softmax(0).view(1, 2, 1, 1, 1)).sum(1)


register("stack_weighted_sum", lambda: image_net(StackedSum(), cout=12), "branches stacked on a new axis")


# ------------------------------------------------------------ grouped, depthwise, transposed, split

for _name, _groups, _cout in (("dense", 1, 12), ("grouped", 4, 12), ("depthwise", 8, 8)):
    register(
        f"conv_transpose_{_name}",
        lambda g=_groups, o=_cout: image_net(
            nn.ConvTranspose2d(8, o, 3, 2, 1, output_padding=1, groups=g), nn.ReLU(), cout=o
        ),
        f"ConvTranspose2d, groups={_groups}: its weight is (in, out / groups, k, k)",
    )
register(
    "depthwise_separable",
    lambda: image_net(conv_bn(8, 8, groups=8), conv_bn(8, 16, 1), conv_bn(16, 16, groups=16), cout=16),
    "MobileNet: depthwise ties its input to its output",
)
register(
    "depthwise_multiplier",
    lambda: image_net(conv_bn(8, 16, groups=8), cout=16),
    "two outputs an input",
)


class ResNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(8, 16, 1), conv_bn(16, 16, groups=4), conv(16, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


register("grouped", lambda: image_net(ResNeXt(), ResNeXt()), "ResNeXt: groups of four")
register(
    "grouped_input",
    lambda: nn.Sequential(conv_bn(4, 12, groups=2), conv_bn(12, 12, groups=4), head(12)),
    "a grouped convolution on the frozen input: only the inner index can go",
    normal((2, 4, 8, 8)),
)
register(
    "grouped_conflict",
    lambda: image_net(conv_bn(8, 12, groups=2), conv_bn(12, 12, groups=3), conv_bn(12, 12, groups=4), cout=12),
    "one axis cut into groups in three ways",
)


def shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleUnit(nn.Module):
    """ShuffleNet V2: stride 1 splits its input in halves, stride 2 doubles the width."""

    def __init__(self, cin: int, stride: int) -> None:
        super().__init__()
        self.stride, half = stride, 8
        self.left = nn.Sequential(conv(cin, cin, 3, 2, cin), nn.BatchNorm2d(cin), conv_bn(cin, half, 1))
        inner = half if stride == 1 else cin
        self.right = nn.Sequential(
            conv_bn(inner, half, 1),
            conv(half, half, 3, stride, half),
            nn.BatchNorm2d(half),
            conv_bn(half, half, 1),
        )
        if stride == 1:
            self.left = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            a, b = x.chunk(2, dim=1)
            return shuffle(torch.cat((a, self.right(b)), 1), 2)
        return shuffle(torch.cat((self.left(x), self.right(x)), 1), 2)


register(
    "shufflenet",
    lambda: image_net(ShuffleUnit(8, 2), ShuffleUnit(16, 1), ShuffleUnit(16, 1), cout=16),
    "chunk, cat and shuffle chain from unit to unit",
)
register("channel_shuffle", lambda: image_net(nn.ChannelShuffle(4)), "nn.ChannelShuffle")


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cut, self.a, self.b = conv_bn(8, 18), conv_bn(6, 8), conv_bn(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = torch.split(self.cut(x), [6, 8, 4], dim=1)
        return torch.cat([c, self.a(a) + self.b(b)], 1)


register("split_sizes", lambda: image_net(Split(), cout=12), "unequal parts, put back in another order")


class C2f(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cut, self.blocks = conv_bn(8, 12, 1), nn.ModuleList([conv_bn(6, 6), conv_bn(6, 6)])
        self.join = conv_bn(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.cut(x).chunk(2, 1)
        parts = [a, b]
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return self.join(torch.cat(parts, 1))


register("c2f", lambda: image_net(C2f()), "YOLO C2f: chunk -> list -> cat, with shortcuts")


class CrossStage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cut, self.a, self.b = conv_bn(8, 16, 1), conv_bn(10, 8), conv_bn(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cut(x)
        y = torch.cat([x[:, :6], self.a(x[:, 6:])], 1)
        return self.b(y[:, 2:10])  # a slice across the seam of a cat


register("csp_slices", lambda: image_net(CrossStage()), "CSP: slices, cat, and a slice across the seam")


class Res2Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = conv_bn(8, 16, 1), conv(16, 8, 1)
        self.steps = nn.ModuleList([conv_bn(4, 4) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.chunk(self.enter(x), 4, 1)
        out = [parts[0]]
        for i, step in enumerate(self.steps):
            out.append(step(parts[i + 1] if i == 0 else parts[i + 1] + out[-1]))
        return F.relu(x + self.leave(torch.cat(out, 1)))


register("res2net", lambda: image_net(Res2Net()), "parts of one axis feed each other")


class StridedSlice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.even, self.odd = conv_bn(6, 8), conv_bn(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.even(x[:, ::2]) + self.odd(x[:, 1::2])


register("strided_channels", lambda: image_net(StridedSlice(), cin=12), "x[:, ::2] on the channel axis")


class TemporalShift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        left, right, keep = x[:, :2].roll(1, -1), x[:, 2:4].roll(-1, -1), x[:, 4:]
        return torch.cat([left, torch.zeros_like(right) + right, keep], 1)


register(
    "shift",
    lambda: image_net(conv_bn(8, 12), TemporalShift(), cout=12),
    "slices roll by their own step",
)


class Permuted(nn.Module):
    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([3, 1, 0, 7, 6, 2, 5, 4]))

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1) + x[:, self.order]


register(
    "channel_permutation",
    lambda: image_net(conv_bn(8, 8), Permuted()),
    "flip and index by a constant buffer",
)


class Reorg(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
        return x.reshape(n, 4 * c, h // 2, w // 2)


class Focus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return torch.cat(parts, 1)


register(
    "pixel_shuffle",
    lambda: image_net(conv(8, 24), nn.PixelShuffle(2), cout=6),
    "four channels make one",
)
register("pixel_unshuffle", lambda: image_net(nn.PixelUnshuffle(2), cout=32), "one channel makes four")
register("reorg", lambda: image_net(Reorg(), cout=32), "view-permute-reshape to depth")
register("focus", lambda: image_net(Focus(), cout=32), "space to depth by strided slices")


class Maxout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (8, 2)).amax(2)


register("maxout", lambda: image_net(conv(8, 16), Maxout()), "a maximum over pairs of channels")


class PatchUnfold(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.embed, self.fc = conv_bn(3, 8), nn.Linear(32, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(self.stem(x), 2, stride=2).transpose(1, 2)
        return self.fc(F.relu(self.embed(patches)).mean(1))


register("unfold", PatchUnfold, "im2col: channel times window on one axis")


# ------------------------------------------------------------------------- gates, scales, constants


class SqueezeConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            conv(8, 4, 1, bias=True),
            nn.ReLU(),
            conv(4, 8, 1, bias=True),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class SqueezeLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return x * gate.view(b, c, 1, 1).expand_as(x)


register("se_conv", lambda: image_net(SqueezeConv()), "squeeze and excite by 1x1 convolutions")
register(
    "se_linear",
    lambda: image_net(SqueezeLinear()),
    "squeeze and excite by linears, view and expand_as",
)


class Film(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.body = conv(8, 12)
        self.cond = nn.Linear(5, 24)
        self.head = head(12)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.cond(condition)[:, :, None, None].chunk(2, dim=1)
        return self.head(F.relu(self.body(self.stem(x)) * (1 + scale) + shift))


register(
    "film",
    Film,
    "another input makes scale and shift of each channel",
    normal((2, 3, 8, 8), (2, 5)),
)


class SpatialGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.gate = conv_bn(8, 12), conv(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.gate(pooled))


register(
    "spatial_gate",
    lambda: image_net(SpatialGate(), cout=12),
    "CBAM: mean over channels freezes them",
)


class GlobalResponse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.gamma = conv(8, 12), nn.Parameter(torch.ones(1, 12, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, 12, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.body(x))
        g = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        return x + self.gamma * (x * (g / (g.mean(1, keepdim=True) + 1e-6))) + self.beta


register(
    "global_response",
    lambda: image_net(GlobalResponse(), cout=12),
    "ConvNeXt V2: a hand-written norm",
    inexact=True,
)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.shift = nn.Parameter(torch.zeros(1, 8, 1, 1))
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (x * self.scale + self.shift)


class Constant(nn.Module):
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_bn(8, 12)
        self.register_buffer("table", torch.linspace(0.5, 1.5, 12).view(1, 12, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.table


class SizeScalar(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.shape[1] ** -0.5 + x.sum((2, 3), keepdim=True) / x.size(1)


register("bare_scale", lambda: image_net(Scale()), "bare parameters (C, 1, 1), (1, C, 1, 1) and ()")
register(
    "float_buffer",
    lambda: image_net(Constant(), cout=12),
    "a float buffer multiplied onto channels",
)
register("size_scalar", lambda: image_net(SizeScalar()), "C ** -0.5: a cut must not change the scalar")


# ---------------------------------------------------------------- weights: shared, functional, tied


class SharedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


register(
    "shared_conv",
    lambda: image_net(SharedConv()),
    "one block called twice: its input is its output",
)


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Sequential(conv_bn(3, 8), conv_bn(8, 12)), nn.Linear(24, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.stem(a).mean((2, 3)), self.stem(b).mean((2, 3))
        return self.fc(torch.cat([(a - b).abs(), a * b], 1))


register("siamese", Siamese, "one module in two paths", normal((2, 3, 8, 8), (2, 3, 8, 8)))


class TwoPaths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(conv_bn(3, 8), conv(8, 12))
        self.b = nn.Sequential(conv_bn(3, 8), self.a[1])  # the same module under two names
        self.head = head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.a(x)) + torch.sigmoid(self.b(x)))


class TiedParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(10, 12)
        self.a = nn.Linear(12, 16)
        self.b = nn.Linear(12, 16)
        self.fc = nn.Linear(32, 4)
        self.b.weight = self.a.weight  # one tensor, two modules; the biases differ

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.fc(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1))


class TiedDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.hidden = nn.Linear(10, 16), nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.zeros(10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.hidden(F.relu(self.encode(x))))
        return F.linear(x, self.encode.weight.t(), self.bias)


register("tied_module", TwoPaths, "one convolution listed under two names")
register(
    "tied_parameter",
    TiedParameter,
    "two linears share one weight: two concat halves, one group",
    VECTOR,
)
register("tied_decoder", TiedDecoder, "autoencoder: the transposed encoder weight decodes", VECTOR)


class FunctionalConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(12, 8, 3, 3)), nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, self.w, self.b, padding=1))


class StandardisedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 8, 3, 3))
        self.gain = nn.Parameter(torch.ones(12, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = self.gain * w * torch.rsqrt(w.square().mean((1, 2, 3), keepdim=True) + 1e-5)
        return F.relu(F.conv2d(x, w, padding=1))


class BatchStandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.repeat(1, 1, 1, 2)  # two equal taps
        shape = w.shape
        w = F.batch_norm(w.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0)
        return F.conv2d(x, w.reshape(shape), self.bias)


class Caching(nn.Module):
    """A convolution that keeps what it computed in a dict, as LeViT keeps its attention biases in eval mode."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 1)
        self.bias = nn.Parameter(torch.randn(1, cout, 1, 1))
        self.cache = {"cpu": self.bias * 2}

    def train(self, mode: bool = True) -> Self:
        self.cache = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and "cpu" not in self.cache:
            self.cache["cpu"] = self.bias * 2
        return F.relu(self.conv(x) + (self.bias * 2 if self.training else self.cache["cpu"]))


class ModulatedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 8, 3, 3))
        self.mask = nn.Parameter(torch.ones(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, self.weight * self.mask, stride=2, padding=1))


register(
    "functional_conv",
    lambda: image_net(FunctionalConv(), cout=12),
    "F.conv2d with a bare parameter",
)
register(
    "weight_standardisation",
    lambda: image_net(StandardisedConv(), cout=12),
    "the mean over the weight's inputs is that of the inputs that are kept",
    inexact=True,
)
register(
    "weight_standardisation_by_batch_norm",
    lambda: image_net(BatchStandardisedConv(8, 12, 1), nn.ReLU(), BatchStandardisedConv(12, 12, 1), cout=12),
    "F.batch_norm over a weight: its statistics run over the inputs that are kept (NFNet, BiT)",
    inexact=True,
)
register(
    "cached_tensors",
    lambda: image_net(Caching(8, 12), Caching(12, 12), cout=12),
    "tensors with a history in a dict of the module",
)
register("modulated_conv", lambda: image_net(ModulatedConv(), cout=12), "the weight is a product")


class UnusedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.unused = image_net(conv_bn(8, 8)), conv_bn(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


register("unused_layer", UnusedLayer, "parameters that never run")


# --------------------------------------------------------------------------- normalisation and MLPs

register(
    "batch_norm_mlp",
    lambda: nn.Sequential(
        nn.Linear(10, 16, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 12),
        nn.Tanh(),
        nn.Linear(12, 4),
    ),
    "BatchNorm1d on vectors",
    VECTOR,
)
register(
    "batch_norm_plain",
    lambda: image_net(
        nn.BatchNorm2d(8, affine=False),
        conv(8, 12),
        nn.BatchNorm2d(12, track_running_stats=False),
        cout=12,
    ),
    "BatchNorm without affine, and without statistics",
)
register(
    "layer_norm_mlp",
    lambda: nn.Sequential(
        nn.Linear(10, 16),
        nn.LayerNorm(16),
        nn.GELU(),
        nn.Linear(16, 12),
        nn.ReLU(),
        nn.Linear(12, 4),
    ),
    "LayerNorm over a prunable axis",
    VECTOR,
    inexact=True,
)
register(
    "rms_norm_mlp",
    lambda: nn.Sequential(nn.Linear(10, 16), nn.RMSNorm(16), nn.SiLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)),
    "nn.RMSNorm over a prunable axis",
    VECTOR,
    inexact=True,
)
register(
    "group_norm",
    lambda: image_net(conv(8, 12), nn.GroupNorm(4, 12), nn.ReLU(), cout=12),
    "GroupNorm: whole groups go, which is exact",
)
register(
    "instance_norm",
    lambda: image_net(conv(8, 12), nn.InstanceNorm2d(12, affine=True), nn.ReLU(), cout=12),
    "each channel is normed by itself: exact",
)
register(
    "layer_norm_chw",
    lambda: image_net(conv(8, 12), nn.LayerNorm([12, 8, 8]), nn.ReLU(), cout=12),
    "LayerNorm over (C, H, W): its weight has a position for each pixel",
    inexact=True,
)


class HandRms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(10, 12), nn.Linear(12, 16), nn.Linear(16, 4)
        self.weight = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        return self.c(F.relu(self.b(x)))


class HandLayerNorm(nn.Module):
    """A layer norm over the channels of an image, as SAM and many others write it; ``form`` is how."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.weight, self.bias = nn.Parameter(torch.ones(12)), nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "var_mean":
            variance, mean = torch.var_mean(x, 1, keepdim=True, correction=0)
        else:
            mean = x.mean(1, keepdim=True)
            variance = (x - mean).pow(2).mean(1, keepdim=True) if self.form == "mean" else x.var(1, False, keepdim=True)
        return self.weight[:, None, None] * ((x - mean) / (variance + 1e-5).sqrt()) + self.bias[:, None, None]


class Normalize(nn.Module):
    """Each pixel to length one, as SSD does it; after a sigmoid, no channel that goes is zero."""

    def __init__(self, zero: bool) -> None:
        super().__init__()
        self.zero, self.scale = zero, nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale.view(1, -1, 1, 1) * F.normalize(F.relu(x) if self.zero else torch.sigmoid(x))


class LinearAttention(nn.Module):
    """Attention without softmax: ``feature`` maps queries and keys, whose channels are summed over."""

    def __init__(self, feature: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.feature, self.stem = feature, nn.Linear(10, 12)
        self.q, self.k, self.v, self.fc = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        q, k = self.feature(self.q(x)), self.feature(self.k(x))
        return self.fc(q @ (k.transpose(1, 2) @ self.v(x)))


def one_more(x: Tensor) -> Tensor:
    return F.elu(x) + 1


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(10, 12)
        self.gate = nn.Linear(12, 24, bias=False)
        self.up = nn.Linear(12, 24, bias=False)
        self.down, self.fc = nn.Linear(24, 12, bias=False), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(x + self.down(F.silu(self.gate(x)) * self.up(x)))


class ConvNeXt(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.depthwise = conv(width, width, 7, groups=width, bias=True)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x + self.layer_scale * y


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Linear(10, 12), nn.Linear(12, 4)
        self.tokens = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 5))
        self.channels = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return self.fc((x + self.channels(x)).mean(1))


register("hand_rms_norm", HandRms, "a norm in plain operators: its mean runs over what is kept", VECTOR, inexact=True)
for form in ("mean", "var", "var_mean"):
    register(
        f"hand_layer_norm_{form}",
        lambda form=form: image_net(conv(8, 12), HandLayerNorm(form), nn.ReLU(), cout=12),
        "LayerNorm2d in plain operators",
        inexact=True,
    )
register("normalize", lambda: image_net(conv(8, 12), Normalize(True), cout=12), "zeros add nothing to a length: exact")
register(
    "normalize_nonzero",
    lambda: image_net(conv(8, 12), Normalize(False), cout=12),
    "what goes was not zero: the length is that of what is kept",
    inexact=True,
)
register("linear_attention", lambda: LinearAttention(F.relu), "zeros add nothing to a product", TOKENS)
register("linear_attention_nonzero", lambda: LinearAttention(one_more), "f(0) = 1: queries and keys are frozen", TOKENS)
register("swiglu", SwiGLU, "gated MLP of a language model", TOKENS)
register(
    "convnext",
    lambda: image_net(ConvNeXt(), ConvNeXt()),
    "channels last, layer scale",
    inexact=True,
)
register("mixer", Mixer, "linears on the token axis and on the channel axis", TOKENS)


# ---------------------------------------------------------------------------------------- attention


class Encoder(nn.Module):
    """A transformer block by hand around nn.MultiheadAttention."""

    def __init__(self, batch_first: bool = True, bias: bool = True, norm_first: bool = True) -> None:
        super().__init__()
        self.batch_first, self.norm_first = batch_first, norm_first
        self.stem, self.fc = nn.Linear(10, 12), nn.Linear(12, 4)
        self.attention = nn.MultiheadAttention(12, 3, bias=bias, batch_first=batch_first)
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.mlp = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 12))

    def attend(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x if self.batch_first else x.transpose(0, 1))
        if self.norm_first:
            x = x + self.attend(self.norm1(x))
            x = x + self.mlp(self.norm2(x))
        else:
            x = self.norm1(x + self.attend(x))
            x = self.norm2(x + self.mlp(x))
        return self.fc(x.mean(1 if self.batch_first else 0))


for _first in (True, False):
    for _bias in (True, False):
        register(
            f"mha_{'batch' if _first else 'sequence'}_first{'' if _bias else '_no_bias'}",
            lambda first=_first, bias=_bias: Encoder(batch_first=first, bias=bias),
            "pre-norm encoder around nn.MultiheadAttention",
            TOKENS,
            inexact=True,
        )
register("mha_post_norm", lambda: Encoder(norm_first=False), "post-norm encoder", TOKENS, inexact=True)


class PlainMha(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Linear(10, 12), nn.Linear(12, 4)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.fc(y)


class MaskedMha(nn.Module):
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Linear(10, 12), nn.Linear(12, 4)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.register_buffer("mask", torch.ones(5, 5).triu(1).bool())

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y, _ = self.attention(x, x, x, attn_mask=self.mask)  # need_weights True, as most write it
        return self.fc(y)


class CrossMha(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.memory, self.fc = nn.Linear(10, 12), nn.Linear(6, 8), nn.Linear(12, 4)
        self.attention = nn.MultiheadAttention(12, 3, kdim=8, vdim=8, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, m = self.query(x), F.relu(self.memory(memory))
        y, _ = self.attention(q, m, m, need_weights=False)
        return self.fc(q + y)


register("mha_exact", PlainMha, "nn.MultiheadAttention and no norm: exact", TOKENS)
register("mha_masked", MaskedMha, "attn_mask; weights are asked for and dropped", TOKENS)
register(
    "mha_cross",
    CrossMha,
    "keys and values of another width: three weights",
    normal((2, 5, 10), (2, 4, 6)),
)


class Attention(nn.Module):
    """Self-attention by hand with a packed qkv; ``form`` says how the product is written."""

    def __init__(self, form: str, width: int = 12, heads: int = 3, head_dim: int = 4) -> None:
        super().__init__()
        self.form, self.heads, self.head_dim, self.scale = form, heads, head_dim, head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.heads, self.head_dim)
        if self.form == "einsum":
            q, k, v = qkv.unbind(2)
            weights = torch.einsum("bnhd,bmhd->bhnm", q * self.scale, k).softmax(-1)
            return self.proj(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.form == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v)  # default scale: from head_dim
        elif self.form == "shape":
            y = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        else:
            y = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))


class AttentionNet(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.stem, self.attention, self.fc = nn.Linear(10, 12), attention, nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.fc((x + self.attention(x)).mean(1))


for _form, _note in (
    ("matmul", "qkv viewed as (B, N, 3, H, D), a constant scale"),
    ("shape", "the scale is read off a shape"),
    ("sdpa", "F.scaled_dot_product_attention with its default scale"),
    ("einsum", "einsum on both products"),
):
    register(f"attention_{_form}", lambda form=_form: AttentionNet(Attention(form)), _note, TOKENS)


class GroupedQuery(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(12, 16)
        self.k = nn.Linear(12, 8)
        self.v = nn.Linear(12, 8)
        self.o = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 4).transpose(1, 2)
        k = self.k(x).view(b, n, 2, 4).transpose(1, 2).repeat_interleave(2, dim=1)
        v = self.v(x).view(b, n, 2, 4).transpose(1, 2).repeat_interleave(2, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Causal(nn.Module):
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 8)
        self.o = nn.Linear(8, 12)
        self.register_buffer("mask", torch.ones(5, 5).triu(1).bool())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = torch.matmul(q, k.mT) / 2.0
        weights = scores.masked_fill(self.mask, float("-inf")).softmax(-1)
        return self.o(torch.matmul(weights, v).transpose(1, 2).reshape(x.shape[0], x.shape[1], 8))


class CrossCovariance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = (q.transpose(1, 2) @ k).softmax(-1)  # (B, C, C): channels attend to channels
        return self.proj(v @ weights.transpose(1, 2))


register(
    "attention_gqa",
    lambda: AttentionNet(GroupedQuery()),
    "two key heads serve four query heads",
    TOKENS,
)
register(
    "attention_causal",
    lambda: AttentionNet(Causal()),
    "q, k, v apart; masked_fill with a buffer",
    TOKENS,
)
register(
    "attention_channels",
    lambda: AttentionNet(CrossCovariance()),
    "XCiT: a softmax over channels",
    TOKENS,
)


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 4, 4)
        self.cls = nn.Parameter(torch.zeros(1, 1, 12))
        self.pos = nn.Parameter(torch.zeros(1, 5, 12))
        self.norm1 = nn.LayerNorm(12)
        self.attention = Attention("sdpa")
        self.norm2 = nn.LayerNorm(12)
        self.mlp = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.pos
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.fc(x[:, 0])


register("vit", ViT, "class token, positions, patch convolution", inexact=True)


class Swin(nn.Module):
    """Shifted 4x4 windows with a relative position bias, then a patch merge."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 12, 2, 2), nn.LayerNorm(12)
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.table = nn.Parameter(torch.zeros(9, 3))
        y, x = torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")
        y, x = y.flatten(), x.flatten()
        self.register_buffer("index", ((y[:, None] - y + 1) * 3 + x[:, None] - x + 1).flatten())
        self.merge, self.fc = nn.Linear(48, 16, bias=False), nn.Linear(16, 4)

    def attend(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = torch.roll(x, (-1, -1), (1, 2)).view(b, 2, 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(x).reshape(-1, 4, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index].view(4, 4, -1).permute(2, 0, 1).unsqueeze(0)
        y = ((q * 4**-0.5) @ k.transpose(-2, -1) + bias).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(-1, 4, 12)).view(b, 2, 2, 2, 2, 12)
        return torch.roll(y.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, 12), (1, 1), (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        x = x + self.attend(self.norm(x))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.fc(self.merge(x).mean((1, 2)))


register("swin", Swin, "windows, a gathered bias table, patch merging", inexact=True)


class TextClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(20, 12), nn.Parameter(torch.zeros(6, 12))
        self.hidden, self.fc = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = (self.embedding(ids) + self.position).mean(1)
        return self.fc(F.relu(self.hidden(x)))


class TiedLanguageModel(nn.Module):
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(20, 12), nn.Linear(12, 20, bias=False)
        self.out.weight = self.embedding.weight
        self.hidden, self.back = nn.Linear(12, 16), nn.Linear(16, 12)
        self.register_buffer("table", torch.sin(torch.arange(72.0)).view(6, 12))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) * 12**0.5
        x = x + self.back(F.gelu(self.hidden(x)))
        return self.out(x + self.table)


register(
    "text_classifier",
    TextClassifier,
    "embedding rows are addressed, its columns are channels",
    words,
)
register(
    "tied_language_model",
    TiedLanguageModel,
    "the embedding is the output; sinusoids in a buffer",
    words,
)


# ------------------------------------------------------------------------ inputs, outputs and modes


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.out = conv_bn(3, 8), conv_bn(8, 12), conv(12, 2, 1, bias=True)

    def forward(self, x: Tensor) -> dict[str, Any]:
        a = self.stem(x)
        b = self.body(a)
        return {"mask": self.out(b), "features": (b, {"pooled": b.mean((2, 3))})}


class TupleOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.body = conv_bn(8, 12)
        self.a = head(12, 4)
        self.b = head(12, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(self.stem(x))
        return self.a(x), self.b(x)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector, self.fc = conv_bn(3, 8), nn.Linear(10, 12), nn.Linear(20, 4)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        return self.fc(torch.cat([self.image(image).mean((2, 3)), F.relu(self.vector(vector))], 1))


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cond, self.head = conv_bn(3, 8), nn.Linear(5, 8), head(8)

    def forward(self, x: Tensor, *, condition: Tensor, weight: float = 1.0) -> Tensor:
        return self.head(self.stem(x) + weight * self.cond(condition)[:, :, None, None])


def keyword_inputs() -> tuple[Any, ...]:
    image, condition = normal((2, 3, 8, 8), (2, 5))()
    return (image,), {"condition": condition}


register("dict_output", DictOutput, "nested dict; a returned feature map freezes")
register("tuple_output", TupleOutput, "two heads")
register("two_inputs", TwoInputs, "an image and a vector", normal((2, 3, 8, 8), (2, 10)))
register("keyword_input", Keywords, "a keyword-only tensor and a default number", keyword_inputs)


class AuxiliaryHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head, self.aux = conv_bn(3, 8), conv_bn(8, 12), head(12), head(8)

    def forward(self, x: Tensor) -> Any:
        a = self.stem(x)
        y = self.head(self.body(a))
        if self.training:
            return {"out": y, "aux": self.aux(a)}
        return {"out": y}


class TrainOnlyCoupling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv_bn(3, 8), conv_bn(3, 8), head(16)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        if self.training:
            a = a + 0.1 * b  # couples in train mode what eval mode keeps apart
        return self.head(torch.cat([a, b], 1))


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.drop = nn.Dropout2d(0.2)
        self.a = nn.Linear(8, 16)
        self.b = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.stem(x)).mean((2, 3))
        return self.b(F.dropout(F.relu(self.a(x)), 0.3, training=self.training))


class StochasticDepth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(8, 12), conv(12, 8), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.training:
            keep = y.new_empty((y.shape[0], 1, 1, 1)).bernoulli_(0.8)
            y = y * keep / 0.8
        return x + y


register("auxiliary_head", AuxiliaryHead, "a second head in train mode only")
register("train_only_coupling", TrainOnlyCoupling, "train mode couples what eval mode keeps apart")
register("dropout", Dropout, "F.dropout with self.training, nn.Dropout2d", random=True)
register(
    "stochastic_depth",
    lambda: image_net(StochasticDepth(), StochasticDepth()),
    "a block skipped at random, by sample",
)


# -------------------------------------------------------------------- other ranks, opaque operators

register(
    "conv1d",
    lambda: nn.Sequential(
        nn.Conv1d(3, 8, 3, padding=1),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(8, 12, 3, groups=2),
        nn.ReLU(),
        nn.ConvTranspose1d(12, 8, 2, 2),
        nn.AdaptiveAvgPool1d(2),
        nn.Flatten(),
        nn.Linear(16, 4),
    ),
    "one dimension",
    normal((2, 3, 16)),
)
register(
    "conv3d",
    lambda: nn.Sequential(
        nn.Conv3d(3, 8, (1, 3, 3), padding=(0, 1, 1)),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.Conv3d(8, 8, (3, 1, 1), groups=8),
        nn.MaxPool3d(2),
        nn.Conv3d(8, 12, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    ),
    "three dimensions: (2 + 1)D, depthwise",
    normal((2, 3, 4, 8, 8)),
)


class LstmHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 12, 3)
        self.lstm, self.fc = nn.LSTM(12, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x)))).transpose(1, 2)
        y, _ = self.lstm(x)
        return self.fc(y[:, -1])


class LstmOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(10, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0][:, -1])


register("lstm_head", LstmHead, "the LSTM is frozen, the first convolution is not", normal((2, 3, 12)))
register("lstm_only", LstmOnly, "an LSTM between input and classifier", TOKENS)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@torch.fx.wrap
def straight_through(x: Tensor) -> Tensor:
    return _StraightThrough.apply(x)


@torch.library.custom_op("fxprune_tests::reverse_channels", mutates_args=())
def reverse_channels(x: Tensor) -> Tensor:
    """An operator nobody can know: it moves channels, so taking it for pointwise is wrong."""
    return x.flip(1).clone()


@reverse_channels.register_fake
def _reverse_channels_shape(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _reverse_channels_backward(ctx: Any, grad: Tensor) -> Tensor:
    return grad.flip(1)


reverse_channels.register_autograd(_reverse_channels_backward)


@torch.fx.wrap
def opaque(x: Tensor) -> Tensor:
    return reverse_channels(x)


class Quantise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return straight_through(x)


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return opaque(x)


register(
    "autograd_function",
    lambda: image_net(conv_bn(8, 12), Quantise(), cout=12),
    "a custom autograd Function",
)
register(
    "unknown_operator",
    lambda: image_net(conv_bn(8, 12), Opaque(), cout=12),
    "a custom operator freezes",
)

# ------------------------------------------------------------------------------------------- the wild


class Fusion(nn.Module):
    """HRNet: branches of two resolutions exchange what they know, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.low = conv_bn(3, 6), conv_bn(6, 8, stride=2)
        self.up, self.down = nn.ModuleList(), nn.ModuleList()
        for _ in range(2):
            self.up.append(nn.Sequential(conv(8, 6, 1), nn.BatchNorm2d(6)))
            self.down.append(nn.Sequential(conv(6, 8, stride=2), nn.BatchNorm2d(8)))
        self.last = head(14)

    def forward(self, x: Tensor) -> Tensor:
        high = self.stem(x)
        low = self.low(high)
        for up, down in zip(self.up, self.down, strict=True):
            wide = F.interpolate(up(low), scale_factor=2.0, mode="nearest")
            high, low = F.relu(high + wide), F.relu(low + down(high))
        return self.last(torch.cat([high, F.interpolate(low, scale_factor=2.0)], 1))


class Rotary(nn.Module):
    """Grouped queries with rotary embeddings: positions turn pairs of features of a head."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(10, 16), nn.Linear(10, 8), nn.Linear(10, 8)
        self.out, self.last = nn.Linear(16, 10), nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 4))
        angle = torch.arange(5)[:, None] / 10 ** torch.arange(2)
        self.register_buffer("cos", torch.cat([angle.cos(), angle.cos()], -1))
        self.register_buffer("sin", torch.cat([angle.sin(), angle.sin()], -1))

    def turn(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-right, left], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query = self.turn(self.query(x).view(batch, length, 4, 4).transpose(1, 2))
        key = self.turn(self.key(x).view(batch, length, 2, 4).transpose(1, 2))
        value = self.value(x).view(batch, length, 2, 4).transpose(1, 2)
        key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, length, -1)
        return self.last(x + self.out(mixed))


class Sliced(nn.Module):
    """One Sequential, run in slices, with what is between them kept."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv_bn(3, 6), conv_bn(6, 8), conv_bn(8, 6), head(6))

    def forward(self, x: Tensor) -> Tensor:
        early = self.layers[:1](x)
        return self.layers[-1:](self.layers[1:3](early) + early)


class GruHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(10, 12), nn.Linear(12, 8)
        self.gru, self.fc = nn.GRU(8, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gru(self.b(F.relu(self.a(x))))[0][:, -1])


class SplitStack(nn.Module):
    """The block of recent YOLOs: one half goes through residual bottlenecks, and every stage is kept for the end."""

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.enter = conv_bn(6, 2 * width)
        self.steps = nn.ModuleList(nn.Sequential(conv_bn(width, width), conv_bn(width, width)) for _ in range(depth))
        self.leave = conv_bn((2 + depth) * width, 8)

    def forward(self, x: Tensor) -> Tensor:
        stages = list(self.enter(x).chunk(2, 1))
        for step in self.steps:
            stages.append(stages[-1] + step(stages[-1]))
        return self.leave(torch.cat(stages, 1))


register("yolo_c2f", lambda: nn.Sequential(conv_bn(3, 6), SplitStack(), head(8)), "halves, kept stage by stage")


class FusedAttention(nn.Module):
    """As small GPTs have it: the parts of the fused projection are as wide as its input, by the input's own shape."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.qkv, self.proj, self.leave = (
            nn.Linear(10, 16),
            nn.Linear(16, 48),
            nn.Linear(16, 16),
            nn.Linear(16, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        batch, length, width = x.shape
        heads = [part.view(batch, length, 4, 4).transpose(1, 2) for part in self.qkv(x).split(width, dim=2)]
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(batch, length, width)
        return self.leave(x + self.proj(mixed))


register("gpt_split", FusedAttention, "a fused projection, split by the width of its input", TOKENS)
register("hrnet", Fusion, "branches of several resolutions, fused")
register("attention_rotary", Rotary, "grouped queries with rotary embeddings: angles do not tie heads", TOKENS)
register("sequential_slices", Sliced, "nn.Sequential, sliced")
register(
    "weight_norm",
    lambda: image_net(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 12, 3, padding=1)), cout=12),
    "a parametrization: the norm of a filter runs over its input",
)
register(
    "spectral_norm",
    lambda: image_net(torch.nn.utils.spectral_norm(nn.Conv2d(8, 12, 3, padding=1)), cout=12),
    "an old parametrization: a hook computes the weight, and moves buffers in training",
)
register("gru_head", GruHead, "what a GRU reads and its hidden units", TOKENS)
register(
    "channels_last",
    lambda: image_net(conv_bn(8, 12), cout=12).to(memory_format=torch.channels_last),
    "weights in channels_last",
)

import steered_models  # noqa: E402, F401  (registers more)

GRAPHS = [name for name, case in MODELS.items() if not case.steered]  # those that are one graph as a whole
