"""Rewards: what the tuner is paid for."""

import math

CEILING = 1.0  # nats of log loss above the start at which a run counts as diverged
PENALTY = 1.0  # extra cost of divergence, on the scale of the return


def potential(loss: float, start: float) -> float:
    """Quality of a validation loss: the signed square root of log(start / loss).

    Both losses in nats, start > 0; bounded below by -CEILING, which is also the value of a loss
    that is not finite or missing. Without the root, easy tasks, whose loss falls by a factor of
    ten, drown hard ones, where a tenth off is much (docs/adr/0004-reward.md).
    """
    if not (math.isfinite(loss) and math.isfinite(start) and start > 0):
        return -CEILING
    fall = -math.log(max(loss, 1e-4) / start)
    return max(-CEILING, math.copysign(math.sqrt(abs(fall)), fall))


def gain(before: float, after: float, start: float) -> float:
    """Rise of the potential in one interval.

    It telescopes: the sum over a run is the final potential, so with a discount of 1 the
    return is the final quality (Ng et al. 1999; Wu et al. 2018 on why not to discount).
    """
    return potential(after, start) - potential(before, start)
