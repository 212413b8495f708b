"""Slim: the user's class comes back with the weights of the compact graph, equal to it, or is refused by its line."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision.models as zoo
from models import randomize
from torch import Tensor, nn

import fxprune
from fxprune import Budget, passes
from fxprune.errors import RewriteError
from fxprune.graph.traced import Mode
from fxprune.rewrite.verify import relative_difference

EXACT = 1e-10
HALF = Budget(channels=0.5)


def cut(model: nn.Module, example: Any, criterion: Any = None, **options: Any) -> Any:
    """A compact graph of ``model``, in float64."""
    model.double()
    graph = fxprune.trace(model, example)
    analysis = fxprune.analyze(graph, example, **options)
    return fxprune.rewrite(graph, analysis, (criterion or passes.Random(0)).plan(analysis, HALF))[0]


def outcome(model: nn.Module, mode: Mode, x: Tensor) -> list[Tensor]:
    """The output of a copy of ``model`` in one mode, and the gradients of its parameters."""
    model = copy.deepcopy(model).train(mode.training)
    torch.manual_seed(0)
    output = model(x)
    output.square().sum().backward()
    return [output, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def assert_same(model: nn.Module, compact: nn.Module, x: Tensor) -> None:
    """Both give the same in both modes, with the same gradients."""
    for mode in Mode:
        outputs, expected = outcome(model, mode, x), outcome(compact, mode, x)
        assert len(outputs) == len(expected) > 1
        assert max(map(relative_difference, outputs, expected)) < EXACT


class Attention(nn.Module):
    """Sizes in attributes, in a tuple, and in an object."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.half = heads, width // heads, width // 2
        self.parts = (width, width, width)
        self.config = SimpleNamespace(width=width, layers=[width, 2 * width], name="attention")
        self.embed, self.qkv, self.out = nn.Linear(6, width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x))
        assert x.shape[-1] == self.config.width
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.qkv(x).split(self.parts, -1)
        )
        scores = (q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)).softmax(-1)
        x = x + self.out((scores @ v).transpose(1, 2).reshape(*x.shape[:2], self.num_heads * self.head_dim))
        hidden = self.up(x).view(-1, self.config.layers[1]).relu()
        return self.head(x + self.down(hidden).view(x.shape))

    def predict(self, x: Tensor) -> Tensor:
        return self(x).argmax(-1)


def test_own_class() -> None:
    """Each attribute that the forward takes a size from says the new one; the others stay."""
    model, x = Attention(), torch.randn(2, 7, 6, dtype=torch.float64)
    compact = cut(model, x, passes.Uniform())
    small = fxprune.slim(model, compact, x)
    assert [type(small), type(small.qkv)] == [Attention, nn.Linear]
    assert_same(small, compact, x)
    width, inner = small.embed.out_features, small.out.in_features
    assert [small.norm.normalized_shape, small.config.width] == [(width,), width]
    assert [small.num_heads * small.head_dim, small.head_dim] == [inner, model.head_dim]
    assert [small.parts, small.config.layers] == [(inner,) * 3, [16, small.up.out_features]]
    assert max(width, inner) < 16
    assert (small.half, small.config.name) == (8, "attention")
    assert torch.equal(small.predict(x), compact(x).argmax(-1))
    assert (model.num_heads, model.parts, model.config.width, model.config.layers) == (4, (16,) * 3, 16, [16, 32])


def build_vit() -> nn.Module:
    return zoo.VisionTransformer(image_size=32, patch_size=16, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64)


def build_swin() -> nn.Module:
    return zoo.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=10)


def build_regnet() -> nn.Module:
    params = zoo.regnet.BlockParams([1, 2], [16, 32], [8, 8], [1.0, 1.0], [2, 2], se_ratio=0.25)
    return zoo.RegNet(params, num_classes=10, stem_width=8)


IMAGES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "resnet18": (zoo.resnet18, passes.Random(0)),
    "mobilenet_v3_small": (zoo.mobilenet_v3_small, passes.Random(0)),
    "regnet": (build_regnet, passes.Random(0)),
    "vit": (build_vit, passes.Uniform()),
    "swin": (build_swin, passes.Uniform()),
}


