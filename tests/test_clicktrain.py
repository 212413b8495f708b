"""ClickTrain: what is chosen, beside choosing by loops; its phases; that it changes nothing else."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS, conv_bn, head, image_net, prepare, randomize
from ranks import Ranks
from runs import Thin, assert_equal, begin, snapshot, train
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam

import fxprune
from fxprune import Plan, Session
from fxprune.errors import PlanError
from fxprune.passes import ClickTrain
from fxprune.passes.training.clicktrain._patterns import choose_patterns, dynamic_pool, least_patterns, static_pool
from fxprune.training import distributed
from fxprune.training.memory import saved_values

NOW = ClickTrain(select=0, hard=1, kernels=0.5)
CORNERS = [{(r + i, c + j) for i in (0, 1) for j in (0, 1)} for r, c in ((1, 1), (1, 0), (0, 1), (0, 0))]


def step(session: Session, inputs: Any) -> None:
    """One step with the penalty in the loss."""
    task = session.model(*inputs).square().mean()
    session.optimizer.zero_grad()
    (task + session.penalty(task)).backward()
    session.optimizer.step()


def chosen(session: Session) -> dict[str, Any]:
    return saved_values(session.memories[0])


def masks(session: Session) -> dict[str, Tensor]:
    return {mask.layer.name: mask.gone for mask in session.memories[0].masks}


# ---------------------------------------------------------------------------------------------- what is chosen


@pytest.mark.parametrize("share", ["none", "input_channel", "filter"])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_pattern_keeps_the_most_importance(share: str, groups: int) -> None:
    torch.manual_seed(groups)
    importance, pool = torch.rand(6, 6 // groups, 3, 3), static_pool("static8")
    kept = (importance[:, :, None] * pool).sum((3, 4))  # [filter, kernel, pattern]
    found = choose_patterns(importance, pool, share, groups)
    for o, i in itertools.product(range(6), range(6 // groups)):
        group = o * groups // 6
        mine = range(group * 6 // groups, (group + 1) * 6 // groups)
        together = {"none": kept[o, i], "input_channel": kept[mine, i].sum(0), "filter": kept[o].sum(0)}[share]
        assert found[o, i] == together.argmax()


def test_the_first_four_patterns_are_the_corners() -> None:
    pools = {name: static_pool(name) for name in ("static4", "static8", "static12")}
    assert [len(pool) for pool in pools.values()] == [4, 8, 12]
    for pool in pools.values():
        assert [{tuple(tap) for tap in pattern.nonzero().tolist()} for pattern in pool[:4]] == CORNERS
        assert (pool.sum((1, 2)) == 4).all()
        assert len(pool.flatten(1).unique(dim=0)) == len(pool)
    centre = pools["static12"][:, 1, 1]
    assert [number + 1 for number, has in enumerate(centre) if not has] == [5, 10, 11, 12]


def test_a_dynamic_pool_has_what_most_kernels_choose() -> None:
    torch.manual_seed(0)
    layers = [torch.rand(5, 4, 3, 3), torch.rand(3, 5, 3, 3)]
    layers[0][:, :3] += 5 * static_pool("static12")[4]  # fifteen of one, and eight of another
    layers[1][0:2, :4] += 5 * static_pool("static12")[8]
    counts: dict[tuple[int, ...], int] = {}
    for kernel in torch.cat([each.flatten(0, 1).flatten(1) for each in layers]).tolist():
        best = tuple(sorted(sorted(range(9), key=lambda tap: -kernel[tap])[:4]))
        counts[best] = counts.get(best, 0) + 1
    ranked = sorted(counts, key=lambda taps: (-counts[taps], taps))
    pool = dynamic_pool(layers, 3)
    assert [tuple(each.flatten().nonzero().flatten().tolist()) for each in pool] == ranked[:3]
    assert torch.equal(pool[0], static_pool("static12")[4])
    assert len(dynamic_pool(layers, 126)) == len(counts)


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.55, 55), (0.551, 56), (0.07, 7), (0.29, 29)])
def test_exactly_so_many_kernels_go(fraction: float, count: int) -> None:
    importance = torch.rand(10, 10, 3, 3)
    gone = least_patterns(importance, fraction)
    assert int(gone.sum()) == count == math.ceil(round(fraction * 100, 6))
    sums = importance.sum((2, 3))
    assert count == 0 or sums[gone].max() <= sums[~gone].min()
    assert least_patterns(torch.zeros(2, 2, 1, 1), 0.5).tolist() == [[True, True], [False, False]], (
        "the first of equals"
    )


@pytest.mark.parametrize("share", ["none", "input_channel", "filter"])
def test_the_choice_is_made_from_one_batch(share: str) -> None:
    pruner = ClickTrain(select=0, hard=2, kernels=0.3, share=share)
    session, inputs = begin("residual", steps=0, passes=[pruner])
    before = {name: p.detach().clone() for name, p in session.graph.named_parameters()}
    assert session.penalty(session.model(*inputs).mean()) == 0, "the first batch has the plain loss"
    alone = copy.deepcopy(session.graph)
    alone(*inputs).square().mean().backward()
    step(session, inputs)
    layers = chosen(session)["removed"]
    assert set(layers) == {name for name, p in before.items() if p.ndim == 4} - {"0.0.weight"}
    for name in layers:
        importance = (before[name] * alone.get_parameter(name).grad).square()
        assert torch.equal(chosen(session)["removed"][name], least_patterns(importance, 0.3))
        assert torch.equal(chosen(session)["pattern"][name], choose_patterns(importance, static_pool("static4"), share))


def test_several_batches_are_added_up() -> None:
    session, inputs = begin("residual", steps=0, passes=[ClickTrain(select=0, hard=1, batches=3)])
    total = torch.zeros(())
    for number in range(3):
        assert "removed" not in chosen(session), number
        alone = copy.deepcopy(session.graph)
        alone(*inputs).square().mean().backward()
        weight: Any = alone.get_parameter("1.conv2.weight")
        total = total + (weight.detach() * weight.grad).square()
        step(session, inputs)
    assert torch.equal(
        chosen(session)["pattern"]["1.conv2.weight"], choose_patterns(total, static_pool("static4"), "none")
    )
    assert "importance" not in chosen(session)


def test_gradients_that_overflowed_choose_nothing() -> None:
    session, inputs = begin("residual", steps=0, passes=[NOW])
    (session.model(*inputs).square().mean() * math.inf).backward()
    session.optimizer.step()
    assert "removed" not in chosen(session)


def test_a_step_without_gradients_chooses_nothing() -> None:
    session, inputs = begin("residual", steps=0, passes=[NOW])
    session.optimizer.step()
    assert "removed" not in chosen(session)
    step(session, inputs)
    assert chosen(session)["removed"]


def test_half_precision_does_not_choose() -> None:
    torch.manual_seed(0)
    importance, pool = torch.rand(6, 6, 3, 3) * 1e-8, static_pool("static12")
    expected = choose_patterns(importance, pool, "none")
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(choose_patterns(importance, pool, "none"), expected)
    assert len(expected.unique()) > 4


# --------------------------------------------------------------------------------------------- which layers


class Mixed(nn.Module):
    """A convolution of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = conv_bn(3, 8), nn.Conv2d(8, 8, 5, padding=2)
        self.depthwise, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.grouped, self.shortcut = nn.Conv2d(8, 8, 3, padding=1, groups=2), conv_bn(8, 8, 1)
        self.up, self.frozen = nn.ConvTranspose2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.frozen.requires_grad_(False)
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        inner = self.grouped(self.point(self.depthwise(self.wide(x))))
        return self.head(self.frozen(self.up(inner + self.shortcut[1](self.shortcut[0](x)))))


