"""Slim: the weights of a compact graph in the user's own class, with the sizes in its attributes made to fit.

A compact model is a graph, which has no ``generate`` and no ``save_pretrained``. But its tensors have the names of the
model's, so a copy of the model can hold them. What its Python computes with sizes is read off a recording in which the
integers of its attributes remember where they stand: each size in a call must be that of the compact graph.
"""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from fxprune.channels.groups import fold_names
from fxprune.errors import RewriteError, TraceError, require_type
from fxprune.graph.capture import is_layer
from fxprune.graph.check import compare_runs, gradients_of
from fxprune.graph.inputs import Bound, bind_inputs, for_mode
from fxprune.graph.sizes import Slot, find_sizes, put_sizes
from fxprune.graph.trace import copy_modules, named_tensors, unwrap_model
from fxprune.graph.traced import Mode, TracedModule, is_plain, is_traced, reasons_of, regions_of
from fxprune.rewrite.attributes import layer_attributes
from fxprune.rewrite.config import is_made_of_config, shapes_of, sizes_by_config
from fxprune.rewrite.equations import Solver
from fxprune.rewrite.twins import record_twins


def slim(model: nn.Module, compact: TracedModule, example_inputs: Any, *, fit_config: bool = True) -> Any:
    """Give a compact model the class of the model that it was made of.

    The result is a copy of ``model`` with the tensors of ``compact``, the very same objects, so that an optimizer of
    these trains it. Its layers say their new sizes, and so do the integers in attributes of its own modules from
    which its forward takes sizes. It is compared with ``compact`` on the example, outputs and gradients in both modes.

    Args:
        model: the model that was traced, or another of its class and sizes. Its weights don't matter. It is not
            changed.
        compact: what ``prune``, ``rewrite`` or ``load`` gave, or the model of a session, whatever was done with its
            weights since.
        example_inputs: a tensor, a tuple or dict of arguments, (args, kwargs), or a loader's batch.
        fit_config: where the class is made from a config (``type(model)(model.config)``, as in Hugging Face's
            transformers), write the sizes into that too, so that it makes a model of these sizes again:
            ``from_pretrained`` of what ``save_pretrained`` writes. False leaves the config as it is, with a warning:
            such a model is kept with ``fxprune.save(compact, path)``.

    Raises:
        RewriteError: the class can't be so small; names the line with the size that its Python does not take from an
            attribute, or what ``compact`` lacks.
    """
    require_type(model, nn.Module, "model", RewriteError)
    model = unwrap_model(model)
    if is_traced(model):
        raise RewriteError("model is traced, it has no class to get back; give the model that you traced")
    if is_traced(compact) and not isinstance(compact, TracedModule):
        reason, parts = reasons_of(compact).get(""), ", ".join(fold_names(regions_of(compact)))
        raise RewriteError(
            f"the compact model is no single graph: it is a {type(compact).__name__}, whose Python steers the graphs "
            f"of its parts. It is so because {reason} Its parts can be given, with what they are called with: {parts}"
        )
    require_type(compact, TracedModule, "compact", RewriteError)
    check_names(model, compact)
    inputs = {mode: for_mode(bind_inputs(example_inputs, model), mode, model) for mode in Mode}
    before = find_sizes(model)
    sizes, failing = solve_sizes(model, before, compact, inputs)
    small = take_tensors(model, compact, {slot: size for slot, size in sizes.items() if size != before[slot]})
    if difference := compare_slim(small, compact, inputs):
        failing = failing or solve_sizes(small, {}, compact, inputs)[1]  # what Python computes of new sizes
        raise RewriteError(explain_refusal(model, failing, difference))
    if not is_made_of_config(model):
        return small
    if fit_config:
        put_sizes(small, sizes_by_config(model, small, sizes))
        if difference := compare_slim(small, compact, inputs):
            raise RewriteError(
                f"with the new sizes in its config {type(model).__name__} is not its compact graph: {difference}. "
                "Nothing is changed. Say fit_config=False to leave the config as it is"
            )
    elif shapes_of(small) != shapes_of(model):
        warnings.warn(
            f"the config of this {type(model).__name__} says its old sizes (fit_config=False): from_pretrained can't "
            "load what its save_pretrained writes. Keep it with fxprune.save(compact, path)",
            stacklevel=2,
        )
    return small


