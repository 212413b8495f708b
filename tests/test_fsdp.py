"""prune_sharded: a run in fully_shard, cut and trained on, is the run of one process that is cut alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import fxprune
from fxprune import Budget, passes
from fxprune.errors import SessionError, TraceError
from fxprune.fsdp import prune_sharded

HALF = Budget(channels=0.5)
STEPS = 3


class Block(nn.Module):
    """A residual block whose inside can get narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


def shard(model: Any) -> None:
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)


def optimize(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups, of which one decays."""
    named = dict(model.named_parameters())
    decayed = [name for name in named if name.endswith("weight")]
    groups = [
        {"params": [named[name] for name in decayed], "weight_decay": 0.1},
        {"params": [named[name] for name in named if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, 0.01)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 5, dtype=torch.float64, generator=generator), torch.arange(8) % 3


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, rank: int = 0, world: int = 1) -> None:
    for step in range(first, first + STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rank::world]), y[rank::world]).backward()
        optimizer.step()


def train_alone() -> dict[str, torch.Tensor]:
    """What one process makes of all batches, with the same cut between them."""
    model, x = build(), batch(0)[0]
    optimizer = optimize(model)
    train(model, optimizer, 0)
    graph = fxprune.trace(model, x)
    analysis = fxprune.analyze(graph, x)
    compact, param_map = fxprune.rewrite(graph, analysis, passes.Magnitude().plan(analysis, HALF))
    param_map.migrate(optimizer)
    train(compact, optimizer, STEPS)
    return compact.state_dict()


def gather(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }


def cut_between(rank: int, world: int) -> dict[str, torch.Tensor]:
    model = build()
    shard(model)
    optimizer = optimize(model)
    train(model, optimizer, 0, rank, world)
    before = gather(model)
    small, small_optimizer = prune_sharded(
        model, optimizer, batch(0)[0], passes.Magnitude(), budget=HALF, build=build, shard=shard, optimize=optimize
    )
    assert isinstance(small, Net)
    assert all(isinstance(part, FSDPModule) for part in (small, *small.blocks))
    assert all(isinstance(parameter, DTensor) for parameter in small.parameters())
    assert [group["weight_decay"] for group in small_optimizer.param_groups] == [0.1, 0.0]
    assert all(torch.equal(before[name], tensor) for name, tensor in gather(model).items())  # still there, uncut
    train(small, small_optimizer, STEPS, rank, world)
    return gather(small)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_cut_commutes_with_training_on_many_ranks(ranks: Ranks, tmp_path: Path, world: int) -> None:
    expected = train_alone()
    for found in ranks(world, tmp_path / "store", cut_between, world):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10)


def shard_in_half(model: Any) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def keeping_policies(rank: int) -> str:
    model = build().float()
    shard_in_half(model)
    optimizer = optimize(model)
    small, _ = prune_sharded(
        model,
        optimizer,
        batch(0)[0].float(),
        passes.Magnitude(),
        budget=HALF,
        build=lambda: build().float(),
        shard=shard_in_half,
        optimize=optimize,
    )
    return str(small(batch(0)[0].float()).dtype)


def test_the_policies_of_mixed_precision_stay(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2, tmp_path / "store", keeping_policies) == ["torch.bfloat16"] * 2


def refusing(rank: int) -> None:
    x = batch(0)[0]
    model = build()
    shard(model)
    optimizer = optimize(model)

    def prune(model: nn.Module, criterion: Any = None, build: Any = build) -> None:
        criterion = criterion or passes.Magnitude()
        prune_sharded(model, optimizer, x, criterion, budget=HALF, build=build, shard=shard, optimize=optimize)

    with pytest.raises(SessionError, match="no part of this Net is in fully_shard"):
        prune(build())
    with pytest.raises(SessionError, match=r"build\(\) makes another model"):
        prune(model, build=lambda: nn.Linear(5, 3).double())
    with pytest.raises(SessionError, match=r"makes stem\.weight as torch\.float32, .* has torch\.float64"):
        prune(model, build=lambda: build().float())
    with pytest.raises(SessionError, match="the ranks disagree on the plan"):
        prune(model, passes.Random(seed=rank))
    with pytest.raises(TraceError, match=r"stem\.weight of FSDPNet is spread over ranks \(DTensor\)"):
        fxprune.prune(model, x, passes.Magnitude(), budget=HALF)
    train(model, optimizer, 0, rank, 2)  # it trains on, uncut


def test_what_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, tmp_path / "store", refusing)
