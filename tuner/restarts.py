"""Restarts: where each further steered run of a job starts, and which run is the best."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from envs.knobs import RATE_CEILING, RATE_FLOOR

SPREAD = 0.3  # decades around the best run's rate


class Ended(NamedTuple):
    """A steered run: selection score, and the peak rate in force at its best checkpoint."""

    selection: float
    rate: float


def best_run(ended: Sequence[Ended]) -> int:
    """The place of the run with the best selection score; the first of equals."""
    return max(range(len(ended)), key=lambda number: ended[number].selection)


def next_start(ended: Sequence[Ended], seed: int) -> float:
    """The starting rate of the run after those: the best one's, from the third run on spread.

    The second run starts at the rate that the first ended with; each further one within `SPREAD`
    decades of the best run's, drawn from the seed and the number of runs alone, so that a search
    that goes on later draws the same.
    """
    decades = np.random.default_rng([seed, 1]).uniform(-SPREAD, SPREAD, max(0, len(ended) - 1))
    rate = ended[best_run(ended)].rate * 10 ** (float(decades[-1]) if len(decades) else 0.0)
    return min(max(rate, RATE_FLOOR), RATE_CEILING)