@pytest.mark.parametrize("name", IMAGES)
def test_torchvision(name: str) -> None:
    """The classes of torchvision work on, in both modes; transformers where every width is cut alike."""
    build, criterion = IMAGES[name]
    model, x = randomize(build()), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    compact = cut(model, x, criterion)
    small = fxprune.slim(model, compact, x)
    assert type(small) is type(model)
    assert_same(small, compact, x)
    assert sum(p.numel() for p in small.parameters()) < 0.5 * sum(p.numel() for p in model.parameters())
    assert [*small.state_dict()] == [*model.state_dict()]


def test_tensors_are_those_of_the_graph() -> None:
    """So an optimizer that went along with the cut trains the class: a step of it is a step of the graph."""
    model, x = Attention().double(), torch.randn(2, 7, 6, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).square().sum().backward()
    optimizer.step()
    graph = fxprune.trace(model, x)
    analysis = fxprune.analyze(graph, x)
    compact, param_map = fxprune.rewrite(graph, analysis, passes.Uniform().plan(analysis, HALF))
    param_map.migrate(optimizer)
    small = fxprune.slim(model, compact, x)
    parameters, expected = dict(small.named_parameters()), dict(compact.named_parameters())
    assert all(parameters[name] is expected[name] for name in expected)
    before = small(x)
    before.square().sum().backward()
    optimizer.step()
    assert relative_difference(small(x), before) > 1e-3
    assert relative_difference(small(x), compact(x)) < EXACT


def test_after_training_and_a_second_cut() -> None:
    """Any model of the class will do for the sizes; the weights are those that the graph has now."""
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    compact = cut(Attention(), x, passes.Uniform())
    with torch.no_grad():
        compact.embed.weight.add_(1)
    again = cut(compact, x, passes.Uniform())
    small = fxprune.slim(Attention().double(), again, x)
    assert small.embed.out_features < compact.embed.out_features < 16
    assert_same(small, again, x)


class Written(nn.Module):
    """A size, 24 of 32 channels after the cut, in a call of its own ``way``."""

    def __init__(self, way: Callable[["Written", Tensor], Tensor]) -> None:
        super().__init__()
        self.way, self.width, self.quarter, self.four = way, 32, 8, 4
        self.before, self.after = nn.Linear(6, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.way(self, self.before(x).tanh()))


