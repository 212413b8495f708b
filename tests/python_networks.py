"""Random networks in Python: a class with a forward of random statements, as people write them.

    network = network_from_seed(7)
    print(network.source)              # Python, one class for each module
    model = network.build()            # an nn.Module
    args, kwargs = network.inputs(4)   # a batch of four

``random_networks`` runs a straight line of operators; here Python itself is drawn: loops, checks, properties, dicts,
contexts, buffers, functions with keywords, modules in modules. The pieces stand in data/idioms.txt.
"""

import collections
import contextlib
import functools
import linecache
import math
import operator
import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import Template
from textwrap import indent
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

IDIOMS = Path(__file__).with_name("data") / "idioms.txt"
WIDTHS = (4, 6, 8, 12)
WIDEST = 24
SIZE = 8  # height and width of the image


class Shape(NamedTuple):
    """``layout`` says where the axes stand: image [B, C, H, W], tokens [B, T, C], line [B, C, T], vector [B, C]."""

    layout: str
    channels: int
    size: int  # T, or H = W; 1 for a vector


@dataclass(frozen=True)
class Idiom:
    """One piece of Python: see data/idioms.txt."""

    weight: int
    takes: str
    other: str  # "", "same" or "wide"
    gives: str
    channels: str
    size: str
    condition: str
    init: str
    forward: str
    members: str

    def fits(self, x: Shape, **more: int) -> bool:
        """Whether it can read a value of this shape."""
        return x.layout == self.takes and eval(self.condition, {"c": x.channels, "s": x.size, **more})

    def result(self, x: Shape, **widths: int) -> Shape:
        """The shape of what it makes."""
        scope = {"c": x.channels, "s": x.size, **widths}
        return Shape(self.gives, eval(self.channels, scope), 1 if self.gives == "vector" else eval(self.size, scope))


@cache
def read_idioms() -> tuple[Idiom, ...]:
    """All pieces of data/idioms.txt."""
    _, *texts = IDIOMS.read_text().strip().split("\n\n")
    return tuple(parse_idiom(text) for text in texts if "->" in text)


def parse_idiom(text: str) -> Idiom:
    """One piece."""
    head, _, rest = text.partition("\n")
    init, forward, members = [*f"{rest}\n".split("---\n"), ""][:3]
    head, _, condition = head.partition(" if ")
    head, _, size = head.partition(" @ ")
    takes, _, gives = head.partition(" -> ")
    weight, _, takes = takes.rpartition(" * ")
    takes, _, other = takes.partition(" + ")
    gives, _, channels = gives.partition(" ")
    return Idiom(
        int(weight or 1), takes, other, gives, channels, size or "s", condition or "True", init, forward, members
    )


# What a statement may stand in. {body} makes $y of $x; where the shape stays the same, it may run twice or not at all.
AROUND = (
    "with torch.no_grad():\n{body}",
    "with torch.autocast('cpu', dtype=torch.bfloat16), torch.enable_grad():\n{body}",
    "if isinstance($x, Tensor) and not isinstance($x, nn.Parameter):\n{body}",
    "if $x.shape[0] < 1 or $x.ndim != len($x.shape):\n    raise ValueError($x.shape)\nelse:\n{body}",
    "for _ in range(1):\n{body}",
    "with contextlib.ExitStack() as stack:\n    stack.enter_context(torch.set_grad_enabled(True))\n{body}",
    "def step($x):\n{body}\n    return $y\n$y = step($x)",
    "try:\n{body}\nfinally:\n    pass",
)
AROUND_SAME = (
    "for _ in range(2):\n{body}\n    $x = $y",
    "if self.training:\n{body}\nelse:\n    $y = $x * 1",
    "if not self.training:\n{body}\nelse:\n    $y = $x + 0",
    "$y = $x\nif self.flag:\n{body}",
)
RETURNS = (
    "return {first}",
    "return {first}, {rest}",
    "return [{first}, [{rest}], len(x)]",
    "return {{'first': {first}, 'rest': ({rest},), 'shape': tuple(x.shape[1:])}}",
    "result = {{}}\nresult['first'] = {first}\nresult.update(rest=[{rest}])\nreturn result",
    "return Named({first}, rest=({rest},))",
    "return Output(main={first}, rest=[{rest}], note='kept')",
)
CALLS = (  # of a module within, that takes one tensor
    "$y = self.$n($x)",
    "$y = self.$n(x=$x)",
    "$y = self.$n(*[$x], **{})",
    "$y = nn.Module.__call__(self.$n, $x)",
    "for _, child in self.named_children():\n    if child is self.$n:\n        $y = child($x)",
)


