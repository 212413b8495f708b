"""Guards: a graph follows sizes and dtypes as the model's Python does, or names the line that does not let it."""

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune import passes
from fxprune.errors import TraceError
from fxprune.graph.guards import GUARDS

DOUBLE = torch.float64
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Three convolutions that ``forward`` calls."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def net(forward: Forward) -> Net:
    torch.manual_seed(0)
    return Net(forward).double().eval()


def whole(model: nn.Module, x: Tensor = X) -> fxprune.TracedModule:
    graph = fxprune.trace(model, x)
    assert isinstance(graph, fxprune.TracedModule), graph.meta
    return graph


def pruned(model: nn.Module, x: Tensor = X) -> fxprune.TracedModule:
    compact = fxprune.prune(model, x, passes.Magnitude(), budget=fxprune.Budget(channels=0.6, tolerance=0.3))
    assert isinstance(compact, fxprune.TracedModule)
    return compact


def sized(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)


def place_of(forward: Forward) -> str:
    mark = f"# {forward.__name__.replace('_', ' ')}"
    lines = Path(__file__).read_text().splitlines()
    return rf"test_guards\.py:{next(at for at, line in enumerate(lines, 1) if line.endswith(mark))}: "


# ------------------------------------------------------------------------------------------------------ comparisons