def cut_written(way: Callable[[Written, Tensor], Tensor]) -> tuple[Written, Any, Tensor]:
    """A model, its compact graph without the last quarter of the channels, and an example."""
    model, x = Written(way).double(), torch.randn(8, 6, dtype=torch.float64)
    graph = fxprune.trace(model, x)
    analysis = fxprune.analyze(graph, x)
    plan = fxprune.Plan(
        {name: range(max(3 * size // 4, 1)) for name, size in analysis.sizes.items()}, analysis.sizes, analysis.options
    )
    return model, fxprune.rewrite(graph, analysis, plan)[0], x


WAYS: dict[str, Callable[[Written, Tensor], Tensor]] = {
    "alone": lambda net, x: x.view(-1, net.width),
    "in a tuple": lambda net, x: x.view((-1, net.width)),
    "sum": lambda net, x: x.view(-1, 5 + net.width - 5),
    "difference": lambda net, x: x.view(-1, 100 - (100 - net.width)),
    "product": lambda net, x: x.view(-1, 2 * (net.width // 2)),
    "four times": lambda net, x: x.view(-1, net.quarter * 4),
    "times a size": lambda net, x: x.view(-1, len(x) * net.width // len(x)),
    "quotient": lambda net, x: x.view(-1, 96 // (96 // net.width)),
    "negative": lambda net, x: x[:, -net.width :],
    "slice": lambda net, x: x[:, : net.width],
    "parts": lambda net, x: torch.cat(x.split(net.width, 1), 1),
    "all parts": lambda net, x: torch.cat(x.split([net.width, 0], 1), 1),
    "number of parts": lambda net, x: torch.cat(x.chunk(net.four, 1), 1),
    "check": lambda net, x: x if x.shape[1] == net.width else x[:, :1],
    "two, of which one is checked": lambda net, x: x.view(-1, net.quarter * net.four) if net.four == 4 else x,
    "only in train mode": lambda net, x: x.view(-1, net.width) if net.training else x,
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_write_a_size(way: str) -> None:
    """What Python computes from an attribute is solved for it."""
    model, compact, x = cut_written(WAYS[way])
    small = fxprune.slim(model, compact, x)
    assert_same(small, compact, x)
    assert (small.width, small.quarter, small.four) in [(24, 8, 4), (32, 6, 4), (32, 8, 4)]
    assert small.before.out_features == small.after.in_features == 24


REFUSED: dict[str, tuple[Callable[[Written, Tensor], Tensor], str]] = {
    "baked": (
        lambda net, x: x.view(-1, 2, 16).flatten(1),
        r"view\(-1, 2, 16\).*it has \d+ where the compact graph has",
    ),
    "root": (
        lambda net, x: x.view(-1, net.width) / math.sqrt(net.width),
        r"at truediv \(.*test_slim.py:\d+: `.*math.sqrt.*`\) it has 4.89\d+ where the compact graph has 5.65\d+. With",
    ),
    "of the shape": (lambda net, x: x / x.shape[1], r"x / x.shape\[1\].* it has 24 where the compact graph has 32"),
    "two unknown": (lambda net, x: x.view(-1, net.quarter * net.four), "it has 32 where the compact graph has 24"),
    "twice": (lambda net, x: x.view(-1, net.width * net.width // 32), "has 32 where the compact graph has 24"),
    "times nothing": (lambda net, x: x.view(-1, 24 + 8 + 0 * net.width), "has 32 where the compact graph has 24"),
    "remainder": (lambda net, x: x.view(-1, 32 + net.width % 32), "has 32 where the compact graph has 24"),
    "one for two": (
        lambda net, x: torch.cat([x.view(-1, net.width)[:, net.width - 8 :], x[:, : net.width - 8]], 1),
        "it has 16 where the compact graph has 24",
    ),
    "parts": (
        lambda net, x: torch.cat(x.chunk(4, 1)[::-1], 1),
        r"x.chunk\(4, 1\).*it has 6 where the compact graph has 8",
    ),
}


@pytest.mark.parametrize("way", REFUSED)
def test_what_can_not_be_smaller_is_refused_by_its_line(way: str) -> None:
    """The message has the user's line and both sizes; nothing is changed."""
    model, compact, x = cut_written(REFUSED[way][0])
    before = {name: value for name, value in vars(model).items() if name[0] != "_"}
    with pytest.raises(RewriteError, match=f"Written can't have the widths.*{REFUSED[way][1]}") as caught:
        fxprune.slim(model, compact, x)
    assert "test_slim.py" in str(caught.value)
    assert before == {name: value for name, value in vars(model).items() if name[0] != "_"}


@dataclass
class Config:
    """What ``Built`` is made from."""

    width: int = 16
    inner: int = 24
    depth: int = 2
    scaled: bool = False


class Built(nn.Module):
    """A class that is made from its config."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.unused = config, 2 * config.inner
        self.first, self.last = nn.Linear(6, config.width), nn.Linear(config.width, 3)
        self.ups = nn.ModuleList(nn.Linear(config.width, config.inner) for _ in range(config.depth))
        self.downs = nn.ModuleList(nn.Linear(config.inner, config.width) for _ in range(config.depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(up(x).relu())
        return self.last(x * math.sqrt(self.config.width) if self.config.scaled else x)


class Filled(Built):
    """One that can't be made without data."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.bound = float(self.first.weight.max().item())


def test_config() -> None:
    """The config says the new sizes, and the class makes a model of them, with attributes that no run reads too."""
    model, x = Built(Config()), torch.randn(2, 6, dtype=torch.float64)
    compact = cut(model, x, passes.Uniform())
    small = fxprune.slim(model, compact, x)
    width, inner = small.first.out_features, small.ups[0].out_features
    assert (small.config, small.unused) == (Config(width, inner), 2 * inner)
    assert max(width, inner / 2) < 16
    assert model.config == Config()
    again = Built(small.config).double()
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), compact(x))


CONFIGS = {
    "no config says these widths": (Built, Config(), "ups.1.out_features would be 24, not 20"),
    "the size is used otherwise": (Built, Config(scaled=True), "with the new sizes in its config Built is not its com"),
    "needs data": (Filled, Config(), r"Filled can't be made from its config without data \(RuntimeError: .*item"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_that_can_not_say_the_sizes_is_refused(case: str) -> None:
    """Unless the user says that it may stay as it is."""
    kind, config, message = CONFIGS[case]
    model, x = kind(config).double(), torch.randn(2, 6, dtype=torch.float64)
    graph = fxprune.trace(model, x)
    analysis = fxprune.analyze(graph, x)
    keep = {name: range(20) for name, size in analysis.sizes.items() if name == "ups.1"}
    if case != "no config says these widths":
        keep = {name: range(size // 2) for name, size in analysis.sizes.items()}
    compact, _ = fxprune.rewrite(graph, analysis, fxprune.Plan(keep, analysis.sizes, analysis.options))
    with pytest.raises(RewriteError, match=message):
        fxprune.slim(model, compact, x)
    with pytest.warns(UserWarning, match=f"the config of this {kind.__name__} says its old sizes"):
        small = fxprune.slim(model, compact, x, fit_config=False)
    assert small.config == config
    assert_same(small, compact, x)


class Headed(nn.Module):
    """Made from a config that knows heads and a width, and refuses one that the heads don't divide."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"{config.heads} heads do not divide {config.width}")
        self.config = config
        self.heads, self.size = config.heads, config.width // config.heads
        self.embed, self.head = nn.Linear(6, config.width), nn.Linear(config.width, 5)
        self.qkv = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(6))
        self.outs = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(config.width, config.inner) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(config.inner, config.width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in range(2):
            q, k, v = (
                layer(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2) for layer in self.qkv[3 * i : 3 * i + 3]
            )
            read = (q @ k.transpose(-2, -1) / math.sqrt(self.size)).softmax(-1) @ v
            x = x + self.outs[i](read.transpose(1, 2).flatten(2))
            x = x + self.downs[i](self.ups[i](x).relu())
        return self.head(x)


@pytest.mark.parametrize("budget", [{"flops": 0.5}, {"params": 0.3}, {"channels": 0.5}, {"flops": 0.7}])
@pytest.mark.parametrize("criterion", [passes.Uniform(), passes.Magnitude(scope="local")])
def test_equal_shares_fit_a_config(criterion: Any, budget: dict[str, float]) -> None:
    """Heads go with the width that is theirs, whatever is counted; the criterion says which."""
    model, x = Headed(SimpleNamespace(width=96, heads=6, inner=384)).double(), torch.randn(2, 4, 6).double()
    compact = fxprune.prune(model, x, criterion, budget=Budget(**budget, tolerance=0.02))  # type: ignore[arg-type]
    small = fxprune.slim(model, compact, x)
    assert small.config.width == 16 * small.config.heads < 96
    again = Headed(small.config).double()
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), compact(x))


def test_unequal_shares_that_no_config_says_are_refused_with_the_cure(caplog: pytest.LogCaptureFixture) -> None:
    """Where no equal shares meet the budget, others do, and the log says so."""
    model, x = Headed(SimpleNamespace(width=16, heads=2, inner=16)).double(), torch.randn(2, 4, 6).double()
    with caplog.at_level("INFO", "fxprune"):
        compact = fxprune.prune(model, x, passes.Uniform(), budget=Budget(flops=0.5))
    assert "no equal share of equally wide groups meets this budget" in caplog.text
    with pytest.raises(RewriteError, match=r"passes.Uniform or scope='local', with Budget\(channels=0.5\), or"):
        fxprune.slim(model, compact, x)


def test_what_is_given_is_checked() -> None:
    """A graph for the class, a graph of another model, one without a branch, one that a pass changed."""
    model, x = Attention().double(), torch.randn(2, 7, 6, dtype=torch.float64)
    compact = cut(model, x, passes.Uniform())
    with pytest.raises(RewriteError, match="model is traced, it has no class to get back"):
        fxprune.slim(compact, compact, x)
    with pytest.raises(RewriteError, match="compact must be a TracedModule, but it is Attention"):
        fxprune.slim(model, model, x)
    with pytest.raises(RewriteError, match=r"before.weight is in Written but not in the compact model: its branch"):
        fxprune.slim(Written(WAYS["alone"]), compact, x)
    with pytest.raises(
        RewriteError, match=r"embed.weight has shape \(\d+, 6\) .* no cut of the \(4, 6\) that Attention"
    ):
        fxprune.slim(Attention(4, 2), compact, x)
    image = torch.randn(2, 3, 32, 32)
    net = zoo.resnet18().eval()
    folded = fxprune.Pipeline([passes.FoldBatchNorm()])(fxprune.trace(net, image)).graph_module
    with pytest.raises(RewriteError, match=r"bn1.weight is in ResNet but not in the compact model"):
        fxprune.slim(net, folded, image)


class Steering(nn.Module):
    """A class whose Python looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return x if float(x.detach().sum()) > 1e9 else -x


def test_a_part_of_a_model_without_a_graph() -> None:
    """Where plain Python steers, the parts that are graphs can be given."""
    model, x = Steering(), torch.randn(2, 6, dtype=torch.float64)
    compact = cut(model, x)
    with pytest.raises(
        RewriteError, match=r"it is a Steering, whose Python steers the graphs of its parts\. .*called with: body"
    ):
        fxprune.slim(model, compact, x)
    model.body = fxprune.slim(model.body, compact.body, x)
    assert type(model.body[0]) is nn.Linear
    assert model.body[0].out_features < 16
    assert torch.equal(model(x), compact(x))


class Later(Written):
    """One whose Python does not record."""

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.before(x).tanh() * float(self.before.weight.sum()))


class Twice(Written):
    """One that makes another call."""

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.before(x).tanh().tanh())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Later, r"the class can't be given back: can't trace Later, .*test_slim.py:\d+: `return .*float"),
        (Twice, r"where the model calls tanh_1 \(.*test_slim.py:\d+.*\), the compact graph has after"),
    ],
)
def test_another_class_is_refused(kind: type[Written], message: str) -> None:
    """Tensors of the right names are not enough."""
    _, compact, x = cut_written(lambda net, x: x)
    with pytest.raises(RewriteError, match=message):
        fxprune.slim(kind(WAYS["alone"]).double(), compact, x)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bert"])
def test_transformers(name: str, tmp_path: Any) -> None:
    """Language models generate on, are saved with their config, and made again by it."""
    library = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 200}
    if name != "GPT2":
        sizes |= {"intermediate_size": 128, "max_position_embeddings": 64}
    if name == "Llama":
        sizes |= {"num_key_value_heads": 2}
    task = {"Llama": "ForCausalLM", "GPT2": "LMHeadModel", "Bert": "ForSequenceClassification"}[name]
    config = getattr(library, f"{name}Config")(**sizes, use_cache=False, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = getattr(library, f"{name}{task}")(config)
    example = ((), {"input_ids": torch.randint(3, 200, (2, 12))})
    graph = fxprune.trace(model, example)
    analysis = fxprune.analyze(graph, example)
    compact, _ = fxprune.rewrite(graph, analysis, passes.Uniform().plan(analysis, HALF))
    small = fxprune.slim(model, compact, example).eval()
    assert (small.config.hidden_size, small.config.num_attention_heads, config.hidden_size) == (32, 2, 64)
    small.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**example[1]).logits, compact.eval()(**example[1]).logits)
    if name != "Bert":
        tokens = [
            net.generate(**example[1], max_new_tokens=4, do_sample=False, use_cache=True) for net in (small, again)
        ]
        assert torch.equal(*tokens)
        assert tokens[0].shape == (2, 16)