def mixed(**options: Any) -> tuple[Session, Any]:
    torch.manual_seed(0)
    model, inputs = Mixed().double(), [torch.randn(4, 3, 8, 8, dtype=torch.float64)]
    optimizer = SGD((p for p in model.parameters() if p.requires_grad), 0.01, momentum=0.9)
    session = Session(model, tuple(inputs), optimizer, [ClickTrain(**options)], progress=False)
    return session, inputs


def test_each_layer_is_pruned_by_its_kind() -> None:
    session, inputs = mixed(select=0, hard=1, kernels=0.5)
    step(session, inputs)
    assert set(chosen(session)["pattern"]) == {"depthwise.weight", "grouped.weight"}
    gone = {name: int(removed.sum()) for name, removed in chosen(session)["removed"].items()}
    assert gone == {"wide.weight": 32, "depthwise.weight": 0, "point.weight": 32, "grouped.weight": 16}


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        ((0.25, 0.75), {"wide": 16, "point": 32, "grouped": 24}),
        ({"wide": 0.5, "g*": 0.25}, {"wide": 32, "grouped": 8}),
        (0.0, {"grouped": 0}),
    ],
)
def test_fractions_by_depth_and_by_name(kernels: Any, expected: dict[str, int]) -> None:
    session, inputs = mixed(select=0, hard=1, kernels=kernels, keep=["depthwise"])
    step(session, inputs)
    gone = {name: int(removed.sum()) for name, removed in chosen(session)["removed"].items()}
    assert gone == {f"{name}.weight": count for name, count in expected.items()}


