"""ActivationDensity: what is counted, beside counting by hand; when it cuts, and what; counting changes nothing."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import EVERY_OPTIMIZER, agree, cuts_commute_with_steps, outcome, thinner
from models import MODELS, Dense, Residual, conv_bn, head, image_net, prepare, randomize
from ranks import Ranks
from runs import assert_equal, begin, nothing_changes, traced, train
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel

import fxprune
from fxprune import Analysis, Plan, Session
from fxprune.errors import PlanError
from fxprune.graph.traced import Mode, regions_of
from fxprune.passes import ActivationDensity
from fxprune.training import distributed
from fxprune.training.memory import Memory, saved_values
from fxprune.training.run import Run, TrainingPass

pytestmark = pytest.mark.filterwarnings("ignore:ActivationDensity leaves:UserWarning")
EAGER = ActivationDensity(saturation=1.0, patience=1, cooldown=1, stop=1.0, cuts=None)  # cuts every second epoch
NEVER = ActivationDensity(cooldown=10**6)


def session_of(model: nn.Module, inputs: Any, pruner: ActivationDensity = NEVER, **options: Any) -> Session:
    optimizer = SGD(model.parameters(), lr=1e-2, momentum=0.9)
    return Session(model, inputs, optimizer, [pruner], progress=False, **options)


def pruner_of(session: Session) -> tuple[ActivationDensity, Memory]:
    pruner = session.passes[0]
    assert isinstance(pruner, ActivationDensity)
    return pruner, session.memories[0]


def densities(session: Session) -> dict[str, float]:
    pruner, memory = pruner_of(session)
    return {name: density for name, (density, _) in pruner.measure(session, memory).items()}


def channels(session: Session, group: str) -> list[float]:
    pruner, memory = pruner_of(session)
    return list(pruner.measure(session, memory)[group][1])


def saved(session: Session) -> dict[str, Any]:
    return saved_values(session.memories[0])


# ------------------------------------------------------------------------------------------- what is counted


class Identity(nn.Module):
    """A 1x1 convolution that hands its input on, an activation, and a layer that reads it."""

    def __init__(self, activation: Any = F.relu, size: int = 6) -> None:
        super().__init__()
        self.conv, self.read, self.activation = nn.Conv2d(size, size, 1, bias=False), nn.Conv2d(size, 2, 1), activation
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(size)[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.activation(self.conv(x)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "activation",
    [F.relu, torch.relu, lambda x: x.relu(), F.relu6, nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), F.hardswish],
)
def test_a_known_share_of_negatives_is_the_density(activation: Any, dtype: torch.dtype) -> None:
    model = Identity(activation).to(dtype).train()
    x = torch.full((4, 6, 5, 5), -4.0, dtype=dtype)  # below -3 hardswish gives zero too
    for channel, positive in enumerate((0, 1, 7, 50, 99, 100)):  # of 100 in each channel
        x[:, channel].view(4, -1)[torch.arange(positive) // 25, torch.arange(positive) % 25] = 1.0
    session = session_of(model, x)
    for _ in range(3):
        session.model(x)
    counts, values = saved(session)["counts"][next(iter(saved(session)["counts"]))]
    assert counts.tolist() == [0, 3, 21, 150, 297, 300]
    assert values.item() == 300
    assert channels(session, "conv") == [0, 0.01, 0.07, 0.5, 0.99, 1]
    assert densities(session) == {"conv": pytest.approx(257 / 600, abs=1e-15)}


def test_flops_of_the_graph_are_counted_while_it_trains_and_count_no_activation() -> None:
    model, (x,) = prepare(MODELS["residual"])
    expected = fxprune.cost.flops(copy.deepcopy(model), x)
    session = session_of(model.train(), x)
    assert fxprune.cost.flops(session.graph.train(), x) == expected
    assert not any(tensor.any() for pair in saved(session)["counts"].values() for tensor in pair)
    session.model(x)
    assert all(tensor.any() for pair in saved(session)["counts"].values() for tensor in pair)


def test_only_what_trains_is_counted_and_each_epoch_anew() -> None:
    model, x = Identity().double(), torch.randn(4, 6, 5, 5, dtype=torch.float64)
    session = session_of(model.train(), x)
    assert densities(session) == {}, "nothing was run"
    session.epoch_end()
    assert saved(session)["since"] == 0, "an epoch without a step says nothing"
    session.model(x)
    session.model.eval()
    session.model(torch.ones_like(x))
    session.model.train()
    assert densities(session) == {"conv": pytest.approx((x > 0).double().mean().item(), abs=1e-15)}
    session.epoch_end()
    session.model(torch.ones_like(x))
    assert densities(session) == {"conv": 1.0}


class Watched(torch.fx.Interpreter):
    """Runs a graph and keeps the value of every activation: the oracle."""

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        target = self.fetch(n) if n.op == "call_module" else n.target
        if isinstance(target, nn.ReLU) or target in (F.relu, torch.relu, "relu"):
            self.seen[n.name] = result.detach().clone()
        return result

    def fetch(self, n: torch.fx.Node) -> Any:
        return self.module.get_submodule(str(n.target))


def activations_of(session: Session, inputs: Any) -> dict[str, Tensor]:
    """The activations of a step, by node, found on a copy that nobody observes."""
    model = copy.deepcopy(session.graph).train()
    watched = Watched(model, graph=model.graphs[Mode.TRAIN])
    watched.seen = {}
    watched.run(*inputs)
    return watched.seen


def share(*values: Tensor) -> float:
    return max((value != 0).double().mean().item() for value in values)


def test_a_stage_takes_the_largest_or_the_mean_of_its_activations() -> None:
    for several in ("max", "mean"):
        session, inputs = begin("residual", steps=0, passes=[ActivationDensity(several=several, cooldown=99)])
        seen = activations_of(session, inputs)
        session.model(*inputs)
        assert list(seen) == ["_0_2", "_1_conv1_2", "relu", "_2_conv1_2", "relu_1", "_3_2"]
        stage = [share(seen[name]) for name in ("_0_2", "relu", "relu_1")]
        assert len(set(stage)) == 3
        expected = max(stage) if several == "max" else sum(stage) / 3
        found = densities(session)
        assert found.pop("0.0") == pytest.approx(expected, abs=1e-15)
        inside = {"1.conv1.0": "_1_conv1_2", "2.conv1.0": "_2_conv1_2", "3.0": "_3_2"}
        assert found == {group: pytest.approx(share(seen[node]), abs=1e-15) for group, node in inside.items()}
        summed = sum((seen[name] != 0).double().mean((0, 2, 3)) for name in ("_0_2", "relu", "relu_1"))
        assert channels(session, "0.0") == pytest.approx(summed.tolist(), abs=1e-15), "ranked by the sum"


def test_behind_a_concatenation_each_source_has_its_own() -> None:
    model = randomize(image_net(Dense(), cout=20), 0).double().train()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    session = session_of(model, x)
    seen = list(activations_of(session, [x]).values())
    session.model(x)
    found = densities(session)
    first = [seen[0], *(each[:, :8] for each in seen[1:4])]  # the stem's own, and its part of each sum
    assert found["0.0"] == pytest.approx(share(*first), abs=1e-15)
    second = [seen[2][:, 8:12], seen[3][:, 8:12]]
    assert found["1.layers.0.2"] == pytest.approx(share(*second), abs=1e-15)
    assert found["1.layers.1.2"] == pytest.approx(share(seen[3][:, 12:16]), abs=1e-15)
    assert "1.layers.2.2" not in found, "read by no activation"


def test_a_flattened_map_counts_for_its_channel() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 5, 3), nn.Linear(180, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).flatten(1).relu())

    x = torch.randn(4, 3, 8, 8)
    session = session_of(Flat().train(), x)
    value = next(iter(activations_of(session, [x]).values()))
    session.model(x)
    expected = (value != 0).double().reshape(4, 5, 36).mean((0, 2))
    assert channels(session, "conv") == pytest.approx(expected.tolist(), abs=1e-15)


class Half(nn.Module):
    """An activation on half of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.read = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.conv(x).chunk(2, 1)
        return self.read(torch.cat([F.relu(left), right], 1))


