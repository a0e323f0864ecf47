"""Restarts: where each further steered run of a job starts, and which run is the best."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from envs.knobs import RATE_CEILING, RATE_FLOOR, exchange

SPREAD = 0.3  # decades around the best run's rate


class Ended(NamedTuple):
    """A steered run: selection score, and the peak rate in force at its best checkpoint.

    The rate is `opening_rate`'s, as the next run is opened with that optimizer again.
    """

    selection: float
    rate: float


def opening_rate(rate: float, optimizer: str, opened: str) -> float:
    """A rate of one optimizer as that which the run was opened with would have it."""
    return rate / exchange(opened, optimizer, 1, "full")


def best_run(ended: Sequence[Ended]) -> int:
    """The place of the run with the best selection score; the first of equals."""
    return max(range(len(ended)), key=lambda number: ended[number].selection)


def next_start(ended: Sequence[Ended], seed: int) -> float:
    """The starting rate of the run after those: within `SPREAD` decades of the best one's rate.

    Drawn from the seed and the number of runs alone, so that a search that goes on later draws the
    same. Not that rate itself: a policy that goes there before the first update has been there.
    """
    decades = np.random.default_rng([seed, 1]).uniform(-SPREAD, SPREAD, len(ended))
    rate = ended[best_run(ended)].rate * 10 ** float(decades[-1])
    return min(max(rate, RATE_FLOOR), RATE_CEILING)
