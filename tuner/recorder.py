"""Recorder: what the episodes of a vector environment brought, and what they looked like."""

import math
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper
from numpy.typing import NDArray


class Recorder(VectorWrapper):
    """Keeps returns, final metrics and divergences, and the range of every raw observation.

    Expects ``AutoresetMode.SAME_STEP``.
    """

    def __init__(self, envs: VectorEnv) -> None:
        super().__init__(envs)
        size = int(np.prod(envs.single_observation_space.shape or (1,)))
        self.low = np.full(size, math.inf)
        self.high = np.full(size, -math.inf)
        self.seen: list[NDArray[np.float32]] = []
        self.forget()
        self._sums = np.zeros(envs.num_envs)

    def forget(self) -> None:
        """Drop the episodes and observations; the ranges stay."""
        self.returns: list[float] = []
        self.metrics: list[float] = []
        self.decisions = self.divergences = 0
        self.seen = []

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        """Reset all; sums of unfinished episodes are dropped."""
        observations, info = self.env.reset(seed=seed, options=options)
        self._sums[:] = 0.0
        self._look(observations)
        return observations, info

    def step(self, actions: Any) -> Any:
        """Step all."""
        observations, rewards, terminated, truncated, info = self.env.step(actions)
        self._sums += rewards
        self.decisions += self.num_envs
        for i in np.flatnonzero(terminated | truncated):
            self.returns.append(float(self._sums[i]))
            final = info.get("final_info", {})
            if "metric" in final:
                self.metrics.append(float(final["metric"][i]))
                self.divergences += final["reason"][i] is not None
            self._look(info["final_obs"][i][None])
            self._sums[i] = 0.0
        self._look(observations)
        return observations, rewards, terminated, truncated, info

    def _look(self, observations: NDArray[np.float32]) -> None:
        self.low = np.minimum(self.low, observations.min(0))
        self.high = np.maximum(self.high, observations.max(0))
        self.seen.append(observations.copy())
