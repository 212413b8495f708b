"""DistributedDataParallel and torch.compile around a model: found, and put on again after a cut, in place."""

import inspect
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from fxprune.errors import SessionError

KEPT = set(
    """device_ids output_device dim process_group broadcast_buffers forward_sync_buffers find_unused_parameters
    gradient_as_bucket_view static_graph skip_all_reduce_unused_params batched_grad_copy
    lazy_bucket_allocation""".split()
)
HOOKS = [name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs", "_always_called"))]


def wrappers_of(model: nn.Module) -> list[nn.Module]:
    """The wrappers around ``model``, the outermost first.

    Raises:
        SessionError: DataParallel or FSDP, whose parameters can't be cut in place.
    """
    found: list[nn.Module] = []
    while True:
        if isinstance(model, (nn.DataParallel, FSDPModule)):
            raise SessionError(
                f"{type(model).__name__} splits the model in a way that can't be cut while it trains. Use "
                "DistributedDataParallel, or give the model without the wrapper."
            )
        if not isinstance(model, (DistributedDataParallel, OptimizedModule)):
            return found
        if isinstance(model, DistributedDataParallel) and model.mixed_precision is not None:
            raise SessionError("DistributedDataParallel with mixed_precision= can't be made anew; use torch.autocast")
        found.append(model)
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod


def wrap(wrappers: list[nn.Module], model: nn.Module) -> nn.Module:
    """Put ``wrappers`` (the outermost first) around ``model``. They stay the same objects, with their arguments."""
    for wrapper in reversed(wrappers):
        hooks = {name: vars(wrapper)[name] for name in HOOKS}
        if isinstance(wrapper, DistributedDataParallel):
            distribute(wrapper, model)
        elif isinstance(wrapper, OptimizedModule):
            wrapper.__init__(model, wrapper.dynamo_ctx)  # type: ignore[misc]
        vars(wrapper).update(hooks)
        model = wrapper
    if any(isinstance(wrapper, OptimizedModule) for wrapper in wrappers):
        torch.compiler.reset()  # guards of the old shapes, and the limit on recompilations that they count against
    return model


def distribute(wrapper: DistributedDataParallel, model: nn.Module) -> None:
    """Make ``wrapper`` anew around ``model`` with the arguments it was made with: its buckets fit the old shapes."""
    hooks = list(getattr(wrapper, "_comm_hooks", []))
    arguments = arguments_of(wrapper)
    training = wrapper.training
    wrapper.__init__(model, **arguments)  # type: ignore[misc]
    wrapper.train(training)  # type: ignore[no-untyped-call]
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)


def arguments_of(wrapper: DistributedDataParallel) -> dict[str, Any]:
    """The arguments that ``wrapper`` was made with: those that it keeps under their own names, and its bucket size."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    found = {name: getattr(wrapper, name) for name in known if name in KEPT and hasattr(wrapper, name)}
    if not wrapper.bucket_bytes_cap_default:
        found["bucket_cap_mb"] = wrapper.bucket_bytes_cap / 2**20
    return found
