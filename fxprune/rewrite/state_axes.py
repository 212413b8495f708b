"""Which axis of an optimizer's state is which axis of its parameter: known, registered or seen in a probe.

Anything else is refused, for a shape alone does not tell: a preconditioner of a square weight is as large as the
weight, and its axes are two times the same one.
"""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from fxprune.errors import MigrationError, require_type
from fxprune.graph.inputs import tensors_in
from fxprune.rewrite.kept import Kept, cut_tensor

Axes = tuple[int | None, ...]  # for each axis of a state tensor the axis of the parameter that it goes along with
AxesOf = Callable[[str, int], Axes]  # (name of the state, axes of the parameter) -> those

STEPS = 3  # of a probe
ROLLED = 1e-3  # two states of a probe are the same where they differ by less than this part of their spread
PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
REGISTERED: dict[type[Optimizer], AxesOf] = {}


class UnknownAxesError(MigrationError):
    """State of which nobody knows how to cut it."""


def register_optimizer(kind: type[Optimizer], axes: AxesOf | None = None) -> None:
    """Say which axes the state of an optimizer of your own has, where a cut asks for it.

    Without this, a cut tries the optimizer on copies of the parameters and sees which axes go along.

    Args:
        kind: the class; its subclasses are not meant.
        axes: from the name of a state and the number of axes of its parameter, the parameter's axis that each axis of
            the state goes along with, None for none: ``lambda name, axes: (0,) if name == "row" else (1,)``. The name
            of what is in a list or dictionary goes on with its place: ``"factors[0]"``. Default: the state has the
            parameter's own axes, each whole or of length 1.

    Raises:
        MigrationError: ``kind`` is no class of optimizers.
    """
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise MigrationError(f"kind must be a class of optimizers, but it is {kind!r:.60}")
    REGISTERED[kind] = axes or axes_like_parameter


def axes_like_parameter(name: str, axes: int) -> Axes:
    """Those of state that is shaped like its parameter."""
    return tuple(range(axes))


def known_axes(kind: type[Optimizer]) -> AxesOf | None:
    """What is known of a class: those of torch are elementwise, or keep means over some of the parameter's axes."""
    if kind in REGISTERED:
        return REGISTERED[kind]
    return axes_like_parameter if kind.__module__.startswith("torch.optim.") else None


class StateCutter:
    """Cuts the state of one optimizer, parameter by parameter; the optimizer is not changed."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._groups = {
            parameter: at for at, group in enumerate(optimizer.param_groups) for parameter in group["params"]
        }
        self._probes: dict[Any, dict[str, Axes | str]] = {}

    def __call__(self, name: str, old: nn.Parameter, new: Tensor, kept: Kept) -> dict[str, Any]:
        """The state of ``old``, the parameter ``name``, cut to ``kept``, which gives it the shape of ``new``.

        Raises:
            UnknownAxesError: it can't be cut.
        """
        state: Mapping[str, Any] = self.optimizer.state.get(old, {})
        if new.shape == old.shape:
            return dict(state)

        def cut(path: tuple[Any, ...], value: Any) -> Any:
            if isinstance(value, PLAIN) or (isinstance(value, Tensor) and value.numel() <= 1):
                return value
            key = name_path(path)
            axes = self._axes(key, value, old, new.shape)
            if isinstance(axes, str):
                shape = f"its shape is {tuple(value.shape)}" if isinstance(value, Tensor) else "it is no tensor"
                raise UnknownAxesError(
                    f"the optimizer's state {key!r} of {name} can't be sliced: {shape}, the parameter's "
                    f"{tuple(old.shape)}; {axes}. Say what its axes are with fxprune.register_optimizer("
                    f"{type(self.optimizer).__name__}, ...), or drop such state at a cut: reset=True "
                    "(reset_state=True in a Session)."
                )
            return cut_tensor(value, tuple(None if axis is None else kept[axis] for axis in axes))

        result: dict[str, Any] = pytree.tree_map_with_path(cut, dict(state))
        return result

    def _axes(self, key: str, value: Any, old: nn.Parameter, shape: torch.Size) -> Axes | str:
        """The axes of a state tensor, or why they are not known."""
        kind = type(self.optimizer)
        if not isinstance(value, Tensor):
            return f"nobody knows what a {type(value).__name__} holds"
        known = known_axes(kind)
        if known is not None:
            axes = known(key, old.ndim)
            if fits_axes(value, axes, old):
                return tuple(None if size == 1 else axis for size, axis in zip(value.shape, axes, strict=True))
            return f"of {kind.__name__} it is known that its axes go along with the axes {axes} of the parameter"
        probed = self._probe(old, shape)
        return probed.get(key) or probed.get("") or f"a copy of the optimizer has no such state after {STEPS} steps"

    def _probe(self, old: nn.Parameter, shape: torch.Size) -> dict[str, Axes | str]:
        """What ``probe_axes`` finds, once for all parameters that are alike."""
        key = self._groups[old], old.shape, shape, old.dtype, old.device
        if key not in self._probes:
            self._probes[key] = probe_axes(self.optimizer, old, shape)
        return self._probes[key]


def fits_axes(state: Tensor, axes: Axes, parameter: Tensor) -> bool:
    """Whether each axis of a state is as long as the parameter's that it goes along with, or a mean over it."""
    sizes = zip(state.shape, axes, strict=False)
    return len(axes) == state.ndim and all(axis is None or size in (1, parameter.shape[axis]) for size, axis in sizes)


