"""Every criterion, made for a model's inputs: what is true of one is tested on all."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from models import args_kwargs
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune import passes


def loss(output: Any, y: Any) -> Tensor:
    """Of outputs of any shape, against no target."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return sum((leaf.float() if leaf.dtype.itemsize < 4 else leaf).square().mean() for leaf in leaves)


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y)


def batch(inputs: Any, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A batch of random numbers shaped like ``inputs``, one tensor, with labels of four classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(inputs[0].shape, generator=generator, dtype=inputs[0].dtype)
    return x, torch.randint(0, 4, (len(x),), generator=generator)


def pair(inputs: Any) -> list[tuple[Any, Any]]:
    """The inputs of a model as a loader of one batch."""
    return [(args_kwargs(inputs), 0)]


CRITERIA: dict[str, Callable[[Any], passes.Criterion]] = {
    "Magnitude": lambda inputs: passes.Magnitude(),
    "BatchNormScale": lambda inputs: passes.BatchNormScale(),
    "GeometricMedian": lambda inputs: passes.GeometricMedian(),
    "Random": lambda inputs: passes.Random(),
    "Uniform": lambda inputs: passes.Uniform(),
    "ErdosRenyi": lambda inputs: passes.ErdosRenyi(),
    "PreCrop": lambda inputs: passes.PreCrop(),
    "Uniform by Magnitude": lambda inputs: passes.Uniform(by=passes.Magnitude()),
    "Taylor": lambda inputs: passes.Taylor(pair(inputs), loss),
    "Fisher": lambda inputs: passes.Fisher(pair(inputs), loss),
    "SingleShot": lambda inputs: passes.SingleShot(pair(inputs), loss),
    "GraSP": lambda inputs: passes.GraSP(pair(inputs), loss),
    "SynFlow": lambda inputs: passes.SynFlow(),
    "Combined": lambda inputs: passes.Combined(pair(inputs), loss),
    "Activation mean": lambda inputs: passes.Activation(pair(inputs)),
    "Activation variance": lambda inputs: passes.Activation(pair(inputs), "variance"),
    "OptimalBrainSurgeon": lambda inputs: passes.OptimalBrainSurgeon(pair(inputs)),
}
WITH_DATA = [
    "Taylor",
    "Fisher",
    "SingleShot",
    "GraSP",
    "Combined",
    "Activation mean",
    "Activation variance",
    "OptimalBrainSurgeon",
]
IN_FLOAT32 = ["GraSP", "Combined"]  # whatever the precision
WITHOUT_VALUES = ["Random", "Uniform", "ErdosRenyi", "PreCrop"]
