"""The door to models that torch's ``fully_shard`` splits over ranks."""

from fxprune.training.trainers.fsdp import prune_sharded

__all__ = ["prune_sharded"]
