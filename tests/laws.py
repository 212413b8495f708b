"""The laws that make pruning right, as functions over (graph, example inputs, analysis, plan), all in float64.

The oracle here shares nothing with ``fxprune.verify`` but the masked norm: it zeroes the removed slices of a copy of
the traced model and calls that copy. Each law raises AssertionError and says what differs.
"""

import copy
import random
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)
from torch.utils import _pytree as pytree

import fxprune
from fxprune import Analysis, ParamMap, Plan, TracedModule
from fxprune.graph.inputs import bind_inputs
from fxprune.rewrite.rounding import RandomRounding
from fxprune.rewrite.verify import masked_norms

RTOL = 1e-10
BOTH_MODES = (False, True)

# eps is far above the noise of a gradient that is zero in theory: dividing by less would blow that noise up.
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=1e-2),
    "momentum": lambda parameters: SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda parameters: SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True),
    "adam": lambda parameters: Adam(parameters, lr=1e-3, eps=1e-4, amsgrad=True),
    "adamw": lambda parameters: AdamW(parameters, lr=1e-3, eps=1e-4, weight_decay=1e-2),
    "rmsprop": lambda parameters: RMSprop(parameters, lr=1e-3, eps=1e-3, momentum=0.9),
}


class Lion(Optimizer):
    """Chen et al. 2023, as third parties write it: one moment of its own, under a name of its own."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-3, decay: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                mean = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                update = torch.tanh(1e3 * mean.lerp(parameter.grad, 0.1))  # a sign, but not of what is only rounding
                parameter.mul_(1 - group["lr"] * group["decay"]).sub_(update, alpha=group["lr"])
                mean.lerp_(parameter.grad, 0.01)


def matrices(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """What Muon takes."""
    return [parameter for parameter in parameters if parameter.ndim == 2]


# Every optimizer whose state is shaped like the parameter, and each of its implementations.
EVERY_OPTIMIZER: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = OPTIMIZERS | {
    "sgd foreach": lambda parameters: SGD(parameters, lr=1e-2, momentum=0.9, foreach=True),
    "sgd fused": lambda parameters: SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True, fused=True),
    "sgd dampened": lambda parameters: SGD(parameters, lr=1e-2, momentum=0.9, dampening=0.3, maximize=True),
    "adam foreach": lambda parameters: Adam(parameters, lr=1e-3, eps=1e-4, foreach=True),
    "adam fused": lambda parameters: Adam(parameters, lr=1e-3, eps=1e-4, fused=True),
    "adamw amsgrad": lambda parameters: AdamW(parameters, lr=1e-3, eps=1e-4, amsgrad=True),
    "adamw foreach": lambda parameters: AdamW(parameters, lr=1e-3, eps=1e-4, amsgrad=True, foreach=True),
    "adamw fused": lambda parameters: AdamW(parameters, lr=1e-3, eps=1e-4, amsgrad=True, fused=True),
    "rmsprop centered": lambda parameters: RMSprop(parameters, lr=1e-3, eps=1e-3, momentum=0.9, centered=True),
    "rmsprop foreach": lambda parameters: RMSprop(parameters, lr=1e-3, eps=1e-3, foreach=True),
    "adagrad": lambda parameters: Adagrad(parameters, lr=1e-2, eps=1e-4, lr_decay=0.1),
    "adagrad foreach": lambda parameters: Adagrad(parameters, lr=1e-2, eps=1e-4, foreach=True),
    "adagrad fused": lambda parameters: Adagrad(parameters, lr=1e-2, eps=1e-4, fused=True),
    "adadelta": lambda parameters: Adadelta(parameters, lr=1e-1, eps=1e-4),
    "adadelta foreach": lambda parameters: Adadelta(parameters, lr=1e-1, eps=1e-4, foreach=True),
    "nadam": lambda parameters: NAdam(parameters, lr=1e-3, eps=1e-4, decoupled_weight_decay=True),
    "nadam foreach": lambda parameters: NAdam(parameters, lr=1e-3, eps=1e-4, foreach=True),
    "radam": lambda parameters: RAdam(parameters, lr=1e-3, eps=1e-4),
    "radam foreach": lambda parameters: RAdam(parameters, lr=1e-3, eps=1e-4, foreach=True),
    "adamax": lambda parameters: Adamax(parameters, lr=1e-3, eps=1e-4),
    "adamax foreach": lambda parameters: Adamax(parameters, lr=1e-3, eps=1e-4, foreach=True),
    "asgd": lambda parameters: ASGD(parameters, lr=1e-2, t0=2),
    "asgd foreach": lambda parameters: ASGD(parameters, lr=1e-2, t0=2, foreach=True),
    "rprop": lambda parameters: Rprop(parameters, lr=1e-3),
    "rprop foreach": lambda parameters: Rprop(parameters, lr=1e-3, foreach=True),
    "lion": Lion,
}


def random_plan(analysis: Analysis, seed: int, least: int = 1, *, layers: bool = False) -> Plan:
    """An arbitrary part of every group, at least ``least`` channels where it has as many; one in five stays whole.

    ``layers``: residual branches go whole, one at least where there is one.
    """
    draw = random.Random(seed)
    keep = {}
    for name, group in analysis.groups.items():
        if draw.random() < 0.8:
            count = draw.randint(min(least, group.size), group.size)
            keep[name] = sorted(draw.sample(range(group.size), count))
    able = sorted(analysis.layers) if layers else []
    gone = draw.sample(able, draw.randint(min(1, len(able)), len(able)))
    return Plan(keep, analysis.sizes, analysis.options, layers=gone)


# ------------------------------------------------------------------------------------------- oracle


@dataclass(frozen=True)
class Outcome:
    """What one pass forwards and backwards leaves behind."""

    outputs: Any
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def masked(graph: TracedModule, param_map: ParamMap) -> TracedModule:
    """A copy of ``graph`` in which every removed slice of every parameter is zero."""
    copied = copy.deepcopy(graph)
    zero_removed(copied, param_map)
    return copied


def zero_removed(model: nn.Module, param_map: ParamMap) -> None:
    """Set to zero, axis by axis, whatever ``param_map`` does not keep."""
    for name, parameter in model.named_parameters():
        for axis, kept in enumerate(param_map[name]):
            if kept is not None:
                gone = sorted(set(range(parameter.shape[axis])) - set(kept.tolist()))
                parameter.data.index_fill_(axis, torch.tensor(gone, dtype=torch.int64), 0.0)


def outcome(model: nn.Module, inputs: Any, mode: bool, norms: Mapping[Any, Any], seed: int = 7) -> Outcome:
    """Run ``model`` as it stands, with seeded random streams; the loss is a fixed random sum of the outputs.

    ``norms``: where norms run over kept channels only, as a ParamMap has them. Buffers move as the mode has it.
    """
    model.train(mode)
    model.zero_grad(set_to_none=True)
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, bind_inputs(inputs))
    torch.manual_seed(seed)
    with masked_norms(model, norms) if norms else nullcontext():
        outputs = model(*args, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64)
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            loss = loss + (leaf * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)).sum()
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return Outcome(pytree.tree_map_only(Tensor, Tensor.detach, outputs), gradients, buffers)


def assert_close(title: str, actual: Tensor, expected: Tensor, floor: float = 0.0, rounding: float = 0.0) -> None:
    """The largest difference is at most RTOL of the largest expected value (or of ``floor``), or ten times rounding."""
    assert actual.shape == expected.shape, f"{title}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), title
    elif expected.numel():
        size = max(expected.abs().max().item(), floor)
        gap = (actual - expected).abs().max().item()
        assert gap <= max(RTOL * size, min(10 * rounding, 1e-4 * size)), (
            f"{title} differs by {gap:.2e}, its largest value is {size:.2e}"
        )


def assert_all_close(
    title: str,
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    rounding: Mapping[str, float] | None = None,
) -> None:
    """The same names and values. Rounding is that of the largest value of all, or what was measured by name."""
    assert actual.keys() == expected.keys(), f"{title}: {sorted(actual.keys() ^ expected.keys())} is on one side only"
    floor = max((t.abs().max().item() for t in expected.values() if t.is_floating_point() and t.numel()), default=0)
    for name, tensor in expected.items():
        assert_close(f"{title} {name}", actual[name], tensor, floor, (rounding or {}).get(name, 0.0))


def sliced(param_map: ParamMap, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor cut as the parameter or buffer of its name is."""
    result = {}
    for name, tensor in tensors.items():
        if name in param_map.gone:
            continue
        for axis, kept in enumerate(param_map[name]):
            tensor = tensor if kept is None else tensor.index_select(axis, kept)
        result[name] = tensor
    return result