# ------------------------------------------------------------------------------------------------- its phases


def test_before_the_choice_it_is_the_plain_run() -> None:
    pruned, inputs = begin("residual", steps=0, passes=[ClickTrain(select=2, hard=3)])
    plain = copy.deepcopy(pruned.graph)
    optimizer = type(pruned.optimizer)(plain.parameters(), **pruned.optimizer.defaults)
    for _ in range(2):
        for _ in range(3):
            step(pruned, inputs)
            optimizer.zero_grad()
            plain(*inputs).square().mean().backward()
            optimizer.step()
        pruned.epoch_end()
    assert_equal("weights", dict(pruned.graph.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("make", [lambda p: SGD(p, 0.01, momentum=0.9, weight_decay=0.1), Adam])
@pytest.mark.parametrize("pool", ["static4", "static12", "dynamic"])
def test_what_is_gone_stays_gone(make: Any, pool: str) -> None:
    pruner = ClickTrain(select=1, hard=2, kernels=0.4, pool=pool, patterns=5, strength=1e-2)
    session, inputs = begin("residual", make, steps=0, passes=[pruner])
    shapes = {name: tensor.shape for name, tensor in session.graph.state_dict().items()}
    for epoch in range(4):
        for _ in range(2):
            step(session, inputs)
        if epoch >= 1:
            before = {name: mask.clone() for name, mask in masks(session).items()}
        for name, gone in masks(session).items() if epoch >= 2 else ():
            weight = session.graph.get_parameter(name)
            assert weight.abs()[gone].max() == 0
            assert (weight.flatten(2) != 0).sum(2).max() <= 4
            state = session.optimizer.state[weight]
            tensors = [value for value in state.values() if value.shape == weight.shape]
            assert tensors
            assert all(value[gone].abs().max() == 0 and value[~gone].abs().min() > 0 for value in tensors)
            assert weight.grad is not None
            assert weight.grad[gone].abs().max() == 0
        session.epoch_end()
    assert_equal("masks", masks(session), before)
    assert {name: tensor.shape for name, tensor in session.graph.state_dict().items()} == shapes


def test_the_penalty_is_the_papers() -> None:
    session, inputs = begin("residual", steps=0, passes=[ClickTrain(select=0, hard=2, kernels=0.3, strength=0.1)])
    step(session, inputs)
    total = 0.0
    gradients: dict[str, Tensor] = {}
    for name, removed in chosen(session)["removed"].items():
        weight = session.graph.get_parameter(name).detach()
        gradient = torch.zeros_like(weight)
        for o, i in itertools.product(*map(range, removed.shape)):
            pattern = static_pool("static4")[int(chosen(session)["pattern"][name][o, i])]
            for part in (~pattern, torch.full((3, 3), bool(removed[o, i]))):
                norm = math.sqrt((weight[o, i] * part).square().sum() + 1e-8)
                total += 0.1 * norm
                gradient[o, i] += 0.1 * weight[o, i] * part / norm
        gradients[name] = gradient
    penalty = session.penalty(torch.ones(()))
    assert penalty.item() == pytest.approx(total, rel=1e-12)
    session.optimizer.zero_grad()
    penalty.backward()
    for name, gradient in gradients.items():
        found = session.graph.get_parameter(name).grad
        assert found is not None
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-15)
        assert (found[~masks(session)[name]] == 0).all(), "what stays is not penalised"


def test_the_penalty_alone_makes_what_goes_smaller() -> None:
    session, inputs = begin("residual", lambda p: SGD(p, 1e-2), passes=[ClickTrain(select=0, hard=2, strength=0.05)])
    name, gone = next(iter(masks(session).items()))
    weight, norms = session.graph.get_parameter(name), list[float]()
    kept = weight.detach()[~gone].clone()
    for _ in range(6):
        session.optimizer.zero_grad()
        session.penalty(torch.ones(())).backward()
        session.optimizer.step()
        norms.append(float(weight.detach()[gone].norm()))
    assert norms == sorted(norms, reverse=True)
    assert torch.equal(weight.detach()[~gone], kept)
    del inputs


def test_the_compression_is_the_papers() -> None:
    session, inputs = begin("residual", steps=0, passes=[NOW])
    step(session, inputs)
    record = session.epoch_end()
    weights = {name: p.numel() for name, p in session.graph.named_parameters() if p.ndim == 4}
    first = weights.pop("0.0.weight")
    expected = (first + sum(weights.values())) / (first + sum(each * 0.5 / 2.25 for each in weights.values()))
    assert record.values["compression"] == pytest.approx(expected)


# ---------------------------------------------------------------------------------- cuts, files, checkpoints, ranks


def test_a_cut_takes_patterns_along() -> None:
    session, inputs = begin("residual", steps=0, passes=[ClickTrain(select=0, hard=1, kernels=0.3), Thin(interval=2)])
    step(session, inputs)
    session.epoch_end()
    step(session, inputs)
    before = {name: (session.graph.get_parameter(name).detach().clone(), gone) for name, gone in masks(session).items()}
    plan = Plan({name: tuple(range(1, size)) for name, size in session.analysis.sizes.items()}, session.analysis.sizes)
    param_map = session.reconfigure(plan)
    for name, gone in masks(session).items():
        assert torch.equal(gone, param_map.slice(name, before[name][1]))
        assert torch.equal(session.graph.get_parameter(name), param_map.slice(name, before[name][0]))
    step(session, inputs)
    for name, gone in masks(session).items():
        assert session.graph.get_parameter(name).detach()[gone].abs().max() == 0


def test_a_pattern_of_names_may_lose_its_layers_to_a_cut(tmp_path: Path) -> None:
    pruner = ClickTrain(select=0, hard=1, kernels={"1": 0.5, "2": 0.5}, keep=["1.conv2"])
    session, inputs = begin("residual", steps=0, passes=[pruner])
    step(session, inputs)
    group = "1.conv1.0"
    session.reconfigure(Plan({group: ()}, session.analysis.sizes, session.analysis.options, [group]))
    step(session, inputs)
    assert not any(name.startswith("1.") for name in masks(session))
    session.optimizer.zero_grad()
    session.save(tmp_path / "run.pt")
    other, _ = begin("residual", steps=0)
    other.close()
    again = Session.load(tmp_path / "run.pt", other.graph, inputs, other.optimizer, progress=False)
    assert masks(again).keys() == masks(session).keys()


def test_channels_without_kernels_can_be_cut() -> None:
    model = randomize(image_net(conv_bn(8, 8)), 0).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    optimizer = SGD(model.parameters(), 0.01)
    session = Session(model, x, optimizer, [ClickTrain(select=0, hard=1, kernels=0.9)], progress=False)
    for _ in range(2):
        step(session, [x])
        session.epoch_end()
    keep = {}
    for name, group in session.analysis.groups.items():
        sums = torch.zeros(group.size)
        for member in group.members:
            weight = session.graph.state_dict()[member.parameter]
            if member.axis == 1 and weight.ndim == 4:
                sums[torch.from_numpy(member.channel)] += weight.abs().sum((0, 2, 3))[torch.from_numpy(member.index)]
        if (sums == 0).any() and (sums > 0).any():
            keep[name] = tuple(sums.nonzero().flatten().tolist())
    assert keep, "some channel is read by no kernel any more"
    session.graph.eval()
    expected = session.graph(x)
    session.reconfigure(Plan(keep, session.analysis.sizes, session.analysis.options))
    torch.testing.assert_close(session.graph(x), expected, rtol=1e-10, atol=1e-10)


def test_files_have_what_is_not_zero_and_load_bit_for_bit(tmp_path: Path) -> None:
    session, inputs = begin("residual", steps=0, passes=[ClickTrain(select=0, hard=1, kernels=0.5)])
    fxprune.save(session.graph, tmp_path / "dense.safetensors")
    step(session, inputs)
    session.epoch_end()
    step(session, inputs)
    fxprune.save(session.graph, tmp_path / "sparse.safetensors")
    loaded = fxprune.load(tmp_path / "sparse.safetensors", copy.deepcopy(session.graph))
    assert_equal("weights", dict(loaded.state_dict()), dict(session.graph.state_dict()))
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("dense", "sparse")]
    weights = sum(gone.numel() for gone in masks(session).values())
    kernels = weights // 9
    saved = sum(int(gone.sum()) for gone in masks(session).values()) * 8 - kernels
    assert abs(sizes[0] - sizes[1] - saved) < 0.1 * sizes[0], "eight bytes a weight, less one a kernel"


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_run_goes_on_from_a_checkpoint(epochs: int, tmp_path: Path) -> None:
    def go(session: Session, inputs: Any, count: int) -> None:
        for _ in range(count):
            for _ in range(2):
                step(session, inputs)
            session.epoch_end()

    pruner = ClickTrain(select=1, hard=2, kernels=(0.2, 0.6), strength=1e-2)
    session, inputs = begin("residual", steps=0, passes=[pruner])
    model = copy.deepcopy(session.graph)
    go(session, inputs, epochs)
    session.save(tmp_path / "run.pt")
    optimizer = type(session.optimizer)(model.parameters(), **session.optimizer.defaults)
    again = Session.load(tmp_path / "run.pt", model, inputs, optimizer, progress=False)
    assert again.passes == (pruner,)
    go(session, inputs, 4 - epochs)
    go(again, inputs, 4 - epochs)
    one, other = snapshot(again), snapshot(session)
    assert_equal("state", one["state"], other["state"])
    assert_equal("momentum", one["optimizer"]["state"], other["optimizer"]["state"])


