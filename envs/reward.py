"""Rewards: what the tuner is paid for."""

import math

CEILING = 1.0  # nats of log loss above the start at which a run counts as diverged
PENALTY = 1.0  # extra cost of divergence, on the scale of the return


def potential(loss: float, start: float) -> float:
    """Quality of a validation loss: -log(loss / start), bounded below by -CEILING.

    Both losses in nats, start > 0. Not finite, or missing: the lower bound.
    """
    if not (math.isfinite(loss) and math.isfinite(start) and start > 0):
        return -CEILING
    return max(-CEILING, -math.log(max(loss, 1e-4) / start))


def log_gain(before: float, after: float, start: float) -> float:
    """Improvement of the validation loss in one interval, in nats.

    It telescopes: the sum over a run is the final potential, so with a discount of 1 the
    return is the final quality (Ng et al. 1999; Wu et al. 2018 on why not to discount).
    """
    return potential(after, start) - potential(before, start)
