"""Rewrites: FoldConstants, RemoveBranches, FoldBatchNorm and Align leave the function as it is, to 1e-10 in float64."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from laws import random_plan
from models import GRAPHS, MODELS, Residual, conv, conv_bn, head, image_net, prepare, randomize
from torch import Tensor, nn
from torch.optim import SGD

import fxprune
from fxprune import Pipeline, TracedModule
from fxprune.channels.interpret import bind_placeholders
from fxprune.errors import PassError, PlanError
from fxprune.graph.inputs import bind_inputs
from fxprune.graph.layers import BATCH_NORMS
from fxprune.graph.traced import Mode
from fxprune.passes import Align, FoldBatchNorm, FoldConstants, RemoveBranches
from fxprune.passes.rewrites._constants import Constants

BOTH = (False, True)


def resnet18() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = randomize(torchvision.models.resnet18(weights=None, num_classes=10), 0).double()
    return model, (torch.randn(2, 3, 64, 64, dtype=torch.float64),)


def made(name: str) -> tuple[nn.Module, Any]:
    return resnet18() if name == "resnet18" else prepare(MODELS[name])


def norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BATCH_NORMS) and module.affine]


@torch.no_grad()
def scale_by_zero(model: nn.Module, seed: int = 0) -> nn.Module:
    """A third of the scales of every batch norm is zero; the shifts are not."""
    draw = torch.Generator().manual_seed(seed)
    for norm in norms(model):
        norm.weight[torch.randperm(norm.num_features, generator=draw)[: max(1, norm.num_features // 3)]] = 0.0
    return model


def outputs(model: nn.Module, inputs: Any, mode: bool) -> list[Tensor]:
    args, kwargs = bind_inputs(inputs)
    model = copy.deepcopy(model).train(mode)
    torch.manual_seed(3)
    with torch.no_grad():
        leaves = torch.utils._pytree.tree_leaves(model(*args, **kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def assert_same(actual: nn.Module, expected: nn.Module, inputs: Any, modes: Any = BOTH) -> None:
    """The same outputs, without the help of the Pipeline."""
    for mode in modes:
        pairs = zip(outputs(actual, inputs, mode), outputs(expected, inputs, mode), strict=True)
        for output, expected_output in pairs:
            assert output.shape == expected_output.shape
            assert (output - expected_output).abs().max() <= 1e-10 * max(1.0, expected_output.abs().max().item())


def rewritten(rewrite: Any, model: nn.Module, inputs: Any, modes: Any = BOTH, changes: bool = True) -> TracedModule:
    """What a pass makes of a model, in a Pipeline and alone: the same, exact, and the model is untouched."""
    graph = fxprune.trace(model, inputs)
    before = copy.deepcopy(graph)
    result = Pipeline([rewrite], inputs)(graph)
    compact: TracedModule = result.graph_module
    assert result.modified == changes
    assert "example_inputs" not in compact.meta
    assert_same(compact, before, inputs, modes)
    for key, tensor in graph.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[key])
    return compact


def kept_names(compact: nn.Module, graph: nn.Module, new: str = "") -> None:
    """Every name of the rewritten model is one of the original's, but biases that are ``new``."""
    added = set(compact.state_dict()) - set(graph.state_dict())
    assert all(new and key.endswith(new) for key in added), added


def exported(compact: TracedModule, inputs: Any, path: Path) -> None:
    args, kwargs = bind_inputs(inputs)
    example = (tuple(a.float() if a.is_floating_point() else a for a in args), kwargs)
    fxprune.export_onnx(copy.deepcopy(compact).float(), example, path / "model.onnx")  # compares with onnxruntime


# --------------------------------------------------------------------------------------------- constants


