"""Random small networks: a program is plain data, ``build`` makes it an nn.Module that traces.

    program = program_from_seed(7)      # or @given(networks()) in a hypothesis test
    print(program)                      # one line an operator; repr(program) can be pasted back
    model = build(program)              # forward(x) -> tuple of tensors, x: float[2, C, 8, 8]

One generator serves both: it asks ``integer(low, high)`` for every decision, answered by hypothesis
(which shrinks: the smaller the answers, the simpler the network) or by ``random.Random(seed)``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

T = TypeVar("T")
SIZE = 8  # height and width of the input
LIMIT = 12  # operators in a program, heads not counted


@dataclass(frozen=True)
class Op:
    """``kind`` applied to earlier values; it appends ``results`` new values."""

    kind: str
    inputs: tuple[int, ...]
    options: dict[str, Any]
    results: int = 1


@dataclass(frozen=True)
class Program:
    """Value 0 is the input; ``heads`` read whatever no operator consumed, and a few values more."""

    channels: int
    ops: tuple[Op, ...]
    heads: tuple[Op, ...]

    def __str__(self) -> str:
        lines, value = [f"v0 = input({self.channels}, {SIZE}, {SIZE})"], 1
        for op in self.ops + self.heads:
            names = ", ".join(f"v{i}" for i in range(value, value + op.results))
            arguments = [f"v{i}" for i in op.inputs] + [f"{k}={v}" for k, v in op.options.items()]
            lines.append(f"{names} = {op.kind}({', '.join(arguments)})")
            value += op.results
        return "\n".join(lines)


# --------------------------------------------------------------------------------- drawing programs


class Writer:
    """Writes one program, operator by operator, and tracks the shape (C, H) of every value."""

    def __init__(self, integer: Callable[[int, int], int], channels: int) -> None:
        self.integer = integer
        self.ops: list[Op] = []
        self.shapes = [(channels, SIZE)]
        self.used: set[int] = set()

    def choice(self, items: Sequence[T]) -> T:
        return items[self.integer(0, len(items) - 1)]

    def emit(self, kind: str, inputs: tuple[int, ...], *shapes: tuple[int, int], **options: Any) -> int:
        """Append one operator; returns its first new value."""
        self.ops.append(Op(kind, inputs, options, len(shapes)))
        self.used.update(inputs)
        self.shapes.extend(shapes)
        return len(self.shapes) - len(shapes)

    def pick(self) -> int:
        """A value to read: mostly the newest, so that depth grows; rarely the frozen input."""
        last, kind = len(self.shapes) - 1, self.integer(0, 19)
        if kind < 12:
            return last
        return self.integer(max(1, last - 3), last) if kind < 19 else self.integer(0, last)

    def leaves(self) -> list[int]:
        return [i for i in range(1, len(self.shapes)) if i not in self.used]

    def partner(self, x: int) -> int:
        """A value of the same height as x; often one nobody read yet, such as a split part."""
        alike = [i for i, shape in enumerate(self.shapes) if shape[1] == self.shapes[x][1]]
        fresh = [i for i in self.leaves() if i in alike and i != x]
        return self.choice(fresh if fresh and self.integer(0, 1) == 0 else alike)

    def width(self) -> int:
        return self.choice((4, 6, 8, 12, 16))

    def groups(self, *widths: int) -> int:
        return self.choice([g for g in (1, 2, 3, 4, 6) if all(w % g == 0 for w in widths)])

    def room(self) -> int:
        """How many operators the program may still take."""
        return LIMIT - len(self.ops)

    # Each method below draws one operator, or a short run of them, on value x.

    def add_conv(self, x: int, cout: int, k: int, stride: int = 1, groups: int = 1, bias: bool = False) -> int:
        c, h = self.shapes[x]
        options = {"k": k, "stride": stride, "groups": groups, "bias": bias}
        return self.emit("conv", (x,), (cout, h // stride), cin=c, cout=cout, **options)

    def conv(self, x: int) -> None:
        c, h = self.shapes[x]
        cout, k = self.width(), self.choice((1, 3))
        groups = self.groups(c, cout) if self.integer(0, 2) == 2 else 1
        stride = 2 if h > 2 and self.integer(0, 4) == 4 else 1
        self.add_conv(x, cout, k, stride, groups, bias=bool(self.integer(0, 1)))

    def depthwise(self, x: int) -> None:
        c = self.shapes[x][0]
        cout = c * (1 if c > 8 else self.choice((1, 2)))
        self.add_conv(x, cout, 3, groups=c, bias=bool(self.integer(0, 1)))

    def conv_transpose(self, x: int) -> None:
        c, h = self.shapes[x]
        kind = self.choice(("dense", "grouped", "depthwise"))
        cout = c if kind == "depthwise" else self.width()
        groups = {"dense": 1, "grouped": self.groups(c, cout), "depthwise": c}[kind]
        stride = 2 if h < SIZE else 1
        options = {"cin": c, "cout": cout, "stride": stride, "groups": groups}
        self.emit("conv_transpose", (x,), (cout, h * stride), **options)

    def conv_bn_act(self, x: int) -> None:
        self.conv(x)
        if self.room() >= 2:
            self.batch_norm(len(self.shapes) - 1)
            self.activation(len(self.shapes) - 1)

    def batch_norm(self, x: int) -> None:
        self.emit("batch_norm", (x,), self.shapes[x], c=self.shapes[x][0])

    def activation(self, x: int) -> None:
        names = ("relu", "hardswish", "sigmoid", "silu", "gelu", "tanh")
        self.emit("activation", (x,), self.shapes[x], name=self.choice(names))

    def prelu(self, x: int) -> None:
        self.emit("prelu", (x,), self.shapes[x], c=self.shapes[x][0] if self.integer(0, 1) else 1)

    def glu(self, x: int) -> None:
        c, h = self.shapes[x]
        if c % 2 == 0:
            self.emit("glu", (x,), (c // 2, h))

    def add(self, x: int) -> None:
        y = self.partner(x)
        cx, cy = self.shapes[x][0], self.shapes[y][0]
        self.emit("add", (x, y), self.shapes[x], project=None if cx == cy else (cy, cx))

    def gate(self, x: int) -> None:
        alike = [i for i, shape in enumerate(self.shapes) if shape == self.shapes[x]]
        self.emit("gate", (x, self.choice(alike)), self.shapes[x])

    def residual_chain(self, x: int) -> None:
        """Several blocks on one stream: every shortcut add ties the same channels again."""
        c, h = self.shapes[x]
        for _ in range(min(self.integer(1, 3), self.room() // 4)):
            inner = self.width()
            y = self.add_conv(x, inner, 1, bias=True)
            y = self.emit("activation", (y,), (inner, h), name="relu")
            y = self.add_conv(y, c, 3)
            x = self.emit("add", (y, x), (c, h), project=None)

    def cat(self, x: int) -> None:
        values = [x] + [self.partner(x) for _ in range(self.integer(1, 2))]
        width = sum(self.shapes[i][0] for i in values)
        if width <= 32:
            self.emit("cat", tuple(values), (width, self.shapes[x][1]))

    def split(self, x: int) -> None:
        """Split or chunk; half the time the parts are put back together in another order."""
        c, h = self.shapes[x]
        parts = self.integer(2, 3)
        if c < 2 * parts:
            return
        if self.integer(0, 1):
            step = -(-c // parts)  # as chunk does it: the last part may be smaller
            sizes = [min(step, c - i) for i in range(0, c, step)]
            first = self.emit("chunk", (x,), *[(s, h) for s in sizes], parts=parts)
        else:
            cuts = sorted(self.integer(0, c - 2 * parts) for _ in range(parts - 1))
            edges = [0, *[cut + 2 * i + 2 for i, cut in enumerate(cuts)], c]  # two channels a part
            sizes = [b - a for a, b in pairwise(edges)]
            first = self.emit("split", (x,), *[(s, h) for s in sizes], sizes=tuple(sizes))
        if self.integer(0, 1) and self.room():
            self.emit("cat", tuple(first + i for i in reversed(range(len(sizes)))), (c, h))

    def channel_slice(self, x: int) -> None:
        c, h = self.shapes[x]
        start, step = self.integer(0, c // 2), self.choice((1, 2))
        stop = self.integer(min(start + 3, c), c)
        width = len(range(start, stop, step))
        self.emit("slice", (x,), (width, h), start=start, stop=stop, step=step)

    def shuffle(self, x: int) -> None:
        c, h = self.shapes[x]
        groups = [g for g in (2, 3, 4) if c % g == 0 and c > g]
        if groups:
            self.emit("shuffle", (x,), (c, h), groups=self.choice(groups))

    def squeeze(self, x: int) -> None:
        self.emit("squeeze", (x,), self.shapes[x], c=self.shapes[x][0], inner=self.choice((4, 6)))

    def pool(self, x: int) -> None:
        c, h = self.shapes[x]
        if h > 2:
            self.emit("pool", (x,), (c, h // 2), name=self.choice(("max", "avg")))

    def attention(self, x: int) -> None:
        c, h = self.shapes[x]
        form = self.choice(("matmul", "shape", "sdpa"))
        heads, dim = self.choice((1, 2, 3)), self.choice((2, 4))
        self.emit("attention", (x,), (c, h), c=c, heads=heads, head_dim=dim, form=form)

    def reuse(self, x: int) -> None:
        """Call an earlier convolution again, on any value of its input width."""
        plain = [i for i, op in enumerate(self.ops) if op.options.get("stride") == 1]
        pairs = [
            (owner, value)
            for owner in plain
            for value, (c, _) in enumerate(self.shapes)
            if c == self.ops[owner].options["cin"] and (value,) != self.ops[owner].inputs
        ]
        if pairs:
            owner, value = self.choice(pairs)
            shape = (self.ops[owner].options["cout"], self.shapes[value][1])
            self.emit("reuse", (value,), shape, of=owner)

    def group_norm(self, x: int) -> None:
        c, h = self.shapes[x]
        groups = self.groups(c)
        if c // groups * h * h >= 8:  # a norm over very few values is degenerate
            self.emit("group_norm", (x,), (c, h), groups=groups, c=c)

    def layer_norm(self, x: int) -> None:
        if self.shapes[x][0] >= 4:
            self.emit("layer_norm", (x,), self.shapes[x], c=self.shapes[x][0])

    def hand_norm(self, x: int) -> None:
        if self.shapes[x][0] >= 4:
            form = self.choice(("rms", "layer", "response", "length", "sum"))
            self.emit("hand_norm", (x,), self.shapes[x], c=self.shapes[x][0], form=form)

    def kernel_attention(self, x: int) -> None:
        """Queries and keys through a function, which need not map zero to zero, are summed over their channels."""
        c, h = self.shapes[x]
        name = self.choice(("relu", "sigmoid", "softplus", "silu"))
        self.emit("kernel_attention", (x,), (c, h), c=c, dim=self.width(), name=name)

    def head(self, values: list[int]) -> Op:
        kind = self.choice(("pool_head", "flatten_head"))
        area = [1 if kind == "pool_head" else self.shapes[i][1] ** 2 for i in values]
        features = sum(self.shapes[i][0] * a for i, a in zip(values, area, strict=True))
        return Op(kind, tuple(values), {"features": features, "classes": self.integer(2, 4)})


def _write(integer: Callable[[int, int], int], norms: bool) -> Program:
    """The one generator: 3 to 12 operators, then heads that read every value nobody consumed."""
    channels = integer(3, 6)
    w = Writer(integer, channels)
    steps: list[Callable[[int], None]] = [w.conv, w.conv_bn_act, w.batch_norm, w.activation, w.add]
    steps += [w.residual_chain, w.cat, w.split, w.depthwise, w.pool, w.squeeze, w.prelu, w.shuffle]
    steps += [w.reuse, w.conv_transpose, w.gate, w.glu, w.channel_slice, w.attention]
    if norms:
        steps += [w.group_norm, w.layer_norm, w.hand_norm, w.kernel_attention]
    length = integer(3, LIMIT)
    w.conv(0)
    while len(w.ops) < length:
        before = len(w.ops)
        w.choice(steps)(w.pick())
        if len(w.ops) == before:  # the operator did not fit there: go on with a plain one
            w.conv(w.pick())
    heads = [w.head(w.leaves())]
    extra = integer(0, 4)
    if extra == 3:
        heads.append(w.head([w.pick()]))
    elif extra == 4:
        heads.append(Op("identity", (integer(1, len(w.shapes) - 1),), {}))  # a raw feature map: frozen as an output
    return Program(channels, tuple(w.ops), tuple(heads))


def program_from_seed(seed: int, norms: bool = False) -> Program:
    """The same program for the same seed; ``norms`` allows norms across channels, and attention by kernels."""
    return _write(random.Random(seed).randint, norms)


@st.composite
def networks(draw: st.DrawFn, norms: bool = False) -> Program:
    """A hypothesis strategy of programs; ``norms`` allows norms across channels, and attention by kernels."""
    return _write(lambda low, high: draw(st.integers(low, high)), norms)


def inputs(program: Program, seed: int = 0) -> tuple[Tensor]:
    """One batch for this program in the default dtype: x: float[2, C, 8, 8]."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, program.channels, SIZE, SIZE, generator=generator),)