def test_a_group_is_measured_where_all_of_it_is() -> None:
    with pytest.raises(PlanError, match="of 1 groups, 1 have no activation that gives zeros"):
        session_of(Half().train(), torch.randn(2, 3, 4, 4))
    model = Half().train()
    model.conv = nn.Sequential(conv_bn(3, 12), nn.Conv2d(12, 8, 1))
    session = session_of(model, x := torch.randn(4, 3, 4, 4), EAGER)
    cut(session, [x])
    assert session.analysis.sizes["conv.1"] == 8
    assert session.analysis.sizes["conv.0.0"] < 12


def test_a_depthwise_convolution_shares_the_density_of_its_channels() -> None:
    model = nn.Sequential(conv_bn(3, 8, 1), conv_bn(8, 8, groups=8), conv_bn(8, 12, 1), head(12)).double().train()
    session = session_of(model, x := torch.randn(4, 3, 8, 8, dtype=torch.float64), EAGER)
    seen = list(activations_of(session, [x]).values())
    session.model(x)
    assert densities(session)["0.0"] == pytest.approx(share(seen[0], seen[1]), abs=1e-15)
    cut(session, [x])
    depthwise = session.graph.get_submodule("1.0")
    assert depthwise.groups == depthwise.in_channels == session.analysis.sizes["0.0"] < 8


