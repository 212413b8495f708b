"""Capture: the graph is the user's model, whatever Python that has; or the line is named that no graph can hold."""

import collections
import contextlib
import copy
import dataclasses
import functools
import itertools
import operator
import pickle
import random
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import conv_bn, randomize
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxprune
from fxprune import passes
from fxprune.errors import TraceError, VerificationError
from fxprune.graph import capture, watch
from fxprune.graph.contexts import Apply
from fxprune.graph.inputs import bind_inputs
from fxprune.graph.trace import trace_whole
from fxprune.graph.traced import Mode

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    """Three convolutions, and a forward that is given."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.register_buffer("count", torch.zeros(()))
        self.hidden = [nn.Parameter(torch.ones(8, 1, 1, dtype=torch.float64))]
        self.how = forward

    def forward(self, x: Any) -> Any:
        return self.how(self, x)


def net(forward: Callable[..., Any]) -> Net:
    return randomize(Net(forward)).double().eval()


def trace_graph(model: nn.Module, example: Any = X) -> fxprune.TracedModule:
    return trace_whole(model, bind_inputs(example))


def pruned(model: nn.Module, example: Any = X) -> Any:
    budget = fxprune.Budget(channels=0.6, tolerance=0.2)
    return fxprune.prune(model, example, passes.Magnitude(scope="local", round_to=1), budget=budget)


def line_of(text: str) -> int:
    return next(at for at, line in enumerate(Path(__file__).read_text().splitlines(), 1) if text in line)


# ------------------------------------------------------------------------------------------- Python that just works


def if_tensor(m: Net, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    if isinstance(y, Tensor):
        y = m.b(y[:, :, 1:-1, 1:-1]).relu()
    return m.o(y)


def checks_shapes(m: Net, x: Tensor) -> Tensor:
    assert x.dim() == 4
    if x.shape[1] != 3 or x.size(-1) % 4:
        raise ValueError("size")
    return m.o(m.b(m.a(x).relu()).relu())


def reads_dtypes(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    if y.dtype in (torch.float16, torch.bfloat16) or y.device.type == "cuda":
        y = y.float()
    return m.o(m.b(y.relu().to(m.a.weight.dtype).to(x.device)).relu())


def loops(m: Net, x: Tensor) -> Tensor:
    parts = list(m.a(x).chunk(4, 1))
    parts.append(parts[-1].relu())
    return m.o(m.b(torch.cat([part * 1.5 for part in parts[1:]], 1)).relu())


def maps(m: Net, x: Tensor) -> Tensor:
    return m.o(m.b(torch.cat(list(map(torch.relu, m.a(x).chunk(2, 1))), 1)))


def stars(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    b, _, h, w = y.shape
    y = y.flatten(2).transpose(1, 2)
    y = y.view(*y.shape[:-1], -1, 4).flatten(2)
    return m.o(m.b(y.transpose(1, 2).reshape(b, -1, h, w)).relu())


def asks_by_axes(m: Net, x: Tensor) -> Tensor:
    return m.o(m.b(m.a(x).relu()) * {3: 1.0, 4: 2.0}[x.ndim])


def makes_constants(m: Net, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    mask = torch.tensor([1.0, 0.0] * 4, dtype=y.dtype)[:, None, None] + torch.from_numpy(np.ones((8, 1, 1)))
    return m.o(m.b(y * mask) + torch.zeros(y.shape[0], 1, 1, 1, device=y.device, dtype=y.dtype))


@functools.lru_cache
def mask_of(size: int) -> Tensor:
    return torch.ones(size, 1, 1)


def remembers(m: Net, x: Tensor) -> Tensor:
    return m.o(m.a(x) * mask_of(8))


@pytest.mark.parametrize(
    "forward", [if_tensor, checks_shapes, reads_dtypes, loops, maps, stars, asks_by_axes, makes_constants]
)
def test_python_that_just_works(forward: Callable[..., Any]) -> None:
    model = net(forward)
    graph, large = trace_graph(model), torch.cat([X, -X, X + 1])
    assert torch.equal(graph(large), model(large)), "another batch"
    assert pruned(model)(large).shape == model(large).shape
    frozen = [str(item.reason) for item in fxprune.analyze(graph, X).frozen if item.parameter == "a.bias"]
    assert not frozen or forward is makes_constants


def test_what_a_function_remembers_is_no_tensor_of_the_recording() -> None:
    model = net(remembers)
    graph = trace_graph(model)
    assert type(mask_of(8)) is Tensor
    torch.testing.assert_close(graph(X), model(X), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "size",
    [len, lambda x: int(x.shape[0]), lambda x: x.numel() // 192, lambda x: x.shape.numel() // 192],
    ids=["len", "int", "numel", "shape.numel"],
)
def test_the_batch_is_followed_however_it_is_read(size: Callable[[Tensor], int]) -> None:
    model = net(lambda m, x: m.o(m.b(m.a(x)).reshape(size(x), 8, 2 * 4, -1)))
    assert torch.equal(trace_graph(model)(X[:1]), model(X[:1]))


def test_python_that_loops_over_the_batch() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.o(torch.stack([m.a(image).relu() for image in x]))  # one by one

    message = rf"test_capture.py:{line_of('# one by one')}: .* is another for another batch size"
    with pytest.raises(TraceError, match=message):
        trace_graph(net(forward))
    model = net(forward)
    assert torch.equal(fxprune.trace(model, X)(X[:1]), model(X[:1])), "it stays plain Python"


def test_a_node_names_the_line_of_the_model() -> None:
    graph = trace_graph(net(stars))
    lines = {node.name: node.stack_trace for node in graph.graph.nodes if node.op.startswith("call")}
    assert all("test_capture.py" in (trace or "") for name, trace in lines.items() if "size" not in name), lines


def test_a_graph_of_two_modes_can_be_traced_by_torch() -> None:
    model = net(lambda m, x: m.o(F.dropout(m.a(x), 0.5, m.training)))
    graph = trace_graph(model)
    assert len(graph.distinct_graphs()) == 2
    assert torch.equal(torch.fx.symbolic_trace(graph.eval())(X), model(X))


# -------------------------------------------------------------------------------------------------------- contexts


def under_no_grad(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.a(x).relu()
    return m.o(m.b(y))


@torch.no_grad()
def stem(m: Net, x: Tensor) -> Tensor:
    return m.a(x).relu()


def decorated(m: Net, x: Tensor) -> Tensor:
    return m.o(m.b(stem(m, x)))


def switched(m: Net, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        y = m.a(x).relu()
        with torch.enable_grad():
            z = m.b(y.detach())
    return m.o(z)


@pytest.mark.parametrize("forward", [under_no_grad, decorated, switched])
def test_what_does_not_train_does_not_train(forward: Callable[..., Any]) -> None:
    compact = pruned(net(forward)).train()
    compact(X).sum().backward()
    assert compact.get_submodule("a").weight.grad is None
    assert float(compact.get_submodule("b").weight.grad.abs().sum()) > 0
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            before = torch.is_grad_enabled()
            compact(X)
            assert torch.is_grad_enabled() is before, "what it met is put back"


@pytest.mark.filterwarnings("ignore:.*CPU autocast")
def test_autocast_begins_and_ends() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        with torch.autocast("cpu", enabled=False):
            return m.o(m.b(y.float()))

    model = randomize(Net(forward)).float().eval()
    x = X.float()
    for graph in (trace_graph(model, x), pickle.loads(pickle.dumps(trace_graph(model, x)))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(graph(x), model(x))
            assert graph(x).dtype == torch.float32
            assert torch.is_autocast_enabled("cpu")
    inner = trace_graph(randomize(Net(lambda m, x: inside_autocast(m, x))).float(), x)
    assert inner(x).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def inside_autocast(m: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.o(m.b(m.a(x)))


@pytest.mark.filterwarnings("ignore:.*CPU autocast")
def test_contexts_end_where_a_graph_fails() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            return m.o(m.a(x))

    graph = trace_graph(net(forward))
    with pytest.raises(RuntimeError, match="expected input"):
        graph(X[:, :2])
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda graph: pickle.loads(pickle.dumps(graph))], ids=["copy", "pickle"]
)
def test_a_function_keeps_its_backward(copied: Callable[..., Any]) -> None:
    model = net(lambda m, x: m.o(Round.apply(m.b(m.a(x)))))
    for graph in (trace_graph(model), copied(trace_graph(model)), pruned(model)):
        graph.train()(X).sum().backward()
        assert float(graph.get_submodule("a").weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.o(m.a(x) * torch.rand(8, 1, 1)),
        lambda m, x: m.o(m.a(x) * torch.empty(8, 1, 1).bernoulli_(0.5)),
        lambda m, x: m.o(F.dropout(m.a(x), 0.5, True)),
    ],
)
def test_noise_is_drawn_anew(forward: Callable[..., Any]) -> None:
    graph = trace_graph(net(forward))
    for copied in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert len({float(copied(X).detach().sum()) for _ in range(10)}) > 5


# ----------------------------------------------------------------------------- buffers, hooks, arguments, results


def counts(m: Net, x: Tensor) -> Tensor:
    m.count += 1
    return m.o(m.a(x))


def counts_anew(m: Net, x: Tensor) -> Tensor:
    m.count = m.count + 1
    return m.o(m.a(x) * m.count.clamp(max=1.0))


def counts_in_place(m: Net, x: Tensor) -> Tensor:
    m.count.add_(1)
    return m.o(m.a(x))


@pytest.mark.parametrize("forward", [counts, counts_anew, counts_in_place])
def test_buffers_are_written(forward: Callable[..., Any]) -> None:
    model = net(forward)
    graph = trace_graph(model)
    assert float(model.count) == 0, "tracing writes nothing"
    graph(X), graph(X)
    assert float(graph.get_buffer("count")) == 2
    assert "count" in graph.state_dict()


def test_hooks_of_root_containers_and_layers() -> None:
    model = nn.Sequential(conv_bn(3, 8), nn.Conv2d(8, 4, 1)).double().eval()
    model.register_forward_pre_hook(lambda module, args: (args[0] / 4,))
    model[0].register_forward_hook(lambda module, args, result: result * 3)
    model.register_forward_hook(lambda module, args, result: {"logits": result})
    calls: list[int] = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    graph = trace_graph(model)
    calls.clear()
    assert torch.equal(graph(X)["logits"], model(X)["logits"])
    assert len(calls) == 2, "those of a layer stay on it"


def writes_sizes(m: Net, x: Tensor) -> Tensor:
    m.grid = x.shape[2:]
    m.height, m.flags = x.shape[2], {"ready": True}
    return m.o(m.b(m.a(x)).reshape(x.shape[0], 8, m.height, -1))


def writes_a_cache(m: Net, x: Tensor) -> Tensor:
    m.ramp = torch.arange(x.shape[2], dtype=torch.float64) * m.b.weight.sum()
    return m.o(m.a(x) + m.ramp)


@pytest.mark.parametrize("forward", [writes_sizes, writes_a_cache])
def test_what_is_written_anew_in_each_run_is_no_effect(forward: Callable[..., Any]) -> None:
    model = net(forward)
    assert torch.equal(trace_graph(model)(X[:1]), model(X[:1]))
    assert not {"grid", "ramp"} & vars(trace_graph(net(forward))).keys()


def look(*_: Any) -> None:
    """A hook for its effects."""


@pytest.mark.parametrize(
    ("hang", "message"),
    [
        (lambda m: m.register_forward_hook(look), "hook look of the model gives nothing back"),
        (lambda m: m[0].register_forward_pre_hook(look), "hook look of module 0 gives nothing back"),
        (lambda m: m[0].register_full_backward_hook(look), "module 0 has a backward hook"),
    ],
)
def test_hooks_that_a_graph_would_lose(hang: Callable[[nn.Sequential], Any], message: str) -> None:
    model = nn.Sequential(conv_bn(3, 8), nn.Conv2d(8, 4, 1)).double().eval()
    hang(model)
    with pytest.raises(TraceError, match=message):
        trace_graph(model)
    assert any(
        kind
        for part in model.modules()
        for kind in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks)
    )


class Arguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 4)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *more: Tensor, double: bool = False, **rest: Any
    ) -> Tensor:
        y = self.a(x).relu()
        for tensor in (*more, *rest.values()):
            y = y + tensor
        y = y if mask is None else y * mask
        return 2 * y if double else y


V = torch.randn(2, 8)
MASK = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("example", "same", "refused"),
    [
        (V, [((V,), {"mask": None}), ((V,), {"double": False})], [((V, MASK), {}), ((V,), {"double": True})]),
        ((V, MASK), [((V, MASK * 3), {})], [((V, None), {}), ((V,), {}), ((V, MASK, MASK), {})]),
        ((V, MASK, MASK), [((V, MASK, MASK + 1), {})], [((V, MASK), {}), ((V, MASK, MASK, MASK), {})]),
        (((V,), {"extra": MASK}), [((V,), {"extra": 2 * MASK})], [((V,), {}), ((V,), {"other": MASK})]),
        (((), {"x": V, "double": True}), [((), {"x": V, "double": True})], [((V,), {}), ((V,), {"double": 1})]),
    ],
)
def test_arguments_are_those_of_the_example(example: Any, same: list[Any], refused: list[Any]) -> None:
    model = Arguments()
    graph = trace_graph(model, example)
    for args, kwargs in same:
        assert torch.equal(graph(*args, **kwargs), model(*args, **kwargs))
    for args, kwargs in refused:
        with pytest.raises(TraceError, match=r"argument '(mask|double|more|rest)' is .* made with .* trace"):
            graph(*args, **kwargs)
    fxprune.analyze(graph, example)


def test_keywords_behind_a_decorator() -> None:
    def returns(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return forward(self, *args, **kwargs)

        return wrapper

    class Decorated(Arguments):
        forward = returns(Arguments.forward)

    model = Decorated()
    assert torch.equal(trace_graph(model, ((), {"x": V, "extra": MASK}))(x=V, extra=2 * MASK), model(V, extra=2 * MASK))


def fills_in_defaults(forward: Callable[..., Any]) -> Callable[..., Any]:
    """As decorators of Hugging Face do: what the caller left out is given by name."""

    @functools.wraps(forward)
    def call(model: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("scale", 2.0)
        return forward(model, *args, **kwargs)

    return call


class Scaled(Net):
    @fills_in_defaults
    def forward(self, x: Tensor, scale: float | None = None) -> Any:
        return self.how(self, x) * scale


@pytest.mark.parametrize("example", [(X,), ((X,), {}), ((), {"x": X})])
def test_forward_is_called_as_the_example_says(example: Any) -> None:
    model = randomize(Scaled(lambda m, x: m.o(m.b(m.a(x))))).double().eval()
    assert torch.equal(trace_graph(model, example)(X), model(X))


def test_an_argument_that_no_graph_can_take() -> None:
    with pytest.raises(TraceError, match="argument 'mask' is a Generator, which no graph can take"):
        trace_graph(Arguments(), (V, torch.Generator()))


@dataclasses.dataclass
class Output:
    logits: Tensor
    more: Any = None


@dataclasses.dataclass
class Ordered(collections.OrderedDict):  # type: ignore[type-arg]
    logits: Any = None

    def __post_init__(self) -> None:
        self["logits"] = self.logits


class Pair(NamedTuple):
    logits: Tensor
    features: Tensor


@pytest.mark.parametrize(
    ("wrap", "get"),
    [
        (lambda y: Output(y, [y, None]), lambda out: out.logits),
        (lambda y: Ordered(y), lambda out: out["logits"]),
        (lambda y: Pair(y, y + 1), lambda out: out.logits),
        (lambda y: collections.OrderedDict(out=y), lambda out: out["out"]),
        (lambda y: {"out": [y, (y, "text", 1)]}, lambda out: out["out"][0]),
    ],
)
def test_results_keep_their_class(wrap: Callable[..., Any], get: Callable[..., Any]) -> None:
    model = net(lambda m, x: wrap(m.o(m.b(m.a(x)))))
    expected = model(X)
    for graph in (trace_graph(model), pruned(model), pickle.loads(pickle.dumps(trace_graph(model)))):
        result = graph(X)
        assert type(result) is type(expected)
        assert get(result).shape == get(expected).shape
    assert torch.equal(get(trace_graph(model)(X)), get(expected))


def test_a_result_that_no_graph_can_make() -> None:
    with pytest.raises(TraceError, match="the model returns a set, which no graph can make"):
        trace_graph(net(lambda m, x: {m.a(x)}))


# --------------------------------------------------------------------------------------------------------- refusals


def draws_random(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    if random.random() < 0.5:  # a draw
        y = y + m.b(y)
    return m.o(y)


def draws_numpy(m: Net, x: Tensor) -> Tensor:
    scale = np.random.rand()  # numpy's draw
    return m.o(m.a(x) * scale)


def asks(m: Net, x: Tensor) -> Tensor:
    return m.o(m.a(x) if bool(x.sum() > 0) else m.b(m.a(x)))  # asks


def asks_behind_try(m: Net, x: Tensor) -> Tensor:
    try:
        big = x.max().item() > 3  # asks in a try
    except RuntimeError:
        big = False
    return m.o(m.a(x) * 2 if big else m.a(x))


def asks_numpy(m: Net, x: Tensor) -> Tensor:
    return m.o(m.a(x) * float(x.detach().numpy().mean()))  # asks numpy


def picks(m: Net, x: Tensor) -> Tensor:
    return m.o(m.a(x[x.sum((1, 2, 3)) > -1e9]))  # picks


def recomputes(m: Net, x: Tensor) -> Tensor:
    return m.o(checkpoint(m.b, m.a(x), use_reentrant=False))  # recomputes


def hooks_a_tensor(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    y.register_hook(lambda gradient: gradient * 2)  # hooks
    return m.o(y)


def hooks_what_is_saved(m: Net, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved * 2):  # saved
        return m.o(m.a(x))


def infers(m: Net, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = m.a(x)  # infers
    return m.o(y.clone())


def uses_hidden(m: Net, x: Tensor) -> Tensor:
    return m.o(m.a(x) * m.hidden[0])  # hidden


def widens(m: Net, x: Tensor) -> Tensor:
    m.count = m.count.expand(2).clone()
    return m.o(m.a(x))


def takes_generator(m: Net, x: Tensor) -> Tensor:
    return m.o(m.a(x) + torch.rand(8, 1, 1, generator=torch.Generator()))  # generator


# A cache that nobody looks for.
HIDDEN = SimpleNamespace(mask=functools.lru_cache(lambda size: torch.ones(size, 1, 1)))


def remembers_elsewhere(m: Net, x: Tensor) -> Tensor:
    return m.o(m.a(x) * HIDDEN.mask(8))  # remembers


def keeps(m: Net, x: Tensor) -> Tensor:
    m.seen = m.a(x)
    return m.o(m.seen)


def keeps_in_a_list(m: Net, x: Tensor) -> Tensor:
    m.hidden.append(m.a(x))  # type: ignore[arg-type]
    return m.o(m.hidden[-1])


def counts_runs(m: Net, x: Tensor) -> Tensor:
    m.runs = getattr(m, "runs", 0) + 1
    return m.o(m.a(x))


def is_new(m: Net, x: Tensor) -> Tensor:
    y = m.a(x) if hasattr(m, "old") else m.b(m.a(x))
    m.old = True
    return m.o(y)


def draws_from_its_own(m: Net, x: Tensor) -> Tensor:
    m.dice = getattr(m, "dice", random.Random(0))
    return m.o(m.a(x) * m.dice.random())


def draws_from_numpys(m: Net, x: Tensor) -> Tensor:
    m.dice = getattr(m, "dice", np.random.default_rng(0))
    return m.o(m.a(x) * float(m.dice.uniform()))


def counts_with_an_iterator(m: Net, x: Tensor) -> Tensor:
    m.number = getattr(m, "number", itertools.count(1))
    return m.o(m.a(x) / next(m.number))


def counts_in_an_object(m: Net, x: Tensor) -> Tensor:
    m.state = getattr(m, "state", SimpleNamespace(step=0))
    m.state.step += 1
    return m.o(m.a(x) / m.state.step)


def asks_for_a_gradient(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.o(m.b(y) if y.requires_grad else y)  # asks for a gradient


def maps(m: Net, x: Tensor) -> Tensor:
    return m.o(torch.vmap(lambda image: image * 2)(m.a(x)))  # maps


def differentiates(m: Net, x: Tensor) -> Tensor:
    return m.o(torch.func.grad(lambda y: (y**2).sum())(m.a(x)))  # differentiates


def pushes_forward(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.o(torch.func.jvp(torch.sin, (y,), (y,))[1])  # pushes forward


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it is deprecated
    DOUBLE = torch.jit.CompilationUnit("def double(x):\n    return x * 2\n").double
    TRACED_RELU = torch.jit.trace(nn.ReLU(), torch.ones(2))


def calls_script(m: Net, x: Tensor) -> Tensor:
    return m.o(DOUBLE(m.a(x)))  # script


@pytest.mark.parametrize(
    ("forward", "mark", "message"),
    [
        (draws_random, "# a draw", "draws a random number"),
        (draws_numpy, "# numpy's draw", "draws a random number"),
        (asks, "# asks", "asks for the values of a tensor"),
        (asks_behind_try, "", "asks for the values of a tensor"),
        (asks_numpy, "# asks numpy", "numpy"),
        (picks, "# picks", "asks for the values of a tensor"),
        (recomputes, "# recomputes", "checkpoint can't stand in a graph"),
        (hooks_a_tensor, "# hooks", "a hook of the backward pass can't stand in a graph"),
        (hooks_what_is_saved, "# saved", "a hook of the backward pass can't stand in a graph"),
        (infers, "# infers", "write torch.no_grad"),
        (uses_hidden, "# hidden", r"a parameter of shape \[8, 1, 1\] is used that the model does not register"),
        (widens, "", r"buffer count becomes .* keep shape and dtype"),
        (takes_generator, "# generator", "a Generator is given to torch"),
        (maps, "# maps", r"a transform of torch.func \(vmap, .*, or in a module of its own"),
        (differentiates, "# differentiates", "a transform of torch.func"),
        (pushes_forward, "# pushes forward", "a transform of torch.func"),
        (calls_script, "# script", "TorchScript without its Python"),
        (remembers_elsewhere, "# remembers", r"tensor of shape \[8, 1, 1\] comes from a call that can't be recorded"),
        (keeps, "", r"attribute 'seen' of the model keeps a tensor of shape \[2, 8, 8, 8\]"),
        (keeps_in_a_list, "", r"attribute 'hidden' of the model keeps a tensor of shape \[2, 8, 8, 8\]"),
        (counts_runs, "", "attribute 'runs' of the model is another after each run"),
        (is_new, "", "attribute 'old' of the model is another after each run"),
        (draws_from_its_own, "", "attribute 'dice' of the model is another after each run"),
        (draws_from_numpys, "", "attribute 'dice' of the model is another after each run"),
        (counts_with_an_iterator, "", "attribute 'number' of the model is another after each run"),
        (counts_in_an_object, "", "attribute 'state' of the model is another after each run"),
        (asks_for_a_gradient, "# asks for a gradient", "whether a tensor has a gradient"),
    ],
)
def test_what_a_graph_can_not_hold(forward: Callable[..., Any], mark: str, message: str) -> None:
    python, numpy = random.getstate(), np.random.get_state(legacy=True)[1].tolist()
    place = rf"test_capture.py:{line_of('  ' + mark)}.*" if mark else ""
    with pytest.raises(TraceError, match=f"(?s){place}{message}"):
        trace_graph(net(forward))
    assert random.getstate() == python
    assert np.random.get_state(legacy=True)[1].tolist() == numpy


@pytest.mark.parametrize(
    "forward", [draws_random, asks, asks_behind_try, asks_numpy, picks, recomputes, keeps, counts_runs]
)
def test_it_stays_plain_python(forward: Callable[..., Any]) -> None:
    model = net(forward)
    graph = fxprune.trace(nn.Sequential(model, conv_bn(4, 4).double().eval()), X)
    assert [path for path in fxprune.graph.traced.regions_of(graph)] == ["1"]
    random.seed(0)
    expected = model(X)
    random.seed(0)
    assert torch.equal(graph[0](X), expected)
    text = str(fxprune.analyze(graph, X))
    assert re.search(r"plain Python, 0: .*(Net|Conv2d)", text), text
    assert "plain Python, the whole: can't trace " in text


def test_weights_that_the_model_writes_into_are_as_before() -> None:
    def clamps(m: Net, x: Tensor) -> Tensor:
        m.a.weight.data.clamp_(-0.1, 0.1)
        return m.o(m.a(x))

    model = net(clamps)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with contextlib.suppress(TraceError):
        fxprune.trace(model, X)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_torchscript_in_a_model_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), TRACED_RELU)
    with pytest.raises(TraceError, match=r"^1 of Sequential is TorchScript, .* give the model it was made from"):
        fxprune.trace(model, torch.randn(2, 3, 8, 8))


# ------------------------------------------------------------------------------------------- layers in another mode


class Normed(nn.Module):
    """Batch norm and dropout, whose mode ``set_mode`` sets in forward or in ``train``."""

    def __init__(self, set_mode: Callable[["Normed"], Any], within: bool) -> None:
        super().__init__()
        self.a, self.bn, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.b, self.o = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)
        self.set_mode, self.within = set_mode, within

    def train(self, mode: bool = True) -> "Normed":
        super().train(mode)
        if not self.within:
            self.set_mode(self)
        return self

    def forward(self, x: Tensor) -> Any:
        if self.within:
            self.set_mode(self)
        return self.o(self.b(self.drop(self.bn(self.a(x)).relu())).relu())


@pytest.mark.parametrize(
    "set_mode",
    [
        lambda m: m.bn.eval(),
        lambda m: m.drop.train(),
        lambda m: (m.bn.train(False), m.drop.train(True)),
        lambda m: m.bn.train(m.training and False),
    ],
)
@pytest.mark.parametrize("within", [False, True])
def test_layers_keep_a_mode_of_their_own(set_mode: Callable[[Normed], Any], within: bool) -> None:
    """Frozen batch norm, and dropout that never rests, whether ``train`` sees to it or forward."""
    model = randomize(Normed(set_mode, within)).double().eval()
    graph, compact = trace_graph(model), pruned(model)
    for training in (True, False):
        outcomes = []
        for run in (copy.deepcopy(model), graph):
            torch.manual_seed(0)
            run.train(training)
            outcomes.append(run(X))
            assert torch.equal(run.bn.running_mean, model.bn.running_mean) or run.bn.training
        assert torch.allclose(*outcomes, rtol=0, atol=1e-10)
    compact.train()
    compact(X).sum().backward()
    assert compact.bn.weight.grad is not None


def lends_weights(m: Net, x: Tensor) -> Tensor:
    weights = {"weight": m.b.weight * 2, "bias": m.b.bias}
    return m.o(torch.func.functional_call(m.b, weights, (m.a(x).relu(),)))


def lends_all(m: Net, x: Tensor) -> Tensor:
    weights = {name: parameter * 0.5 for name, parameter in m.b.named_parameters()}
    return m.o(torch.func.functional_call(m.b, weights, m.a(x)) + m.b(m.a(x)))


@pytest.mark.parametrize("forward", [lends_weights, lends_all])
def test_a_layer_that_is_called_with_other_weights(forward: Callable[..., Any]) -> None:
    model = net(forward)
    graph = trace_graph(model)
    for x in (X, torch.cat([X, -X])):
        assert torch.allclose(graph(x), model(x), rtol=0, atol=1e-10)
    compact = pruned(model)
    assert max(compact.a.weight.shape[0], compact.b.weight.shape[0]) < 8


def parametrized(change: Callable[[nn.Module], Any]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).double().eval()
    change(model[0])
    return model


@pytest.mark.parametrize(
    "change",
    [
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        lambda layer: nn.utils.parametrizations.spectral_norm(nn.utils.parametrizations.weight_norm(layer)),
    ],
)
def test_a_parametrized_layer_makes_its_weight_once(change: Callable[[nn.Module], Any]) -> None:
    model = parametrized(change)
    graph = trace_graph(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    alone = copy.deepcopy(model).train()
    assert torch.allclose(alone(X), graph.train()(X), rtol=0, atol=1e-10)
    buffers = dict(graph.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in alone.named_buffers())


# ------------------------------------------------------------------------------------------------------------ check


@pytest.mark.parametrize(
    ("wrong", "forward", "message"),
    [
        ({"sub": operator.add}, lambda m, x: m.o(m.a(x) - m.b(m.a(x))), "in eval mode output 0 is another"),
        ({"mul": lambda a, b: (a * b).detach()}, lambda m, x: m.o(m.a(x) * m.a(x)), "a.bias gets no gradient"),
        (
            {"mul": lambda a, b: a * b.detach()},
            lambda m, x: m.o(m.a(x) * m.a(x)),
            "the gradient of a.weight is another",
        ),
        ({"sub": lambda a, b: (a - b)[:1]}, lambda m, x: m.a(x) - 1, "in eval mode output 0 is another"),
        ({"sub": lambda a, b: [a - b]}, lambda m, x: m.a(x) - 1, r"the result is \['Tensor\[2, 8, 8, 8\]'\], not"),
        ({"sub": lambda a, b: 1 / 0}, lambda m, x: m.a(x) - 1, "the graph of Net does not run: ZeroDivisionError"),
    ],
)
def test_a_graph_that_is_not_the_model(
    wrong: dict[str, Any], forward: Callable[..., Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "OPERATORS", capture.OPERATORS | wrong)
    model = net(forward)
    with pytest.raises(TraceError, match=message):
        trace_graph(model)
    assert isinstance(trace_whole(model, bind_inputs(X), check=False), fxprune.TracedModule)


class Halved(torch.autograd.Function):
    """A product, with half its gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        a, b = ctx.saved_tensors
        return gradient * b / 2, gradient * a / 2


