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


def load_images(folder: Path, shape: tuple[int, ...], count: int, seed: int) -> "DataLoader[Any]":
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
    if not folder.is_dir():
        raise FileError(f"there is no folder {folder}")
    try:
        images = ImageFolder(str(folder), transforms.Compose(steps), loader=load_image)
    except (OSError, ValueError) as error:
        raise FileError(
            f"{folder} must have a folder for each class with images in it, as {folder}/cat/1.jpg: {error}"
        ) from error
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    return DataLoader(Subset(images, order.tolist()), BATCH)


def load_image(path: str) -> Any:
    """The image in a file."""
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except (OSError, ValueError) as error:
        raise FileError(f"can't read the image {path}: {error}") from error


@torch.no_grad()
def measure_accuracy(model: torch.nn.Module, batches: "DataLoader[Any]") -> float:
    """The fraction of images whose class is the model's first choice."""
    right = [(compute_logits(model(x), y).argmax(1) == y).float() for x, y in batches]
    return torch.cat(right).mean().item()


def compute_logits(output: Any, y: Tensor) -> Tensor:
    """What a classifier says of each class. Raises DataError where the folder has more classes than the model."""
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise DataError("--data needs a classifier, a model that gives a tensor of [batch, classes]")
    if int(y.max()) >= output.shape[1]:
        raise DataError(
            f"the folder has more classes than the model, which tells {output.shape[1]} apart; see --classes"
        )
    return output


def compute_loss(output: Any, y: Tensor) -> Tensor:
    """Cross entropy."""
    return torch.nn.functional.cross_entropy(compute_logits(output, y), y)
