"""State: what a model's Python keeps from run to run is seen wherever it stands, and a trace leaves it as it was."""

import contextlib
import copy
import functools
import io
import itertools
import pickle
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from models import conv_bn, randomize
from torch import Tensor, nn

import fxprune
from fxprune import passes
from fxprune.errors import AnalysisError, TraceError, VerificationError
from fxprune.graph.inputs import bind_inputs
from fxprune.graph.trace import trace_whole
from fxprune.graph.traced import reasons_of, regions_of

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BUDGET = fxprune.Budget(channels=0.6, tolerance=0.2)


class Net(nn.Module):
    """Three convolutions, a forward that is given, and something that it keeps."""

    calls = 0

    def __init__(self, forward: Callable[..., Any], kept: Any = None) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.drop, self.norm = nn.Dropout(0.0), nn.BatchNorm2d(8)
        self.register_buffer("empty", None)
        self.how, self.kept = forward, kept

    def forward(self, x: Any) -> Any:
        return self.how(self, x)

    def body(self, x: Tensor) -> Tensor:
        """What all do."""
        y: Tensor = self.o(self.b(self.a(x).relu()).relu())
        return y


def net(forward: Callable[..., Any], kept: Any = None) -> Net:
    return randomize(Net(forward, kept)).double().eval()


def whole(model: nn.Module) -> fxprune.TracedModule:
    return trace_whole(model, bind_inputs(X))


def pruned(model: nn.Module) -> Any:
    return fxprune.prune(model, X, passes.Magnitude(scope="local", round_to=1), budget=BUDGET)


def line_of(text: str) -> int:
    return next(at for at, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.endswith(text))


# ------------------------------------------------------------------------------------------ counters, wherever they are

STEPS = {"n": 0}
TICKS = itertools.count(1)


