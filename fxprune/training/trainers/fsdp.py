"""Models that ``torch.distributed.fsdp.fully_shard`` splits over ranks: gathered, cut, and split again.

.. code-block:: python

    def shard(model):
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)

    def optimize(model):
        return torch.optim.AdamW(model.parameters(), 1e-3)

    model = Net()
    shard(model)
    optimizer = optimize(model)
    ...  # some epochs
    model, optimizer = prune_sharded(
        model, optimizer, x, passes.Magnitude(), budget=Budget(flops=0.5), build=Net, shard=shard, optimize=optimize
    )
    ...  # some more
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from fxprune.budget.budget import Budget
from fxprune.channels.analysis import analyze
from fxprune.errors import SessionError, require_type
from fxprune.graph.trace import trace
from fxprune.rewrite.rewrite import rewrite
from fxprune.rewrite.slim import slim
from fxprune.rewrite.verify import verify as check
from fxprune.training import distributed

WHOLE = StateDictOptions(full_state_dict=True)


def prune_sharded(
    model: nn.Module,
    optimizer: Optimizer,
    example_inputs: Any,
    criterion: Any,
    *,
    budget: Budget,
    build: Callable[[], nn.Module],
    shard: Callable[[nn.Module], Any],
    optimize: Callable[[nn.Module], Optimizer],
    keep: Sequence[str] = (),
    verify: bool = True,
) -> tuple[nn.Module, Optimizer]:
    """Cut a model that ``fully_shard`` splits, between two epochs. Every rank calls this, with the same arguments.

    Weights and the optimizer's state are gathered, cut on every rank as ``prune`` and ``ParamMap.migrate`` cut them,
    and split again by your own function. ``model`` and ``optimizer`` are not changed. What is returned takes their
    place; make schedulers anew for it. Each rank holds the whole model while this runs, and its cut copy.

    Args:
        model: in ``fully_shard``, or with parts in it.
        optimizer: of its parameters.
        example_inputs: a tensor, a tuple of arguments, or (args, kwargs); the same on all ranks.
        criterion: says which channels matter, such as ``passes.Magnitude()``.
        budget: what may remain.
        build: makes the model as it was before it was split and trained.
        shard: splits a model: your calls of ``fully_shard``, with their policies.
        optimize: makes the optimizer of a model.
        keep: patterns of layers whose channels all stay.
        verify: check in float64 that the compact model is the masked original.

    Returns:
        The compact model, of the class of ``model``, and its optimizer.

    Raises:
        SessionError: ``model`` is not split, ``build`` makes another one, or the ranks have different plans.
        RewriteError: the class of the model can't have these sizes; see ``slim``.
        FxpruneError: a subclass for each other stage that can fail.
    """
    require_type(model, nn.Module, "model", SessionError)
    require_type(optimizer, Optimizer, "optimizer", SessionError)
    require_type(budget, Budget, "budget", SessionError)
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise SessionError(f"no part of this {type(model).__name__} is in fully_shard: use fxprune.prune or a Session")
    weights = get_model_state_dict(model, options=WHOLE)
    moments = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    with distributed.all_or_none():
        dense = load_dense(build(), weights).train(model.training)
        graph = trace(dense, example_inputs)
        analysis = analyze(graph, example_inputs)
        plan = criterion.plan(analysis, budget, keep=keep)
        distributed.require_agreement({"the plan": plan.to_json()})
        compact, param_map = rewrite(graph, analysis, plan)
        if verify:
            check(graph, compact, param_map, example_inputs)
        whole_optimizer = optimize(graph)
        set_optimizer_state_dict(graph, whole_optimizer, moments, options=WHOLE)
        param_map.migrate(whole_optimizer)
        slimmed = slim(dense, compact, example_inputs).train(model.training)
        moments = get_optimizer_state_dict(slimmed, whole_optimizer, options=WHOLE)
    shard(slimmed)
    sharded_optimizer = optimize(slimmed)
    set_optimizer_state_dict(slimmed, sharded_optimizer, moments, options=WHOLE)
    return slimmed, sharded_optimizer


def load_dense(dense: nn.Module, weights: dict[str, Any]) -> nn.Module:
    """``dense`` with ``weights``, on their device.

    Raises:
        SessionError: they are of another model.
    """
    expected = {name: tensor.dtype for name, tensor in dense.state_dict().items()}
    for name, tensor in weights.items():
        if expected.get(name, tensor.dtype) != tensor.dtype:
            raise SessionError(
                f"build() makes {name} as {expected[name]}, but the model that is split has {tensor.dtype}"
            )
    try:
        dense.to(next(iter(weights.values())).device).load_state_dict(weights)
    except RuntimeError as error:
        raise SessionError(f"build() makes another model than the one that is split: {error}") from error
    return dense