def probe_axes(optimizer: Optimizer, old: nn.Parameter, shape: torch.Size) -> dict[str, Axes | str]:
    """Try the optimizer on copies: the axes of each state by its name, or why they can't be told; "" is for all.

    Positions along one axis of the parameter and its gradients change places. State that goes along with that axis
    changes places alike, along one axis of its own; means over it stay; anything else mixes what is cut with what
    stays. And the state of a parameter that has the new shape from the start must have the shape that the cut gives.
    """
    try:
        plain = run_copy(optimizer, old, old.shape)
        small = run_copy(optimizer, old, shape)
        cut = [axis for axis in range(old.ndim) if shape[axis] != old.shape[axis]]
        rolled = {axis: run_copy(optimizer, old, old.shape, roll=axis) for axis in cut}
    except Exception as error:  # it is the user's, and fails as it likes
        return {"": f"a copy of the optimizer can't be tried: {type(error).__name__}: {error}"}
    return {
        name: axes_of_state(tensor, small.get(name), {axis: states.get(name) for axis, states in rolled.items()}, shape)
        for name, tensor in plain.items()
    }


def axes_of_state(
    plain: Tensor, small: Tensor | None, rolled: Mapping[int, Tensor | None], shape: torch.Size
) -> Axes | str:
    """The axes of one state, from how it is as such, for the new shape, and with each axis of the parameter rolled."""
    axes: list[int | None] = [None] * plain.ndim
    for axis, moved in rolled.items():
        if moved is None:
            return "it is there on some copies only"
        if is_same(moved, plain):
            continue
        along = [state_axis for state_axis in range(plain.ndim) if is_same(moved, plain.roll(1, state_axis))]
        if len(along) != 1 or axes[along[0]] is not None:
            return f"on a copy it does not go along with axis {axis} of the parameter on one axis of its own"
        axes[along[0]] = axis
    expected = tuple(size if axis is None else shape[axis] for size, axis in zip(plain.shape, axes, strict=True))
    if small is None or tuple(small.shape) != expected:
        return (
            f"a cut would give it the shape {expected}, but for a parameter of shape {tuple(shape)} it has "
            f"{None if small is None else tuple(small.shape)}"
        )
    return tuple(axes)


def is_same(state: Tensor, reference: Tensor) -> bool:
    """Whether two states differ by rounding only."""
    if state.shape != reference.shape:
        return False
    wide = torch.complex128 if reference.is_complex() else torch.float64
    state, reference = state.cpu().to(wide), reference.cpu().to(wide)
    spread = (reference - reference.mean()).abs().max()
    return bool((state - reference).abs().max() <= ROLLED * spread)