@pytest.mark.parametrize("name", GRAPHS)
def test_what_is_called_constant_does_not_move(name: str) -> None:
    """The masks beside the values of other inputs: what they call constant is what it was, bit for bit or nearly."""
    model, inputs = prepare(MODELS[name])
    graph = fxprune.trace(scale_by_zero(model), inputs)
    for mode in Mode:
        run = Constants(graph, mode, inputs)
        values = {node.name: value for node, value in run.env.items() if isinstance(value, Tensor)}
        for seed in (1, 2):
            args, kwargs = bind_inputs(inputs)
            draw = torch.Generator().manual_seed(seed)
            changed = [a + torch.randn(a.shape, generator=draw) if a.is_floating_point() else a.flip(0) for a in args]
            again = Constants(graph, mode, (tuple(changed), kwargs))
            for node, value in again.env.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    still = run.varies[next(n for n in run.varies if n.name == node.name)] == 0
                    torch.testing.assert_close(value[still], values[node.name][still], rtol=1e-9, atol=1e-9)
    assert list(bind_placeholders(graph.graphs[Mode.EVAL], bind_inputs(inputs)))


def test_in_training_a_channel_varies_where_any_of_it_does() -> None:
    model = randomize(nn.Sequential(conv(3, 6, bias=True), nn.BatchNorm2d(6), nn.ReLU()), 0).double()
    inputs = (torch.randn(2, 3, 7, 7, dtype=torch.float64),)
    with torch.no_grad():
        model[0].weight[:, :, 1:] = 0.0  # so that the first row of the map reads the border alone
        model[0].weight[2] = 0.0
        model[1].weight[4] = 0.0
    for mode in Mode:
        run = Constants(fxprune.trace(model, inputs), mode, inputs)
        norm = next(mask for node, mask in run.varies.items() if node.name == "_1")
        expected = torch.ones(2, 6, 7, 7, dtype=torch.float64)
        expected[:, [2, 4]] = 0.0
        if mode is Mode.EVAL:
            expected[:, :, 0] = 0.0
        assert torch.equal(norm, expected)


# ----------------------------------------------------------------------------------------- fold constants

# Cases of which nothing can be folded: no batch norm, or something else reads its channels.
NOTHING = """only_linear conv_bias pools activations in_place merges grouped_input unfold tied_module tied_parameter
tied_decoder layer_norm_mlp rms_norm_mlp hand_rms_norm swiglu mixer mha_batch_first mha_batch_first_no_bias
mha_sequence_first mha_sequence_first_no_bias mha_post_norm mha_exact mha_masked mha_cross attention_matmul
attention_shape attention_sdpa attention_einsum attention_gqa attention_causal attention_channels vit swin
text_classifier tied_language_model keyword_input train_only_coupling dropout conv1d lstm_head lstm_only hrnet gru_head
attention_rotary linear_attention linear_attention_nonzero gpt_split""".split()


@pytest.mark.filterwarnings("ignore:FoldConstants leaves:UserWarning")
@pytest.mark.parametrize("name", [*GRAPHS, "resnet18"])
def test_channels_behind_a_scale_of_zero_go_in_both_modes(name: str) -> None:
    model, inputs = made(name)
    graph = fxprune.trace(scale_by_zero(model), inputs)
    compact = rewritten(FoldConstants(), graph, inputs, changes=name not in NOTHING)
    if name not in NOTHING:
        assert fxprune.cost.params(compact) < fxprune.cost.params(graph)
        kept_names(compact, graph, new=".bias")


class Net(nn.Module):
    """A convolution, an activation, and a layer that reads it."""

    def __init__(self, read: nn.Module, activation: Any = F.relu, last: Any = None, size: int = 6) -> None:
        super().__init__()
        self.conv, self.read, self.activation, self.last = nn.Conv2d(3, size, 3, padding=1), read, activation, last

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(self.activation(self.conv(x)))
        return x if self.last is None else self.last(x)


def net(read: nn.Module, bias: float, activation: Any = F.relu, last: Any = None, dead: Any = (1, 4)) -> Any:
    """With channels without weights, whose bias is ``bias`` and a little more from channel to channel."""
    model = randomize(Net(read, activation, last), 0).double()
    with torch.no_grad():
        for number, channel in enumerate(dead):
            model.conv.weight[channel] = 0.0
            model.conv.bias[channel] = bias + 0.1 * number * (bias != 0)
    return model, (torch.randn(2, 3, 7, 7, dtype=torch.float64),)


