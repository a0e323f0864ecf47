"""Gauge: what a line of the Trainer's log says of the cost, where no loss can be seen."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

LEAST = 1e-3  # of 1 - reward, so that it has a logarithm


@dataclass
class Gauge:
    """The loss; but the reward where there is one, as with GRPO and RLOO: there it is no measure.

    ``1 - reward`` if the run's first reward is within [0, 1], else ``log(1 + exp(-reward))``. A
    line without one, as of an update that reuses completions, says nothing then.
    """

    bounded: bool | None = None  # rewards are within [0, 1]; None before the first
    rewarded: bool = False  # a line had a reward, be it None
    missed: bool = False  # one had None or NaN, and it was said
    exceeded: bool = False  # one was above 1 in a run whose first was not, and it was said

    def cost(self, logs: Mapping[str, Any], prefix: str = "") -> float | None:
        """Lower is better; None where the line has none. prefix: of the names in the line."""
        if f"{prefix}reward" not in logs:
            loss = None if self.rewarded else logs.get(f"{prefix}loss")
            return None if loss is None else float(loss)
        self.rewarded, given = True, logs[f"{prefix}reward"]
        if given is None or not math.isfinite(given):
            if not self.missed:
                logger.warning(
                    "reward: %s is the mean since the last line of the log: the tuner does not "
                    "know how the run does; let the reward functions return finite numbers",
                    given,
                )
            self.missed = True
            return None
        reward = float(given)
        if self.bounded is None:
            self.bounded = 0.0 <= reward <= 1.0
            if not self.bounded:
                logger.warning(
                    "reward: %.4g is outside [0, 1]: the tuner goes by log(1 + exp(-reward)), and "
                    "sees little of rewards far from 0; scale them to [0, 1]",
                    reward,
                )
        if self.bounded and reward > 1.0 + LEAST and not self.exceeded:
            self.exceeded = True
            logger.warning(
                "reward: %.4g is outside [0, 1], and the first was not: the tuner goes by "
                "1 - reward, and sees no difference above 1; scale them to [0, 1]",
                reward,
            )
        if self.bounded:
            return max(1.0 - reward, LEAST)
        return max(-reward, 0.0) + math.log1p(math.exp(-abs(reward)))
