"""The door to pruning under the Trainer of Hugging Face Transformers."""

from fxprune.training.trainers.transformers import Pruning

__all__ = ["Pruning"]
