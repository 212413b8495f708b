"""ParamMap: for each parameter and buffer the indices kept on each axis; enough to slice anything shaped like it."""

from collections.abc import Collection, Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from fxprune.errors import MigrationError, require_type
from fxprune.graph.traced import Mode
from fxprune.rewrite.kept import Kept, compose_kept, cut_tensor
from fxprune.rewrite.state_axes import StateCutter, UnknownAxesError, check_hidden_state, optimizers_in


class ParamMap(Mapping[str, Kept]):
    """What a rewrite kept.

    ``param_map[name]`` has, for each axis of the original tensor, the sorted int64 indices kept, or None for all.
    """

    def __init__(
        self,
        kept: Mapping[str, Kept],
        parameters: Mapping[nn.Parameter, tuple[str, nn.Parameter]],
        norms: Mapping[tuple[Mode, str], Kept],
        gone: Collection[str] = (),
    ) -> None:
        """``parameters``: original -> (name, compact). ``norms``: (mode, graph node) -> what is kept of its input.

        ``gone``: names that the compact model does not have, because their whole branch went.
        """
        self._kept = dict(kept)
        self._parameters = dict(parameters)
        self.norms = dict(norms)
        self.gone = frozenset(gone)

    def __getitem__(self, name: str) -> Kept:
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def slice(self, name: str, tensor: Tensor) -> Tensor:
        """Cut a tensor that is shaped like the original parameter or buffer ``name``."""
        return cut_tensor(tensor, self._kept[name])

    def removed(self, name: str, tensor: Tensor) -> Tensor:
        """bool, shaped like ``tensor``: the positions of ``name`` that are gone."""
        kept = torch.ones_like(tensor, dtype=torch.bool)
        for axis, index in enumerate(self._kept[name]):
            if index is not None:
                stays = torch.zeros(tensor.shape[axis], dtype=torch.bool, device=tensor.device)
                stays[index.to(tensor.device)] = True
                kept &= stays.reshape([-1 if at == axis else 1 for at in range(tensor.ndim)])
        return ~kept

    def then(self, other: "ParamMap") -> "ParamMap":
        """The map of two rewrites, one after the other.

        Raises:
            MigrationError: ``other`` is not the map of a rewrite of the model that this one led to.
        """
        for name, new in self._parameters.values():
            if new not in other._parameters and name not in self.gone:
                raise MigrationError(
                    f"these maps do not follow each other: the second does not start from the {name} that the first "
                    "led to. Rewrite the compact model itself, not a copy of it."
                )
        kept = {
            name: first if name in self.gone else tuple(map(compose_kept, first, other[name]))
            for name, first in self._kept.items()
        }
        parameters = {
            old: (name, new) if name in self.gone else other._parameters[new]
            for old, (name, new) in self._parameters.items()
        }
        norms = {
            key: tuple(map(compose_kept, self.norms[key], other.norms[key]))
            if key in self.norms and key in other.norms
            else (self.norms | other.norms)[key]
            for key in self.norms | other.norms
        }
        return ParamMap(kept, parameters, norms, self.gone | other.gone)

    def in_place(self) -> "ParamMap":
        """This map for a model that was cut in place: the parameters are the same objects before and after."""
        parameters = {old: (name, old) for old, (name, _) in self._parameters.items()}
        return ParamMap(self._kept, parameters, self.norms, self.gone)

    def migrate(self, optimizer: Optimizer, *, reset: bool = False) -> None:
        """Make ``optimizer`` hold the compact model's parameters, its state sliced. The object stays the same.

        State of torch's optimizers is cut as its parameter is; so is that of others where ``register_optimizer`` or a
        try on copies tells which axes it has. Scalars stay. Gradients are cut too, and optimizers within this one.

        Args:
            optimizer: of the model that was rewritten.
            reset: where the state of a parameter can't be sliced, drop it, as if that parameter had made no step yet.

        Raises:
            MigrationError: the optimizer holds parameters of another model, or state of which nobody knows how to cut
                it. The optimizer is unchanged then.
        """
        require_type(optimizer, Optimizer, "optimizer", MigrationError)
        moved = [(part, self.sliced_state(part, reset=reset)) for part in optimizers_in(optimizer)]
        groups = {id(group): group for part, _ in moved for group in part.param_groups}  # inner ones may share them
        for part, _ in moved:
            self.drop_gone(part)
        for group in groups.values():
            group["params"] = [self._parameters[old][1] for old in group["params"]]
        for part, states in moved:
            for old, state in states.items():
                name, new = self._parameters[old]
                new.grad = None if old.grad is None else cut_tensor(old.grad, self._kept[name])
                part.state.pop(old, None)
                if state:
                    part.state[new] = state

    def name_of(self, parameter: nn.Parameter) -> str:
        """The name of a parameter of the original."""
        return self._parameters[parameter][0]

    def is_gone(self, parameter: nn.Parameter) -> bool:
        """Whether ``parameter``, of the original, went with its whole branch."""
        return parameter in self._parameters and self._parameters[parameter][0] in self.gone

    def drop_gone(self, optimizer: Optimizer) -> None:
        """Take the parameters that the compact model does not have out of ``optimizer``, and their state."""
        for group in optimizer.param_groups:
            for old in filter(self.is_gone, group["params"]):
                optimizer.state.pop(old, None)
            group["params"] = [old for old in group["params"] if not self.is_gone(old)]

    def sliced_state(
        self, optimizer: Optimizer, *, reset: bool = False, others: Collection[nn.Parameter] = ()
    ) -> dict[nn.Parameter, dict[str, Any]]:
        """The state of ``optimizer``, by its present parameters, cut to what stays. The optimizer is not changed.

        ``others``: parameters beside those of the model that the optimizer may hold; they are not in the result.

        Raises:
            MigrationError: as ``migrate``.
        """
        require_type(optimizer, Optimizer, "optimizer", MigrationError)
        check_owned(optimizer, {*self._parameters, *others})
        if isinstance(optimizer, LBFGS):
            raise MigrationError(
                "LBFGS keeps one flat history for all parameters, which can't be sliced. Use another optimizer, or "
                "make a new one after the cut."
            )
        if any(old is new for old, (_, new) in self._parameters.items()):
            raise MigrationError(
                "this is the map of a cut in place, whose parameters are smaller already: there is nothing left to "
                "migrate. A second optimizer goes along with session.register(name=optimizer) before the cut."
            )
        check_hidden_state(optimizer, {*self._parameters, *others})
        cutter = StateCutter(optimizer)
        result = {}
        for old in (old for group in optimizer.param_groups for old in group["params"] if old in self._parameters):
            name, new = self._parameters[old]
            if name in self.gone:
                continue
            try:
                result[old] = cutter(name, old, new, self._kept[name])
            except UnknownAxesError:
                if not reset:
                    raise
                result[old] = {}
        return result


def check_owned(optimizer: Optimizer, parameters: Container[nn.Parameter]) -> None:
    """Raise MigrationError unless everything that ``optimizer`` updates is among ``parameters``."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in parameters:
                raise MigrationError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not in the model that "
                    "was rewritten. Make the optimizer from the parameters of that model."
                )
