"""DistributedDataParallel and torch.compile around a model: found, and put on again after a cut, in place."""

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fxprune.errors import SessionError
from fxprune.graph.trace import SPREAD
from fxprune.loaded import loaded_types

# Classes of modules that are slow to import.
COMPILED = "torch._dynamo.eval_frame.OptimizedModule"
SHARDED = ("torch.distributed.fsdp.FSDPModule", "torch.distributed.fsdp.FullyShardedDataParallel")
POWER_SGD = "torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook.PowerSGDState"
# Arguments that DistributedDataParallel keeps under their own names, in one version of torch or another.
KEPT = set(
    """device_ids output_device dim process_group broadcast_buffers forward_sync_buffers find_unused_parameters
    gradient_as_bucket_view static_graph skip_all_reduce_unused_params batched_grad_copy
    lazy_bucket_allocation""".split()
)
HOOKS = [name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs", "_always_called"))]


def wrappers_of(model: nn.Module) -> list[nn.Module]:
    """The wrappers around ``model``, the outermost first.

    Raises:
        SessionError: DataParallel or FSDP, whose parameters can't be cut in place, or an argument of
            DistributedDataParallel that can't be given again.
    """
    wrappers: list[nn.Module] = []
    while True:
        check_whole(model)
        if isinstance(model, DistributedDataParallel):
            check_distributed(model)
            wrappers.append(model)
            model = model.module
        elif isinstance(model, loaded_types(COMPILED)):
            wrappers.append(model)
            model = model._orig_mod
        else:
            return wrappers


def check_whole(model: nn.Module) -> None:
    """Raise SessionError where parameters are not whole on each rank.

    ``fully_shard`` puts others in their place, of which a rank holds a part, and offers no way back. A cut would have
    to replace them once more, and the optimizer and all who refer to them would be left with the old ones.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__ + (f" ({name})" if name else "")
        if isinstance(module, (nn.DataParallel, *loaded_types(*SHARDED))):
            raise SessionError(
                f"{kind} splits the model in a way that can't be cut while it trains. Use DistributedDataParallel, or "
                "give the model without the wrapper. What fully_shard splits is cut between two epochs by "
                "fxprune.fsdp.prune_sharded."
            )
        if any(isinstance(parameter, loaded_types(SPREAD)) for parameter in module.parameters(recurse=False)):
            raise SessionError(f"{kind} has parameters that are spread over ranks (DTensor), which can't be cut")


def check_distributed(wrapper: DistributedDataParallel) -> None:
    """Raise SessionError where a wrapper can't be made anew as it was."""
    if wrapper.mixed_precision is not None:
        raise SessionError("DistributedDataParallel with mixed_precision= can't be made anew; use torch.autocast")
    if getattr(wrapper, "_delay_all_reduce_params", None):
        raise SessionError(
            "DistributedDataParallel with delay_all_reduce_named_params= can't be made anew; leave that argument out"
        )


def wrap_again(wrappers: list[nn.Module], model: nn.Module) -> nn.Module:
    """Put ``wrappers`` (the outermost first) around ``model``. They stay the same objects, with their arguments.

    Nothing is sent to other ranks: their models must be cut alike.
    """
    for wrapper in reversed(wrappers):
        hooks = {name: vars(wrapper)[name] for name in HOOKS}
        if isinstance(wrapper, DistributedDataParallel):
            distribute_again(wrapper, model)
        elif isinstance(wrapper, loaded_types(COMPILED)):
            wrapper.__init__(model, wrapper.dynamo_ctx)
        vars(wrapper).update(hooks)
        model = wrapper
    if any(isinstance(wrapper, loaded_types(COMPILED)) for wrapper in wrappers):
        torch.compiler.reset()  # guards of the old shapes, and the limit on recompilations that they count against
    return model


def distribute_again(wrapper: DistributedDataParallel, model: nn.Module) -> None:
    """Make ``wrapper`` anew around ``model`` with the arguments it was made with: its buckets fit the old shapes."""
    hooks = list(getattr(wrapper, "_comm_hooks", []))
    for handle in getattr(wrapper, "_accum_grad_hooks", ()):  # of the reducer in Python
        handle.remove()
    synchronize = wrapper.require_backward_grad_sync  # False within no_sync()
    training = wrapper.training
    if wrapper.parameters_to_ignore:
        model._ddp_params_and_buffers_to_ignore = list(wrapper.parameters_to_ignore)  # type: ignore[assignment]
    DistributedDataParallel.__init__(wrapper, model, **arguments_of(wrapper))
    wrapper.require_backward_grad_sync = synchronize
    wrapper.train(training)  # type: ignore[no-untyped-call]
    for hook, state in hooks:
        if isinstance(state, loaded_types(POWER_SGD)):  # its errors and factors are shaped like the old buckets
            for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
                memory.clear()
            state.iter = 0
        wrapper.register_comm_hook(state, hook)


def arguments_of(wrapper: DistributedDataParallel) -> dict[str, Any]:
    """The arguments that ``wrapper`` was made with. The ranks need no check and no broadcast: they are alike."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    arguments = {name: getattr(wrapper, name) for name in known if name in KEPT and hasattr(wrapper, name)}
    if "forward_sync_buffers" in arguments:  # the new name of broadcast_buffers, which warns
        del arguments["broadcast_buffers"]
    if wrapper.bucket_bytes_cap_list:
        arguments["bucket_cap_mb_list"] = [cap / 2**20 for cap in wrapper.bucket_bytes_cap_list]
    elif not wrapper.bucket_bytes_cap_default:
        arguments["bucket_cap_mb"] = wrapper.bucket_bytes_cap / 2**20
    return arguments | {"init_sync": False}