def test_a_relu_that_never_fires_takes_its_channel_along(tmp_path: Path) -> None:
    model, inputs = net(nn.Conv2d(6, 4, 3, padding=1), -0.5)
    compact = rewritten(FoldConstants(), model, inputs)
    assert compact.get_parameter("conv.weight").shape[0] == 4
    assert list(compact.state_dict()) == list(model.state_dict())
    assert torch.equal(compact.get_parameter("read.bias"), model.read.bias), "zero adds nothing, at the border too"
    exported(compact, inputs, tmp_path)
    fxprune.save(compact, tmp_path / "compact.safetensors")  # the plan describes it
    assert_same(fxprune.load(tmp_path / "compact.safetensors", model).double(), compact, inputs, [False])


@pytest.mark.parametrize("activation", [F.relu, F.silu, torch.tanh, nn.PReLU(6), nn.Identity()])
@pytest.mark.parametrize("mode", ["none", "reflect", "replicate", "valid", "1x1", "stride"])
def test_without_zeros_beyond_the_border_a_bias_does_it(mode: str, activation: Any, tmp_path: Path) -> None:
    kinds: dict[str, Callable[[], nn.Module]] = {
        "none": lambda: nn.Conv2d(6, 4, 3),
        "valid": lambda: nn.Conv2d(6, 4, 3, padding="valid", dilation=2),
        "1x1": lambda: nn.Conv2d(6, 4, 1),
        "stride": lambda: nn.Conv2d(6, 4, 3, stride=2),
    }
    make = kinds.get(mode, lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode=mode))
    model, inputs = net(make(), 0.7, activation)
    compact = rewritten(FoldConstants(), model, inputs)
    assert compact.get_parameter("conv.weight").shape[0] == 4
    assert list(compact.state_dict()) == list(model.state_dict())
    value = torch.stack([F.relu(torch.tensor(v)) for v in (0.7, 0.8)]).double()
    if activation is F.relu:
        added = (model.read.weight[:, [1, 4]].sum((2, 3)) * value).sum(1)
        torch.testing.assert_close(compact.get_parameter("read.bias"), model.read.bias + added)
    larger = (torch.randn(2, 3, 19, 13, dtype=torch.float64),)
    assert_same(compact, model, larger)


def test_past_zeros_beyond_the_border_one_channel_carries_the_others(tmp_path: Path) -> None:
    model, inputs = net(nn.Conv2d(6, 4, 3, padding=1), 0.7, dead=(1, 2, 4))
    compact = rewritten(FoldConstants(), model, inputs)
    assert compact.get_parameter("conv.weight").shape[0] == 4, "two of three"
    assert list(compact.state_dict()) == list(model.state_dict())
    assert torch.equal(compact.get_parameter("read.bias"), model.read.bias)
    carrier = next(c for c, row in enumerate(compact.get_parameter("conv.weight")) if not row.any())
    v = {1: 0.7, 2: 0.8, 4: 0.9}
    expected = sum(model.read.weight[:, c] * (v[c] / 0.9) for c in v)
    torch.testing.assert_close(compact.get_parameter("read.weight")[:, carrier], expected)
    for size in (1, 2, 5, 24):
        assert_same(compact, model, (torch.randn(2, 3, size, size, dtype=torch.float64),))
    exported(compact, inputs, tmp_path)


def test_a_constant_that_only_padding_would_see_is_no_constant_further_on() -> None:
    """At 1 x 1 no border of a padded convolution shows; still the next layer's channels are no constants."""
    model = randomize(nn.Sequential(conv(3, 6, bias=True), nn.ReLU(), conv(6, 5, bias=True), nn.ReLU(), conv(5, 2)), 0)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(0.5)
    compact = rewritten(FoldConstants(), model.double(), (torch.randn(2, 3, 1, 1, dtype=torch.float64),))
    assert compact.get_parameter("0.weight").shape[0] == 1
    assert compact.get_parameter("2.weight").shape[0] == 5
    assert_same(compact, model, (torch.randn(2, 3, 6, 6, dtype=torch.float64),))


