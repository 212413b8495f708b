"""Reconfigure: prune a model in the middle of training, in place, with everything that hangs on it. All or nothing.

The model, its modules, its parameters and buffers, and the optimizer stay the same objects; what they hold gets
smaller. So whatever refers to them (the training loop, a scheduler, a list of parameters for clipping, hooks) stays
right.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxprune.channels.analysis import Analysis
from fxprune.errors import MigrationError
from fxprune.graph.trace import same_graphs
from fxprune.graph.traced import Mode, Model, TracedModule, is_plain, regions_of
from fxprune.plan import Plan
from fxprune.rewrite.kept import cut_tensor
from fxprune.rewrite.param_map import ParamMap
from fxprune.rewrite.rewrite import rewrite
from fxprune.rewrite.verify import verify


def reconfigure(
    model: Model,
    analysis: Analysis,
    plan: Plan,
    optimizers: Sequence[Optimizer],
    copies: Sequence[Model] = (),
    shadows: Sequence[tuple[str, Tensor]] = (),
    *,
    outer: Collection[nn.Parameter] = (),
    reset_state: bool = False,
    verify_with: Any = None,
) -> tuple[Analysis, ParamMap]:
    """Carry out ``plan`` on ``model`` itself, on the optimizers' state and on ``copies`` of the model.

    Args:
        model: the traced model that was analysed.
        analysis: of that model.
        plan: for that analysis.
        optimizers: of parameters of the model. Momentum and every other state are cut with the parameter, and so are
            gradients.
        copies: other traced models with the same graph and shapes, such as a moving average.
        shadows: further tensors to cut, each as the parameter or buffer of the name beside it.
        outer: parameters of a larger model that has this one as a part; the optimizers may hold them too.
        reset_state: drop an optimizer's state of a parameter where it can't be sliced.
        verify_with: example inputs, to prove first, in float64, that the cut changes nothing else.

    Returns:
        The analysis of the model as it is now, and the map of what was kept.

    Raises:
        FxpruneError: the plan, the rewrite, the state or the proof is refused. Nothing is changed then.
    """
    compact, param_map = rewrite(model, analysis, plan)
    states = [param_map.sliced_state(optimizer, reset=reset_state, others=outer) for optimizer in optimizers]
    followers = [rewrite(copied, analysis, plan)[0] for copied in copies]
    if verify_with is not None:
        verify(model, compact, param_map, verify_with)
    gradients = {
        parameter: cut_tensor(parameter.grad, param_map[name])
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and name not in param_map.gone
    }
    gone = sorted({name for name, _ in shadows} & param_map.gone)
    if gone:
        raise MigrationError(
            f"{gone[0]} goes with its whole branch, and what is registered keeps an average of it in a list or "
            "dictionary, which would no longer fit. Use a torch.optim.swa_utils.AveragedModel."
        )
    cut_shadows = [(tensor, param_map.slice(name, tensor)) for name, tensor in shadows]
    # From here on nothing can fail.
    for parameter in model.parameters():
        parameter.grad = None
    for wide, narrow in zip((model, *copies), (compact, *followers), strict=True):
        become_compact(wide, narrow)
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    for tensor, smaller in cut_shadows:
        replace_data(tensor, smaller)
    for optimizer, sliced in zip(optimizers, states, strict=True):
        param_map.drop_gone(optimizer)
        for parameter, state in sliced.items():
            optimizer.state.pop(parameter, None)
            if state:
                optimizer.state[parameter] = state
    return analysis.after(plan, model), param_map.in_place()


def become_compact(model: Model, compact: Model) -> None:
    """Make ``model`` what ``compact`` is. What has the same name in both stays the same object."""
    regions_of_both = [(region, regions_of(compact)[path]) for path, region in regions_of(model).items()]
    take_over(model, compact)
    model.meta.clear()
    model.meta.update(compact.meta)
    for region, smaller in regions_of_both:
        if not all(same_graphs(region.graphs[mode], smaller.graphs[mode]) for mode in Mode):
            region.set_graphs(smaller.graphs[Mode.TRAIN], smaller.graphs[Mode.EVAL])


def take_over(module: nn.Module, source: nn.Module) -> None:
    """Give ``module`` the tensors, children and plain attributes of ``source``."""
    take_over_tensors(module, source)
    for tensors, source_tensors in tensors_of(module, source):
        tensors.clear()
        tensors.update(source_tensors)
    for name in module._modules.keys() - source._modules.keys():
        del module._modules[name]
    for name, child in source._modules.items():
        held = module._modules.get(name)
        if held is None or child is None:
            module._modules[name] = child
        elif type(held) is not type(child) and not isinstance(child, TracedModule):  # what is left of a branch
            take_over_tensors(held, child)
            module._modules[name] = child
        else:
            take_over(held, child)
    if not isinstance(module, TracedModule):
        public = {key: value for key, value in vars(source).items() if not key.startswith("_") and is_plain(value)}
        vars(module).update(public | {"training": module.training})


def take_over_tensors(module: nn.Module, source: nn.Module) -> None:
    """Make ``source`` hold the tensors of ``module``, with its own values in them."""
    for tensors, source_tensors in tensors_of(module, source):
        for name, tensor in source_tensors.items():
            held = tensors.get(name)
            if held is not None and tensor is not None and held is not tensor:
                replace_data(held, tensor)
                source_tensors[name] = held


def tensors_of(module: nn.Module, source: nn.Module) -> Any:
    """The parameters of both, and the buffers of both."""
    return (module._parameters, source._parameters), (module._buffers, source._buffers)


def replace_data(tensor: Tensor, new: Tensor) -> None:
    """Make ``tensor`` hold the values of ``new``, of another shape."""
    if tensor.shape != new.shape and tensor.is_leaf and tensor.requires_grad:
        # A loss that is still referred to keeps the node that accumulates gradients, which remembers the old shape.
        # Autograd makes a new one for data of another dtype.
        dtype = torch.float32 if tensor.dtype == torch.float16 else torch.float16
        tensor.data = torch.empty(0, dtype=dtype, device=tensor.device)
    tensor.data = new.data
