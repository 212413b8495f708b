"""The door to sessions with Hugging Face Accelerate."""

from fxprune.training.trainers.accelerate import prepare

__all__ = ["prepare"]