@pytest.mark.parametrize("size", [8, 80])  # smaller, and larger, than the crops
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda a, b: a * b.detach(), "b.bias gets no gradient"),
        (lambda a, b: Halved.apply(a, b), "the gradient of a.weight is another"),
    ],
)
def test_the_backward_pass_is_compared(
    wrong: Callable[..., Any], message: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    monkeypatch.setattr(capture, "OPERATORS", capture.OPERATORS | {"mul": wrong})
    with pytest.raises(TraceError, match=f"in eval mode {message}"):
        trace_graph(net(lambda m, x: m.o(m.a(x) * m.b(m.a(x)))), x)


def test_two_samples_of_a_batch_are_compared() -> None:
    note = Mock()  # a list would be as before

    def forward(m: Net, x: Tensor) -> Tensor:
        if type(x) is Tensor:
            note(len(x))
        return m.o(m.a(x))

    trace_graph(net(forward), torch.cat([X] * 4))
    assert {call.args for call in note.call_args_list} == {(2,)}


def test_the_check_leaves_everything_as_it_was() -> None:
    model = nn.Sequential(conv_bn(3, 8), nn.Dropout(), nn.Conv2d(8, 4, 1)).double()
    state, noise = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fxprune.trace(model, X)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), noise)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            lambda m, x: m.o(m.a(x) / (m.a(x) - m.a(x))),
            "output 0 is NaN in eval mode, .* the model itself gives NaN on these example_inputs, first at .*lambda m",
        ),
        (
            lambda m, x: m.o(m.a(x)) * m.a(x)[:, :1].var(1, keepdim=True),
            r"the model itself gives NaN on these example_inputs, first at var \(.*test_capture.py",
        ),
        (
            lambda m, x: m.o(F.conv2d(x, m.a.weight / m.a.weight.abs().amax((1, 2, 3), keepdim=True))),
            "with the removed channels at zero the model gives NaN, first at truediv .*Add a small number",
        ),
        (lambda m, x: m.o((m.a(x).relu() * 0).sqrt()), "gradient .* is NaN in eval mode, .*in the backward pass"),
    ],
)
@pytest.mark.filterwarnings("ignore:var")
def test_nan_is_said_in_words(forward: Callable[..., Any], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        pruned(net(forward))


def test_infinities_are_alike() -> None:
    """As in scores that a mask has taken out; what is finite is compared."""
    compact = pruned(net(lambda m, x: m.o(m.b(m.a(x).relu())).masked_fill(x[:, :1] > 0, -float("inf"))))
    assert compact(X).isinf().any()


def test_a_module_under_two_names_is_restored_after_its_run_on_names() -> None:
    class Shared(Net):
        def __init__(self) -> None:
            super().__init__(lambda m, x: m.o(checkpoint(m.parts, m.a(x), use_reentrant=False)))
            self.parts = nn.Sequential(self.b, nn.ReLU())

    model = randomize(Shared()).double().eval()
    analysis = fxprune.analyze(model, X)
    assert all(type(parameter) is nn.Parameter for parameter in analysis.graph.parameters())
    assert pruned(model)(X).shape == (2, 4, 8, 8)


def test_verify_takes_the_users_model() -> None:
    model = net(stars)
    analysis = fxprune.analyze(model, X)
    plan = passes.Magnitude().plan(analysis, fxprune.Budget(channels=0.6, tolerance=0.2))
    compact, param_map = fxprune.rewrite(analysis.graph, analysis, plan)
    assert fxprune.verify(model, compact, param_map, X).outputs < 1e-10
    with pytest.raises(fxprune.errors.VerificationError, match=r"graph must be a Module, but it is 3"):
        fxprune.verify(3, compact, param_map, X)


# ---------------------------------------------------------------------------------------------------------- threads


def test_nothing_is_left_behind_and_threads_do_not_meet() -> None:
    before = {place: vars(place[0])[place[1]] for place in watch.HANDLERS}
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                model = net(lambda m, x: m.o(Round.apply(m.b(m.a(x)))))
                assert any(node.target == Apply(Round) for node in trace_graph(model).graph.nodes)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        y = torch.ones(2, requires_grad=True)
        Round.apply(y).sum().backward()
        assert y.grad is not None
    for thread in threads:
        thread.join()
    assert not errors
    assert {place: vars(place[0])[place[1]] for place in watch.HANDLERS} == before


# ----------------------------------------------------------------------------------------------- torch's transformers


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
        lambda: nn.TransformerEncoderLayer(16, 4, 32, norm_first=True),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2),
    ],
)
def test_torchs_transformers_lose_heads(make: Callable[[], nn.Module]) -> None:
    model = randomize(nn.Sequential(nn.Linear(8, 16), make(), nn.Linear(16, 4))).double().eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    analysis = fxprune.analyze(trace_graph(model, x), x)
    assert any("in_proj" in member.parameter for group in analysis.groups.values() for member in group.members)
    pruned(model, x)


