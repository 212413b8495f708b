"""Keep: what a run changes in a model, and around its code, is put back, so that nobody sees that it was run."""

import copy
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MemberDescriptorType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.graph.draws import keep_draws
from fxprune.graph.state import TORCHS, Picture, is_data, is_own, surroundings_of
from fxprune.graph.traced import ATOMS

Undo = Callable[[], None]


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """What runs of ``model`` write meanwhile is undone, and random numbers are drawn from a copy."""
    with attributes_kept(model), tensors_kept(model), keep_draws():
        yield


@contextmanager
def tensors_kept(model: nn.Module, parameters: bool = True) -> Iterator[None]:
    """What is written into tensors meanwhile is undone, and torch draws random numbers from a copy.

    ``parameters``: whether it may be written into these too.
    """
    tensors = [tensor for tensor in tensors_of(model) if parameters or not isinstance(tensor, nn.Parameter)]
    before = [(tensor, tensor.data, tensor.detach().clone(), tensor.requires_grad) for tensor in tensors]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for tensor, data, values, trains in before:
                tensor.data = data  # a model may put another there
                tensor.copy_(values)
                if tensor.is_leaf:
                    tensor.requires_grad_(trains)


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and the tensors in attributes and around the code of ``model``."""
    parts = {path: part for path, part in model.named_modules() if not isinstance(part, fx.GraphModule)}
    held = Picture(parts, surroundings_of(parts.values()).variables).tensors.values()
    direct = [value for part in model.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    tensors = (*model.parameters(), *model.buffers(), *direct, *(tensor for found in held for tensor in found))
    return list({id(tensor): tensor for tensor in tensors}.values())


@contextmanager
def attributes_kept(model: nn.Module, copied: bool = False) -> Iterator[None]:
    """What Python writes meanwhile into attributes of ``model``, and into variables around its code, is undone.

    ``copied``: only copies of it are run, which may share the objects in its attributes.
    """
    keeper = Keeper()
    parts = [part for part in model.modules() if not isinstance(part, fx.GraphModule)]
    around = surroundings_of(parts)
    for part in parts:
        for held in [value for name, value in vars(part).items() if name not in TORCHS] if copied else [vars(part)]:
            keeper.keep(held)
    for variable in around.variables:
        keeper.undo.append(partial(variable.write, keeper.keep(variable.read())))
    filled = [cache.cache_info().misses for cache in around.caches]
    try:
        yield
    finally:
        for undo in keeper.undo:
            undo()
        for cache, misses in zip(around.caches, filled, strict=True):
            if cache.cache_info().misses != misses:
                cache.cache_clear()  # a tensor of a recording may be in it


class Keeper:
    """Knows how to put values back to what they were when it met them."""

    def __init__(self) -> None:
        self.undo: list[Undo] = []
        self.seen: dict[int, Any] = {}

    def keep(self, value: Any) -> Any:
        """Keep what is in ``value``. Returns what is to stand for it afterwards: itself, or a copy of an iterator."""
        if type(value) in ATOMS or not is_data(value) or isinstance(value, Tensor) or id(value) in self.seen:
            return value
        self.seen[id(value)] = value  # kept, so that no other object has its id
        if isinstance(value, Iterator) and not hasattr(value, "__dict__"):
            return copied(value)
        for undo in self.ways_back(value):
            self.undo.append(undo)
        return value

    def ways_back(self, value: Any) -> Iterator[Undo]:
        """What puts an object back."""
        if isinstance(value, dict):
            yield partial(put_items, value, {key: self.keep(item) for key, item in value.items()})
        elif isinstance(value, (list, deque)):
            yield partial(put_sequence, value, list(map(self.keep, value)))
        elif isinstance(value, tuple):
            for item in value:
                self.keep(item)
        elif isinstance(value, set):
            yield partial(put_sequence, value, set(value))
        elif isinstance(value, random.Random):
            yield partial(value.setstate, value.getstate())
        elif isinstance(value, np.random.Generator):
            yield partial(setattr, value.bit_generator, "state", value.bit_generator.state)
        elif isinstance(value, np.random.RandomState):
            yield partial(value.set_state, value.get_state())
        elif isinstance(value, torch.Generator):
            yield partial(put_state, value, value.get_state())
        elif isinstance(value, np.ndarray) and value.flags.writeable:
            yield partial(np.copyto, value, value.copy())
        if isinstance(value, MethodType):
            self.keep(value.__self__)
        elif isinstance(value, partial):
            self.keep((value.func, value.args, value.keywords))
        elif hasattr(value, "__dict__"):
            yield from self.ways_back(vars(value))
        for name in slots_of(value):
            yield partial(object.__setattr__, value, name, self.keep(getattr(value, name)))


def slots_of(value: Any) -> list[str]:
    """The attributes that an object of the user's keeps outside of a dict."""
    slots = [item for kind in filter(is_own, type(value).__mro__) for item in vars(kind).items()]
    return [name for name, slot in slots if isinstance(slot, MemberDescriptorType) and hasattr(value, name)]


def put_items(held: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Give a dict the items that it had."""
    if held.keys() != before.keys() or any(held[key] is not before[key] for key in before):
        held.clear()
        held.update(before)


def put_sequence(held: Any, before: Any) -> None:
    """Give a list, deque or set the items that it had."""
    held.clear()
    (held.update if isinstance(held, set) else held.extend)(before)


def put_state(generator: torch.Generator, state: Tensor) -> None:
    """Let a generator go on from an earlier state."""
    generator.set_state(state)


def copied(iterator: Iterator[Any]) -> Iterator[Any]:
    """A copy of an iterator that goes on from where it is; itself where Python can't."""
    try:
        return copy.deepcopy(iterator)
    except TypeError:
        return iterator
