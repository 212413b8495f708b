"""Operators: all that is known of each, a file a family. Importing this fills the tables of the other rooms.

The decorators here are public: with them a model's own operators, and any of ATen, get rules.
"""

from fxprune.channels.labels import (
    Labels,
    Operand,
    freeze_labels,
    join_labels,
    label_along,
    pin_axes,
    settle_labels,
)
from fxprune.channels.tensor import Call, as_operand, mark_norm, rule
from fxprune.ops import contraction, movement, normalization, pointwise, recurrent, reduction  # noqa: F401  (fill)
from fxprune.ops.custom import register_operator
from fxprune.rewrite.attributes import attributes
from fxprune.rewrite.fit import CompactRun, find_argument, fitter, set_argument
from fxprune.rewrite.norms import norm_over_kept, put_back, take_kept

__all__ = [
    "Call",
    "CompactRun",
    "Labels",
    "Operand",
    "as_operand",
    "attributes",
    "find_argument",
    "fitter",
    "freeze_labels",
    "join_labels",
    "label_along",
    "mark_norm",
    "norm_over_kept",
    "pin_axes",
    "put_back",
    "register_operator",
    "rule",
    "set_argument",
    "settle_labels",
    "take_kept",
]
