"""Config: where a class makes its modules from a config, the config that makes them as small as they are now.

The class is made once, without data, from a config whose integers remember where they stand. So each size that a layer
was made with is a number computed from these, and must be what the layer has now.
"""

import copy
import inspect
from collections.abc import Mapping

import torch
from torch import fx, nn

from fxprune.errors import RewriteError
from fxprune.graph.capture import is_layer
from fxprune.graph.numbers import Number
from fxprune.graph.sizes import Slot, find_sizes, put_sizes, remembered_size
from fxprune.graph.trace import named_tensors
from fxprune.rewrite.equations import Equation, Solver

CONFIG = "config"
LEFT = "fit_config=False: then the config stays as it is, and from_pretrained can't load what save_pretrained writes"
CURE = (
    "Make a plan that keeps the same share of all equally wide layers: passes.Uniform or scope='local', with "
    f"Budget(channels=0.5), or with a Budget(flops=0.5, tolerance=0.05) that such widths can meet. Or say {LEFT}"
)


def is_made_of_config(model: nn.Module) -> bool:
    """Whether the class of ``model`` is made from its config and nothing else."""
    parameters = inspect.signature(type(model)).parameters.values()
    plain = [item for item in parameters if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)]
    needed = [item.name for item in plain if item.default is item.empty]
    return needed == [CONFIG] and hasattr(vars(model).get(CONFIG), "__dict__")


def sizes_by_config(model: nn.Module, small: nn.Module, sizes: Mapping[Slot, int]) -> dict[Slot, int]:
    """What integers in attributes become when the class of ``model`` is made anew, as small as ``small``.

    Args:
        model: as it was.
        small: with the small layers.
        sizes: integers in the attributes of its own modules that are known.

    Raises:
        RewriteError: no config makes such a model; names what it can't say.
    """
    before = {slot: size for slot, size in find_sizes(model).items() if (slot.path, slot.keys[0]) == ("", CONFIG)}
    graph = fx.Graph()
    fresh = build_class(
        model, {slot: remembered_size(graph, slot, size) for slot, size in before.items()}, f"Say {LEFT}"
    )
    layers = {path for path, module in small.named_modules() if is_layer(module)}
    target = {slot: size for slot, size in find_sizes(small, layers=True).items() if slot.path in layers} | dict(sizes)
    equations = [
        Equation(number.node, target[slot], str(slot))
        for slot, number in find_sizes(fresh, layers=True).items()
        if isinstance(number, Number) and slot in target
    ]
    solver = Solver(before, lambda node, axis: 0)  # no tensor has a size here
    known, failing = solver.solve(equations)
    rebuilt = build_class(model, known, CURE)
    shapes, small_shapes = map(shapes_of, (rebuilt, small))
    if shapes != small_shapes:
        name = next(name for name in small_shapes if shapes.get(name) != small_shapes[name])
        said = f"{name} would have shape {shapes.get(name)}, not {small_shapes[name]}"
        if failing:
            said = f"{failing[0].place} would be {solver.value(failing[0].left, known)}, not {failing[0].right}"
        raise RewriteError(
            f"{type(model).__name__} is made from its config, and no config says these widths: {said}. Nothing is "
            f"changed. {CURE}"
        )
    old = find_sizes(model, layers=True)
    return {slot: size for slot, size in find_sizes(rebuilt, layers=True).items() if old.get(slot, size) != size}


def build_class(model: nn.Module, sizes: Mapping[Slot, int], cure: str) -> nn.Module:
    """A model of the class of ``model``, without data, made from its config with ``sizes`` in it.

    ``cure``: what to do where it can't be.

    Raises:
        RewriteError: it can't be made so.
    """
    holder = nn.Module()
    vars(holder)[CONFIG] = copy.deepcopy(vars(model)[CONFIG])
    put_sizes(holder, sizes)
    try:
        with torch.device("meta"):
            return type(model)(vars(holder)[CONFIG])
    except Exception as error:
        raise RewriteError(
            f"{type(model).__name__} can't be made from its config without data ({type(error).__name__}: {error}). "
            f"Nothing is changed. {cure}"
        ) from error


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of parameters and buffers by their names."""
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
