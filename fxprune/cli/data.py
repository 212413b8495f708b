"""Images in a folder, a folder for each class, as batches."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from fxprune.cli.models import find_object, split_name
from fxprune.cli.preprocessing import DataError, Preprocessing, make_transform
from fxprune.errors import FileError

BATCH = 32


def load_images(folder: Path, preprocessing: Preprocessing, count: int, seed: int) -> "DataLoader[Any]":
    """At most ``count`` of the images in ``folder``, as ``preprocessing`` says.

    Raises:
        FileError: there are no images in folders in ``folder``.
    """
    from torchvision.datasets import ImageFolder

    if not folder.is_dir():
        raise FileError(f"there is no folder {folder}")
    try:
        images = ImageFolder(str(folder), make_transform(preprocessing), loader=load_image)
    except (OSError, ValueError) as error:
        raise FileError(
            f"{folder} must have a folder for each class with images in it, as {folder}/cat/1.jpg: {error}"
        ) from error
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    return DataLoader(Subset(images, order.tolist()), BATCH)


def load_batches(name: str) -> Any:
    """The batches that ``name``, package.module:loader or file.py:loader, is or gives when it is called.

    Raises:
        DataError: it is nothing that has batches (x, y).
        ModelError: there is no such thing, or it can't be imported.
    """
    loader = find_object(*split_name(name))
    if not isinstance(loader, Iterable) and callable(loader):
        loader = loader()
    batches = list(loader) if isinstance(loader, Iterable) else []
    labelled = [isinstance(batch, (tuple, list)) and len(batch) == 2 for batch in batches]
    if not batches or not all(labelled):
        raise DataError(
            f"--data {name} must be batches (images, classes), such as a DataLoader, or a function that returns them; "
            f"got {type(loader).__name__} with {len(batches)} batches"
        )
    return batches


@torch.no_grad()
def warn_of_chance(accuracy: float, model: torch.nn.Module, batches: Iterable[Any], preprocessing: str) -> str:
    """What to say of a model that is hardly better than guessing on its own data; "" where it is."""
    x, y = next(iter(batches))
    classes = compute_logits(model(x), y).shape[1]
    count = sum(len(labels) for _, labels in batches)
    chance = 1 / classes
    if accuracy > chance + 3 * (chance * (1 - chance) / count) ** 0.5:
        return ""
    return (
        f"WARNING: the model is right on {accuracy:.1%} of this data before the cut, and guessing on {chance:.1%}. "
        "Were its weights given (--weights), are the classes in its order, and were its images prepared so: "
        f"{preprocessing}? See --mean, --std, --size and --resize."
    )


def load_image(path: str) -> Any:
    """The image in a file."""
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except (OSError, ValueError) as error:
        raise FileError(f"can't read the image {path}: {error}") from error


@torch.no_grad()
def measure_accuracy(model: torch.nn.Module, batches: Iterable[Any]) -> float:
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
