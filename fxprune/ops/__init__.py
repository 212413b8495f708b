"""Operators: all that is known of each, a file a family. Importing this fills the tables of the other rooms."""

from fxprune.ops import contraction, custom, movement, pointwise, reduction  # noqa: F401  (each registers its rules)