def on_rank(rank: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model: nn.Module = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), head(8)), 0).double()
    x = torch.randn(8, 3, 10, 10, dtype=torch.float64)
    model = DistributedDataParallel(model) if distributed.count_ranks() > 1 else model
    session = Session(model, x[:2], SGD(model.parameters(), 0.01), [NOW], progress=False)
    mine = x[distributed.own_rank() :: distributed.count_ranks()]
    for _ in range(2):
        step(session, [mine])
        session.epoch_end()
    return {name: tensor.clone() for name, tensor in session.graph.state_dict().items()}


def test_ranks_choose_together(ranks: Ranks, tmp_path: Path) -> None:
    found = ranks(2, tmp_path / "store", on_rank)
    assert_equal("ranks", found[0], found[1])
    alone = on_rank(0)
    assert all(torch.equal(alone[name] == 0, tensor == 0) for name, tensor in found[0].items())


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": -1}, r"select=-1 must be an integer of at least 0"),
        ({"hard": 0.5}, r"hard=0.5 must be a positive integer"),
        ({"select": 3, "hard": 3}, r"hard=3 must come after select=3"),
        ({"strength": -1.0}, r"strength=-1.0 must be a number at least 0"),
        ({"share": "layer"}, r"share='layer' is not known; use 'none', 'input_channel' or 'filter'"),
        ({"pool": "static5"}, r"pool='static5' is not known; use 'static4', .*'dynamic'"),
        ({"patterns": 127}, r"patterns=127 must be a count from 1 to 126"),
        ({"kernels": 1.0}, r"kernels=1.0 must be a fraction from 0 up to 1"),
        ({"kernels": (0.1, 0.2, 0.3)}, r"kernels=\(0.1, 0.2, 0.3\) must be"),
        ({"kernels": None}, r"kernels=None must be"),
        ({"kernels": {"a": 2}}, r"kernels=\{'a': 2\} must be"),
        ({"batches": True}, r"batches=True must be a positive integer"),
        ({"keep": 3}, r"keep=3 must be a list of names"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        ClickTrain(**options)


def test_names_that_match_nothing_and_models_without_convolutions() -> None:
    with pytest.raises(PlanError, match="'layer9' matches no convolution of this model"):
        begin("residual", passes=[ClickTrain(keep=["layer9"])])
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(PlanError, match="ClickTrain finds no layer to prune"):
        Session(model, torch.zeros(2, 4), SGD(model.parameters(), 0.1), [ClickTrain()], progress=False)


def test_a_session_that_never_calls_penalty_still_prunes() -> None:
    session, inputs = begin("residual", steps=0, passes=[NOW])
    for _ in range(2):
        train(session, inputs)
        session.epoch_end()
    assert all(
        session.graph.get_parameter(name).detach()[gone].abs().max() == 0 for name, gone in masks(session).items()
    )


@pytest.mark.parametrize("name", ["shared_conv", "repvgg", "c2f", "shufflenet", "siamese", "steered_cat_in_python"])
def test_models_of_all_kinds(name: str, tmp_path: Path) -> None:
    session, inputs = begin(name, steps=0, passes=[NOW])
    for _ in range(3):
        train(session, inputs)
        session.epoch_end()
    assert masks(session)
    for weight, gone in masks(session).items():
        assert session.graph.get_parameter(weight).detach()[gone].abs().max() == 0
    fxprune.save(session.graph, tmp_path / "model.safetensors")
    model, _ = prepare(MODELS[name])
    loaded = fxprune.load(tmp_path / "model.safetensors", model)
    assert_equal("weights", dict(loaded.state_dict()), dict(session.graph.state_dict()))
