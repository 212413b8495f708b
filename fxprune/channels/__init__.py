"""The analysis: run a model on tensors that carry channel names. One file an operator family."""

from fxprune.channels import contraction, custom, movement, pointwise, reduction  # noqa: F401  (each registers its rules)