# ------------------------------------------------------------------------------------------- what people do with it


class Head(nn.Module):
    """Containers, indexed by number and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
        self.parts = nn.ModuleList([nn.Flatten(), nn.Linear(256, 16)])
        self.head = nn.ModuleDict({"last": nn.Linear(16, 4)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        for part in self.parts:
            x = part(x)
        return self.head["last"](x)


def test_containers_stay_containers() -> None:
    compact = pruned(Head().double())
    compact.head["last"] = nn.Linear(compact.head["last"].in_features, 7).double()
    assert compact(X).shape == (2, 7)
    assert [type(layer) for layer in compact.features[:2]] == [nn.Conv2d, nn.ReLU]
    compact.parts[1] = nn.Linear(compact.parts[1].in_features, compact.head["last"].in_features).double()
    assert copy.deepcopy(compact)(X).shape == (2, 7)


def in_two_modes(m: Net, x: Tensor) -> Tensor:
    return m.o(F.dropout(m.b(m.a(x).relu()).relu(), 0.1, m.training))


@pytest.mark.parametrize("forward", [in_two_modes, checks_shapes])
@pytest.mark.parametrize("training", [False, True])
def test_compact_models_are_traced_again(forward: Callable[..., Any], training: bool) -> None:
    compact = pruned(net(forward)).train(training)
    again = torch.fx.symbolic_trace(compact)
    for model in (again, compact):
        torch.manual_seed(0)
        outcome = model(X)
        torch.manual_seed(0)
        assert torch.equal(outcome, compact(X))


def test_a_check_of_arguments_is_traced_again_too() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor, scale: int = 2) -> Tensor:
            return self.o(self.b(self.a(x).relu() * scale).relu())

    again = torch.fx.symbolic_trace(pruned(randomize(Scaled(checks_shapes)).double()))
    assert again(X, 2).shape == (2, 4, 8, 8)
    with pytest.raises(TraceError, match="argument 'scale' is 3, but the graph was made with 2"):
        again(X, 3)


def test_an_interpreter_runs_a_graph_that_takes_any_keywords() -> None:
    """As torch.export does: it gives an empty list for them."""

    class Keywords(Net):
        def forward(self, x: Tensor, **options: Any) -> Tensor:
            return self.o(self.b(self.a(x).relu()).relu())

    compact = pruned(randomize(Keywords(checks_shapes)).double()).eval()
    plain = torch.fx.GraphModule(compact.root(), compact.graphs[Mode.EVAL])
    assert torch.equal(torch.fx.Interpreter(plain).run(X), compact(X))


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")
def test_compact_models_are_scripted() -> None:
    compact = pruned(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)).double())
    assert torch.equal(torch.jit.script(compact)(X), compact(X))


class Grouped(nn.Module):
    """Attention with four heads of queries to two of keys and values; the Python of ``steered`` looks at values."""

    def __init__(self, steered: bool) -> None:
        super().__init__()
        self.i, self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 64), nn.Linear(8, 32), nn.Linear(8, 32)
        self.o, self.steered = nn.Linear(64, 8), steered

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x)
        if self.steered and x.sum() > 1e9:
            return x
        q, k, v = (part(x).unflatten(-1, (-1, 16)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("steered", [False, True])
def test_heads_of_grouped_queries(steered: bool) -> None:
    analysis = fxprune.analyze(Grouped(steered).eval(), torch.randn(2, 5, 8))
    groups = [
        group for group in analysis.groups.values() for m in group.members if (m.parameter, m.axis) == ("k.weight", 0)
    ]
    assert steered or [group.size for group in groups] == [2]


def test_empty_slices_and_tied_embeddings() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.mid, self.head = nn.Embedding(10, 16), nn.Linear(16, 16), nn.Linear(16, 10, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, i: Tensor) -> Tensor:
            h = self.mid(self.emb(i))
            return self.head(torch.cat([h[:, :0], h[:, 0:].relu()], 1))

    analysis = fxprune.analyze(Tied(), torch.randint(10, (2, 5)))
    assert "emb.weight[0]: all frozen" in analysis.explain("head")
