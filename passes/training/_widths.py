"""Which channels of a group stay, when it is known how many should."""

import numpy as np

from fxprune.budget.cost import Floats


def keep_highest(scores: Floats, count: int, minimum: int, round_to: int, most: int | None = None) -> tuple[int, ...]:
    """The ``count`` channels with the highest scores, the first of equals.

    Args:
        scores: float64[channels].
        count: how many should stay.
        minimum: how many stay at least.
        round_to: so many more stay that they are a multiple of this, where there are as many.
        most: how many stay at most, if it is at least ``minimum``; all, if None.
    """
    most = len(scores) if most is None else max(most, min(minimum, len(scores)))
    count = max(count, min(minimum, len(scores)))
    count = min(-(-count // round_to) * round_to, most)
    return tuple(sorted(np.argsort(-scores, kind="stable")[:count].tolist()))