def test_a_layer_without_a_bias_uses_the_norm_behind_it_or_gets_one(tmp_path: Path) -> None:
    model, inputs = net(nn.Conv2d(6, 4, 3, bias=False), 0.7, last=nn.BatchNorm2d(4))
    compact = rewritten(FoldConstants(), model, inputs)
    assert list(compact.state_dict()) == list(model.state_dict())
    assert not torch.equal(compact.get_buffer("last.running_mean"), model.last.running_mean)
    for trained in (model := copy.deepcopy(model).train(), compact.train()):  # and the average goes on as it would
        trained(*inputs)
    assert_same(compact, model, inputs)
    for last in (F.relu, nn.BatchNorm2d(4, track_running_stats=False)):
        model, inputs = net(nn.Conv2d(6, 4, 3, bias=False), 0.7, last=last)
        compact = rewritten(FoldConstants(), model, inputs)
        assert [*compact.state_dict()] == [*list(model.state_dict())[:3], "read.bias", *list(model.state_dict())[3:]]
        exported(compact, inputs, tmp_path)


def test_a_hook_may_do_anything() -> None:
    model, inputs = net(nn.Conv2d(6, 4, 1), 0.7, activation=nn.ReLU())
    loud = [1.0]
    model.activation.register_forward_hook(lambda module, args, output: output * loud[0])
    rewritten(FoldConstants(), model, inputs, changes=False)


def test_a_new_bias_trains_if_the_weights_do() -> None:
    for trains in (False, True):
        model, inputs = net(nn.Conv2d(6, 4, 1, bias=False), 0.7)
        compact = rewritten(FoldConstants(), model.requires_grad_(trains), inputs)
        assert compact.get_parameter("read.bias").requires_grad == trains


class ReadBy(nn.Module):
    def __init__(self, *readers: nn.Module) -> None:
        super().__init__()
        self.conv, self.readers = nn.Conv2d(3, 6, 1), nn.ModuleList(readers)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.conv(x))
        return [reader(x) for reader in self.readers]


def dead(model: Any, channels: list[int], bias: list[float]) -> Any:
    model = randomize(model, 0).double()
    with torch.no_grad():
        model.conv.weight[channels] = 0.0
        model.conv.bias[channels] = torch.tensor(bias, dtype=torch.float64)
    return model, (torch.randn(2, 3, 7, 7, dtype=torch.float64),)


def test_readers_of_every_kind_at_once() -> None:
    """A bias for one, a carrier for the other; and a channel that is zero needs neither."""
    model, inputs = dead(ReadBy(nn.Conv2d(6, 2, 3), nn.Conv2d(6, 3, 3, padding=1)), [0, 2, 5], [0.4, -1.0, 0.6])
    compact = rewritten(FoldConstants(), model, inputs)
    assert compact.get_parameter("conv.weight").shape[0] == 4
    assert not torch.equal(compact.get_parameter("readers.0.bias"), model.readers[0].bias)