class Steered(nn.Module):
    """Plain Python between the layers, which torch.fx can't follow."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(conv_bn(3, 8), conv_bn(8, 12)), head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if float(x.detach().max()) < 0:
            raise ValueError("never")
        return self.head(x)


def test_graphs_that_python_steers_are_counted_too() -> None:
    model = randomize(Steered(), 0).double().train()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    value = model.body[0](x)
    session = session_of(model, x, EAGER)
    assert set(saved(session)["counts"]) == {"body/_0_2"}, "a maximum of all channels holds the others"
    session.model(x)
    assert densities(session) == {"body.0.0": pytest.approx(share(value), abs=1e-15)}
    session.epoch_end()
    cut(session, [x], 1)
    session.close()
    assert not any("count_nonzero" in region.code for region in fxprune.graph.traced.regions_of(session.graph).values())


class Bottleneck(nn.Module):
    """MobileNetV2's: the sum is linear, so nothing there gives zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = nn.Conv2d(3, 8, 1), conv_bn(8, 16, 1)
        self.project, self.read = nn.Conv2d(16, 8, 1), conv_bn(8, 6, 1)
        self.head = head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.read(x + self.project(self.expand(x))))


@pytest.mark.filterwarnings("error")
def test_layers_without_zeros_are_left_alone_and_named() -> None:
    x = torch.randn(4, 3, 8, 8)
    with pytest.warns(UserWarning, match="ActivationDensity leaves 1 of 3 groups whole, where no activation .*: stem"):
        session = session_of(Bottleneck().train(), x, EAGER)
    cut(session, [x])
    assert session.analysis.sizes["stem"] == 8
    assert session.analysis.sizes["expand.0"] < 16
    chosen = ActivationDensity(keep=["stem", "read*"], patience=1, cooldown=1, saturation=1.0)
    session = session_of(Bottleneck().train(), x, chosen)  # no warning: the user says so
    cut(session, [x])
    assert {name: size for name, size in session.analysis.sizes.items() if name != "expand.0"} == {
        "stem": 8,
        "read.0": 6,
    }
    assert session.analysis.sizes["expand.0"] < 16


# ------------------------------------------------------------------------------------------------- the loop


def cut(session: Session, inputs: Any, epochs: int = 2) -> Plan:
    """Epochs of one step, of which the last cuts; the plan."""
    plans: list[Plan] = []
    reconfigure = session._cut
    session._cut = lambda plan: (plans.append(plan), reconfigure(plan))[1]  # type: ignore[method-assign]
    for _ in range(epochs):
        train(session, inputs, 1)
        record = session.epoch_end()
    session._cut = reconfigure  # type: ignore[method-assign]
    assert record.removed > 0
    assert len(plans) == 1
    return plans[0]