def assert_same(title: str, actual: Outcome, expected: Outcome, rounding: Mapping[str, float] | None = None) -> None:
    """Two outcomes agree; their outputs have the same structure. ``rounding``: see ``measure_rounding``."""
    leaves, structure = pytree.tree_flatten(actual.outputs)
    expected_leaves, expected_structure = pytree.tree_flatten(expected.outputs)
    assert structure == expected_structure, f"{title}: returns {structure}, expected {expected_structure}"
    for number, (leaf, want) in enumerate(zip(leaves, expected_leaves, strict=True)):
        if isinstance(want, Tensor):
            assert_close(f"{title} output {number}", leaf, want)
        else:
            assert leaf == want, f"{title} output {number}"
    assert_all_close(f"{title} gradient", actual.gradients, expected.gradients, rounding)
    for name, buffer in expected.buffers.items():
        assert_close(f"{title} buffer {name}", actual.buffers[name], buffer, 1e-4)  # some are zero but for rounding


def measure_rounding(run: Callable[[torch.Generator], Outcome], expected: Outcome) -> dict[str, float]:
    """By how much each gradient moves with the last bits of all that is computed: the largest of four runs."""
    draws, spread = torch.Generator().manual_seed(0), dict.fromkeys(expected.gradients, 0.0)
    for _ in range(4):
        for name, gradient in run(draws).gradients.items():
            spread[name] = max(spread[name], (gradient - expected.gradients[name]).abs().max().item())
    return spread


