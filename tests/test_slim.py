"""Slim: the user's own class comes back with the weights of the compact graph, equal to it, or is refused by its line."""

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision.models as zoo
from models import MODELS, prepare, randomize
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
        own, theirs = outcome(model, mode, x), outcome(compact, mode, x)
        assert len(own) == len(theirs) > 1
        assert max(map(relative_difference, own, theirs)) < EXACT


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
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.qkv(x).split(self.parts, -1))
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
    assert type(small) is Attention and type(small.qkv) is nn.Linear
    assert_same(small, compact, x)
    width, inner = small.embed.out_features, small.out.in_features
    assert width < 16 and small.norm.normalized_shape == (width,) and small.config.width == width
    assert small.num_heads * small.head_dim == inner < 16 and small.head_dim == model.head_dim
    assert small.parts == (inner,) * 3 and small.config.layers == [16, small.up.out_features]
    assert (small.half, small.config.name) == (8, "attention")
    assert torch.equal(small.predict(x), compact(x).argmax(-1))
    assert (model.num_heads, model.parts, model.config.width, model.config.layers) == (4, (16,) * 3, 16, [16, 32])


def build_vit() -> nn.Module:
    return zoo.VisionTransformer(image_size=32, patch_size=16, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64)


def build_swin() -> nn.Module:
    return zoo.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=10)


IMAGES: dict[str, tuple[Callable[[], nn.Module], int, Any]] = {  # builder, pixels, criterion
    "resnet18": (zoo.resnet18, 32, passes.Random(0)),
    "mobilenet_v3_small": (zoo.mobilenet_v3_small, 32, passes.Random(0)),
    "regnet_x_400mf": (zoo.regnet_x_400mf, 32, passes.Random(0)),
    "vit": (build_vit, 32, passes.Uniform()),
    "swin": (build_swin, 32, passes.Uniform()),
}


@pytest.mark.parametrize("name", IMAGES)
def test_torchvision(name: str) -> None:
    """The classes of torchvision work on, in both modes; transformers where every width is cut alike."""
    build, pixels, criterion = IMAGES[name]
    model, x = randomize(build()), torch.randn(2, 3, pixels, pixels, dtype=torch.float64)
    compact = cut(model, x, criterion)
    small = fxprune.slim(model, compact, x)
    assert type(small) is type(model)
    assert_same(small, compact, x)
    assert sum(p.numel() for p in small.parameters()) < 0.5 * sum(p.numel() for p in model.parameters())
    assert [*small.state_dict()] == [*model.state_dict()]