# -------------------------------------------------------------------------------- building networks


def build(program: Program) -> nn.Module:
    """The network of a program: forward(x: float[2, C, 8, 8]) -> tuple of tensors, one a head."""
    return Network(program)


class Network(nn.Module):
    """Runs a program: a straight line of calls, so tracing sees no control flow on data."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.ops = nn.ModuleList([_MODULES[op.kind](**op.options) for op in program.ops])
        self.heads = nn.ModuleList([_MODULES[op.kind](**op.options) for op in program.heads])

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        values: list[Any] = [x]
        for op, module in zip(self.program.ops, self.ops, strict=True):
            called = self.ops[op.options["of"]] if op.kind == "reuse" else module
            out = called(*[values[i] for i in op.inputs])
            values += [out] if op.results == 1 else [out[i] for i in range(op.results)]
        pairs = zip(self.program.heads, self.heads, strict=True)
        return tuple(head(*[values[i] for i in op.inputs]) for op, head in pairs)


class Function(nn.Module):
    """A function of tensors as a module: partials of named functions pickle, lambdas would not."""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.function = partial(function, *args, **kwargs) if args or kwargs else function

    def forward(self, *xs: Any) -> Any:
        return self.function(*xs)


class Add(nn.Module):
    """x + y, with y through a 1x1 convolution where the widths differ."""

    def __init__(self, project: tuple[int, int] | None) -> None:
        super().__init__()
        self.project = nn.Conv2d(*project, 1, bias=False) if project else nn.Identity()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.project(y)


class Squeeze(nn.Module):
    """Squeeze and excite."""

    def __init__(self, c: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(c, inner), nn.Linear(inner, c)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class Attention(nn.Module):
    """Self-attention over pixels; the last reshape takes its sizes from another tensor."""

    def __init__(self, c: int, heads: int, head_dim: int, form: str) -> None:
        super().__init__()
        self.heads, self.head_dim, self.form = heads, head_dim, form
        self.qkv, self.proj = nn.Linear(c, 3 * heads * head_dim), nn.Linear(heads * head_dim, c)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).view(b, h * w, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.form == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            scale = q.shape[-1] ** -0.5 if self.form == "shape" else self.head_dim**-0.5
            y = (q @ k.transpose(-2, -1) * scale).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).flatten(2))
        return y.transpose(1, 2).reshape(b, c, h, w)


class ChannelsLastNorm(nn.Module):
    """LayerNorm over channels, as ConvNeXt has it."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class HandNorm(nn.Module):
    """A norm over channels in plain operators."""

    def __init__(self, c: int, form: str) -> None:
        super().__init__()
        self.form, self.scale = form, nn.Parameter(torch.rand(c, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "rms":
            return self.scale * x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-2)
        if self.form == "layer":
            return self.scale * (x - x.mean(1, keepdim=True)) / (x.std(1, correction=0, keepdim=True) + 0.1)
        if self.form == "response":
            length = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
            return x + self.scale * x * (length / (length.mean(1, keepdim=True) + 0.1))
        if self.form == "sum":
            return self.scale * x / (1 + x.abs().sum(1, keepdim=True))
        return self.scale * F.normalize(x, dim=1, eps=0.1)


class KernelAttention(nn.Module):
    """Attention over pixels without softmax."""

    def __init__(self, c: int, dim: int, name: str) -> None:
        super().__init__()
        self.q, self.k = nn.Conv2d(c, dim, 1), nn.Conv2d(c, dim, 1)
        self.function = getattr(F, name)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.function(self.q(x)).flatten(2), self.function(self.k(x)).flatten(2)
        return x + (x.flatten(2) @ (k.transpose(1, 2) @ q / q.shape[2])).view(x.shape)


class Head(nn.Module):
    """Pool or flatten every value, concatenate, classify."""

    def __init__(self, pool: bool, features: int, classes: int) -> None:
        super().__init__()
        self.pool, self.fc = pool, nn.Linear(features, classes)

    def forward(self, *xs: Tensor) -> Tensor:
        flat = [x.mean((2, 3)) if self.pool else x.flatten(1) for x in xs]
        return self.fc(torch.cat(flat, 1) if len(flat) > 1 else flat[0])


def _shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def _slice(x: Tensor, start: int, stop: int, step: int) -> Tensor:
    return x[:, start:stop:step]


def _gate(x: Tensor, y: Tensor) -> Tensor:
    return x * torch.sigmoid(y)  # a bare product, chained, would explode


def _cat(*xs: Tensor) -> Tensor:
    return torch.cat(xs, 1)


def _conv(cin: int, cout: int, k: int, stride: int, groups: int, bias: bool) -> nn.Module:
    return nn.Conv2d(cin, cout, k, stride, k // 2, groups=groups, bias=bias)


def _conv_transpose(cin: int, cout: int, stride: int, groups: int) -> nn.Module:
    return nn.ConvTranspose2d(cin, cout, 3, stride, 1, output_padding=stride - 1, groups=groups)


_MODULES: dict[str, Callable[..., nn.Module]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "reuse": lambda of: nn.Identity(),  # a place holder: forward calls the owner again
    "batch_norm": lambda c: nn.BatchNorm2d(c),
    "group_norm": lambda groups, c: nn.GroupNorm(groups, c),
    "layer_norm": ChannelsLastNorm,
    "hand_norm": HandNorm,
    "kernel_attention": KernelAttention,
    "activation": lambda name: Function(getattr(torch if name in ("sigmoid", "tanh") else F, name)),
    "prelu": lambda c: nn.PReLU(c),
    "glu": lambda: nn.GLU(1),
    "add": Add,
    "gate": lambda: Function(_gate),
    "cat": lambda: Function(_cat),
    "chunk": lambda parts: Function(torch.chunk, chunks=parts, dim=1),
    "split": lambda sizes: Function(torch.split, split_size_or_sections=list(sizes), dim=1),
    "slice": lambda start, stop, step: Function(_slice, start=start, stop=stop, step=step),
    "shuffle": lambda groups: Function(_shuffle, groups=groups),
    "squeeze": Squeeze,
    "pool": lambda name: nn.MaxPool2d(2) if name == "max" else nn.AvgPool2d(2),
    "attention": Attention,
    "pool_head": lambda features, classes: Head(True, features, classes),
    "flatten_head": lambda features, classes: Head(False, features, classes),
    "identity": nn.Identity,
}
