"""Preprocessing: how images become what a model takes, as its weights were trained or as the user says."""

import importlib
from dataclasses import dataclass
from typing import Any

from fxprune.cli.models import Source, split_name
from fxprune.errors import FxpruneError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class DataError(FxpruneError):
    """Images do not go with the model."""


@dataclass(frozen=True)
class Asked:
    """What the user said of preprocessing; None where nothing was said."""

    mean: str | None = None
    std: str | None = None
    size: int | None = None
    resize: int | None = None


@dataclass(frozen=True)
class Preprocessing:
    """How images become what a model takes.

    Attributes:
        resize: pixels of the shorter side, before the middle is cut out.
        crop: (height, width) of what is cut out.
        mean: of each channel, of pixels between 0 and 1; is subtracted.
        std: of each channel; divides.
        origin: who says so, in words.
    """

    resize: int
    crop: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: str

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        height, width = self.crop
        return f"shorter side to {self.resize}, middle {height} x {width}, mean {mean}, std {std} ({self.origin})"


def choose_preprocessing(shape: tuple[int, ...], source: Source, weights: str | None, asked: Asked) -> Preprocessing:
    """What goes with a model that takes ``shape`` (batch, channels, height, width): as asked, else as its weights say.

    Raises:
        DataError: the model takes no images, or what was asked can't be.
    """
    if len(shape) != 4 or shape[1] not in (1, 3):
        raise DataError(f"--data gives images, but the model takes a tensor of shape {list(shape)}")
    channels, height, width = shape[1:]
    mean, std, ratio, origin = find_transforms(source, weights)
    crop = (height, width) if asked.size is None else (asked.size, asked.size)
    said = [f"--{name}" for name, value in vars(asked).items() if value is not None]
    return Preprocessing(
        resize=asked.resize or round(max(crop) * ratio),
        crop=crop,
        mean=read_channels("--mean", asked.mean, channels) or mean[:channels],
        std=read_channels("--std", asked.std, channels) or std[:channels],
        origin="; ".join([*filter(None, [", ".join(said)]), origin]),
    )


def read_channels(option: str, text: str | None, channels: int) -> tuple[float, ...] | None:
    """A number for each channel: "0.5,0.5,0.5", or one for all."""
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise DataError(f"{option} {text!r} must be numbers such as 0.485,0.456,0.406") from None
    values = values * channels if len(values) == 1 else values
    if len(values) != channels:
        raise DataError(f"{option} {text!r} has {len(values)} numbers, but the model takes {channels} channels")
    least = 0.0 if option == "--std" else -1.0
    if not all(least < value <= 1 for value in values):
        raise DataError(f"{option} {text!r} is of pixels from 0 to 1, not 255: it must lie above {least:g}, up to 1")
    return values


def find_transforms(source: Source, weights: str | None) -> tuple[tuple[float, ...], tuple[float, ...], float, str]:
    """The mean, the standard deviation, and resize over crop, of a model's weights; and whose they are."""
    kind, name = split_name(source.model)
    if kind == "torchvision":
        from torchvision import models

        try:
            members = models.get_model_weights(name).__members__
        except ValueError:  # it has none
            members = {}
        chosen = members.get(weights or "") or next(iter(members.values()), None)
        own: Any = chosen.transforms() if chosen is not None else None
        if chosen is not None and hasattr(own, "crop_size") and hasattr(own, "resize_size"):
            ratio = max(own.resize_size) / max(own.crop_size)
            return tuple(own.mean), tuple(own.std), ratio, f"of torchvision's weights {chosen.name}"
    if kind == "timm":
        own = importlib.import_module("timm").get_pretrained_cfg(name)
        if own is not None:
            return tuple(own.mean), tuple(own.std), 1 / (own.crop_pct or 1), "of timm's weights"
    return MEAN, STD, 1.0, "mean and std of ImageNet, a guess: say others with --mean and --std"


def make_transform(preprocessing: Preprocessing) -> Any:
    """What turns an image into a tensor."""
    from torchvision import transforms

    steps: list[Any] = [transforms.Resize(preprocessing.resize), transforms.CenterCrop(preprocessing.crop)]
    steps += [transforms.Grayscale()] if len(preprocessing.mean) == 1 else []
    steps += [transforms.ToTensor(), transforms.Normalize(preprocessing.mean, preprocessing.std)]
    return transforms.Compose(steps)