class Named(NamedTuple):
    """A result of two parts."""

    first: Tensor
    rest: tuple[Tensor, ...]


@dataclass
class Output:
    """A result in a class of its own."""

    main: Tensor
    rest: list[Tensor] = field(default_factory=list)
    note: str = ""


pytree.register_dataclass(Output)


class Double(torch.autograd.Function):
    """Twice its input, with a backward of its own."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 3  # not the derivative: who loses it is seen


class Author:
    """Writes one class, statement by statement, and knows the shape of every value."""

    def __init__(self, draw: random.Random, name: str, x: Shape, steer: bool, written: list[str]) -> None:
        self.draw, self.name, self.steer, self.written = draw, name, steer, written
        self.shapes = {"x": x}
        self.unread = {"x"}
        self.init: list[str] = ["self.flag = True"]
        self.forward: list[str] = []
        self.members: list[str] = []

    def add(self, idiom: Idiom, x: str) -> bool:
        """Write one statement; False where it does not fit."""
        shape = self.shapes[x]
        z = self.find_other(idiom, x)
        widths = {"d": self.draw.choice(WIDTHS), "e": self.shapes[z].channels if z else 0}
        result = idiom.result(shape, **widths)
        if (idiom.other and not z) or not 0 < result.channels <= WIDEST:
            return False
        y, n = f"v{len(self.shapes)}", f"{self.name.lower()}_{len(self.shapes)}"
        words = {"x": x, "y": y, "z": z, "n": n, "c": shape.channels, "s": shape.size, **widths}
        body = idiom.forward.strip()
        around = AROUND + (AROUND_SAME if result == shape else ())
        for _ in range(self.draw.choice((0, 0, 0, 0, 1, 1, 2))):
            body = self.draw.choice(around).format(body=indent(body, "    "))
            around = AROUND
        self.write(body, words)
        self.init += fill(idiom.init, words)
        self.members += fill(idiom.members, words)
        self.note(y, result, x, *([z] if z else []))
        return True

    def find_other(self, idiom: Idiom, x: str) -> str:
        """A second value for a statement that reads two: of the same shape, but for the width where that may differ."""
        layout, channels, size = self.shapes[x]
        alike = [
            name
            for name, shape in self.shapes.items()
            if name != x and (shape.layout, shape.size) == (layout, size)
            if idiom.other == "wide" or shape.channels == channels
        ]
        return self.draw.choice(alike) if idiom.other and alike else ""

    def write(self, body: str, words: dict[str, Any]) -> None:
        """Add lines to forward."""
        self.forward += fill(body, words)

    def note(self, y: str, shape: Shape, *read: str) -> None:
        """A value is there, and others were read."""
        self.unread.difference_update(read)
        self.unread.add(y)
        self.shapes[y] = shape

    def add_module(self, x: str, depth: int) -> None:
        """A call of a module of a class of its own."""
        name = f"Block{len(self.written)}"
        self.written.append("")  # so that no other has its name
        inner = Author(self.draw, name, self.shapes[x], self.steer, self.written)
        y, n = f"v{len(self.shapes)}", f"block{len(self.shapes)}"
        result = inner.write_block(self.draw.randint(1, 4), depth + 1)
        self.written.append(inner.text("x"))
        words = {"x": x, "y": y, "n": n}
        self.init.append(f"self.{n} = {name}()")
        self.write(self.draw.choice(CALLS), words)
        if result == self.shapes[x] and self.draw.random() < 0.3:  # the same weights twice
            self.write("$y = $y + self.$n($y)", words)
        self.note(y, result, x)

    def write_statements(self, count: int, depth: int) -> None:
        """Statements, each of which reads a value: mostly the newest."""
        for _ in range(count):
            x = self.draw.choice([*self.shapes][-3:]) if self.draw.random() < 0.5 else [*self.shapes][-1]
            if depth < 2 and self.draw.random() < 0.12:
                self.add_module(x, depth)
                continue
            fitting = [idiom for idiom in read_idioms() if idiom.fits(self.shapes[x], steer=self.steer)]
            while fitting:
                idiom = self.draw.choices(fitting, [idiom.weight for idiom in fitting])[0]
                if self.add(idiom, x):
                    break
                fitting.remove(idiom)

    def write_block(self, count: int, depth: int) -> Shape:
        """The statements of a module within, which gives back its newest value."""
        self.write_statements(count, depth)
        newest = [*self.shapes][-1]
        self.forward.append(f"return {newest}")
        return self.shapes[newest]

    def write_outputs(self) -> None:
        """What is left unread is classified, and given back in some form; now and then a value as it is."""
        results = []
        for value in [name for name in self.shapes if name in self.unread]:
            layout, channels, _ = self.shapes[value]
            mean = {"image": ".mean((2, 3))", "tokens": ".mean(1)", "line": ".mean(-1)", "vector": ""}[layout]
            self.init.append(f"self.head_{value} = nn.Linear({channels}, 3)")
            self.forward.append(f"{value} = self.head_{value}({value}{mean})")
            results.append(value)
        if self.draw.random() < 0.15:
            results.append(self.draw.choice([*self.shapes]))
        rest = "".join(f"{value}, " for value in results[1:])[:-2] or "None"
        form = self.draw.choice(RETURNS[1:] if len(results) > 1 else RETURNS)
        self.forward += form.format(first=results[0], rest=rest).split("\n")

    def text(self, arguments: str) -> str:
        """The class."""
        lines = [f"class {self.name}(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in self.init]
        lines += ["", f"    def forward(self, {arguments}):", *[f"        {line}" for line in self.forward]]
        lines += ["", *[f"    {line}" for line in self.members]]
        return "\n".join(lines).rstrip() + "\n"


def fill(text: str, words: dict[str, Any]) -> list[str]:
    """The lines of a piece, with its names."""
    filled = Template(text).substitute(words).rstrip("\n")
    return filled.split("\n") if filled else []


@dataclass(frozen=True)
class Network:
    """The text of a network, and the form of its arguments."""

    seed: int
    source: str
    channels: int
    form: str  # of the arguments: see inputs

    def build(self) -> nn.Module:
        """The network. Its lines are known by a file name, as those of any module."""
        name = f"/networks/{self.seed}.py"
        linecache.cache[name] = len(self.source), None, self.source.splitlines(True), name
        scope: dict[str, Any] = {"collections": collections, "functools": functools, "math": math, "torch": torch}
        scope |= {"operator": operator, "F": F, "Tensor": Tensor, "nn": nn, "contextlib": contextlib}
        scope |= {"Named": Named, "Output": Output, "Double": Double}
        exec(compile(self.source, name, "exec"), scope)
        model: nn.Module = scope["Network"]()
        return model

    def inputs(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for one batch: an image, in several forms; float64."""
        generator = torch.Generator().manual_seed(self.seed)
        image = torch.randn(batch, self.channels, SIZE, SIZE, generator=generator, dtype=torch.float64)
        if self.form == "dict":
            return ({"image": image, "scale": 0.5},), {}
        return ((), {"x": image, "scale": 0.5}) if self.form == "keyword" else ((image,), {})


ARGUMENTS = {
    "plain": ("x", []),
    "keyword": ("x, mask=None, *, scale=1.0", ["x = x * scale if mask is None else x * mask"]),
    "star": ("*images, **options", ["x, = images", "assert not options"]),
    "dict": ("batch", ["x = batch['image'] * batch.get('scale', 1)"]),
}


def network_from_seed(seed: int, length: int = 100) -> Network:
    """The same network for the same seed: of up to 14 statements, of ``length`` at most."""
    draw = random.Random(seed)
    channels, form, steer = draw.choice((1, 3, 4)), draw.choice([*ARGUMENTS]), draw.random() < 0.1
    written: list[str] = []
    author = Author(draw, "Network", Shape("image", channels, SIZE), steer, written)
    arguments, lines = ARGUMENTS[form]
    author.forward += lines
    author.write_statements(min(draw.randint(3, 14), length), 0)
    author.write_outputs()
    return Network(seed, "\n\n".join([*filter(None, written), author.text(arguments)]), channels, form)
