"""What can go wrong for a user: each has its own clear error, and nothing is changed by it."""

import copy
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import random_plan
from models import MODELS, prepare, randomize
from random_networks import ChannelsLastNorm
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer

import fxprune
from fxprune import Analysis, Budget, FxpruneError, ParamMap, Plan, TracedModule, errors, passes
from fxprune.errors import (
    AnalysisError,
    BudgetError,
    ExportError,
    FileError,
    MigrationError,
    PlanError,
    RewriteError,
    TraceError,
    VerificationError,
)
from fxprune.graph.inputs import bind_inputs
from fxprune.graph.trace import trace_whole
from fxprune.graph.traced import Mode

HALF = Budget(channels=0.5, tolerance=0.2)


@contextmanager
def unchanged(model: nn.Module, optimizer: Optimizer | None = None) -> Iterator[None]:
    """Check that the block leaves a model, and an optimizer, bit for bit as they were."""
    modes = [module.training for module in model.modules()]
    parameters = list(model.parameters())
    flags = [parameter.requires_grad for parameter in parameters]
    weights = copy.deepcopy(model.state_dict())
    held = [] if optimizer is None else [list(group["params"]) for group in optimizer.param_groups]
    state = copy.deepcopy(optimizer.state_dict()) if optimizer else {}
    yield
    assert [module.training for module in model.modules()] == modes
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [parameter.requires_grad for parameter in parameters] == flags
    assert list(model.state_dict()) == list(weights)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    if optimizer is not None:
        for group, before in zip(optimizer.param_groups, held, strict=True):
            assert all(a is b for a, b in zip(group["params"], before, strict=True))
        torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)


def ready(name: str = "residual") -> tuple[TracedModule, Analysis, Any]:
    model, inputs = prepare(MODELS[name])
    graph = fxprune.trace(model, inputs)
    return graph, fxprune.analyze(graph, inputs), inputs


def test_one_base_for_all() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and value is not FxpruneError]
    assert classes
    assert all(issubclass(error, FxpruneError) for error in classes)


# --------------------------------------------------------------------------------------- models


def test_a_frozen_model_prunes_as_usual() -> None:
    model, inputs = prepare(MODELS["frozen_parameters"])
    with unchanged(model):
        compact = fxprune.prune(model, inputs, passes.Magnitude(), budget=HALF)
    assert not any(parameter.requires_grad for parameter in compact.parameters())
    thawed = fxprune.prune(copy.deepcopy(model).requires_grad_(), inputs, passes.Magnitude(), budget=HALF)
    torch.testing.assert_close(compact(*inputs), thawed(*inputs), rtol=0, atol=0)


def test_layers_that_the_user_keeps_stay() -> None:
    model, inputs = prepare(MODELS["residual"])
    compact = fxprune.prune(
        model, inputs, passes.Magnitude(), budget=Budget(params=0.8, tolerance=0.1), keep=["2.conv1"]
    )
    before, after = model.state_dict(), compact.state_dict()
    assert after["2.conv1.0.weight"].shape[0] == before["2.conv1.0.weight"].shape[0]
    assert sum(map(Tensor.numel, after.values())) < sum(map(Tensor.numel, before.values()))


@pytest.mark.parametrize("name", [name for name, case in MODELS.items() if not case.prunable])
def test_a_model_with_nothing_to_prune_says_why(name: str) -> None:
    model, inputs = prepare(MODELS[name])
    with unchanged(model), pytest.raises(PlanError, match=r"nothing in this model can be pruned: .*\w+.*See print"):
        fxprune.prune(model, inputs, passes.Magnitude(), budget=HALF)


def test_the_reasons_are_those_of_the_analysis() -> None:
    with pytest.raises(PlanError, match="can be pruned: meets input input; output"):
        fxprune.prune(nn.Linear(4, 2), torch.randn(3, 4), passes.Magnitude(), budget=HALF)
    with pytest.raises(PlanError, match="can be pruned: it has no parameters"):
        fxprune.prune(nn.ReLU(), torch.randn(3, 4), passes.Magnitude(), budget=HALF)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # Python that depends on data
            return x
        return -x


def test_a_model_that_can_not_be_traced() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Branching()))
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "depends on data" in text)
    message = rf"can't trace module 1.1 \(Branching\) of Sequential, .*test_errors.py:{line}: `if x.sum\(\) > 0:"
    with unchanged(model), pytest.raises(TraceError, match=message):
        trace_whole(model, bind_inputs(torch.randn(2, 4)))


