"""Refusal: what is said of a model that can't be recorded."""

from fxprune.errors import TraceError


class RefusalError(Exception):
    """What the recorder can't write down; the message says why and what to do."""


class LeftOverError(RefusalError):
    """A tensor of an earlier recording is met again: the model's Python keeps it, in a cache of functions say."""


class DoesNotRunError(TraceError):
    """The model itself fails on its example, or can't be copied to be run."""


class OtherPathError(TraceError):
    """A graph is given sizes or dtypes for which the model's Python would take another path."""