def solve_sizes(
    model: nn.Module, before: Mapping[Slot, int], compact: TracedModule, inputs: Mapping[Mode, Bound]
) -> tuple[Mapping[Slot, int], list[str]]:
    """What the sizes in the attributes of ``model`` must be, and in words what can't be as in the compact graph.

    ``before``: what they are.
    """
    twins = [record_twins(model, before, compact, mode, inputs[mode]) for mode in compact.distinct_graphs()]
    owners = {node: twin for twin in twins for node in twin.pairs}
    solver = Solver(before, lambda node, axis: owners[node].size_of(node, axis))
    sizes, failing = solver.solve([equation for twin in twins for equation in twin.equations()])
    return sizes, [solver.describe(equation, sizes) for equation in failing]


def explain_refusal(model: nn.Module, failing: Sequence[str], difference: str) -> str:
    """Why the class can't be as small as the graph."""
    line = f"{failing[0]}. With the sizes of its attributes changed, " if failing else ""
    return (
        f"{type(model).__name__} can't have the widths of its compact graph: {line}{difference}. Nothing is changed. "
        "Use the graph as it is; or let that line read the size from an attribute or from x.shape; or make a plan that "
        "keeps the channels there (keep=), or the same share of every width (passes.Uniform, scope='local')"
    )


def check_names(model: nn.Module, compact: TracedModule) -> None:
    """Refuse a compact model that does not have the tensors of ``model``."""
    theirs, own = named_tensors(compact), named_tensors(model)
    missing = [name for name in own if name not in theirs]
    if missing:
        raise RewriteError(
            f"{missing[0]} is in {type(model).__name__} but not in the compact model: its branch went whole, or it is "
            "of another model. The class calls every branch that it has: make a plan that keeps a channel in each "
            "(minimum=0.1 of a criterion)"
        )
    for name, tensor in own.items():
        small = theirs[name]
        if small.ndim != tensor.ndim or any(a > b for a, b in zip(small.shape, tensor.shape, strict=True)):
            raise RewriteError(
                f"{name} has shape {tuple(small.shape)} in the compact model, which is no cut of the "
                f"{tuple(tensor.shape)} that {type(model).__name__} has: give a model of the sizes that were traced"
            )


def take_tensors(model: nn.Module, compact: TracedModule, sizes: Mapping[Slot, int]) -> nn.Module:
    """A copy of ``model`` with the tensors of ``compact``, the attributes of its layers, and ``sizes`` in its own."""
    theirs = named_tensors(compact)
    small = copy_modules(model, {id(tensor): theirs[name] for name, tensor in named_tensors(model).items()})
    put_sizes(small, sizes)
    called = dict(compact.named_modules(remove_duplicate=False))
    for path, module in small.named_modules():
        layer = called.get(path)
        if layer is not None and is_layer(module) and type(layer) is type(module):
            attributes = {name: value for name, value in vars(layer).items() if name[0] != "_" and is_plain(value)}
            vars(module).update(attributes | {"training": module.training})
        elif not isinstance(module, nn.GroupNorm):  # derived from a layer of torch.nn, or called by its weights
            shape = channels_of(module)
            vars(module).update(layer_attributes(module, shape, shape))
    return small.train(model.training)


def channels_of(layer: nn.Module) -> tuple[int, ...]:
    """As much of the shape of a layer's input, or output where it is transposed, as its weights tell."""
    weight = layer._parameters.get("weight")
    if isinstance(layer, nn.modules.conv._ConvNd) and weight is not None:
        return (1, weight.shape[1] * layer.groups, *weight.shape[2:])
    if isinstance(layer, nn.modules.batchnorm._NormBase) and weight is not None:
        return (1, *weight.shape)
    return ()


def compare_slim(small: nn.Module, compact: TracedModule, inputs: Mapping[Mode, Bound]) -> str:
    """In words how ``small`` differs from its graph; "" where it does not."""
    for mode in Mode:
        try:
            difference = compare_runs(partial(copy_modules, small, {}), compact, inputs[mode], mode, gradients_of)
        except TraceError as error:
            difference = f"it fails: {error}"
        if difference:
            return f"in {mode.value} mode {difference}"
    return ""
