"""Tiny networks that torch.fx can't trace as a whole: Python looks at values, or loops over what only a run knows.

They are registered with those of models.py, and every law holds for them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from models import conv_bn, register
from torch import Tensor, nn


class Steered(nn.Module):
    """A backbone of 8 channels, and Python that must not be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv_bn(3, 6), conv_bn(6, 8))

    def features(self, x: Tensor) -> Tensor:
        if not bool(torch.isfinite(x).all()):
            raise ValueError("the input is not finite")
        return self.backbone(x)


class SumDecides(Steered):
    """Python may look at a sum over channels that go: they add nothing to it."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return self.last(y if float(y.detach().sum()) > 1 else 2 * y)


class Pyramid(Steered):
    """One head for all levels of a pyramid, as detectors have it."""

    def __init__(self) -> None:
        super().__init__()
        self.down = conv_bn(8, 8)
        self.head = nn.Sequential(conv_bn(8, 10), conv_bn(10, 12))
        self.logits = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels = [self.features(x)]
        levels.append(self.down(F.avg_pool2d(levels[-1], 2)))
        return {str(i): self.logits(self.head(level)) for i, level in enumerate(levels)}


class SumInPython(Steered):
    """Python adds what two regions give: their channels go together."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = conv_bn(8, 10), conv_bn(8, 10), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return self.last(F.relu(self.left(y) + self.right(y)))


class CatInPython(Steered):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = conv_bn(8, 5), conv_bn(8, 7), nn.Conv2d(20, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return self.last(torch.cat([self.left(y), y, self.right(y)], 1))


class ReadsASize(Steered):
    """The channels that Python counts keep their number."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        batch, channels, height, width = y.shape
        return self.last(y.view(batch, channels // 2, 2, height, width).sum(2))


class ReadsOtherSizes(Steered):
    """Python that looks only at the image leaves the channels free."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        small = F.max_pool2d(y, 2)
        large = F.interpolate(small, size=y.shape[-2:])
        return self.last(large + y) / (y.size(-1) * y.shape[2] * len(y))


class ScaledInPython(Steered):
    """A number that is computed from the channels' number, as in RAFT's correlation."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        left, right = self.left(y).flatten(2), self.right(y).flatten(2)
        return left.transpose(1, 2) @ right / torch.sqrt(torch.tensor(left.shape[1]))


class SplitsInPython(Steered):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.last = conv_bn(8, 12), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.wide(self.features(x)), [4, 8], dim=1)
        return self.last(a) + b[:, :4] * b[:, -4:]


class ChunksInPython(Steered):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.last = conv_bn(8, 12), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.wide(self.features(x)).chunk(2, dim=1)
        return self.last(a * torch.sigmoid(b))


class PadsInPython(Steered):
    """Channels that Python adds stay."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.last = conv_bn(12, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.wide(F.pad(self.features(x), (0, 0, 0, 0, 2, 2))))


class FunctionalInPython(Steered):
    """Weights that Python itself hands to functions, one of them grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.empty(9, 8, 1, 1))
        self.grouped = nn.Parameter(torch.empty(6, 3, 3, 3))
        self.norm = nn.Parameter(torch.empty(6))
        self.last = nn.Parameter(torch.empty(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.conv2d(self.features(x), self.free))
        y = F.conv2d(y, self.grouped, groups=3, padding=1)
        y = F.group_norm(y, 2, self.norm)
        return F.linear(y.mean((2, 3)), weight=self.last)


class LayersInPython(Steered):
    """Layers that Python calls itself follow their weights: grouped, depthwise, norms."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 1, groups=2)
        self.norm = nn.GroupNorm(12, 12)
        self.flat = nn.Linear(12, 10)
        self.layer_norm = nn.LayerNorm(10)
        self.last = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.grouped(self.depthwise(self.features(x))))
        return self.last(self.layer_norm(self.flat(y.mean((2, 3)))))


class Attends(Steered):
    """Attention written in Python: its scale depends on the size of a head."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 6) for _ in range(3))
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x).flatten(2).transpose(1, 2)
        return self.last(F.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y)))


class Refines(nn.Module):
    """A part that is called again and again: how often, only a value knows."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = conv_bn(3, 8)
        self.state = nn.Conv2d(8, 6, 1)
        self.update = Cell(8, 6)
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.encoder(x)
        state, steps = torch.tanh(self.state(y)), []
        for _ in range(2 + int(x.isfinite().all())):
            state = self.update(state, y)
            steps.append(self.last(state))
        return steps


class Cell(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.gate, self.candidate = (nn.Conv2d(inputs + width, width, 3, padding=1) for _ in range(2))

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        both = torch.cat([state, x], 1)
        gate = torch.sigmoid(self.gate(both))
        return (1 - gate) * state + gate * torch.tanh(self.candidate(both))


class Chooses(Steered):
    """One of two parts, by the input; the other is not seen to be called."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.last = conv_bn(8, 6), conv_bn(8, 6), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return self.last(self.one(y) if x.flatten()[0] > -1e9 else self.other(y))


class Proposes(Steered):
    """Boxes by score, pooled from the features, as two-stage detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Sequential(conv_bn(8, 7), nn.Conv2d(7, 1, 1))
        self.box = nn.Sequential(nn.Flatten(), nn.Linear(8 * 4, 12), nn.ReLU())
        self.last = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.features(x)
        scores = self.scores(y).flatten(1)
        best = scores.detach().topk(3, dim=1).indices.flatten()
        proposed = torch.nonzero(best >= 0).flatten()
        corner = torch.stack([best % 8, best // 8], 1)[proposed].to(y.dtype)
        image = torch.arange(len(x), dtype=y.dtype).repeat_interleave(3)[proposed]
        boxes = torch.cat([image[:, None], corner / 2, corner / 2 + 3], 1)
        return scores, self.last(self.box(torchvision.ops.roi_align(y, boxes, (2, 2))))


class ReadsAnAttribute(Steered):
    """Python asks a region for a number that it was made with."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell(8, 6)
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return self.last(self.cell(torch.zeros(len(x), self.cell.width, *y.shape[2:], dtype=y.dtype), y))


@dataclass
class Prediction:
    logits: Tensor
    features: list[Tensor]


class ReturnsAnObject(Steered):
    """Channels that leave inside an object keep their number."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.last = conv_bn(8, 12), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.features(x)
        prediction = Prediction(self.last(self.wide(y)), [y])
        return {"logits": prediction.logits, "features": prediction.features}


class CallsTwice(Steered):
    """One region, given channels of its model once and an image the other time."""

    def __init__(self) -> None:
        super().__init__()
        self.same = Halve()
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        image = self.same(torch.cat([x, x[:, :1], x, x[:, :1]], 1))
        return self.last(self.same(self.features(x))) + image


class Halve(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x[:, :4] - x[:, 4:])


for steered in (
    SumDecides,
    Pyramid,
    SumInPython,
    CatInPython,
    ReadsASize,
    ReadsOtherSizes,
    ScaledInPython,
    SplitsInPython,
    ChunksInPython,
    PadsInPython,
    FunctionalInPython,
    LayersInPython,
    Attends,
    Refines,
    Chooses,
    Proposes,
    ReadsAnAttribute,
    ReturnsAnObject,
    CallsTwice,
):
    words_of_name = re.sub(r"(?<!^)(?=[A-Z])", "_", steered.__name__).lower()
    register(
        f"steered_{words_of_name}",
        steered,
        (steered.__doc__ or "plain Python between regions").splitlines()[0],
        inexact=steered is LayersInPython,
        steered=True,
    )
