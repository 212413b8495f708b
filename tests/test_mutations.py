"""The laws can fail: break one rule at a time and see law 1 notice."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import random_plan, slice_is_zero
from models import IMAGE, MODELS, Case, conv_bn, head, image_net, prepare
from torch import Tensor, nn

import fxprune
from fxprune import Analysis, Plan, TracedModule
from fxprune.channels import depth, tensor
from fxprune.channels.labels import Labels, Operand, align_label, narrow_label, settle_labels
from fxprune.channels.tensor import Call, as_operand
from fxprune.graph.traced import Mode
from fxprune.ops import contraction, movement, normalization, pointwise
from fxprune.rewrite import branches, fit
from fxprune.rewrite.fit import FITTERS

INTERPRET, REWRITE, VERIFY = (
    sys.modules[f"fxprune.{name}"] for name in ("channels.interpret", "rewrite.rewrite", "rewrite.verify")
)
Patch = pytest.MonkeyPatch
Law = Callable[[TracedModule, Any, Analysis, Plan], None]


class FlipAdd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.flip(1)


class AddInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv_bn(3, 3), conv_bn(3, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x) + x))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(self.conv(x))


CASES = MODELS | {
    "gate": Case("gate", lambda: image_net(conv_bn(8, 8), Gate()), IMAGE),
    "flip": Case("flip", lambda: image_net(conv_bn(8, 8), FlipAdd()), IMAGE),
    "add_input": Case("add_input", AddInput, IMAGE),
}


def law_holds(name: str, law: Law = slice_is_zero) -> bool:
    """Whether law 1 holds for a case under each of a few plans; an error on the way is a failure too."""
    model, example = prepare(CASES[name])
    graph = fxprune.trace(model, example, check=False)  # which would see that a mode is missing
    try:
        analysis = fxprune.analyze(graph, example, heads="within")
        for seed in range(5):
            law(graph, example, analysis, random_plan(analysis, seed, layers=bool(seed % 2)))
    except (AssertionError, RuntimeError, fxprune.FxpruneError):
        return False
    return True


def proof_holds(graph: TracedModule, example: Any, analysis: Analysis, plan: Plan) -> None:
    """What ``prune`` does by itself, without the oracle of the tests."""
    compact, param_map = fxprune.rewrite(graph, analysis, plan)
    fxprune.verify(graph, compact, param_map, example)


def replace_rule(patch: Patch, operator: str, broken: Callable[[Call], Any]) -> None:
    """Put ``broken`` in the place of an operator's rule."""
    patch.setitem(tensor.RULES, operator, broken)
    patch.setattr(tensor, "_resolved", {})


def cat_reversed(patch: Patch) -> None:
    """The names of a concatenation come out in the order of its parts reversed."""

    def broken(call: Call) -> Labels:
        return tuple(label[:, ::-1].copy() for label in movement.cat(call))

    replace_rule(patch, "cat", broken)


def add_unties(patch: Patch) -> None:
    """A pointwise operator passes the names of its first operand on, and merges nothing."""

    def broken(call: Call) -> Labels:
        values = [as_operand(value) for value in call.args if hasattr(value, "shape")]
        return values[0].labels if values[0].shape == call.shape else pointwise.pointwise(call)

    replace_rule(patch, "add", broken)


def convolution_reverses(patch: Patch) -> None:
    """The names of a convolution's output come out in reversed order."""

    def broken(call: Call) -> Labels:
        return tuple(label[:, ::-1].copy() for label in contraction.convolution(call))

    replace_rule(patch, "convolution", broken)


def batch_norm_forgets(patch: Patch) -> None:
    """Weight, bias and statistics of a batch norm are not tied to its channels."""

    def broken(call: Call) -> Any:
        return [as_operand(call.args[0]).labels] + [()] * (len(call.out) - 1)

    for operator in list(tensor.RULES):
        if tensor.RULES[operator] is normalization.batch_norm:
            replace_rule(patch, operator, broken)


def flip_keeps_the_order(patch: Patch) -> None:
    """A flip passes the names on as they were."""
    replace_rule(patch, "flip", lambda call: as_operand(call.args[0]).labels)


def split_takes_the_first(patch: Patch) -> None:
    """Each part of a split has the names of the first positions of the axis."""

    def broken(call: Call) -> Any:
        axis, labels = call.arg("dim", 0) % call.args[0].ndim, as_operand(call.args[0]).labels
        return [tuple(narrow_label(x, axis, 0, part.shape[axis]) for x in labels) for part in call.out]

    for operator in ("split", "split_with_sizes"):
        replace_rule(patch, operator, broken)


def unknown_passes(patch: Patch) -> None:
    """An operator without a rule is taken for a pointwise one."""
    patch.setattr(tensor, "freeze_unknown", pointwise.like)
    patch.setattr(tensor, "_resolved", {})


def outputs_are_free(patch: Patch) -> None:
    """What the model returns is not frozen."""
    patch.setattr(INTERPRET, "freeze_output", lambda tensor: None)