@pytest.mark.parametrize(
    ("reader", "why"),
    [
        (lambda: nn.Conv2d(6, 4, 3, groups=2), "is grouped or transposed"),
        (lambda: nn.ConvTranspose2d(6, 4, 3), "is grouped or transposed"),
        (lambda: nn.Softmax(1), ""),
        (lambda: nn.GroupNorm(1, 6), ""),
    ],
)
def test_constants_that_something_else_reads_are_named(reader: Callable[[], nn.Module], why: str) -> None:
    model, inputs = dead(ReadBy(nn.Conv2d(6, 2, 1), reader()), [2, 5], [0.4, -1.0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compact = rewritten(FoldConstants(), model, inputs, changes=isinstance(model.readers[1], nn.ConvTranspose2d))
    said = [str(warning.message) for warning in caught if "FoldConstants" in str(warning.message)]
    if "transposed" in why:
        grouped = isinstance(model.readers[1], nn.Conv2d)  # of two groups: both lose a channel, or none does
        assert compact.get_parameter("conv.weight").shape[0] == (6 if grouped else 5)
        assert len(said) >= 1
        assert why in said[0]
        assert "conv" in said[0]


class Gram(ReadBy):
    """What is multiplied with itself is read by no layer there."""

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.conv(x))
        flat = x.flatten(2)
        return [self.readers[0](x), flat.transpose(1, 2) @ flat]


def test_constants_that_no_layer_reads_are_named() -> None:
    model, inputs = dead(Gram(nn.Conv2d(6, 2, 1)), [2, 5], [0.4, 0.6])
    graph = fxprune.trace(model, inputs)
    assert fxprune.analyze(graph, inputs).sizes == {"conv": 6}, "to the analysis they are channels like others"
    with pytest.warns(UserWarning, match="leaves 2 channels that hold a constant, of conv: matmul .* reads it"):
        assert not FoldConstants(example_inputs=inputs)(graph).modified


@pytest.mark.filterwarnings("ignore:FoldConstants leaves 3 .* shares its weights:UserWarning")
def test_layers_that_share_their_weights_carry_nothing() -> None:
    first, second = (nn.Conv2d(6, 3, 3, padding=1) for _ in range(2))
    second.weight = first.weight
    model, inputs = dead(ReadBy(first, second), [1, 2, 5], [0.4, 0.6, 0.5])
    rewritten(FoldConstants(), model, inputs, changes=False)


def test_a_group_of_constants_keeps_one() -> None:
    model, inputs = net(nn.Conv2d(6, 4, 1), -1.0, dead=range(6))
    compact = rewritten(FoldConstants(), model, inputs)
    assert compact.get_parameter("conv.weight").shape[0] == 1


def test_behind_a_norm_a_dead_channel_is_one_constant_in_training_and_another_in_eval() -> None:
    model = randomize(nn.Sequential(conv_bn(3, 6), conv(6, 4, 1, bias=True)), 0).double()
    with torch.no_grad():
        model[0][0].weight[[1, 4]] = 0.0
        model[0][1].bias[[1, 4]] = 0.5
    inputs = (torch.randn(2, 3, 7, 7, dtype=torch.float64),)
    rewritten(FoldConstants(), model, inputs, changes=False)
    compact = rewritten(FoldConstants(inference_only=True), model, inputs, [False])
    assert compact.get_parameter("0.0.weight").shape[0] == 4
    assert not torch.equal(compact.train()(*inputs), model.train()(*inputs))


def test_a_residual_stage_goes_where_all_of_it_is_constant() -> None:
    model = randomize(image_net(Residual(8, 8), Residual(8, 8)), 0).double()
    with torch.no_grad():
        for name in ("0.1", "1.bn", "2.bn"):
            model.get_submodule(name).weight[[2, 3]] = 0.0
            model.get_submodule(name).bias[[2, 3]] = 0.3
        model.get_submodule("1.bn").weight[5] = 0.0  # of one of three
    inputs = (torch.randn(2, 3, 8, 8, dtype=torch.float64),)
    compact = rewritten(FoldConstants(), model, inputs)
    assert fxprune.analyze(compact, inputs).sizes["0.0"] == 7, "one carries the other past padding"


# ---------------------------------------------------------------------------------------- remove branches


def with_silent_branches(name: str, how: str) -> tuple[nn.Module, Any]:
    model, inputs = made(name)
    with torch.no_grad():
        blocks = [m for m in model.modules() if hasattr(m, "conv2")]
        for number, block in enumerate(blocks):
            norm = getattr(block, "bn", None) if name != "resnet18" else block.bn2
            if how == "weights" or norm is None:
                block.conv2.weight.zero_()
            elif how == "scale":
                norm.weight.zero_()
            else:  # some channels this way, some that way
                norm.weight[::2] = 0.0
                block.conv2.weight[1::2] = 0.0
            if how == "small":
                norm.weight.fill_(1e-5)
                block.conv2.weight.fill_(0.3)
            if number % 3 == 2:  # this one does something
                block.conv2.weight.fill_(0.1)
                getattr(norm, "weight", block.conv2.weight).fill_(0.5)
    return model, inputs


BLOCKS = ["residual", "residual_projection", "pre_activation", "resnet18"]


@pytest.mark.parametrize("how", ["weights", "scale", "both"])
@pytest.mark.parametrize("name", BLOCKS)
def test_branches_that_add_a_constant_go(name: str, how: str, tmp_path: Path) -> None:
    model, inputs = with_silent_branches(name, how)
    graph = fxprune.trace(model, inputs)
    compact = rewritten(RemoveBranches(), graph, inputs)
    kept_names(compact, graph)
    gone = {key.rpartition(".")[0] for key in set(graph.state_dict()) - set(compact.state_dict())}
    assert any("conv1" in key for key in gone)
    assert not any(key.startswith(("fc", "head")) for key in gone)
    inner = copy.deepcopy(compact).train()
    for output in inner(*inputs) if isinstance(inner(*inputs), tuple) else [inner(*inputs)]:
        output.sum().backward()  # it trains
    exported(compact, inputs, tmp_path)


@pytest.mark.parametrize("name", GRAPHS)
def test_branches_that_add_something_stay(name: str) -> None:
    model, inputs = prepare(MODELS[name])
    rewritten(RemoveBranches(), model, inputs, changes=False)


def test_small_weights_count_as_zero_when_asked() -> None:
    model, inputs = with_silent_branches("residual", "small")
    rewritten(RemoveBranches(), model, inputs, changes=False)
    graph = fxprune.trace(model, inputs)
    pruner = RemoveBranches(threshold=1e-4)
    compact = Pipeline([pruner], inputs)(graph).graph_module  # compared with the reference
    alone = RemoveBranches(threshold=1e-4, example_inputs=inputs)
    assert_same(compact, alone.reference(graph), inputs)
    with pytest.raises(AssertionError):
        assert_same(compact, graph, inputs)
    assert not any("1.conv1" in key for key in compact.state_dict())


def test_a_single_convolution_is_a_branch_too_and_a_shared_one_is_none() -> None:
    class Plus(nn.Module):
        def __init__(self, twice: bool) -> None:
            super().__init__()
            self.stem, self.branch, self.head, self.twice = conv_bn(3, 6), conv_bn(6, 6)[:2], head(6), twice

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.branch(x)
            return self.head(self.branch(x) if self.twice else x)

    for twice in (False, True):
        model = randomize(Plus(twice), 0).double()
        nn.init.zeros_(model.branch[0].weight)
        inputs = (torch.randn(2, 3, 7, 7, dtype=torch.float64),)
        compact = rewritten(RemoveBranches(), model, inputs, changes=not twice)
        assert ("branch.0.weight" in compact.state_dict()) == twice
        assert "branch.1.bias" in compact.state_dict(), "its constant stays"


def test_a_branch_that_gives_the_sum_its_shape_stays() -> None:
    class Wider(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).mean((2, 3), keepdim=True) + self.b(x)

    model = randomize(Wider(), 0).double()
    nn.init.zeros_(model.b.weight)
    rewritten(RemoveBranches(), model, (torch.randn(2, 3, 7, 7, dtype=torch.float64),), changes=False)


def test_what_is_left_trains_in_a_session() -> None:
    model, inputs = with_silent_branches("residual", "scale")
    compact = RemoveBranches(example_inputs=inputs)(fxprune.trace(model, inputs)).graph_module
    optimizer = SGD(compact.parameters(), 1e-2, momentum=0.9)
    with fxprune.Session(compact.train(), inputs, optimizer, progress=False) as session:
        session.reconfigure(random_plan(session.analysis, 0))
        session.model(*inputs).sum().backward()
        optimizer.step()


# ---------------------------------------------------------------------------------------- fold batch norm


@pytest.mark.parametrize("name", [*GRAPHS, "resnet18"])
def test_norms_go_into_the_layers_before_them(name: str) -> None:
    model, inputs = made(name)
    graph = fxprune.trace(model, inputs)
    norms = [path for path, module in graph.named_modules() if type(module) in BATCH_NORMS]
    pairs = foldable(graph)
    compact = rewritten(FoldBatchNorm(), graph, inputs, [False], changes=bool(pairs))
    left = [path for path, module in compact.named_modules() if type(module) in BATCH_NORMS]
    assert sorted(set(norms) - set(left)) == sorted(pairs)
    kept_names(compact, graph, new=".bias")


def foldable(graph: TracedModule) -> list[str]:
    """Norms that alone, and once in each graph, follow a convolution or linear layer that is called there once."""
    paths = []
    nodes = [node for part in graph.distinct_graphs().values() for node in part.nodes]
    count = len(graph.distinct_graphs())
    for path, module in graph.named_modules():
        calls = [node for node in nodes if node.target == path and node.op == "call_module"]
        if (
            type(module) not in BATCH_NORMS
            or module.running_mean is None
            or len(calls) != count
            or len({str(node.args[0]) for node in calls}) != 1
        ):
            continue
        source = calls[0].args[0]
        before = graph.get_submodule(str(source.target)) if source.op == "call_module" else None
        plain = type(before) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear) or (
            type(before) is nn.ConvTranspose2d and before.groups == 1
        )
        once = sum(node.target == source.target for node in nodes) == count
        if plain and once and len(source.users) == 1 and "weight" in before._parameters:
            paths.append(path)
    return paths


