"""Images in a folder, a folder for each class, as batches."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from fxprune.errors import FileError, FxpruneError

BATCH = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class DataError(FxpruneError):
    """Images do not go with the model."""


def images(folder: Path, shape: tuple[int, ...], count: int, seed: int) -> "DataLoader[Any]":
    """At most ``count`` of the images in ``folder``, cut to ``shape`` (batch, channels, height, width) and normalised.

    Raises:
        DataError: the model takes no images.
        FileError: there are no images in folders in ``folder``.
    """
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    if len(shape) != 4 or shape[1] not in (1, 3):
        raise DataError(f"--data gives images, but the model takes a tensor of shape {list(shape)}")
    channels, height, width = shape[1:]
    steps: list[Any] = [
        transforms.Resize(round(max(height, width) * 256 / 224)),
        transforms.CenterCrop((height, width)),
    ]
    steps += [transforms.Grayscale()] if channels == 1 else []
    steps += [transforms.ToTensor(), transforms.Normalize(MEAN[:channels], STD[:channels])]
    try:
        found = ImageFolder(str(folder), transforms.Compose(steps))
    except (OSError, ValueError) as error:
        raise FileError(
            f"there are no images in {folder}: put them in one folder for each class, as {folder}/cat/1.jpg ({error})"
        ) from error
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count]
    return DataLoader(Subset(found, order.tolist()), BATCH)


@torch.no_grad()
def accuracy(model: torch.nn.Module, batches: "DataLoader[Any]") -> float:
    """The fraction of images whose class is the model's first choice."""
    right = [(logits(model(x)).argmax(1) == y).float() for x, y in batches]
    return torch.cat(right).mean().item()


def logits(output: Any) -> Tensor:
    """What a classifier says of each class."""
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise DataError("--data needs a classifier, a model that gives a tensor of [batch, classes]")
    return output


def loss(output: Any, y: Tensor) -> Tensor:
    """Cross entropy. Raises DataError where the folder has more classes than the model."""
    classes = logits(output).shape[1]
    if int(y.max()) >= classes:
        raise DataError(f"the folder has more classes than the model, which tells {classes} apart; see --classes")
    return torch.nn.functional.cross_entropy(output, y)
