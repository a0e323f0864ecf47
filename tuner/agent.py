"""Agents: what learns a policy, behind one protocol."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

Network = dict[str, Any]
Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Normaliser:
    """Mean and deviation of each feature, frozen before learning starts."""

    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]

    def __call__(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        """(..., features) raw -> normalised, clipped to [-10, 10]."""
        scaled = (observation - self.mean) / self.deviation
        return np.clip(scaled, -10.0, 10.0).astype(np.float32)


class Agent(Protocol):
    """A learner. One call of `learn` is a pure function of its state, the seed and the share.

    That is what makes a resume exact: an iteration starts with fresh episodes and leaves
    nothing behind but `state`.
    """

    def learn(self, envs: VectorEnv, seed: int, share: float) -> dict[str, float]:
        """One iteration on freshly reset environments. share: of the training done, 0 to 1."""

    def network(self) -> tuple[Network, Arrays]:
        """What the artifact holds: the network's description and its arrays."""

    def state(self) -> dict[str, Any]:
        """Everything that learning needs, as tensors, numbers, lists and dicts."""

    def load(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