def test_folded_norms_by_hand(tmp_path: Path) -> None:
    model, inputs = resnet18()
    compact = rewritten(FoldBatchNorm(), model, inputs, [False])
    assert not any(isinstance(module, BATCH_NORMS) for module in compact.modules())
    scale = model.bn1.weight / (model.bn1.running_var + model.bn1.eps).sqrt()
    torch.testing.assert_close(compact.get_parameter("conv1.weight"), model.conv1.weight * scale[:, None, None, None])
    torch.testing.assert_close(compact.get_parameter("conv1.bias"), model.bn1.bias - model.bn1.running_mean * scale)
    exported(compact, inputs, tmp_path)


def test_a_layer_that_something_else_reads_too_keeps_its_norm() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.norm(x) + x

    inputs = (torch.randn(2, 3, 7, 7, dtype=torch.float64),)
    rewritten(FoldBatchNorm(), randomize(Twice(), 0).double(), inputs, [False], changes=False)


def test_a_norm_over_another_axis_than_the_linear_layer_s_stays() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm, self.last = nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.fc(x)))

    model = randomize(Tokens(), 0).double()
    rewritten(FoldBatchNorm(), model, (torch.randn(3, 5, 5, dtype=torch.float64),), [False], changes=False)
    flat = (torch.randn(3, 5, dtype=torch.float64),)
    rewritten(FoldBatchNorm(), model, flat, [False])
    assert not FoldBatchNorm()(fxprune.trace(model, flat)).modified, "without an example nobody knows"


