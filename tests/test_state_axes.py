"""The state of any optimizer goes along with a cut, each axis with the right one of its parameter; or is refused."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from laws import outcome, thinner, zero_removed
from runs import begin, nothing_changes, traced, train
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Muon, Optimizer

import fxprune
from fxprune import Session
from fxprune.errors import FxpruneError, MigrationError, SessionError
from fxprune.rewrite.state_axes import REGISTERED


class Own(Optimizer):
    """Someone's own optimizer: plain descent, and a state that ``update`` keeps of gradients and weights."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-3, **settings: Any) -> None:
        super().__init__(params, {"lr": lr, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(self.state[parameter], parameter.grad, parameter)
                    parameter.sub_(parameter.grad, alpha=group["lr"])

    def update(self, state: dict[str, Any], gradient: Tensor, parameter: Tensor) -> None:
        raise NotImplementedError


def matrix(gradient: Tensor) -> Tensor:
    """float[out, the rest]"""
    return gradient.flatten(1) if gradient.ndim > 1 else gradient[:, None]


def add(state: dict[str, Any], name: str, value: Tensor) -> None:
    state[name] = state.get(name, 0) * 0.9 + value


# ---------------------------------------------------------------------------------------- what goes along
# Each keeps one kind of state; ``expected`` cuts it by hand, from what the map keeps of the parameter.

Kept = tuple[Tensor | None, ...]


def cut(tensor: Tensor, *kept: Tensor | None) -> Tensor:
    for axis, index in enumerate(kept):
        tensor = tensor if index is None else tensor.index_select(axis, index)
    return tensor


class Elementwise(Own):
    def update(self, state: dict[str, Any], gradient: Tensor, parameter: Tensor) -> None:
        add(state, "mean", gradient)

    @staticmethod
    def expected(state: dict[str, Any], kept: Kept) -> dict[str, Any]:
        return {"mean": cut(state["mean"], *kept)}


class OtherWayRound(Own):
    """The axes in another order, as a layout for speed has them."""

    def update(self, state: dict[str, Any], gradient: Tensor, parameter: Tensor) -> None:
        add(state, "mean", gradient.permute(*reversed(range(gradient.ndim))).contiguous())

    @staticmethod
    def expected(state: dict[str, Any], kept: Kept) -> dict[str, Any]:
        return {"mean": cut(state["mean"], *reversed(kept))}


class RowsAndColumns(Own):
    """A mean over each axis, as in Adafactor and SM3; in a list."""

    def update(self, state: dict[str, Any], gradient: Tensor, parameter: Tensor) -> None:
        axes = range(gradient.ndim)
        means = [gradient.square().mean([reduced for reduced in axes if reduced != axis] or []) for axis in axes]
        state["means"] = [0.9 * old + new for old, new in zip(state.get("means", [0] * len(means)), means, strict=True)]
        state["count"] = state.get("count", 0) + 1

    @staticmethod
    def expected(state: dict[str, Any], kept: Kept) -> dict[str, Any]:
        means = [cut(mean, index) for mean, index in zip(state["means"], kept, strict=True)]
        return {"means": means if len(kept) > 1 else state["means"], "count": state["count"]}


class Rows(Own):
    """Only the rows have state, in a dictionary, and beside it what all have in common."""

    def update(self, state: dict[str, Any], gradient: Tensor, parameter: Tensor) -> None:
        part = state.setdefault("of", {})
        add(part, "rows", matrix(gradient).norm(dim=1))
        add(part, "all", gradient.norm()[None])

    @staticmethod
    def expected(state: dict[str, Any], kept: Kept) -> dict[str, Any]:
        return {"of": {"rows": cut(state["of"]["rows"], kept[0]), "all": state["of"]["all"]}}


class Anchored(Own):
    """Remembers where it started, and clips by a norm over all: elementwise up to one number."""

    def update(self, state: dict[str, Any], gradient: Tensor, parameter: Tensor) -> None:
        state.setdefault("first", parameter.clone())
        add(state, "mean", gradient / gradient.norm())

    @staticmethod
    def expected(state: dict[str, Any], kept: Kept) -> dict[str, Any]:
        return {name: cut(value, *kept) for name, value in state.items()}


class Noisy(Own):
    """With random numbers of its own."""

    def update(self, state: dict[str, Any], gradient: Tensor, parameter: Tensor) -> None:
        add(state, "mean", gradient * (1 + torch.rand(())))

    expected = Elementwise.expected


KNOWN = [Elementwise, OtherWayRound, Rows, Anchored, Noisy]


def stepped(make: Callable[[Any], Optimizer], name: str = "residual_projection") -> tuple[Any, Optimizer, Any]:
    """A model after two steps, and its map of a cut."""
    graph, inputs = traced(name)
    model = copy.deepcopy(graph).requires_grad_()
    optimizer = make(model.parameters())
    for seed in range(2):
        outcome(model, inputs, True, {}, seed)
        optimizer.step()
    analysis = fxprune.analyze(model, inputs)
    return model, optimizer, fxprune.rewrite(model, analysis, thinner(analysis, 0))


@pytest.mark.parametrize("kind", KNOWN)
def test_state_goes_along_with_the_right_axes(kind: Any) -> None:
    model, optimizer, (compact, param_map) = stepped(kind)
    names = {parameter: name for name, parameter in model.named_parameters()}
    before = {names[p]: copy.deepcopy(state) for p, state in optimizer.state.items()}
    random_numbers = torch.get_rng_state()
    param_map.migrate(optimizer)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    for name, parameter in compact.named_parameters():
        actual, old = optimizer.state[parameter], before[name]
        changed = parameter.shape != model.get_parameter(name).shape
        expected = kind.expected(old, param_map[name]) if changed else old
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    outcome(compact, traced("residual_projection")[1], True, {})
    optimizer.step()


def test_means_over_axes_go_along() -> None:
    """Where an axis has as many as another, too: a square weight's rows and columns."""
    kind = lambda parameters: RowsAndColumns([matrix for matrix in parameters if matrix.ndim > 1])  # noqa: E731
    model, optimizer, (compact, param_map) = stepped(kind, "residual")
    before = {name: copy.deepcopy(optimizer.state.get(p)) for name, p in model.named_parameters()}
    squares = 0
    param_map.migrate(optimizer)
    for name, parameter in compact.named_parameters():
        if before[name] is not None:
            expected = RowsAndColumns.expected(before[name], param_map[name])
            torch.testing.assert_close(optimizer.state[parameter], expected, rtol=0, atol=0)
            squares += model.get_parameter(name).shape[0] == model.get_parameter(name).shape[1]
    assert squares


def test_adafactor_goes_on() -> None:
    """Its means over rows and columns are cut where they have an axis, to the shapes that torch wants then."""
    session, inputs = begin("vgg_flatten", make=lambda p: Adafactor(p, lr=1e-3))
    state = {name: copy.deepcopy(session.optimizer.state[p]) for name, p in session.graph.named_parameters()}
    kept = session.reconfigure(thinner(session.analysis, 0))
    factors = 0
    for name, parameter in session.graph.named_parameters():
        for key, value in session.optimizer.state[parameter].items():
            index = [None if size == 1 else axis for size, axis in zip(value.shape, kept[name], strict=False)]
            assert torch.equal(value, cut(state[name][key], *index)), (name, key)
            factors += key in ("row_var", "col_var") and value.shape != state[name][key].shape
    assert factors >= 2
    assert train(session, inputs, 3)


TIMM = ["adafactor", "adamp", "lamb", "lion", "lookahead_adamw", "madgrad", "muon", "novograd", "rmsproptf"]


@pytest.mark.parametrize("name", TIMM)
def test_optimizers_of_timm_go_on(name: str) -> None:
    optim = pytest.importorskip("timm.optim")

    def make(parameters: Any) -> Optimizer:
        made: Optimizer = optim.create_optimizer_v2(list(parameters), opt=name, lr=1e-3)
        return made

    session, inputs = begin("residual_projection", make=make)
    for seed in range(2):
        session.reconfigure(thinner(session.analysis, seed))
        train(session, inputs, 2)


class Outer(Optimizer):
    """Steps another optimizer, whose groups it shares; its own state is the slow weights, as Lookahead has them."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.param_groups = inner, inner.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                slow = self.state[parameter].setdefault("slow", parameter.clone())
                parameter.copy_(slow.lerp_(parameter, 0.5))


@pytest.mark.parametrize("within", [False, True])
def test_an_optimizer_within_another_goes_along(within: bool) -> None:
    """In a session and by hand; the momentum of the inner one is cut as the slow weights are."""
    model, outer, (compact, param_map) = stepped(lambda p: Outer(SGD(p, lr=0.01, momentum=0.9)))
    inner: Any = outer.inner  # type: ignore[attr-defined]
    expected = {
        name: {
            key: param_map.slice(name, value) for state in (outer.state, inner.state) for key, value in state[p].items()
        }
        for name, p in model.named_parameters()
    }
    if within:
        session = Session(model, traced("residual_projection")[1], outer, progress=False)
        compact, param_map = session.graph, session.reconfigure(thinner(session.analysis, 0))
    else:
        param_map.migrate(outer)
    for name, parameter in compact.named_parameters():
        torch.testing.assert_close({**outer.state[parameter], **inner.state[parameter]}, expected[name], rtol=0, atol=0)
    outcome(compact, traced("residual_projection")[1], True, {})
    outer.step()
    assert all(state["slow"].shape == p.shape for p, state in outer.state.items())


# ----------------------------------------------------------------------------------------- what is refused


class Preconditioner(Own):
    """Shampoo's, and what it takes from it: as large as a square weight, and twice the same axis."""

    def update(self, state: dict[str, Any], gradient: Tensor, parameter: Tensor) -> None:
        rows = matrix(gradient)
        add(state, "left", rows @ rows.T)


class Roots(Own):
    """Only the inverse root is kept, in which every entry hangs on all."""

    def update(self, state: dict[str, Any], gradient: Tensor, parameter: Tensor) -> None:
        rows = matrix(gradient)
        state["root"] = torch.linalg.inv(rows @ rows.T + torch.eye(len(rows), dtype=rows.dtype))


class Spectrum(Own):
    """As many numbers as rows, but in order of size."""

    def update(self, state: dict[str, Any], gradient: Tensor, parameter: Tensor) -> None:
        rows = matrix(gradient)
        state["values"] = torch.linalg.eigvalsh(rows @ rows.T)


class Flat(Own):
    def update(self, state: dict[str, Any], gradient: Tensor, parameter: Tensor) -> None:
        add(state, "flat", gradient.flatten())


class Blocks(Own):
    """Shaped like the parameter, quantized by blocks of five of its entries."""

    def update(self, state: dict[str, Any], gradient: Tensor, parameter: Tensor) -> None:
        flat = gradient.flatten()
        blocks = nn.functional.pad(flat, (0, -len(flat) % 5)).reshape(-1, 5)
        scaled = blocks / blocks.abs().amax(1, keepdim=True).clamp(min=1e-9)
        state["quantized"] = (scaled * 127).round().to(torch.int8).flatten()[: len(flat)].reshape(gradient.shape)


class Idle(Own):
    """Zeros that nobody has moved yet: a square weight's could be anything."""

    def update(self, state: dict[str, Any], gradient: Tensor, parameter: Tensor) -> None:
        state.setdefault("later", torch.zeros_like(parameter))


class Late(Own):
    """State that appears in the fourth step."""

    def update(self, state: dict[str, Any], gradient: Tensor, parameter: Tensor) -> None:
        state["step"] = state.get("step", torch.zeros(())) + 1
        if state["step"] > 3 or self.param_groups[0].get("late"):
            add(state, "late", gradient)


class Sketch(Own):
    """A projection of the rows on a random basis of as many."""

    def update(self, state: dict[str, Any], gradient: Tensor, parameter: Tensor) -> None:
        basis = torch.randn(len(gradient), len(gradient), generator=torch.Generator().manual_seed(1))
        add(state, "sketch", basis.to(gradient) @ matrix(gradient))


@dataclass
class Thing:
    """Of another library, with tensors inside."""


class Opaque(Own):
    def update(self, state: dict[str, Any], gradient: Tensor, parameter: Tensor) -> None:
        state["thing"] = Thing()


class Closing(Own):
    """Can't step without a closure."""

    def step(self, closure: Any = None) -> None:
        if not hasattr(self, "primed"):
            raise ValueError("give a closure")

    def prime(self) -> "Closing":
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["mean"] = torch.ones_like(parameter)
        self.step = lambda *_: None  # type: ignore[method-assign]
        return self


MIXED = "on a copy it does not go along with axis 0 of the parameter on one axis of its own"
REFUSED: dict[Any, str] = {
    Preconditioner: rf"state 'left' of \S+ can't be sliced: .*; {MIXED}",
    Roots: rf"state 'root' of \S+ can't be sliced: .*; {MIXED}",
    Spectrum: r"state 'values' of \S+ .*; a cut would give it the shape \(\d+,\), but .* it has \(\d+,\)",
    Flat: rf"state 'flat' of \S+ can't be sliced: its shape is \(\d+,\), the parameter's \(.*\); {MIXED}",
    Blocks: rf"state 'quantized' of \S+ .*; {MIXED.replace('0', '[01]')}",
    Idle: r"state 'later' of \S+ .*; a cut would give it the shape \(.*\), but for a parameter of shape",
    Sketch: rf"state 'sketch' of \S+ .*; {MIXED.replace('0', '[01]')}",
    Opaque: r"state 'thing' of \S+ can't be sliced: it is no tensor, .*; nobody knows what a Thing holds",
}


def check_refusal(optimizer: Optimizer, model: nn.Module, message: str) -> None:
    """A cut is refused with ``message`` and changes nothing; with reset_state it is made."""
    inputs = traced("residual_projection")[1]
    with Session(model, inputs, optimizer, progress=False) as session:
        with nothing_changes(session), pytest.raises(MigrationError, match=message) as raised:
            session.reconfigure(thinner(session.analysis, 0))
        assert f"fxprune.register_optimizer({type(optimizer).__name__}, ...)" in str(raised.value)
        session.reset_state = True
        session.reconfigure(thinner(session.analysis, 0))
        assert any(not state for state in map(optimizer.state.get, model.parameters()))
        train(session, inputs)


@pytest.mark.parametrize("kind", REFUSED)
def test_state_that_mixes_what_goes_with_what_stays(kind: Any) -> None:
    model, optimizer, _ = stepped(lambda p: kind([parameter for parameter in p if parameter.ndim > 1]))
    check_refusal(optimizer, model, REFUSED[kind])


def test_state_that_copies_do_not_have() -> None:
    model, optimizer, _ = stepped(Late)
    for parameter in list(optimizer.state):
        optimizer.state[parameter]["late"] = torch.ones_like(parameter)
    check_refusal(optimizer, model, r"state 'late' of \S+ .*; a copy of the optimizer has no such state after 3 steps")


def test_an_optimizer_that_can_not_be_tried() -> None:
    graph, _ = traced("residual_projection")
    model = copy.deepcopy(graph).requires_grad_()
    optimizer = Closing(model.parameters()).prime()
    message = r"state 'mean' of \S+ .*; a copy of the optimizer can't be tried: ValueError: give a closure"
    check_refusal(optimizer, model, message)


def hide_in_a_group(optimizer: Any) -> None:
    optimizer.param_groups[0]["mask"] = {"of": [torch.ones(3, 4)]}


def hide_in_an_attribute(optimizer: Any) -> None:
    optimizer.masks = [torch.ones(3, 4)]


def hide_under_a_name(optimizer: Any) -> None:
    optimizer.state["basis"] = {"q": torch.ones(3, 4)}


HIDDEN = {
    hide_in_a_group: r"Elementwise keeps a tensor of shape \(3, 4\) in its param_groups\[0\]\['mask'\]",
    hide_in_an_attribute: r"Elementwise keeps a tensor of shape \(3, 4\) in its attribute masks",
    hide_under_a_name: r"Elementwise keeps a tensor of shape \(3, 4\) in its state\['basis'\]",
}


@pytest.mark.parametrize("hide", HIDDEN)
def test_tensors_where_no_cut_reaches_them(hide: Callable[[Any], None]) -> None:
    model, optimizer, (_, param_map) = stepped(Elementwise)
    hide(optimizer)
    with pytest.raises(MigrationError, match=HIDDEN[hide]):
        param_map.migrate(optimizer)
    optimizer.param_groups[0].pop("mask", None)
    vars(optimizer).pop("masks", None)
    optimizer.state.pop("basis", None)  # type: ignore[call-overload]
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-3)  # one number
    optimizer.held = list(model.parameters())  # type: ignore[attr-defined]
    param_map.migrate(optimizer)


# --------------------------------------------------------------------------------------------- the register


@pytest.fixture
def register() -> Any:
    before = dict(REGISTERED)
    yield fxprune.register_optimizer
    REGISTERED.clear()
    REGISTERED.update(before)


def test_what_is_registered_is_not_tried(register: Any) -> None:
    model, optimizer, (_, param_map) = stepped(Late)
    for parameter in list(optimizer.state):
        optimizer.state[parameter]["late"] = torch.randn_like(parameter)
    before = {name: optimizer.state[p]["late"] for name, p in model.named_parameters()}
    register(Late)
    param_map.migrate(optimizer)
    moved = {id(p): state for p, state in optimizer.state.items()}
    states = [state["late"] for state in moved.values()]
    assert [t.shape for t in states] == [param_map.slice(name, t).shape for name, t in before.items()]
    assert all(map(torch.equal, states, (param_map.slice(name, tensor) for name, tensor in before.items())))


def test_axes_that_are_registered(register: Any) -> None:
    """A state by the rows, which a copy would show too; and axes that can't be right."""
    model, optimizer, (_, param_map) = stepped(Rows)
    with pytest.raises(MigrationError, match=r"kind must be a class of optimizers, but it is 'Rows'"):
        register("Rows")
    register(Rows)
    wrong = r"\"of\['rows'\]\" of \S+ .*; of Rows it is known that its axes go along with the axes \(0, 1, 2, 3\)"
    with pytest.raises(MigrationError, match=wrong):
        param_map.migrate(optimizer)
    register(Rows, lambda name, axes: (0,))
    rows = {name: optimizer.state[p]["of"]["rows"] for name, p in model.named_parameters()}
    expected = [cut(rows[name], param_map[name][0]) for name in rows]
    param_map.migrate(optimizer)
    states = [state["of"]["rows"] for state in optimizer.state.values()]
    assert all(map(torch.equal, states, expected))


# ------------------------------------------------------------------------------------------------- Muon


def orthogonal_in_float64(gradient: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz, as torch has it in bfloat16: X <- a X + (b A + c A A) X with A = X X^T."""
    a, b, c = coefficients
    x = gradient / gradient.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize(("exact", "least", "most"), [(True, 0, 1e-10), (False, 1e-4, 0.2)])
def test_muon_differs_from_the_law_by_bfloat16(
    exact: bool, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero rows and columns pass through Newton-Schulz: in float64 a cut commutes with a step of Muon.

    Two things are left. torch computes the update in bfloat16 and turns a matrix that is higher than wide, so sums are
    rounded in another order where a cut makes it so: up to 2 % for noise, more for gradients of low rank. And the rate
    has a factor sqrt(max(1, rows / columns)), which is that of the smaller matrix after the cut.
    """
    if exact:
        monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", orthogonal_in_float64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 4)).double()
    inputs = torch.randn(256, 6).double()
    graph = fxprune.trace(model, inputs)
    optimizer = Muon([p for p in graph.parameters() if p.ndim == 2], lr=1e-2, weight_decay=0)
    outcome(graph, (inputs,), True, {})
    optimizer.step()
    analysis = fxprune.analyze(graph, inputs)
    first, second = analysis.sizes
    plan = fxprune.Plan({first: range(0, 64, 2), second: range(36)}, analysis.sizes, analysis.options)
    twin, its_optimizer = copy.deepcopy((graph, optimizer))
    compact, param_map = fxprune.rewrite(graph, analysis, plan)
    param_map.migrate(optimizer)
    zero_removed(twin, param_map)
    for name, parameter in twin.named_parameters():
        if parameter in its_optimizer.state:
            its_optimizer.state[parameter]["momentum_buffer"][param_map.removed(name, parameter)] = 0
    before = copy.deepcopy(compact.state_dict())
    for trained, stepping in ((compact, optimizer), (twin, its_optimizer)):
        outcome(trained, (inputs,), True, {}, 3)
        stepping.step()
    differences = []
    for name, parameter in compact.named_parameters():
        if parameter.ndim == 2:
            (rows, columns), (old_rows, old_columns) = parameter.shape, twin.get_parameter(name).shape
            rate = (max(1, rows / columns) / max(1, old_rows / old_columns)) ** 0.5
            update = parameter.detach() - before[name]
            expected = rate * (param_map.slice(name, twin.get_parameter(name)) - before[name])
            differences.append(float((update - expected).norm() / expected.norm()))
    assert least <= max(differences) <= most


# -------------------------------------------------------------------------------------------- averages by hand


class Average:
    """A moving average as many write it: of named tensors or of a list, and with a counter."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        named = {name: p.detach().clone() for name, p in model.named_parameters()}
        trained = [named[name] for name, p in model.named_parameters() if p.requires_grad]
        self.model, self.of = model, list(model.parameters())
        self.held: Any = {
            "names": named,
            "list": list(named.values()),
            "trained": trained,
            "names within": {"shadow": named, "decay": 0.9},
            "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
            "some": {name: tensor for name, tensor in named.items() if tensor.ndim > 1},
            "tuple": tuple(named.values()),
            "reversed": list(named.values())[::-1],
            "prefixed": {f"module.{name}": tensor for name, tensor in named.items()},
            "one": next(iter(named.values())),
        }[kind]
        self.count = torch.zeros(())

    def update(self) -> None:
        held = self.held
        self.count += 1
        for name, parameter in self.model.named_parameters():
            if name in held:
                held[name].lerp_(parameter.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held = state["held"]


@pytest.mark.parametrize("kind", ["names", "list", "trained", "names within", "state", "some", "tuple"])
def test_an_average_by_hand_is_cut_with_the_model(kind: str) -> None:
    session, inputs = begin("residual_projection")
    if kind == "trained":
        next(session.graph.parameters()).requires_grad_(False)
    average = Average(session.graph, kind)
    session.register(average=average)
    before = [(tensor, name, tensor.clone()) for name, tensor in placed(session, average)]
    assert len(before) > 5
    for seed in range(2):
        kept = session.reconfigure(thinner(session.analysis, seed))
        before = [(tensor, name, kept.slice(name, old)) for tensor, name, old in before]
    for (tensor, name, expected), (_, now) in zip(before, placed(session, average), strict=True):
        assert tensor is now
        assert torch.equal(tensor, expected), name
    if kind in ("names", "state", "some"):
        average.update()
    train(session, inputs)


def placed(session: Session, average: Average) -> list[tuple[str, Tensor]]:
    """The tensors of an average, and for what they stand: by their keys, or by their places among the parameters."""
    held = average.held.get("shadow", average.held) if isinstance(average.held, dict) else average.held
    if isinstance(held, dict):
        return list(held.items())
    names = [name for name, p in session.graph.named_parameters() if len(held) == len(average.of) or p.requires_grad]
    return list(zip(names, held, strict=True))


@pytest.mark.parametrize("kind", ["reversed", "prefixed", "one"])
def test_an_average_that_can_not_be_placed(kind: str) -> None:
    session, _ = begin("residual_projection")
    with pytest.raises(SessionError, match=r"average keeps a tensor of shape \(\d+.*\), as \S+ has, and nobody knows"):
        session.register(average=Average(session.graph, kind))
    assert not session.registered
    session.registered["average"] = average = Average(session.graph, "names")
    average.held = Average(session.graph, kind).held  # put there later
    with nothing_changes(session), pytest.raises(SessionError, match="average keeps a tensor"):
        session.reconfigure(thinner(session.analysis, 0))


def test_a_copy_within_an_object() -> None:
    """An average that is no module itself, but has a copy of the model."""
    session, _ = begin("residual_projection")
    average = Average(session.graph, "names")
    average.held = copy.deepcopy(session.graph)
    session.register(average=average)
    session.reconfigure(thinner(session.analysis, 0))
    shapes = {name: tensor.shape for name, tensor in session.graph.state_dict().items()}
    assert {name: tensor.shape for name, tensor in average.held.state_dict().items()} == shapes


def test_an_average_of_what_goes_with_its_branch() -> None:
    session, _ = begin("residual_projection")
    session.register(average=Average(session.graph, "list"))
    plan = fxprune.Plan({"1.conv1.0": ()}, session.analysis.sizes, session.analysis.options)
    with nothing_changes(session), pytest.raises(MigrationError, match=r"1\.conv1\.\S+ goes with its whole branch"):
        session.reconfigure(plan)


def test_a_failed_cut_puts_averages_back() -> None:
    session, _ = begin("residual_projection")
    average = Average(session.graph, "names")
    session.register(average=average)
    before = {name: (tensor, tensor.clone()) for name, tensor in average.held.items()}

    def fail(*_: Any) -> None:
        raise FxpruneError("no")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxprune.training.reconfigure.renew_wrappers", fail)
        with pytest.raises(FxpruneError, match="no"):
            session.reconfigure(thinner(session.analysis, 0))
    for name, (tensor, value) in before.items():
        assert average.held[name] is tensor
        assert torch.equal(tensor, value)
