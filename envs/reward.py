"""Rewards: what the tuner is paid for."""

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

CEILING = 1.0  # nats of log loss above the start at which a run counts as diverged
PENALTY = 1.0  # extra cost of divergence, on the scale of the return
LEAST = 1e-4  # nats; a validation loss below counts as this

Number = TypeVar("Number", float, NDArray[np.floating[Any]])  # of one run, or (n,) of many


def potential(loss: Number, start: Number) -> Number:
    """Quality of a validation loss: the signed square root of log(start / loss).

    Both losses in nats, start > 0; bounded below by -CEILING, which is also the value of a loss
    that is not finite or missing. Without the root, easy tasks, whose loss falls by a factor of
    ten, drown hard ones, where a tenth off is much (docs/adr/0004-reward.md).
    """
    known = np.isfinite(loss) & np.isfinite(start) & (np.asarray(start) > 0)
    fall = np.log(np.where(known, start, 1.0)) - np.log(np.maximum(np.where(known, loss, 1), LEAST))
    quality = np.maximum(np.copysign(np.sqrt(np.abs(fall)), fall), -CEILING)
    value = np.where(known, quality, -CEILING)
    paid: Any = value if value.ndim else float(value)
    return paid


def gain(before: Number, after: Number, start: Number) -> Number:
    """Rise of the potential in one interval.

    It telescopes: the sum over a run is the final potential, so with a discount of 1 the
    return is the final quality (Ng et al. 1999; Wu et al. 2018 on why not to discount).
    """
    return potential(after, start) - potential(before, start)


def crash(before: Number, start: Number) -> Number:
    """What the interval in which a run diverges is paid: down to the bound, and the penalty."""
    return -CEILING - potential(before, start) - PENALTY