# --------------------------------------------------------------------------------------------- laws


def graph_is_model(graph: nn.Module, model: nn.Module, inputs: Iterable[Any]) -> None:
    """Law 0: what the graph gives, and leaves in its buffers, is what the model gives, in both modes."""
    for number, example in enumerate(inputs):
        for mode in BOTH_MODES:
            actual, expected = (outcome(copy.deepcopy(network), example, mode, {}) for network in (graph, model))
            assert_same(f"{'train' if mode else 'eval'}, example {number}", actual, expected)


def slice_is_zero(
    graph: TracedModule, inputs: Any, analysis: Analysis, plan: Plan, modes: Iterable[bool] = BOTH_MODES
) -> None:
    """Law 1: the compact model is the original with every removed slice set to zero."""
    compact, param_map = fxprune.rewrite(graph, analysis, plan)
    agree(graph, compact, param_map, inputs, modes)
    fxprune.verify(graph, compact, param_map, inputs)


def agree(
    graph: TracedModule, compact: TracedModule, param_map: ParamMap, inputs: Any, modes: Iterable[bool] = BOTH_MODES
) -> None:
    """Outputs, gradients and buffers of ``compact`` are those of the masked ``graph``, but for measured rounding."""
    for mode in modes:

        def run_masked(draws: torch.Generator | None = None, mode: bool = mode) -> Outcome:
            zeroed = masked(graph, param_map).requires_grad_()
            with RandomRounding(draws) if draws is not None else nullcontext():
                whole = outcome(zeroed, inputs, mode, param_map.norms)
            return Outcome(whole.outputs, sliced(param_map, whole.gradients), sliced(param_map, whole.buffers))

        expected, what = run_masked(), "train" if mode else "eval"
        found = outcome(copy.deepcopy(compact).requires_grad_(), inputs, mode, {})
        try:
            assert_same(what, found, expected)
        except AssertionError:
            assert_same(what, found, expected, measure_rounding(run_masked, expected))


