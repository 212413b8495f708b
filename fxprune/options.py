"""Options: what each of them may be, said as a rule, and one check of all of them before anything happens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from operator import ge, gt, le, lt
from typing import Any

from fxprune.errors import FxpruneError


@dataclass(frozen=True)
class Rule:
    """What an option may be.

    Attributes:
        holds: whether a value is right.
        words: what follows the name and the value where it is not, such as "must be a positive integer".
    """

    holds: Callable[[Any], bool]
    words: str

    def or_none(self) -> "Rule":
        """The same, and None."""
        return Rule(lambda value: value is None or self.holds(value), f"{self.words}, or None")

    def or_auto(self) -> "Rule":
        """The same, and "auto"."""
        return Rule(lambda value: value == "auto" or self.holds(value), f"{self.words}, or 'auto'")


def check_options(options: object, error: type[FxpruneError], **rules: Rule) -> None:
    """Raise ``error`` for the first of ``options`` that breaks its rule.

    Args:
        options: a mapping, or an object with attributes of these names.
        error: the class of the error.
        rules: by the name of the option.
    """
    values = options if isinstance(options, Mapping) else vars(options)
    for name, rule in rules.items():
        if not rule.holds(values[name]):
            raise error(f"{name}={values[name]!r:.80} {rule.words}")


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an int; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Whether ``value`` is a number on the real line, numpy's too; NaN is one, True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def allow_count(least: int = 1, why: str = "") -> Rule:
    """An integer of at least ``least``."""
    words = "a positive integer" if least == 1 else f"an integer of at least {least}"
    return Rule(lambda value: is_integer(value) and value >= least, f"must be {words}{why}")


def allow_number(
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    why: str = "",
) -> Rule:
    """A number, never NaN, that is ``above`` and ``below`` bounds, or at ``least`` and at ``most`` as large as others.

    ``why`` says in the message what the number is; it begins with a colon.
    """
    bounds = [("above", above, gt), ("at least", least, ge), ("below", below, lt), ("at most", most, le)]
    tests = [(word, bound, test) for word, bound, test in bounds if bound is not None]
    words = " and ".join(f"{word} {bound:g}" for word, bound, _ in tests)

    def holds(value: Any) -> bool:
        return is_real(value) and all(test(value, bound) for _, bound, test in tests)

    return Rule(holds, f"must be a number {words}{why}")


def allow_words(*known: str) -> Rule:
    """One of some words."""
    *first, last = map(repr, known)
    words = f"is not known; use {', '.join(first)} or {last}"
    return Rule(lambda value: isinstance(value, str) and value in known, words)


def allow_kind(kind: type, words: str) -> Rule:
    """An instance of ``kind``, in ``words`` after "must be"."""
    return Rule(lambda value: isinstance(value, kind), f"must be {words}")


FLAG = allow_kind(bool, "True or False")