@pytest.mark.parametrize(("minimum", "round_to"), [(1, 1), (7, 1), (1, 4), (1, 100)])
def test_each_group_keeps_its_density_of_its_channels(minimum: int, round_to: int) -> None:
    pruner = ActivationDensity(saturation=1.0, patience=1, cooldown=1, minimum=minimum, round_to=round_to)
    session, inputs = begin("residual_projection", steps=0, passes=[pruner])
    sizes = session.analysis.sizes
    train(session, inputs)
    session.epoch_end()
    train(session, inputs)
    measured = pruner.measure(session, session.memories[0])
    plan = pruner.after_epoch(session, session.memories[0])
    assert plan is not None
    assert set(measured) == set(sizes)
    for name, (density, each) in measured.items():
        width = max(minimum, int(density * sizes[name] + 0.5))
        width = min(-(-width // round_to) * round_to, sizes[name])
        kept = plan.keep.get(name, tuple(range(sizes[name])))
        assert len(kept) == width
        gone = sorted(set(range(sizes[name])) - set(kept))
        assert not gone or min(each[list(kept)]) >= max(each[gone]), "those of the highest density stay"
    session.reconfigure(plan)
    stage = {
        m.parameter: session.graph.get_parameter(m.parameter).shape[m.axis]
        for m in session.analysis.groups["0.0"].members
        if "running" not in m.parameter
    }
    assert len(stage) > 4
    assert set(stage.values()) == {session.analysis.sizes["0.0"]}, "one value for the whole stage"


def with_dead_channels() -> tuple[nn.Module, Tensor]:
    """A network of which some channels never fire: their norm gives less than nothing."""
    model = randomize(image_net(Residual(8, 8), conv_bn(8, 12), cout=12), 0).double().eval()
    with torch.no_grad():
        for name in ("1.conv1.1", "2.1"):
            norm = model.get_submodule(name)
            norm.weight[[1, 4, 5]] = 0.0
            norm.bias[[1, 4, 5]] = -0.5
    return model, torch.randn(8, 3, 8, 8, dtype=torch.float64)


def test_channels_that_never_fire_can_go() -> None:
    model, x = with_dead_channels()
    session = session_of(model.train(), x)
    session.model(x)
    silent = {
        name: [c for c, each in enumerate(channels(session, name)) if each == 0] for name in session.analysis.sizes
    }
    assert silent["1.conv1.0"] == silent["2.0"] == [1, 4, 5]
    keep = {name: sorted(set(range(size)) - set(silent[name])) for name, size in session.analysis.sizes.items()}
    expected = session.model.eval()(x)
    session.reconfigure(Plan(keep, session.analysis.sizes, session.analysis.options))
    torch.testing.assert_close(session.model(x), expected, rtol=1e-10, atol=1e-12)


class Scripted(ActivationDensity):
    """Takes its densities from a list, one an epoch."""

    def measure(self, run: Run, memory: Memory) -> Any:
        found = super().measure(run, memory)
        density = SCRIPT.pop(0)
        return {name: (density, each) for name, (_, each) in found.items()}


SCRIPT: list[float] = []


@pytest.mark.parametrize(
    ("script", "options", "cuts"),
    [
        ([0.5, 0.5, 0.5, 0.5, 0.5], {"patience": 1, "cooldown": 1}, [2, 4]),
        ([0.5, 0.5, 0.5, 0.5, 0.5], {"patience": 2, "cooldown": 1}, [3]),
        ([0.5, 0.5, 0.5, 0.5, 0.5, 0.5], {"patience": 1, "cooldown": 3}, [3, 6]),
        ([0.5, 0.52, 0.54, 0.545, 0.56], {"patience": 1, "cooldown": 1}, [4]),
        ([0.5, 0.505, 0.6, 0.605, 0.609], {"patience": 2, "cooldown": 1}, [5]),
        ([0.5, 0.51, 0.52], {"patience": 1, "cooldown": 1}, []),
        ([0.5, 0.505, 0.95, 0.95, 0.95], {"patience": 1, "cooldown": 1}, [2]),
        ([0.5, 0.505, 0.94, 0.94, 0.94], {"patience": 1, "cooldown": 1, "stop": 0.9}, [2]),
        ([0.5] * 9, {"patience": 1, "cooldown": 1, "cuts": 3}, [2, 4, 6]),
        ([0.99] * 4, {"patience": 1, "cooldown": 1}, []),
        ([0.94] * 3, {"patience": 1, "cooldown": 1}, [2]),  # of twelve channels one would go
        ([0.94] * 3, {"patience": 1, "cooldown": 1, "stop": 0.94}, []),
    ],
)
def test_when_it_cuts(script: list[float], options: dict[str, Any], cuts: list[int]) -> None:
    SCRIPT[:] = script
    session, inputs = begin("chain", steps=0, passes=[Scripted(**options)])
    found = []
    for epoch in range(1, len(script) + 1):
        train(session, inputs, 1)
        if session.epoch_end().removed:
            found.append(epoch)
    assert found == cuts
    assert saved(session)["cuts"] == len(cuts)


def test_cuts_of_others_are_not_its_own() -> None:
    SCRIPT[:] = [0.5] * 6
    pruner = Scripted(patience=1, cooldown=1, cuts=1, weights="reinit")
    session, inputs = begin("chain", steps=0, passes=[pruner])
    for _ in range(2):
        session.reconfigure(thinner(session.analysis, 0))
        weight = session.graph.get_parameter("0.0.weight").clone()
        train(session, inputs, 1)
        assert session.epoch_end().removed == 0
        assert (session.graph.get_parameter("0.0.weight") - weight).abs().max() < 0.1, "trained, not drawn anew"
    train(session, inputs, 1)
    assert session.epoch_end().removed > 0
    assert saved(session)["cuts"] == 1


@pytest.mark.parametrize("share", [0.9, 0.6])
@pytest.mark.parametrize("settle", [True, False])
def test_a_budget_is_met_and_nothing_goes_below_it(settle: bool, share: float) -> None:
    patience = 1 if settle else 99
    pruner = ActivationDensity(1.0, patience, cooldown=2, cuts=None, budget=fxprune.Budget(flops=share), by=4)
    session, inputs = begin("residual", steps=0, passes=[pruner])
    dense = fxprune.cost.flops(session.graph, inputs)
    removed = []
    for _ in range(6):
        session.model(*inputs)
        removed.append(session.epoch_end().removed)
    assert share - 0.15 <= fxprune.cost.flops(session.graph, inputs) / dense <= share
    assert sum(removed[:3]) > 0 if settle else removed[:3] == [0, 0, 0]
    assert removed[4:] == [0, 0], "it stops there"


def test_a_budget_needs_the_length_of_the_run() -> None:
    with pytest.raises(PlanError, match=r"ActivationDensity is to meet its budget by 0\.6 of the run"):
        begin("residual", steps=0, passes=[ActivationDensity(budget=fxprune.Budget(flops=0.5))])


def test_the_loop_ends() -> None:
    session, inputs = begin("residual", steps=0, passes=[ActivationDensity(1.0, 1, 1, 1.0, None)])
    for _ in range(40):
        train(session, inputs, 1)
        session.epoch_end()
    removed = [each.removed for each in session.log]
    assert sum(each > 0 for each in removed) >= 3
    assert removed[-10:] == [0] * 10
    assert min(session.analysis.sizes.values()) >= 1
    for name, density in saved(session)["densities"].items():
        assert round(density * session.analysis.sizes[name]) >= session.analysis.sizes[name], (
            "a cut would change nothing"
        )


def test_the_training_complexity_is_the_sum_of_the_log() -> None:
    session, inputs = begin("residual", steps=0, passes=[EAGER])
    for _ in range(7):
        train(session, inputs, 1)
        record = session.epoch_end()
        macs = [each.flops / 2 for each in session.log]
        assert record.values["complexity"] == pytest.approx(sum(macs) / (len(macs) * macs[0]), rel=1e-15)
        assert record.values["density"] > 0
    per_image = fxprune.cost.flops(traced("residual")[0], inputs) / len(inputs[0])
    assert session.log[0].flops == per_image
    assert 0 < record.values["complexity"] < 1


# --------------------------------------------------------------------------------- counting changes nothing


# Cases without an activation that gives zeros on channels that may go.
UNABLE = "only_linear merges swiglu mixer vit swin tied_language_model lstm_only gpt_split".split()


@pytest.mark.parametrize("name", MODELS)
def test_counting_and_cutting_under_the_laws(name: str) -> None:
    if name in UNABLE:
        with pytest.raises(PlanError, match="finds nothing to resize"):
            begin(name, steps=0, passes=[NEVER])
        return
    session, inputs = begin(name, steps=0, passes=[EAGER])
    plain, _ = begin(name, steps=0)
    for mode in (True, False):
        found, expected = (outcome(each.graph, inputs, mode, {}) for each in (session, plain))
        assert_equal(name, vars(found), vars(expected))
    for _ in range(2):
        outcome(session.graph, inputs, True, {})
        session.optimizer.zero_grad()
        pruner, memory = pruner_of(session)
        plan = pruner.after_epoch(session, memory)
    assert plan is not None
    dense = copy.deepcopy(session.graph)
    compact, param_map = fxprune.rewrite(dense, fxprune.analyze(dense, inputs), plan)
    agree(dense, compact, param_map, inputs, (False,) if MODELS[name].random else (False, True))
    session.reconfigure(plan)
    for mode in (True, False):
        found, expected = (outcome(each, inputs, mode, {}) for each in (session.graph, compact))
        assert_equal(name, found.outputs, expected.outputs)
        assert_equal(name, found.gradients, expected.gradients)
    assert code(session.graph) == code(compact), "the graph has no counters"


def code(graph: fxprune.TracedModule) -> list[str]:
    graphs = [each for region in regions_of(graph).values() for each in region.distinct_graphs().values()]
    return [each.python_code("self").src for each in graphs]


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_the_optimizer_s_state_goes_along(optimizer: str) -> None:
    def plan(analysis: Analysis, seed: int) -> Plan:
        graph, inputs = analysis.graph, traced("residual")[1]
        with Session(graph, inputs, SGD(graph.parameters(), 0.0), [EAGER], progress=False) as session:
            session.analysis = analysis
            memory = session.memories[0]
            memory.densities, memory.counts = dict.fromkeys(analysis.sizes, 0.5), {}
            session.prepare_pass(session.passes[0], memory)
            buffers = copy.deepcopy(dict(graph.named_buffers()))
            graph(*inputs)
            for name, buffer in graph.named_buffers():
                buffer.copy_(buffers[name])
            found = session.passes[0].after_epoch(session, session.memories[0])
        assert found is not None
        assert found.keep
        return found

    graph, inputs = traced("residual")
    cuts_commute_with_steps(graph, inputs, EVERY_OPTIMIZER[optimizer], cuts=2, plan=plan)


def test_copies_pickles_and_exports_have_no_counters(tmp_path: Path) -> None:
    session, inputs = begin("residual", steps=1, passes=[EAGER])
    graph = session.graph
    counts = lambda: [tensor.tolist() for pair in saved(session)["counts"].values() for tensor in pair]  # noqa: E731
    before = counts()
    copied, pickled = copy.deepcopy(session.model), pickle.loads(pickle.dumps(graph))
    for other in (copied, pickled, AveragedModel(session.model)):
        other.train()(*inputs)
    assert counts() == before
    assert "count_nonzero" in graph.code
    assert "count_nonzero" not in copied.code + pickled.code
    assert list(graph.state_dict()) == list(traced("residual")[0].state_dict())
    assert [name for name, _ in graph.named_buffers()] == [name for name, _ in copied.named_buffers()]
    fxprune.export_onnx(copy.deepcopy(graph).float(), torch.zeros(2, 3, 8, 8), tmp_path / "model.onnx")
    program = torch.export.export(copy.deepcopy(graph).train(), inputs)
    assert not any(str(node.target).startswith("aten.ne") for node in program.graph.nodes)
    assert counts() == before
    session.close()
    assert "count_nonzero" not in graph.code
    graph.train()(*inputs)
    assert counts() == before


# -------------------------------------------------------------------------------------- save, undo, ranks


def run(path: Path | None, epochs: int, stop_at: int | None = None) -> dict[str, Any]:
    """A run that saves after every second step, killed after ``stop_at`` steps; every loss of it, exactly."""
    torch.manual_seed(0)
    graph, inputs = traced("residual")
    model = copy.deepcopy(graph).requires_grad_().train()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = ActivationDensity(saturation=0.2, patience=1, cooldown=2, cuts=3)
    if path is not None and path.exists():
        session = Session.load(path, model, inputs, optimizer, progress=False)
    else:
        session = Session(model, inputs, optimizer, [pruner], progress=False)
    found: dict[str, Any] = {}
    while session.epoch < epochs:
        while session.step < 4 * (session.epoch + 1):
            x = inputs[0] + 0.1 * torch.randn(inputs[0].shape, dtype=torch.float64, generator=numbers(session.step))
            found[f"step {session.step}"] = train(session, [x])[0].hex()
            if path is not None and session.step % 2 == 0:
                session.save(path)
            if session.step == stop_at:
                return found
        record = session.epoch_end()
        found[f"epoch {session.epoch}"] = (record.removed, {**record.values}, dict(saved(session)["densities"]))
    return found


def numbers(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("stop_at", [2, 6, 10, 14, 22])
def test_a_run_goes_on_bit_equal_in_the_middle_of_an_epoch(stop_at: int, tmp_path: Path) -> None:
    whole = run(None, 8)
    assert sum(its[0] > 0 for name, its in whole.items() if name.startswith("epoch")) == 3
    first = run(tmp_path / "run.pt", 8, stop_at)
    assert whole | first == whole
    second = run(tmp_path / "run.pt", 8)
    assert first | second == whole


class Failing(TrainingPass):
    """Fails once after a cut, when every other pass has done its part."""

    failed = False

    def prepare(self, run: Run, memory: Memory) -> None:
        if run.log.epochs and not Failing.failed:
            Failing.failed = True
            raise MemoryError("no room")


@pytest.mark.parametrize("weights", ["keep", "reinit"])
def test_a_cut_that_fails_leaves_run_and_counters(weights: str) -> None:
    Failing.failed = False
    pruner = ActivationDensity(1.0, 1, 1, 1.0, None, weights=weights)
    session, inputs = begin("residual", steps=0, passes=[pruner, Failing()])
    train(session, inputs, 1)
    session.epoch_end()
    train(session, inputs, 1)
    plan = pruner.after_epoch(session, session.memories[0])
    assert plan is not None
    state = torch.get_rng_state()
    with nothing_changes(session), pytest.raises(MemoryError, match="no room"):
        session.reconfigure(plan)
    torch.set_rng_state(state)
    session.model(*inputs)
    assert densities(session), "it counts as before"
    assert session.reconfigure(plan)


def test_a_plan_that_somebody_declines_comes_again() -> None:
    answers = iter([False, True])
    decide = lambda *_: fxprune.training.when.Decision(next(answers), "says the test", 1.0)  # noqa: E731
    session, inputs = begin("chain", steps=0, passes=[EAGER], when=decide)
    removed = []
    for _ in range(3):
        train(session, inputs, 1)
        removed.append(session.epoch_end().removed > 0)
    assert removed == [False, False, True]


def shared(rank: int, how: str = "") -> dict[str, Any]:
    """A run of which each rank has a part of every batch; no norm, so that ranks train as one."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), head(16)]
    model: Any = nn.Sequential(*layers).double().train()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    model = DistributedDataParallel(model) if distributed.count_ranks() > 1 else model
    model = torch.compile(model, backend="eager") if how == "compiled" else model
    pruner = ActivationDensity(saturation=0.2, patience=1, cooldown=1, cuts=2)
    session = Session(model, torch.zeros(2, 3, 6, 6).double(), optimizer, [pruner], progress=False)
    x = (
        torch.randn(8, 3, 6, 6, dtype=torch.float64, generator=numbers(1))
        + torch.arange(-4, 4)[:, None, None, None] / 4
    )
    mine = slice(distributed.own_rank(), None, distributed.count_ranks())
    found: list[Any] = []
    for _ in range(5):
        for _ in range(2):
            loss = session.model(x[mine]).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        record = session.epoch_end()
        found.append((record.removed, dict(saved(session)["densities"])))
    return {"epochs": found, "state": {name: tensor.tolist() for name, tensor in session.graph.state_dict().items()}}


@pytest.mark.parametrize("how", ["", "compiled"])
def test_ranks_count_together(ranks: Ranks, tmp_path: Path, how: str) -> None:
    alone = shared(0)
    assert [removed > 0 for removed, _ in alone["epochs"]] == [False, True, False, True, False]
    for found in ranks(2, tmp_path / "store", shared, how):
        assert [removed for removed, _ in found["epochs"]] == [removed for removed, _ in alone["epochs"]]
        for (_, mine), (_, its) in zip(found["epochs"], alone["epochs"], strict=True):
            assert mine == pytest.approx(its, rel=1e-12)
        for name, tensor in alone["state"].items():
            torch.testing.assert_close(torch.tensor(found["state"][name]), torch.tensor(tensor), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_counts(backend: str) -> None:
    torch.compiler.reset()
    found = []
    for compiled in (False, True):
        graph, inputs = traced("residual")
        model: Any = copy.deepcopy(graph).requires_grad_().train()
        optimizer = SGD(model.parameters(), lr=0.05)
        model = torch.compile(model, backend=backend) if compiled else model
        session = Session(model, inputs, optimizer, [EAGER], progress=False)
        for _ in range(4):
            train(session, inputs, 2)
            counts = {name: [t.tolist() for t in pair] for name, pair in saved(session)["counts"].items()}
            found.append((counts, session.epoch_end().removed))
    assert found[:4] == found[4:]
    assert [removed > 0 for _, removed in found[:4]] == [False, True, False, True]


def test_accumulation_and_autocast() -> None:
    graph, inputs = traced("chain")
    model = copy.deepcopy(graph).float().requires_grad_().train()
    x = inputs[0].float()
    session = session_of(model, x, EAGER)
    for half in (x[:1], x[1:]):
        with torch.autocast("cpu", torch.bfloat16):
            session.model(half).float().square().mean().backward()
    counts = saved(session)["counts"]
    assert {pair[1].item() for pair in counts.values()} == {x[:, 0].numel(), x[:, 0].numel() // 4}
    session.optimizer.step()


# ------------------------------------------------------------------------------------------ new weights


def test_reinit_starts_again() -> None:
    pruner = ActivationDensity(1.0, 1, 1, 1.0, None, weights="reinit")
    session, inputs = begin("residual", steps=0, passes=[pruner])
    average = AveragedModel(session.model)
    session.register(average=average)
    before = copy.deepcopy(session.graph)
    plan = cut(session, inputs)
    assert session.optimizer.state == {}
    assert session.graph.get_buffer("0.1.running_mean").abs().max() == 0
    assert session.graph.get_buffer("0.1.num_batches_tracked") == 0
    _, param_map = fxprune.rewrite(before, fxprune.analyze(before, inputs), plan)
    for name, parameter in session.graph.named_parameters():
        assert not torch.equal(parameter, param_map.slice(name, before.get_parameter(name))), name
        assert torch.equal(parameter, average.module.get_parameter(name)), "copies start again too"
    weight = session.graph.get_parameter("1.conv1.0.weight")
    assert weight.abs().max() <= (weight[0].numel()) ** -0.5 * (1 + 1e-6), "within the bound of a new convolution"
    train(session, inputs, 2)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale = Identity(), nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale


def test_reinit_needs_layers_that_can() -> None:
    x = torch.randn(2, 6, 4, 4)
    with pytest.raises(
        PlanError, match='weights="reinit" can\'t start scale again: its module has no reset_parameters'
    ):
        session_of(Scaled().train(), x, ActivationDensity(weights="reinit"))
    session_of(Scaled().train(), x, ActivationDensity(weights="keep"))


# ------------------------------------------------------------------------------------------------ errors


def test_a_model_without_zeros_is_refused() -> None:
    x = torch.randn(2, 6, 4, 4)
    with pytest.raises(PlanError, match=r"finds nothing to resize: of 1 groups, 1 have no activation .* keep= holds 0"):
        session_of(Identity(F.gelu).train(), x)
    with pytest.raises(PlanError, match=r"of 1 groups, 0 have no activation that gives zeros .*, and keep= holds 1"):
        session_of(Identity().train(), x, ActivationDensity(keep="conv"))
    with pytest.raises(PlanError, match="keep='conf' matches no module"):
        session_of(Identity().train(), x, ActivationDensity(keep="conf"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"saturation": 0}, "saturation=0 must be a number above 0 and at most 1"),
        ({"saturation": "1"}, "saturation='1' must be a number"),
        ({"stop": 1.5}, r"stop=1\.5 must be a number above 0 and at most 1"),
        ({"stop": float("nan")}, "stop=nan must be a number"),
        ({"patience": 0}, "patience=0 must be a positive integer"),
        ({"cooldown": 2.5}, r"cooldown=2\.5 must be a positive integer"),
        ({"cuts": 0}, "cuts=0 must be a positive integer"),
        ({"minimum": True}, "minimum=True must be a positive integer"),
        ({"round_to": -8}, "round_to=-8 must be a positive integer"),
        ({"several": "sum"}, "several='sum' is not known; use 'max' or 'mean'"),
        ({"weights": "rescale"}, "weights='rescale' is not known; use 'keep' or 'reinit'"),
        ({"keep": 3}, "keep=3"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fxprune.FxpruneError, match=message):
        ActivationDensity(**options)
