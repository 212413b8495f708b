"""Undo: put models and optimizers back as they were before a cut that failed half-way. Keeps references, no copies."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fxprune.graph.traced import Mode, Model, regions_of
from fxprune.training.cut import replace_data


class Undo:
    """Call it to restore the tensors, modules and graphs of ``models``, ``shadows``, and the state of ``optimizers``.

    Of ``things``, what else belongs to the run, the schedulers are restored too. Every object stays the same object, as
    in the cut itself. The old data stay in memory as long as this does.
    """

    def __init__(
        self,
        models: Sequence[Model],
        optimizers: Sequence[Optimizer],
        things: Iterable[object] = (),
        shadows: Iterable[Tensor] = (),
    ) -> None:
        tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())] + [*shadows]
        self._data = [(tensor, tensor.data) for tensor in tensors]
        self._gradients = [(parameter, parameter.grad) for model in models for parameter in model.parameters()]
        traced = [region for model in models for region in regions_of(model).values()]
        self._graphs = [(region, region.graphs[Mode.TRAIN], region.graphs[Mode.EVAL]) for region in traced]
        held: list[dict[Any, Any]] = [optimizer.state for optimizer in optimizers]
        held += [vars(scheduler) for scheduler in schedulers_of(things)]
        for model in models:
            held.append(model.meta)
            for module in model.modules():
                held += [vars(module), module._parameters, module._buffers, module._modules]
        self._dicts = [(content, dict(content)) for content in held]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._groups = [(group, {**group, "params": list(group["params"])}) for group in groups]
        rates = [value for group in groups for value in group.values() if isinstance(value, Tensor)]
        self._rates = [(rate, rate.clone()) for rate in rates]

    def __call__(self) -> None:
        """Restore everything."""
        for content, before in self._dicts:
            content.clear()
            content.update(before)
        for group, settings in self._groups:
            group.update(settings)
        for rate, value in self._rates:
            rate.copy_(value)
        for parameter, _ in self._gradients:
            parameter.grad = None
        for tensor, data in self._data:
            replace_data(tensor, data)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for region, train, evaluate in self._graphs:
            region.set_graphs(train, evaluate)


def schedulers_of(things: Iterable[object]) -> list[LRScheduler]:
    """The schedulers among ``things``; in place of one that holds others, those."""
    schedulers = []
    for thing in things:
        if isinstance(thing, LRScheduler):
            inner = schedulers_of(getattr(thing, "_schedulers", ()))
            schedulers += inner or [thing]
    return schedulers
