"""Equations: what the sizes in a model's attributes must be, so that its Python makes the calls of a compact graph."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxprune.graph.sizes import SLOT, Slot

Solution = dict[Slot, int]


@dataclass(frozen=True)
class Equation:
    """Two numbers that must be equal, each a number or a node that computes one from sizes; and where that is."""

    left: Any
    right: Any
    place: str


@dataclass(frozen=True)
class Solver:
    """Finds the values of slots.

    Attributes:
        before: of each slot, its value in the original.
        size_of: gives the size of an axis of what a node gives, in the compact model.
    """

    before: Mapping[Slot, int]
    size_of: Callable[[fx.Node, int], int]

    def solve(self, equations: Sequence[Equation]) -> tuple[Solution, list[Equation]]:
        """The values that equations give to slots, and the equations that do not hold with them.

        Where several slots of one equation are unknown they stay what they were, if then it holds.
        """
        known: Solution = {}
        pending, failing = list(equations), list[Equation]()
        while pending:
            rest = []
            for equation in pending:
                unknown = {slot for side in (equation.left, equation.right) for slot in slots_in(side)} - known.keys()
                if len(unknown) > 1:
                    rest.append(equation)
                    continue
                if unknown:
                    known.update(self.isolate(equation, unknown.pop(), known))
                if not self.holds(equation, known):
                    failing.append(equation)
            if len(rest) == len(pending):  # nothing new is known
                stay = {slot for side in (rest[0].left, rest[0].right) for slot in slots_in(side)}
                known |= {slot: self.before[slot] for slot in stay - known.keys()}
            pending = rest
        return known, failing

    def holds(self, equation: Equation, known: Solution) -> bool:
        """Whether both sides are equal."""
        return bool(self.value(equation.left, known) == self.value(equation.right, known))

    def describe(self, equation: Equation, known: Solution) -> str:
        """In words, what an equation that does not hold says."""
        left, right = (self.value(side, known) for side in (equation.left, equation.right))
        return f"at {equation.place} it has {left} where the compact graph has {right}"

    def value(self, number: Any, known: Solution) -> Any:
        """What a number is; slots that are not known are what they were."""
        if not isinstance(number, fx.Node):
            return number
        if SLOT in number.meta:
            slot = number.meta[SLOT]
            return known.get(slot, self.before[slot])
        args: Any = number.args
        if number.target == "size":
            return self.size_of(*args)
        function: Any = number.target
        return function(*(self.value(arg, known) for arg in args))

    def isolate(self, equation: Equation, unknown: Slot, known: Solution) -> Solution:
        """The value of a slot for which an equation holds; what it was, where that can't be told."""
        sides = [equation.left, equation.right]
        if unknown in slots_in(equation.left):
            sides.reverse()
        number, side = sides
        if unknown in slots_in(number):
            return {unknown: self.before[unknown]}
        result = self.value(number, known)
        while SLOT not in side.meta:
            at = [unknown in slots_in(arg) for arg in side.args]
            operands = [self.value(arg, known) for arg in side.args]
            if sum(at) != 1 or (inverse := INVERSES.get((side.target, at.index(True)))) is None:
                return {unknown: self.before[unknown]}
            try:
                result = inverse(result, *(operand for operand, hides in zip(operands, at, strict=True) if not hides))
            except ZeroDivisionError:
                return {unknown: self.before[unknown]}
            side = side.args[at.index(True)]
        return {unknown: result}


INVERSES: dict[tuple[Any, int], Callable[..., Any]] = {  # by operator and the place of the unknown: f(result, operand)
    (operator.add, 0): operator.sub,
    (operator.add, 1): operator.sub,
    (operator.sub, 0): operator.add,
    (operator.sub, 1): lambda result, operand: operand - result,
    (operator.mul, 0): operator.floordiv,
    (operator.mul, 1): operator.floordiv,
    (operator.floordiv, 0): operator.mul,
    (operator.floordiv, 1): lambda result, operand: operand // result,
    (operator.neg, 0): operator.neg,
}


def slots_in(number: Any) -> Iterator[Slot]:
    """The slots from which a number is computed."""
    if not isinstance(number, fx.Node):
        return
    if SLOT in number.meta:
        yield number.meta[SLOT]
    elif number.target != "size":
        for arg in number.args:
            yield from slots_in(arg)