# ------------------------------------------------------------------------------------------------- align


@pytest.mark.parametrize("name", [*GRAPHS, "resnet18"])
def test_widths_grow_to_multiples(name: str, tmp_path: Path) -> None:
    model, inputs = made(name)
    graph = fxprune.trace(model, inputs)
    analysis = fxprune.analyze(graph, inputs)
    if analysis.groups:
        graph, _ = fxprune.rewrite(graph, analysis, random_plan(analysis, 1))
        graph.meta.pop("fxprune")  # Align makes another model, in which groups are found anew
    before = fxprune.analyze(graph, inputs).sizes
    result = Pipeline([Align(5)], inputs)(graph)
    compact = result.graph_module
    assert_same(compact, graph, inputs, [False] if MODELS.get(name) and MODELS[name].random else BOTH)
    after = fxprune.analyze(compact, inputs).sizes
    assert list(after) == list(before)
    assert all(after[key] in (size, size + -size % 5) for key, size in before.items())
    assert result.modified == (after != before)
    assert list(compact.state_dict()) == list(graph.state_dict())
    for key, tensor in graph.state_dict().items():  # the old values, then nothing
        wide = compact.state_dict()[key]
        assert wide.double().abs().sum() - tensor.double().abs().sum() == pytest.approx(
            (wide.numel() - tensor.numel()) * key.endswith("running_var"), abs=1e-6
        )
    if name in ("resnet18", "residual_projection", "depthwise_separable", "densenet", "vgg_flatten"):
        assert all(size % 5 == 0 for size in after.values())
        exported(compact, inputs, tmp_path)