class Warmup:
    """A schedule that counts how often it is asked."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self) -> int:
        self.step += 1
        return self.step


class Slotted:
    """A counter without a dict."""

    __slots__ = ("step",)

    def __init__(self) -> None:
        self.step = 0


def asks_kept(m: Net, x: Tensor) -> Tensor:
    return m.body(x) / m.kept()


def nexts_kept(m: Net, x: Tensor) -> Tensor:
    return m.body(x) / next(m.kept)


def steps_kept(m: Net, x: Tensor) -> Tensor:
    m.kept.step += 1
    return m.body(x) / m.kept.step


def steps_in_training(m: Net, x: Tensor) -> Tensor:
    if m.training:
        m.kept.inner.step += 1
        return m.body(x) / m.kept.inner.step
    return m.body(x)


def draws_kept(m: Net, x: Tensor) -> Tensor:
    return m.body(x) * float(m.kept.random())


def rotates(m: Net, x: Tensor) -> Tensor:
    m.kept.rotate(1)
    return m.body(x) / m.kept[0]


def writes_numpy(m: Net, x: Tensor) -> Tensor:
    m.kept[0] += 1
    return m.body(x) / float(m.kept[0])


def counts_globally(m: Net, x: Tensor) -> Tensor:
    return m.body(x) / count_globally()


def count_globally() -> int:
    STEPS["n"] += 1
    return STEPS["n"]


def ticks_globally(m: Net, x: Tensor) -> Tensor:
    return m.body(x) / next(TICKS)


def counts_in_class(m: Net, x: Tensor) -> Tensor:
    Net.calls += 1
    return m.body(x) / Net.calls


def counts_late(m: Net, x: Tensor) -> Tensor:
    Net.calls += 1
    return m.body(x) if Net.calls > 100 else m.o(m.a(x))  # where no trace comes


def counts_in_default(m: Net, x: Tensor, calls: list[int] = [0]) -> Tensor:  # noqa: B006 - a counter
    calls[0] += 1
    return m.body(x) / calls[0]


def counts_on_itself(m: Net, x: Tensor) -> Tensor:
    counts_on_itself.calls = getattr(counts_on_itself, "calls", 0) + 1  # type: ignore[attr-defined]
    return m.body(x) / counts_on_itself.calls  # type: ignore[attr-defined]


def closure() -> Callable[..., Any]:
    calls = 0

    def counts(m: Net, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return m.body(x) / calls

    return counts


counts_on_itself.calls = 0  # type: ignore[attr-defined]
KEPT = "attribute 'kept' of the model"
COUNTERS: dict[str, tuple[Callable[..., Any], Callable[[], Any], str]] = {
    "namespace": (steps_kept, lambda: SimpleNamespace(step=0), KEPT),
    "slots": (steps_kept, Slotted, KEPT),
    "callable": (asks_kept, Warmup, KEPT),
    "partial": (asks_kept, lambda: functools.partial(Warmup.__call__, Warmup()), KEPT),
    "inner": (steps_in_training, lambda: SimpleNamespace(inner=SimpleNamespace(step=0)), KEPT),
    "count": (nexts_kept, lambda: itertools.count(1), KEPT),
    "cycle": (nexts_kept, lambda: itertools.cycle([1, 1, 1, 2]), KEPT),
    "iterator": (nexts_kept, lambda: iter(range(1, 1000)), KEPT),
    "random": (draws_kept, lambda: random.Random(0), KEPT),
    "numpy": (draws_kept, lambda: np.random.default_rng(0), KEPT),
    "old numpy": (draws_kept, lambda: np.random.RandomState(0), KEPT),
    "deque": (rotates, lambda: deque([1, 2, 3]), KEPT),
    "array": (writes_numpy, lambda: np.zeros(1), KEPT),
    "global": (counts_globally, lambda: None, "global 'STEPS' of test_state"),
    "global iterator": (ticks_globally, lambda: None, "global 'TICKS' of test_state"),
    "class": (counts_in_class, lambda: None, "attribute 'calls' of class Net"),
    "late": (counts_late, lambda: None, "attribute 'calls' of class Net"),
    "default": (counts_in_default, lambda: None, "a default argument of function counts_in_default"),
    "closure": (closure(), lambda: None, "variable 'calls' of function closure.<locals>.counts"),
    "function": (counts_on_itself, lambda: None, "attribute 'calls' of function counts_on_itself"),
}


def state_of(model: Net) -> Any:
    """Everything that the forwards here count with."""
    forward: Any = model.how
    cells = [cell.cell_contents for cell in forward.__closure__ or ()]
    kept = vars(model.kept.args[0]) if isinstance(model.kept, functools.partial) else model.kept
    held = (kept, STEPS, TICKS, Net.calls, forward.__defaults__, vars(forward), cells)
    file = io.BytesIO()
    pickler = pickle.Pickler(file)
    pickler.fast = True  # which objects are the same is no matter
    pickler.dump(held)
    return file.getvalue()


@pytest.fixture(autouse=True)
def _counters() -> Iterator[None]:
    yield
    STEPS["n"] = Net.calls = 0


@pytest.mark.parametrize("name", COUNTERS)
def test_a_counter_stays_plain_python_and_is_as_it_was(name: str) -> None:
    forward, make, words = COUNTERS[name]
    inner = net(forward, make())
    model = nn.Sequential(inner, conv_bn(4, 8), nn.Conv2d(8, 4, 1)).double().eval()
    before = state_of(inner)
    compact = pruned(model)  # and verified
    words = words.replace("the model", "module 0")
    assert f"{words} is another after each run, which a graph would not follow" in reasons_of(compact)[""]
    assert state_of(inner) == before, "the user's is as it was"
    assert state_of(compact[0]) == before, "so is the copy"
    analysis = fxprune.analyze(compact, X)
    assert "may go another way in other runs" in analysis.explain("0.a")
    assert all(compact[0].get_submodule(path).weight.shape == inner.get_submodule(path).weight.shape for path in "abo")
    if " of module 0" in words or " of the model" in words:
        assert compact.get_submodule("1.0").weight.shape[0] < 8, "what stands beside is pruned"


def test_what_torch_may_count_on_a_layer_is_its_own() -> None:
    model = net(Net.body)
    note: list[int] = []
    model.b.register_forward_hook(lambda *_: note.append(1))
    graph = whole(model)
    note.clear()
    graph(X)
    assert note == [1]


def test_what_can_not_be_copied_is_named() -> None:
    for kept in ((number for number in (1, 2)), threading.Lock()):
        with pytest.raises(TraceError, match=r"^attribute 'kept' of a Net can't be copied, .*: cannot pickle"):
            fxprune.trace(net(Net.body, kept), X)


# ----------------------------------------------------------------------------------------------- what layers are set to


def sets_dropout(m: Net, x: Tensor) -> Tensor:
    m.drop.p = 0.5 if m.training else 0.0
    return m.o(m.drop(m.b(m.a(x).relu())))


def sets_momentum(m: Net, x: Tensor) -> Tensor:
    m.norm.momentum = 0.25
    return m.o(m.norm(m.b(m.a(x).relu())))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (sets_dropout, "attribute 'p' of module drop becomes 0.5 in a run, where a graph keeps 0.0"),
        (sets_momentum, "attribute 'momentum' of module norm becomes 0.25 in a run, where a graph keeps 0.1"),
    ],
)
def test_what_forward_sets_in_a_layer_is_refused(forward: Callable[..., Any], message: str) -> None:
    model = randomize(net(forward)).double().eval()
    compact = pruned(model)
    assert message in reasons_of(compact)[""]
    assert (model.drop.p, model.norm.momentum) == (compact.drop.p, compact.norm.momentum) == (0.0, 0.1)
    torch.manual_seed(0)
    expected = model.train()(X).detach()
    torch.manual_seed(0)
    assert torch.equal(fxprune.trace(model, X)(X), expected)


# ------------------------------------------------------------------------------------------------- tensors written into


def clamps(m: Net, x: Tensor) -> Tensor:
    if m.training:
        m.a.weight.data.clamp_(-0.05, 0.05)
    return m.body(x)


def halves(m: Net, x: Tensor) -> Tensor:
    if m.training:
        m.a.weight.data.mul_(0.5)
    return m.body(x)


def halves_without_gradient(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.a.weight.mul_(0.5)
    return m.body(x)


def puts_data(m: Net, x: Tensor) -> Tensor:
    m.a.weight.data = m.a.weight.data.clamp(-0.05, 0.05)  # puts data
    return m.body(x)


def freezes_weight(m: Net, x: Tensor) -> Tensor:
    m.a.weight.requires_grad = not m.training  # freezes
    return m.body(x)


def averages(m: Net, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    with torch.no_grad():
        m.kept[0].mul_(0.9).add_(0.1 * y.mean((0, 2, 3)))
    return m.o(m.b(y - m.kept[0][:, None, None]))


def fills_a_buffer(m: Net, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    m.empty = y.detach().mean((0, 2, 3)) if m.empty is None else 0.9 * m.empty
    return m.o(m.b(y - m.empty[:, None, None]))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (clamps, ""),
        (halves, ""),
        (halves_without_gradient, ""),
        (puts_data, "Python there sets 'data' of a tensor"),
        (freezes_weight, "Python there sets 'requires_grad' of a tensor"),
        (averages, ""),
        (fills_a_buffer, "buffer empty becomes"),
    ],
)
def test_tensors_are_as_they_were(forward: Callable[..., Any], message: str) -> None:
    model = net(forward, [torch.zeros(8, dtype=torch.float64)])
    model.b.weight.requires_grad_(False)
    tensors = [*model.parameters(), *model.buffers(), *model.kept]
    before = [(tensor.detach().clone(), tensor.requires_grad, tensor.data_ptr()) for tensor in tensors]
    compact = pruned(model)
    assert message in "".join(reasons_of(compact).values())
    assert bool(message) is bool(reasons_of(compact))
    assert model.empty is None
    assert getattr(compact, "empty", None) is None
    for tensor, (values, trains, place) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, values)
        assert (tensor.requires_grad, tensor.data_ptr()) == (trains, place)


@functools.lru_cache
def ramp(size: int) -> Tensor:
    return torch.linspace(0, 1, size, dtype=torch.float64)


CACHE: dict[int, Tensor] = {}


def ramps(m: Net, x: Tensor) -> Tensor:
    return m.body(x * ramp(x.shape[-1]))


def ramps_in_a_dict(m: Net, x: Tensor) -> Tensor:
    if x.shape[-1] not in CACHE:
        CACHE[x.shape[-1]] = torch.linspace(0, 1, x.shape[-1], dtype=torch.float64)
    return m.body(x * CACHE[x.shape[-1]])


@pytest.mark.parametrize("forward", [ramps, ramps_in_a_dict])
@pytest.mark.parametrize("check", [True, False])
def test_caches_hold_no_tensor_of_a_recording(forward: Callable[..., Any], check: bool) -> None:
    ramp.cache_clear()
    CACHE.clear()
    model = net(forward)
    fxprune.trace(model, X, check=check)
    assert type(ramp(8)) is Tensor
    assert not CACHE
    assert model(X).isfinite().all()


# ------------------------------------------------------------------------------------------------------------- branches


def asks_for_a_gradient(m: Net, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return m.o(m.b(y) if y.requires_grad else y)  # requires_grad


def asks_for_the_step(m: Net, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return m.o(y if y.grad_fn is None else m.b(y))  # grad_fn


def asks_for_a_leaf(m: Net, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return m.o(y if y.is_leaf else m.b(y))  # is_leaf


def asks_a_parameter(m: Net, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return m.o(m.b(y) if m.a.weight.requires_grad else y)  # of a parameter


def asks_for_the_mode(m: Net, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return m.o(m.b(y) if torch.is_grad_enabled() else y)  # grad mode


def asks_for_inference(m: Net, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return m.o(y if torch.is_inference_mode_enabled() else m.b(y))  # inference


def asks_for_autocast(m: Net, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return m.o(y if torch.is_autocast_enabled("cpu") else m.b(y))  # autocast


def seeds(m: Net, x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(7)  # seeds
        noise = torch.randn(1, 3, 1, 1, dtype=x.dtype)
    return m.body(x + noise)


def hooks(m: Net, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    y.register_hook(lambda gradient: gradient * 0.1)  # hooks
    return m.o(m.b(y))


def hooks_where_it_trains(m: Net, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    if y.requires_grad:  # hooks where it trains
        y.register_hook(lambda gradient: gradient * 0.1)
    return m.o(m.b(y))


def retains(m: Net, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    y.retain_grad()  # retains
    return m.o(m.b(y))


@pytest.mark.parametrize(
    ("forward", "mark", "message"),
    [
        (asks_for_a_gradient, "# requires_grad", "whether a tensor has a gradient"),
        (asks_for_the_step, "# grad_fn", "whether a tensor has a gradient"),
        (asks_for_a_leaf, "# is_leaf", "whether a tensor has a gradient"),
        (asks_a_parameter, "# of a parameter", "whether a tensor has a gradient"),
        (asks_for_the_mode, "# grad mode", r"asks torch.is_grad_enabled\(\)"),
        (asks_for_inference, "# inference", r"asks torch.is_inference_mode_enabled\(\)"),
        (asks_for_autocast, "# autocast", "asks whether autocast is on, and does something else where it is"),
        (seeds, "# seeds", "torch.manual_seed can't stand in a graph"),
        (hooks, "# hooks", "a hook of the backward pass can't stand in a graph"),
        (hooks_where_it_trains, "# hooks where it trains", "whether a tensor has a gradient"),
        (retains, "# retains", "a hook of the backward pass can't stand in a graph"),
    ],
)
def test_what_differs_from_run_to_run_stays_plain_python(forward: Callable[..., Any], mark: str, message: str) -> None:
    model = net(forward)
    with pytest.raises(TraceError, match=rf"(?s)test_state.py:{line_of('  ' + mark)}.*{message}"):
        whole(model)
    traced = fxprune.trace(model, X)
    assert not regions_of(traced)
    unsteady = "another way in other runs" in str(fxprune.analyze(traced, X))
    assert unsteady is ("autocast" in message or "inference" in message)
    compact = traced if unsteady else pruned(model)  # it is frozen there
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode(), contextlib.suppress(RuntimeError):  # no hook without a gradient
            assert torch.equal(traced(X), model(X))
            assert compact(X).shape == model(X).shape
    with torch.autocast("cpu"):
        assert torch.equal(traced(X), model(X))
        assert compact(X).shape == model(X).shape


def quiet(enabled: bool) -> Any:
    """As Hugging Face writes it: nothing is switched off that is not on."""
    asked = torch.is_autocast_enabled("cpu")
    return torch.autocast("cpu", enabled=enabled) if asked or enabled else contextlib.nullcontext()


def test_autocast_that_is_switched_off_where_it_is_on() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        with quiet(enabled=False):
            return m.o(m.b(y.float()))

    model = randomize(Net(forward)).eval()
    graph = trace_whole(model, bind_inputs(X.float()))
    assert torch.equal(graph(X.float()), model(X.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert graph(X.float()).dtype == torch.float32
        assert torch.equal(graph(X.float()), model(X.float()))


def test_a_mode_that_the_model_has_set_is_known() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = m.a(x).relu()
            if torch.is_grad_enabled():
                y = y * 2
        return m.o(m.b(y))

    model = net(forward)
    assert torch.equal(whole(model)(X), model(X))


def differentiates(m: Net, x: Tensor) -> Any:
    y = m.a(x).relu()
    e = m.o(m.b(y))
    return e, torch.autograd.grad(e.sum(), y, create_graph=True)[0]  # differentiates


def test_a_backward_pass_within_forward() -> None:
    model = net(differentiates)
    place = f"test_state.py:{line_of('  # differentiates')}"
    with pytest.raises(TraceError, match=f"(?s){place}.*a backward pass within forward can't stand in a graph"):
        whole(model)
    traced = fxprune.trace(model, X)
    assert torch.equal(traced(X)[1], model(X)[1])
    with pytest.raises(AnalysisError, match=rf"(?s){place}.*a backward pass within forward can't be followed"):
        fxprune.analyze(traced, X)


def test_a_choice_that_the_analysis_did_not_see_is_told() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        return m.o(m.b(y) if float(x.sum()) and y.dtype is torch.float64 else y)

    model = randomize(Net(forward)).eval()
    with pytest.raises(VerificationError, match=r"the compact model does not run: .*Where plain Python steers a model"):
        fxprune.prune(model, X.float(), passes.Magnitude(scope="local", round_to=1), budget=BUDGET)


# -------------------------------------------------------------------------------------------------- hooks on parameters


def test_hooks_on_parameters_stay_and_keep_their_channels() -> None:
    model = net(Net.body)
    note = Mock(return_value=None)
    model.a.weight.register_hook(lambda gradient: gradient * 0)
    model.a.bias.register_post_accumulate_grad_hook(lambda parameter: note(parameter.shape))
    model.a.weight.requires_grad_(False)
    analysis = fxprune.analyze(model, X)
    assert "a.weight has a hook, which may know its shape" in analysis.explain("a")
    compact = pruned(model)
    assert not note.called, "no run of a trace calls it"
    assert compact.a.weight.shape == model.a.weight.shape
    assert compact.b.weight.shape[0] < 8
    assert not compact.a.weight.requires_grad
    compact.a.weight.requires_grad_(True)
    compact(X).sum().backward()
    assert not compact.a.weight.grad.any()
    assert compact.b.weight.grad.any()
    assert [call.args for call in note.call_args_list] == [(torch.Size([8]),)]


# ------------------------------------------------------------------------------------------------ attributes of a graph


class Block(nn.Sequential):
    """A container with a number of its own."""

    alpha = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x) * self.alpha
        return y


def test_an_attribute_that_a_graph_holds_can_not_be_set_in_vain() -> None:
    model = net(lambda m, x: m.block(m.a(x) * m.alpha))
    model.alpha, model.block = 1.0, Block(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)).double()
    model.block.alpha = 2.0
    compact = pruned(model)
    again = pickle.loads(pickle.dumps(copy.deepcopy(compact)))
    assert isinstance(compact.block, nn.Sequential)
    for part, value in ((compact, 1.0), (compact.block, 2.0), (again, 1.0), (again.block, 2.0)):
        part.alpha = value
        with pytest.raises(
            TraceError, match=f"'alpha' can't be set to 5.0: graphs hold .*, {value}. Set it on your own"
        ):
            part.alpha = 5.0
        part.note = 1
        part.note = 2
        copied = copy.deepcopy(part)
        copied.note = 3
        del copied.alpha
        copied.alpha = 5.0
        assert (part.note, copied.note, copied.alpha, part.alpha) == (2, 3, 5.0, value)


# -------------------------------------------------------------------------------------------------------------- threads


def test_one_thread_traces_at_a_time() -> None:
    started, other, order = threading.Event(), threading.Event(), Mock()

    def slow(m: Net, x: Tensor) -> Tensor:
        started.set()
        other.wait(0.3)
        order("slow")
        return m.body(x)

    def quick(m: Net, x: Tensor) -> Tensor:
        order("quick")
        other.set()
        return m.body(x)

    first = threading.Thread(target=fxprune.trace, args=(net(slow), X))
    second = threading.Thread(target=fxprune.trace, args=(net(quick), X))
    first.start()
    assert started.wait(60)
    second.start()
    first.join()
    second.join()
    names = [call.args[0] for call in order.call_args_list]
    assert names == sorted(names, reverse=True)
    assert {"slow", "quick"} == set(names)