def run_copy(optimizer: Optimizer, old: nn.Parameter, shape: torch.Size, roll: int | None = None) -> dict[str, Tensor]:
    """The tensors of the state of a parameter of ``shape``, like ``old``, after a few steps of a copy of ``optimizer``.

    ``roll``: the axis along which all its values and gradients are rolled by one position.
    """
    draw = torch.Generator().manual_seed(0)

    def values() -> Tensor:
        fresh = torch.randn(shape, generator=draw)
        return (fresh if roll is None else fresh.roll(1, roll)).to(old.device, old.dtype)

    parameter = nn.Parameter(values())
    twin = copy_optimizer(optimizer, {old: parameter})
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        for _ in range(STEPS):
            parameter.grad = values()
            type(twin).step(twin)
    leaves, _ = pytree.tree_flatten_with_path(dict(twin.state[parameter]))
    return {name_path(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def copy_optimizer(optimizer: Optimizer, parameters: Mapping[nn.Parameter, nn.Parameter]) -> Optimizer:
    """A new optimizer like ``optimizer``, without state and hooks, of other ``parameters`` by those that it has.

    So are those that it has within it; what two of them share, their copies share. Groups that would be empty are not
    there.
    """
    parts = optimizers_in(optimizer)
    twins = [object.__new__(type(part)) for part in parts]
    first = next(iter(parameters.values()))
    memo: dict[int, Any] = {}
    for part, twin in zip(parts, twins, strict=True):
        held = [parameter for group in part.param_groups for parameter in group["params"]]
        memo |= {id(parameter): parameters.get(parameter, first) for parameter in held}
        memo |= {id(part): twin, id(part.state): defaultdict(dict)}
    for part, twin in zip(parts, twins, strict=True):
        for group in part.param_groups:
            members = [parameters[parameter] for parameter in group["params"] if parameter in parameters]
            memo.setdefault(id(group), {**copy.deepcopy({**group, "params": []}, memo), "params": members})
        filled = [memo[id(group)] for group in part.param_groups if memo[id(group)]["params"]]
        memo.setdefault(id(part.param_groups), filled)
        for name, value in vars(part).items():
            if name.endswith("_hooks"):
                vars(twin)[name] = OrderedDict()
            elif not (callable(value) and hasattr(type(part), name)):  # step, as a scheduler wraps it
                vars(twin)[name] = copy.deepcopy(value, memo)
    return twins[0]


def name_path(path: tuple[Any, ...]) -> str:
    """The name of a state; what is in a list goes on with its place, as in ``factors[0]``."""
    first, *rest = path
    return f"{first.key}{pytree.keystr(tuple(rest))}"


def optimizers_in(optimizer: Optimizer) -> list[Optimizer]:
    """``optimizer`` and those that it has within it and steps itself, as Lookahead and SAM do."""
    result = [optimizer]
    for outer in result:
        inner = [leaf for leaf in pytree.tree_leaves(list(vars(outer).values())) if isinstance(leaf, Optimizer)]
        result += [new for new in inner if all(new is not old and new.state is not old.state for old in result)]
    return result


def check_hidden_state(optimizer: Optimizer, parameters: Collection[Tensor]) -> None:
    """Refuse an optimizer that keeps tensors where no cut reaches them.

    Raises:
        MigrationError: names the place.
    """
    require_type(optimizer, Optimizer, "optimizer", MigrationError)
    for place, tensor in hidden_tensors(optimizer):
        if tensor.numel() > 1 and tensor not in parameters:
            raise MigrationError(
                f"{type(optimizer).__name__} keeps a tensor of shape {tuple(tensor.shape)} in its {place}, which a cut "
                "would leave as it is. Keep what belongs to a parameter in optimizer.state[parameter]; or make a new "
                "optimizer after the cut."
            )


def hidden_tensors(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Tensors beside the parameters and their state, each with its place."""
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for at, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            if name != "params":
                yield from ((f"param_groups[{at}][{name!r}]", tensor) for tensor in tensors_in(value))
    for key, value in optimizer.state.items():
        if key not in held:
            yield from ((f"state[{key!r:.40}]", tensor) for tensor in tensors_in(value))
    if known_axes(type(optimizer)) is None:
        for name, value in vars(optimizer).items():
            if name not in ("state", "param_groups", "defaults"):
                yield from ((f"attribute {name}", tensor) for tensor in tensors_in(value))