def larger(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    if x.shape[0] > 3:  # larger
        y = m.b(y)
    return m.o(y)


def reflected(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    if not x.size()[0] < 4:  # reflected
        y = m.b(y)
    return m.o(y)


def longest(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    if max(x.shape[-2:]) > 16:  # longest
        y = F.avg_pool2d(y, 2)
    return m.o(y)


def by_a_float(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.o(F.avg_pool2d(y, 2) if x.shape[2] > 15.5 else y)  # by a float


def padded(m: Net, x: Tensor) -> Tensor:
    y, rest = m.a(x), x.shape[-1] % 4
    if rest:  # padded
        y = F.pad(y, (0, 4 - rest))
    return m.o(y)


def resized(m: Net, x: Tensor) -> Tensor:
    small = F.max_pool2d(m.a(x), 2)
    up, y = F.interpolate(small, scale_factor=2.0), m.a(x)
    if up.shape != y.shape:  # resized
        up = F.interpolate(up, size=y.shape[-2:])
    return m.o(torch.cat([up[:, :4], y[:, 4:]], 1))


def chosen(m: Net, x: Tensor) -> Tensor:
    scales = {8: 1.0, 12: 2.0}
    return m.o(m.a(x)) * scales[x.shape[2]]  # chosen


BATCHES = [(larger, sized(5, 3, 8, 8)), (reflected, sized(4, 3, 8, 8))]
IMAGES = [
    (longest, sized(2, 3, 8, 24)),
    (by_a_float, sized(2, 3, 16, 8)),
    (padded, sized(2, 3, 8, 9)),
    (resized, sized(2, 3, 9, 8)),
    (chosen, sized(2, 3, 12, 8)),
]


@pytest.mark.parametrize(("forward", "other"), BATCHES + IMAGES)
def test_sizes_that_take_another_path_are_refused_by_line(forward: Forward, other: Tensor) -> None:
    """In the graph, the compact model and copies; where Python takes the same path the graph is the model."""
    model = net(forward)
    graph, compact = whole(model), pruned(model)
    place = f"{place_of(forward)}.*trace the model with example_inputs"
    for found in (graph, compact, copy.deepcopy(compact), pickle.loads(pickle.dumps(compact))):
        with pytest.raises(TraceError, match=place):
            found(other)
    assert torch.equal(graph(X), model(X))
    if (forward, other) in BATCHES:
        assert torch.allclose(graph(sized(3, 3, 8, 8)), model(sized(3, 3, 8, 8)), rtol=0, atol=1e-10)


def test_a_guard_says_what_was_found() -> None:
    graph = whole(net(larger))
    with pytest.raises(TraceError, match=r"`if x.shape\[0\] > 3:.*it finds that 5 > 3 is True"):
        graph(sized(5, 3, 8, 8))


def test_an_example_larger_than_what_is_checked() -> None:
    """Two samples are compared where the model takes the same path for two."""
    model, x = net(larger), sized(6, 3, 8, 8)
    graph = whole(model, x)
    assert torch.allclose(graph(sized(5, 3, 8, 8)), model(sized(5, 3, 8, 8)), rtol=0, atol=1e-10)
    with pytest.raises(TraceError, match="finds that 2 > 3 is False"):
        graph(X)


def test_guards_of_channels_go_with_the_channels() -> None:
    def checks(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        if y.shape[1] != m.b.in_channels or y.shape[1] > 7:
            return m.o(y * 2)
        return m.o(y)

    model = net(checks)
    compact = pruned(model)
    assert compact.a.out_channels < 8
    assert any(node.target in GUARDS for node in whole(model).graph.nodes)
    assert not any(node.target in GUARDS for node in compact.graph.nodes)
    assert compact(sized(3, 3, 5, 5)).shape == (3, 4, 5, 5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")
@pytest.mark.parametrize("forward", [larger, longest, padded])
def test_guards_stand_in_no_ones_way(forward: Forward, tmp_path: Path) -> None:
    compact = pruned(net(forward))
    traced = torch.fx.symbolic_trace(compact)
    with pytest.raises(TraceError, match="the graph is what Python does there"):
        traced(sized(5, 3, 25, 25))
    batch = {0: torch.export.Dim("batch")}
    for other in (
        torch.jit.script(compact),
        traced,
        torch.export.export(compact, (X,), dynamic_shapes=(batch,)).module(),
    ):
        assert torch.equal(other(X), compact(X))
    fxprune.export_onnx(compact.float(), X.float(), tmp_path / "model.onnx")


# -------------------------------------------------------------------------------------------------------- followed


def whole_part(m: Net, x: Tensor) -> Tensor:
    h, w = x.shape[-2:]
    return m.o(F.interpolate(m.a(x), size=(int(h * 0.5), int(w / 3))))


def halved(m: Net, x: Tensor) -> Tensor:
    return m.o(m.a(x)) * int(x.size(0) / 2)


def rounded(m: Net, x: Tensor) -> Tensor:
    h, w = x.shape[-2:]
    return m.o(F.interpolate(m.a(x), size=(math.ceil(h / 3), math.floor(w * 1.5))))


def powers(m: Net, x: Tensor) -> Tensor:
    return m.o(m.a(x)) * x.shape[2] ** 0.5 / divmod(x.shape[3], 3)[0]


def made_plain(m: Net, x: Tensor) -> Tensor:
    h = int(x.shape[2])
    return m.o(m.a(x)[:, :, :h]) / float(x.shape[3])


@pytest.mark.parametrize("forward", [whole_part, halved, rounded, powers, made_plain])
@pytest.mark.parametrize("compact", [False, True])
def test_numbers_that_python_makes_of_sizes_are_followed(forward: Forward, compact: bool) -> None:
    model = net(forward)
    graph = pruned(model) if compact else whole(model)
    for x in (X, sized(3, 3, 8, 8), sized(2, 3, 12, 9), sized(1, 3, 7, 16)):
        expected = model(x)
        assert graph(x).shape == expected.shape
        assert compact or torch.allclose(graph(x), expected, rtol=0, atol=1e-10)


def loops(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.o(torch.stack([y[:, :, i] * 2 for i in range(y.shape[2])], 2))  # loops


def unbinds(m: Net, x: Tensor) -> Tensor:
    return m.o(torch.stack([row * 2 for row in m.a(x).unbind(2)], 2))  # unbinds


def scales(m: Net, x: Tensor) -> Tensor:
    return m.o(F.adaptive_avg_pool2d(m.a(x), int(0.5 * x.shape[2])))  # scales


@pytest.mark.parametrize("forward", [loops, unbinds, scales])
def test_what_no_number_shows_is_refused_at_other_sizes(forward: Forward) -> None:
    """Python's own loops and tables can't be seen; a recording with longer axes shows what came of them."""
    model = net(forward)
    place = f"{place_of(forward)}.*it needs the size 8, and is given 5"
    for graph in (whole(model), pruned(model)):
        assert graph(sized(3, 3, 8, 8)).shape == model(sized(3, 3, 8, 8)).shape
        with pytest.raises(TraceError, match=place):
            graph(sized(2, 3, 5, 5))


# ---------------------------------------------------------------------------------------------------------- dtypes


class Attention(nn.Module):
    """Attention, with a mask that ``mask`` makes of the scores."""

    def __init__(self, mask: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.mask(self, self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x))


def fills(m: Any, w: Tensor) -> Tensor:
    return w.masked_fill(w < 0, torch.finfo(w.dtype).min)


def fills_half_of_the_limit(m: Any, w: Tensor) -> Tensor:
    return torch.where(w > 0, w, w.new_full((), -torch.finfo(w.dtype).max / 2))


def makes_zeros(m: Any, w: Tensor) -> Tensor:
    return w + w.new_zeros(w.shape, dtype=w.dtype) + torch.arange(w.shape[-1], dtype=m.q.weight.dtype)


def in_float32(m: Any, w: Tensor) -> Tensor:
    return w.softmax(-1, dtype=torch.float32).to(w.dtype)


def floats(m: Any, w: Tensor) -> Tensor:
    return (w.float() * 2).type_as(w).to(dtype=m.v.bias.dtype)


Z = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [fills, fills_half_of_the_limit, makes_zeros, in_float32, floats])
def test_dtypes_are_followed(mask: Callable[[Any, Tensor], Tensor], dtype: torch.dtype) -> None:
    """A model is traced and cut in any dtype, proved in float64, and cast to any after."""
    torch.manual_seed(0)
    model = Attention(mask).to(dtype)
    graph, compact = whole(model, Z.to(dtype)), pruned(model, Z.to(dtype))
    for other in DTYPES:
        found = copy.deepcopy(graph).to(other)(Z.to(other))
        assert torch.equal(found, copy.deepcopy(model).to(other)(Z.to(other)))
        small = copy.deepcopy(compact).to(other)(Z.to(other))
        assert small.dtype == found.dtype
        assert small.isfinite().all()


def in_words(m: Any, w: Tensor) -> Tensor:
    if w.dtype == torch.float16:
        w = w.clamp(-100, 100)  # in words
    return w


def by_its_size(m: Any, w: Tensor) -> Tensor:
    return w if w.dtype != torch.float32 else w * 2  # by its size


@pytest.mark.parametrize(
    ("mask", "traced", "refused"),
    [
        (in_words, torch.float16, torch.float32),
        (in_words, torch.float32, torch.float16),
        (by_its_size, torch.float32, torch.float64),
    ],
)
def test_another_path_for_another_dtype_is_refused_by_line(
    mask: Callable[[Any, Tensor], Tensor], traced: torch.dtype, refused: torch.dtype
) -> None:
    compact = pruned(Attention(mask).to(traced), Z.to(traced))
    assert compact(Z.to(traced)).dtype == traced
    place = f"{place_of(mask)}.*dtype, which is {refused}, but the graph was made in {traced}"
    for found in (compact, torch.fx.symbolic_trace(compact)):
        with pytest.raises(TraceError, match=place):
            copy.deepcopy(found).to(refused)(Z.to(refused))