def slice_commutes_with_a_step(
    graph: TracedModule,
    inputs: Any,
    analysis: Analysis,
    plan: Plan,
    make: Callable[[Iterable[nn.Parameter]], Optimizer],
    mode: bool = True,
) -> None:
    """Law 2: cut and step is mask, step and cut. Two steps of the whole model fill the optimizer's state before."""
    dense = copy.deepcopy(graph).requires_grad_()
    optimizer = make(dense.parameters())
    for seed in (1, 2):
        outcome(dense, inputs, mode, {}, seed)
        optimizer.step()
    zeroed, dense_optimizer = copy.deepcopy((dense, optimizer))

    compact, param_map = fxprune.rewrite(dense, analysis, plan)
    param_map.migrate(optimizer)
    outcome(compact, inputs, mode, {})
    optimizer.step()

    zero_removed(zeroed, param_map)
    outcome(zeroed, inputs, mode, param_map.norms)
    dense_optimizer.step()

    assert_same_training(compact, optimizer, zeroed, dense_optimizer, param_map)


def assert_same_training(
    compact: nn.Module, optimizer: Optimizer, dense: nn.Module, dense_optimizer: Optimizer, param_map: ParamMap
) -> None:
    """The parameters and the optimizer's state of ``compact`` are those of ``dense``, sliced."""
    actual, expected = dict(compact.named_parameters()), dict(dense.named_parameters())
    assert_all_close("parameter", detached(actual), sliced(param_map, detached(expected)))
    kinds = {key for state in (*optimizer.state.values(), *dense_optimizer.state.values()) for key in state}
    for kind in sorted(kinds):
        actual_state, expected_state = states(actual, optimizer, kind), states(expected, dense_optimizer, kind)
        expected_state = {name: state for name, state in expected_state.items() if name not in param_map.gone}
        shaped = {name: tensor for name, tensor in expected_state.items() if tensor.shape == expected[name].shape}
        assert_all_close(f"state {kind}", actual_state, expected_state | sliced(param_map, shaped))


def cuts_commute_with_steps(
    graph: TracedModule,
    inputs: Any,
    make: Callable[[Iterable[nn.Parameter]], Optimizer],
    *,
    mode: bool = True,
    cuts: int = 3,
    steps: int = 2,
    plan: Callable[[Analysis, int], Plan] | None = None,
) -> None:
    """Law 2 in a session: train, cut, train, cut ... is to train a whole twin whose removed slices are held at zero.

    After every step the outputs, gradients, buffers, parameters and the optimizer's state are compared. The twin's
    optimizer keeps its own state of what was removed, so that state which leaks from there into what stays is seen.
    """
    model = copy.deepcopy(graph).requires_grad_()
    twin = copy.deepcopy(model)
    optimizer, dense_optimizer = make(model.parameters()), make(twin.parameters())
    with fxprune.Session(model, inputs, optimizer, progress=False) as session:
        kept = session.reconfigure(Plan({}, session.analysis.sizes, session.analysis.options))
        for cut in range(cuts + 1):
            for step in range(steps):
                actual = outcome(session.graph, inputs, mode, {}, 100 * cut + step)
                optimizer.step()
                dense = outcome(twin, inputs, mode, kept.norms, 100 * cut + step)
                dense_optimizer.step()
                zero_removed(twin, kept)
                expected = Outcome(dense.outputs, sliced(kept, dense.gradients), sliced(kept, dense.buffers))
                title = f"{cut} cuts, step {step + 1}:"
                assert_same(title, actual, expected)
                assert_same_training(session.graph, optimizer, twin, dense_optimizer, kept)
            optimizer.zero_grad()
            if cut < cuts:
                kept = kept.then(session.reconfigure((plan or thinner)(session.analysis, cut)))
                zero_removed(twin, kept)