def test_a_model_that_does_not_run() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Branching())
    message = r"^Sequential does not run on example_inputs: module 0 \(Linear\) of Sequential: .*mat1"
    with unchanged(model), pytest.raises(TraceError, match=message):
        fxprune.trace(model, torch.randn(2, 5))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.randn(1), torch.randn(1)), r"do not fit Linear.forward\(input\).*too many positional arguments"),
        (((torch.randn(1),), {"y": 1}), r"do not fit Linear.forward.* unexpected keyword argument 'y'"),
    ],
)
def test_example_inputs_that_forward_does_not_take(inputs: Any, message: str) -> None:
    model = nn.Linear(4, 2)
    with unchanged(model), pytest.raises(TraceError, match=message):
        fxprune.trace(model, inputs)


def test_example_inputs_of_another_shape() -> None:
    model, _ = prepare(MODELS["residual"])
    with (
        unchanged(model),
        pytest.raises(
            TraceError, match=r"does not run on .*module 0.0 \(Conv2d\) of .*input\[2, 5, 8, 8\] to have 3 channels"
        ),
    ):
        fxprune.prune(model, torch.randn(2, 5, 8, 8), passes.Magnitude(), budget=HALF)


def test_example_inputs_that_are_missing() -> None:
    model, (image, _) = prepare(MODELS["two_inputs"])
    with unchanged(model), pytest.raises(TraceError, match="missing a required argument: 'vector'"):
        fxprune.prune(model, image, passes.Magnitude(), budget=HALF)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, r"model must be a Module, but it is None \(NoneType\)"),
        (nn.Linear, r"model must be a Module, .* \(the class Linear; make an instance\)"),
        (lambda x: x, r"model must be a Module, .*function"),
        (nn.Sequential(nn.LazyLinear(3)), "0.weight of Sequential has no shape yet: call the model once"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_is_no_model(model: Any, message: str) -> None:
    for call in (fxprune.trace, fxprune.analyze):
        with pytest.raises(TraceError, match=message):
            call(model, torch.randn(2, 4))


def test_modules_that_nest_too_deep_to_be_copied() -> None:
    model: nn.Module = nn.Linear(4, 2)
    for _ in range(199):
        model = nn.Sequential(model)
    message = r"modules of Sequential stand 200 deep .* recursion limit, \d+, .* sys.setrecursionlimit\(3200\)"
    with pytest.raises(TraceError, match=message):
        fxprune.trace(model, torch.randn(2, 4))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_refused() -> None:
    with pytest.raises(TraceError, match=r"is TorchScript, .* give the model it was made from"):
        fxprune.trace(torch.jit.script(nn.Linear(4, 2)), torch.randn(2, 4))


def test_numpy_inputs() -> None:
    with pytest.raises(AnalysisError, match="example_inputs hold a numpy array; make it a tensor with"):
        fxprune.trace(nn.Linear(4, 2), torch.randn(2, 4).numpy())


def test_an_empty_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    with unchanged(model), pytest.raises(BudgetError, match="flops is 0 for these example_inputs"):
        fxprune.prune(model, torch.randn(0, 4), passes.Magnitude(), budget=Budget(flops=0.5))


@pytest.mark.parametrize("keep", [None, 3, [3], [nn.Linear(1, 1)]])
def test_keep_that_is_no_names(keep: Any) -> None:
    _, analysis, _ = ready()
    with pytest.raises(PlanError, match=r"keep=.* must be a list of names of layers"):
        passes.Magnitude().plan(analysis, HALF, keep=keep)
    with pytest.raises(PlanError, match=r"keep=.* must be a list of names of layers"):
        passes.Magnitude(keep=keep)


def test_arguments_of_another_kind() -> None:
    graph, analysis, inputs = ready()
    plan = passes.Random().plan(analysis, HALF)
    compact, param_map = fxprune.rewrite(graph, analysis, plan)
    number: Any = 0.5
    for error, message, call in (
        (BudgetError, "budget must be a Budget, but it is 0.5", lambda: passes.Random().plan(analysis, number)),
        (PlanError, "analysis must be a Analysis", lambda: passes.Random().plan(number, HALF)),
        (PlanError, "seed must be a int", lambda: passes.Random(number)),
        (PlanError, "p='2' must be a positive number", lambda: passes.Magnitude(p="2")),  # type: ignore[arg-type]
        (PlanError, "can't plan: give an instance", lambda: fxprune.prune(graph, inputs, number, budget=HALF)),
        (RewriteError, "plan must be a Plan", lambda: fxprune.rewrite(graph, analysis, number)),
        (RewriteError, "graph must be a TracedModule", lambda: fxprune.rewrite(number, analysis, plan)),
        (VerificationError, "param_map must be", lambda: fxprune.verify(graph, compact, number, inputs)),
        (VerificationError, "does not lead from", lambda: fxprune.verify(compact, graph, param_map, inputs)),
        (VerificationError, "does not run on", lambda: fxprune.verify(graph, compact, param_map, torch.ones(1))),
        (MigrationError, "optimizer must be a Optimizer", lambda: param_map.migrate(number)),
        (AnalysisError, "name must be a str", lambda: analysis.explain(number)),
        (FileError, "path must be a str or Path", lambda: fxprune.save(compact, number)),
        (FileError, "path must be a str or Path", lambda: fxprune.load(number, graph)),
        (ExportError, "model must be a Module", lambda: fxprune.export_onnx(number, inputs, "x.onnx")),
        (ExportError, "it is a folder", lambda: fxprune.export_onnx(compact, inputs, ".")),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_loss_that_fails() -> None:
    _, analysis, inputs = ready()
    with pytest.raises(PlanError, match="fails on this data: TypeError: 'str' object is not callable"):
        passes.Taylor((*inputs, 0), "mse").plan(analysis, HALF)  # type: ignore[arg-type]


def test_pruning_without_gradients_is_verified_with_them() -> None:
    model, inputs = prepare(MODELS["residual"])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            fxprune.prune(model, inputs, passes.Magnitude(), budget=HALF)


# --------------------------------------------------------------------------------------- rewrite, verify


def test_a_plan_for_another_model() -> None:
    graph, analysis, _ = ready()
    _, stranger, _ = ready("densenet")
    with unchanged(graph), pytest.raises(PlanError, match="this plan was made for another model: group '"):
        fxprune.rewrite(graph, analysis, random_plan(stranger, 0))


def test_a_graph_that_was_not_analysed() -> None:
    graph, analysis, _ = ready("chain")
    stranger, _, _ = ready("residual")
    plan = random_plan(analysis, 0)
    with (
        unchanged(stranger),
        pytest.raises(RewriteError, match=r"not the model that was analysed: \S+ has shape .*, the ana"),
    ):
        fxprune.rewrite(stranger, analysis, plan)
    compact, _ = fxprune.rewrite(graph, analysis, passes.Random().plan(analysis, HALF))
    with pytest.raises(RewriteError, match=r"\S+ has shape \(\d+.*\), the analysis says \(\d+"):
        fxprune.rewrite(compact, analysis, plan)


def test_a_plan_that_leaves_an_operator_nothing() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = self.both(x).chunk(2, 1)
            return self.last(torch.cat((F.max_pool2d(left, 2), F.avg_pool2d(right, 2)), 1))

    x = torch.randn(2, 3, 4, 4)
    analysis = fxprune.analyze(fxprune.trace(Halves(), x), x)
    plan = fxprune.Plan({"both": (4, 5, 6, 7)}, analysis.sizes, analysis.options)
    with pytest.raises(RewriteError, match=r"no channel of what node max_pool2d .*F.max_pool2d\(left, 2\).* reads"):
        fxprune.rewrite(analysis.graph, analysis, plan)


def test_verify_sees_a_weight_that_was_changed() -> None:
    graph, analysis, inputs = ready()
    compact, param_map = fxprune.rewrite(graph, analysis, passes.Random().plan(analysis, HALF))
    fxprune.verify(graph, compact, param_map, inputs)
    with torch.no_grad():
        next(compact.parameters()).view(-1)[0] += 1e-3
    message = (
        r"in eval mode output 0 of the compact model differs from the masked original by \d\.\d\de-0\d .*allowed 1e-10"
    )
    with unchanged(graph), unchanged(compact), pytest.raises(VerificationError, match=message):
        fxprune.verify(graph, compact, param_map, inputs)


def test_a_layer_norm_over_one_channel_gives_zeros_and_gradients_of_rounding() -> None:
    """No change of the inputs shows how much of it there is: its output stays zero."""
    largest = 0.0
    for seed in range(10):
        torch.manual_seed(seed)
        norm = ChannelsLastNorm(8)
        norm.norm.eps = 1e-7
        model = nn.Sequential(nn.Conv2d(4, 8, 1), norm, nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
        analysis = fxprune.analyze(fxprune.trace(model, x), x)
        plan = fxprune.Plan({"0": (seed % 8,)}, analysis.sizes, analysis.options)
        compact, param_map = fxprune.rewrite(analysis.graph, analysis, plan)
        largest = max(largest, fxprune.verify(analysis.graph, compact, param_map, x).gradients)
    assert 1e-10 < largest < 1e-9


def test_what_a_network_makes_of_rounding_is_no_difference() -> None:
    """Batch norm over values that differ by a ten-millionth amplifies the last bit to 1e-9."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(32, eps=1e-20)
    model = nn.Sequential(nn.Conv2d(16, 32, 1), norm, nn.Tanh(), nn.Conv2d(32, 16, 1)).double()
    x = 1 + 1e-8 * torch.randn(2, 16, 3, 3, dtype=torch.float64)
    analysis = fxprune.analyze(fxprune.trace(model, x), x)
    compact, param_map = fxprune.rewrite(analysis.graph, analysis, passes.Random().plan(analysis, HALF))
    with torch.no_grad():  # the last bit: some processors round both models alike
        weight = compact.get_parameter("0.weight")
        weight.mul_(1 + torch.finfo(weight.dtype).eps * torch.randn_like(weight).sign())
    result = fxprune.verify(analysis.graph, compact, param_map, x, gradients=False)
    assert 1e-10 < result.outputs < 1e-7
    said = r"in train mode gradient 0\.weight .* but rounding alone moves it by .*, so that nothing can be told of it"
    with pytest.raises(VerificationError, match=said):
        fxprune.verify(analysis.graph, compact, param_map, x)
    with torch.no_grad():
        compact.get_parameter("3.weight")[0, 0] += 1e-6
    with pytest.raises(VerificationError, match=r"output 0 .* differs from the masked original by"):
        fxprune.verify(analysis.graph, compact, param_map, x, gradients=False)


def one_channel_normed(seed: int) -> tuple[fxprune.TracedModule, fxprune.TracedModule, fxprune.ParamMap, Tensor]:
    """A layer norm over large values, cut to one channel: what is zero in its gradients is amplified rounding."""
    torch.manual_seed(seed)
    norm = ChannelsLastNorm(8)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.Conv2d(8, 4, 1)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    nn.init.constant_(norm.norm.weight, 1e3)
    x = 1e4 * torch.randn(4, 3, 8, 8, dtype=torch.float64)
    analysis = fxprune.analyze(fxprune.trace(model, x), x)
    plan = fxprune.Plan({"0": (3,)}, analysis.sizes, analysis.options)
    return analysis.graph, *fxprune.rewrite(analysis.graph, analysis, plan), x


@pytest.mark.parametrize("seed", range(4))
def test_rounding_is_measured_and_what_is_more_is_a_fault(seed: int) -> None:
    graph, compact, param_map, x = one_channel_normed(seed)
    amplified = fxprune.verify(graph, compact, param_map, x)
    assert 1e-8 < amplified.gradients < 1e-4
    assert amplified.outputs < 1e-12
    assert "and what this model makes of rounding" in str(amplified)
    with torch.no_grad():  # a fault far below what rounding makes of another gradient
        compact.get_parameter("2.weight").mul_(1 + 1e-9)
    with pytest.raises(VerificationError, match=r"output 0 .* allowed 1e-10, and rounding makes \d+e-1\d of it"):
        fxprune.verify(graph, compact, param_map, x)


def test_a_wrong_gradient_of_an_amplified_model_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit is that of each gradient: a fault in one is not excused by rounding in another."""
    graph, compact, param_map, x = one_channel_normed(0)
    verify = sys.modules["fxprune.rewrite.verify"]
    original = verify.outputs_of

    def wrong(model: nn.Module, mode: Mode, inputs: Any, gradients: bool, norms: Any, *more: Any) -> Any:
        result = original(model, mode, inputs, gradients, norms, *more)
        if norms is None and gradients:  # of the compact model
            result.gradients["2.bias"].mul_(1 + 1e-8)
        return result

    monkeypatch.setattr(verify, "outputs_of", wrong)
    with pytest.raises(
        VerificationError, match=r"gradient 2\.bias .* allowed 1e-10, and rounding makes \d+e-1\d of it"
    ):
        fxprune.verify(graph, compact, param_map, x)


class Tokens(nn.Module):
    """An image as tokens, so that the gradient of a batch norm is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.norms = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norms(self.norm(self.stem(x)).flatten(2).transpose(1, 2)))


def test_one_sample_through_a_batch_norm_whose_gradient_is_not_contiguous() -> None:
    """In eval mode on the CPU torch 2.14 takes the gradient of one sample for a contiguous one, and errs by 0.9."""
    model, x = randomize(Tokens()).double().eval(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    compact = fxprune.prune(model, x, passes.Random(), budget=HALF)
    assert compact.stem.weight.shape[0] < 8


def test_weights_without_values_are_not_verified() -> None:
    model, x = MODELS["chain"].make().to("meta"), torch.randn(2, 3, 8, 8, device="meta")
    with pytest.raises(
        VerificationError, match="tensors on the meta device have no values to compare: pass verify=False"
    ):
        fxprune.prune(model, x, passes.Random(), budget=HALF)
    assert fxprune.prune(model, x, passes.Random(), budget=HALF, verify=False)(x).shape == (2, 4)


def test_verify_sees_another_number_of_outputs() -> None:
    graph, analysis, inputs = ready("tuple_output")
    compact, param_map = fxprune.rewrite(graph, analysis, passes.Random().plan(analysis, HALF))
    output = next(node for node in compact.graph.nodes if node.op == "output")
    output.args = (output.args[0][:1],)
    compact.recompile()
    with pytest.raises(VerificationError, match="the model returns 2 tensors, the compact 1"):
        fxprune.verify(graph, compact, param_map, inputs)


# --------------------------------------------------------------------------------------- optimizers


def cut_with(optimizer_of: Any, name: str = "residual") -> tuple[TracedModule, Optimizer, ParamMap]:
    """A model after a step of its optimizer, and the map of a cut."""
    graph, analysis, inputs = ready(name)
    optimizer = optimizer_of(graph.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = graph(*inputs).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    _, param_map = fxprune.rewrite(graph, analysis, passes.Random().plan(analysis, HALF))
    return graph, optimizer, param_map


def test_an_optimizer_that_holds_other_parameters() -> None:
    graph, _, param_map = cut_with(Adam)
    optimizer = SGD([*graph.parameters(), nn.Parameter(torch.zeros(3, 7))], momentum=0.9)
    message = re.escape("the optimizer holds a parameter of shape (3, 7) that is not in the model")
    with unchanged(graph, optimizer), pytest.raises(MigrationError, match=message):
        param_map.migrate(optimizer)


class Squared(SGD):
    """Keeps a square of statistics for each matrix, as Shampoo does."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                rows = parameter.detach().flatten(1) if parameter.ndim > 1 else None
                self.state[parameter]["left"] = None if rows is None else rows @ rows.T
        return loss


@pytest.mark.parametrize(
    ("optimizer_of", "message"),
    [
        (
            Squared,
            r"state 'left' of \S+ can't be sliced: its shape is \(\d+, \d+\), the parameter's \(\d+, \d+, 3, 3\)",
        ),
        (LBFGS, "LBFGS keeps one flat history for all parameters"),
    ],
)
def test_an_optimizer_whose_state_can_not_be_sliced(optimizer_of: Any, message: str) -> None:
    graph, optimizer, param_map = cut_with(optimizer_of)
    with unchanged(graph, optimizer), pytest.raises(MigrationError, match=message):
        param_map.migrate(optimizer)


def test_maps_that_do_not_follow_each_other() -> None:
    _, _, first = cut_with(SGD)
    _, _, second = cut_with(SGD)
    with pytest.raises(MigrationError, match=r"the second does not start from the \S+ that the first led to"):
        first.then(second)


def test_maps_compose_norms_and_all() -> None:
    """Cut twice, then checked against the first model: also where a norm runs over what goes."""
    name = next(name for name, case in MODELS.items() if case.inexact)
    graph, analysis, inputs = ready(name)
    plan = random_plan(analysis, 0, least=3)
    between, first = fxprune.rewrite(graph, analysis, plan)
    again = analysis.after(plan, between)
    last, second = fxprune.rewrite(between, again, random_plan(again, 1, least=2))
    fxprune.verify(graph, last, first.then(second), inputs)


def test_an_empty_plan_changes_nothing() -> None:
    graph, analysis, inputs = ready()
    compact, param_map = fxprune.rewrite(graph, analysis, Plan({}, analysis.sizes))
    assert all(kept is None for axes in param_map.values() for kept in axes)
    torch.testing.assert_close(compact(*inputs), graph(*inputs), rtol=0, atol=0)
