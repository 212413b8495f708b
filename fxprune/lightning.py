"""The door to the callback for Lightning."""

from fxprune.training.trainers.lightning import Pruning

__all__ = ["Pruning"]