def thinner(analysis: Analysis, seed: int, part: float = 0.25) -> Plan:
    """An arbitrary ``part`` of each group goes, at least one channel of every group that has two."""
    draw = random.Random(seed)
    keep = {
        name: sorted(draw.sample(range(size), max(1, size - max(1, round(part * size)))))
        for name, size in analysis.sizes.items()
    }
    return Plan(keep, analysis.sizes, analysis.options)


def detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without gradients."""
    return {name: tensor.detach() for name, tensor in tensors.items()}


def states(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, kind: str) -> dict[str, Tensor]:
    """One kind of an optimizer's state by the names of the parameters; numbers as tensors."""
    held = {name: optimizer.state.get(parameter, {}) for name, parameter in parameters.items()}
    return {name: torch.as_tensor(state[kind]) for name, state in held.items() if state.get(kind) is not None}


def pruning_composes(
    graph: TracedModule, inputs: Any, analysis: Analysis, p: Plan, seed: int, modes: Iterable[bool] = BOTH_MODES
) -> None:
    """Law 3: pruning by p, then by q, is pruning by p.then(q); the maps of what was kept compose likewise."""
    first, first_map = fxprune.rewrite(graph, analysis, p)
    between = analysis.after(p, first)
    q = random_plan(between, seed, layers=bool(p.layers))
    second, second_map = fxprune.rewrite(first, between, q)
    direct, direct_map = fxprune.rewrite(graph, analysis, p.then(q))
    assert_same_state(second, direct)
    assert_same_map(first_map.then(second_map), direct_map, graph)
    for mode in modes:
        actual, expected = (copy.deepcopy(network).requires_grad_() for network in (second, direct))
        assert_same("composed", outcome(actual, inputs, mode, {}), outcome(expected, inputs, mode, {}))


def pruned_again(graph: TracedModule, inputs: Any, analysis: Analysis, p: Plan, seed: int) -> None:
    """Law 3 where the compact model is analysed anew, as by somebody who prunes it a second time.

    Raises PlanError where other groups are found than it was cut by.
    """
    first, _ = fxprune.rewrite(graph, analysis, p)
    fresh = fxprune.analyze(first, inputs)
    second, _ = fxprune.rewrite(first, fresh, random_plan(fresh, seed))
    direct, _ = fxprune.rewrite(graph, analysis, Plan.from_json(second.meta["fxprune"]["plan"]))
    assert_same_state(second, direct)


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    """The same state_dict, bit by bit and in the same order."""
    state, expected_state = actual.state_dict(), expected.state_dict()
    assert list(state) == list(expected_state)
    for name, tensor in expected_state.items():
        assert torch.equal(state[name], tensor), f"{name} is not the same"


def assert_same_map(actual: ParamMap, expected: ParamMap, graph: nn.Module) -> None:
    """The same indices for every parameter and buffer."""
    tensors = graph.state_dict() | dict(graph.named_buffers())  # buffers that are not saved, too
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert set(actual) == set(expected)
    for name in expected:
        for axis, pair in enumerate(zip(actual[name], expected[name], strict=True)):
            positions, wished = (list(range(shapes[name][axis])) if kept is None else kept.tolist() for kept in pair)
            assert positions == wished, f"kept of {name}[{axis}]: {positions}, expected {wished}"


def channels(analysis: Analysis) -> set[frozenset[tuple[str, int, int]]]:
    """Each channel that may go, as the (parameter, axis, position) triples that go with it."""
    places: dict[tuple[str, int], set[tuple[str, int, int]]] = {}
    for group in analysis.groups.values():
        for member in group.members:
            for position, channel in zip(member.index.tolist(), member.channel.tolist(), strict=True):
                places.setdefault((group.name, channel), set()).add((member.parameter, member.axis, position))
    return {frozenset(triples) for triples in places.values()}
