"""Channels: run a model on tensors that carry channel names, and read off what belongs together."""