def broadcast_is_free(patch: Patch) -> None:
    """Channels that meet a constant of the same size may be pruned."""

    def broken(names: Any, operands: list[Operand], ndim: int) -> Labels:
        return settle_labels(names, [align_label(label, ndim) for operand in operands for label in operand.labels])

    patch.setattr(movement, "join_labels", broken)
    patch.setattr(pointwise, "join_labels", broken)
    patch.setattr(contraction, "join_labels", broken)


def slices_shift(patch: Patch) -> None:
    """The bounds of slices move one position too far."""
    right = fit.moved_bound

    def broken(*args: Any) -> Any:
        bound = right(*args)
        return None if bound is None else bound + 1

    patch.setattr(movement, "moved_bound", broken)


def slices_stay(patch: Patch) -> None:
    """The bounds of slices are left as they are."""
    patch.setitem(FITTERS, "getitem", lambda run, node: None)


def scales_follow_the_size(patch: Patch) -> None:
    """Attention's default scale, and numbers computed from sizes, follow the pruned size."""
    patch.setitem(FITTERS, "scaled_dot_product_attention", lambda run, node: None)


def sizes_enter_arithmetic(patch: Patch) -> None:
    """Numbers computed from sizes follow the pruned size."""
    patch.setattr(fit, "keep_numbers", lambda run, node: None)
    patch.setattr(REWRITE, "bake_scalars", lambda node, value: None)


def groups_stay(patch: Patch) -> None:
    """A grouped convolution keeps its number of groups."""
    right = REWRITE.layer_attributes

    def broken(*args: Any) -> Any:
        return {key: value for key, value in right(*args).items() if key != "groups"}

    patch.setattr(REWRITE, "layer_attributes", broken)


def wrong_channels(patch: Patch) -> None:
    """Parameters lose the last positions instead of those that the plan names."""
    right = REWRITE.cut_tensor

    def broken(tensor: Any, kept: Any) -> Any:
        return right(tensor, tuple(None if k is None else torch.arange(len(k)) for k in kept))

    patch.setattr(REWRITE, "cut_tensor", broken)


def verify_is_blind(patch: Patch) -> None:
    """``fxprune.verify`` sees no difference: the oracle of its own still does."""
    patch.setattr(VERIFY, "relative_difference", lambda *args, **kwargs: 0.0)
    wrong_channels(patch)


def all_is_zero(patch: Patch) -> None:
    """What a pointwise operator gives counts as zero in the channels that go."""
    patch.setattr(pointwise, "zero_along", lambda call, axes: True)


def norms_see_everything(patch: Patch) -> None:
    """The norm of the masked original runs over the removed channels too."""
    patch.setattr(REWRITE, "kept_by_norms", lambda analysis, stays: {})


def train_mode_is_not_analysed(patch: Patch) -> None:
    """Only the graph of eval mode is looked at."""
    patch.setattr(fxprune.TracedModule, "distinct_graphs", lambda self: {Mode.EVAL: self.graphs[Mode.EVAL]})


def branches_are_silent(patch: Patch) -> None:
    """Whatever ends a branch gives zero where the branch's parameters are zero."""
    patch.setattr(depth, "gives_zero", lambda *args: True)


def sums_keep_the_branch(patch: Patch) -> None:
    """What stays of a sum is the branch that should go."""
    patch.setattr(branches.Branch, "other", property(lambda branch: branch.end))


MUTATIONS: list[tuple[Callable[[Patch], None], str]] = [
    (cat_reversed, "inception"),
    (add_unties, "residual_projection"),
    (convolution_reverses, "chain"),
    (batch_norm_forgets, "chain"),
    (flip_keeps_the_order, "flip"),
    (split_takes_the_first, "split_sizes"),
    (unknown_passes, "unknown_operator"),
    (outputs_are_free, "dict_output"),
    (broadcast_is_free, "add_input"),
    (slices_shift, "csp_slices"),
    (slices_stay, "csp_slices"),
    (scales_follow_the_size, "attention_sdpa"),
    (sizes_enter_arithmetic, "size_scalar"),
    (groups_stay, "depthwise_separable"),
    (wrong_channels, "residual"),
    (verify_is_blind, "residual"),
    (norms_see_everything, "layer_norm_mlp"),
    (norms_see_everything, "hand_rms_norm"),
    (all_is_zero, "linear_attention_nonzero"),
    (all_is_zero, "normalize_nonzero"),
    (train_mode_is_not_analysed, "train_only_coupling"),
    (branches_are_silent, "gate"),
    (sums_keep_the_branch, "residual"),
]


@pytest.mark.parametrize(("mutate", "name"), MUTATIONS, ids=[f"{m.__name__}-{name}" for m, name in MUTATIONS])
def test_law_1_sees_a_broken_rule(mutate: Callable[[Patch], None], name: str) -> None:
    assert law_holds(name)
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        assert not law_holds(name)
    assert law_holds(name)


PROVED = [(mutate, name) for mutate, name in MUTATIONS if mutate is not verify_is_blind]


@pytest.mark.parametrize(("mutate", "name"), PROVED, ids=[f"{m.__name__}-{name}" for m, name in PROVED])
def test_verify_alone_sees_a_broken_rule(mutate: Callable[[Patch], None], name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        assert not law_holds(name, proof_holds)
