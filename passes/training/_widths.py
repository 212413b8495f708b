"""Which channels of a group stay, when it is known how many should."""

import numpy as np

from fxprune.budget.cost import Floats


def keep_highest(scores: Floats, count: int, minimum: int, round_to: int) -> tuple[int, ...]:
    """The ``count`` channels with the highest scores, the first of equals.

    Args:
        scores: float64[channels].
        count: how many should stay.
        minimum: how many stay at least.
        round_to: so many more stay that they are a multiple of this, where there are as many.
    """
    count = max(count, min(minimum, len(scores)))
    count = min(-(-count // round_to) * round_to, len(scores))
    return tuple(sorted(np.argsort(-scores, kind="stable")[:count].tolist()))