def test_new_channels_stay_nothing_in_training() -> None:
    model, inputs = prepare(MODELS["residual"])
    compact = Pipeline([Align(16)], inputs)(fxprune.trace(model, inputs)).graph_module.train()
    twin = copy.deepcopy(model).train()
    optimizers = [SGD(trained.parameters(), 1e-2, momentum=0.9, weight_decay=1e-2) for trained in (compact, twin)]
    for _ in range(3):
        losses = []
        for trained, optimizer in zip((compact, twin), optimizers, strict=True):
            loss = trained(*inputs).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_auto_rounds_as_the_criteria_do() -> None:
    model, inputs = resnet18()
    graph = fxprune.trace(model, inputs)
    analysis = fxprune.analyze(graph, inputs)
    graph, _ = fxprune.rewrite(graph, analysis, random_plan(analysis, 1, least=40))
    compact = Pipeline([Align()], inputs)(graph).graph_module
    sizes = fxprune.analyze(compact, inputs).sizes.values()
    assert all(size % 16 == 0 for size in sizes if size >= 64)
    assert not Align(example_inputs=inputs)(compact).modified


# ---------------------------------------------------------------------------------------------- together


def test_all_of_them_in_a_row(tmp_path: Path) -> None:
    model, inputs = with_silent_branches("resnet18", "scale")
    graph = fxprune.trace(scale_by_zero(model), inputs)
    passes = [RemoveBranches(), FoldConstants(), FoldConstants(inference_only=True), Align(8), FoldBatchNorm()]
    pipeline = Pipeline(passes, inputs)
    compact = pipeline(graph).graph_module
    assert [step.name for step in pipeline.steps] == [type(step_pass).__name__ for step_pass in passes]
    assert all(step.difference <= 1e-12 for step in pipeline.steps)
    assert_same(compact, graph, inputs, [False])
    assert fxprune.cost.flops(compact, inputs) < fxprune.cost.flops(graph.eval(), inputs)
    exported(compact, inputs, tmp_path)


def test_weights_that_are_computed_are_rounded_to_the_model_s_precision() -> None:
    model, inputs = with_silent_branches("resnet18", "scale")
    model, inputs = scale_by_zero(model).float(), (inputs[0].float(),)
    pipeline = Pipeline([RemoveBranches(), Align(8), FoldConstants(inference_only=True), FoldBatchNorm()], inputs)
    compact = pipeline(fxprune.trace(model, inputs)).graph_module
    assert {parameter.dtype for parameter in compact.parameters()} == {torch.float32}
    exact, rounded = [step.difference for step in pipeline.steps[:2]], pipeline.steps[-1].difference
    assert max(exact) <= 1e-10 < rounded <= 1e-5

    class Wrong(FoldBatchNorm):
        def call(self, graph_module: Any) -> Any:
            result = super().call(graph_module)
            result.graph_module.get_parameter("conv1.bias").data.add_(1e-3)
            return result

    with pytest.raises(PassError, match=r"pass Wrong .* changed the outputs in eval mode by"):
        Pipeline([Wrong()], inputs)(fxprune.trace(model, inputs))


@pytest.mark.parametrize("kind", [FoldConstants, RemoveBranches, Align])
def test_example_inputs_are_needed(kind: Any) -> None:
    model, inputs = prepare(MODELS["chain"])
    graph = fxprune.trace(model, inputs)
    with pytest.raises(PassError, match="needs example inputs"):
        kind()(graph)
    with pytest.raises(PassError, match=rf"pass {kind.__name__} \(the first\) failed: PassError: this"):
        Pipeline([kind()])(graph)
    kind(example_inputs=inputs)(graph)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Align(0), "round_to=0 must be a positive integer, or 'auto'"),
        (lambda: Align(True), "round_to=True must be a positive integer"),
        (lambda: Align("16"), "round_to='16' must be a positive integer"),
        (lambda: RemoveBranches(-1.0), r"threshold=-1\.0 must be a number at least 0"),
        (lambda: RemoveBranches("small"), "threshold='small' must be a number"),
        (lambda: RemoveBranches(float("nan")), "threshold=nan must be a number"),
    ],
)
def test_bad_options(make: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()
