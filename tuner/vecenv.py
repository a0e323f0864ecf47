"""A gymnasium VectorEnv as a stable-baselines3 VecEnv."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

Look = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class VectorAdapter(VecEnv):
    """Steps a VectorEnv made with ``AutoresetMode.SAME_STEP``; observations pass through ``look``.

    At the end of an episode the observation is the next episode's first, and the last one of the
    old episode is in ``info["terminal_observation"]``, as stable-baselines3 expects.
    """

    def __init__(self, envs: VectorEnv, look: Look, group: int = 1) -> None:
        """group: neighbours that are given the same seed, and so the same episodes."""
        self._envs, self.look, self._actions = envs, look, np.empty(0)
        self._group = group
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> NDArray[np.float32]:
        """Reset all, with the seed given to `seed` if one was given."""
        first, seeds = self._seeds[0], None  # type: int | None, Any
        if first is not None:
            seeds = [first + i // self._group for i in range(self.num_envs)]
        observations, _ = self._envs.reset(seed=seeds)
        self._reset_seeds()
        return self.look(observations)

    def step_async(self, actions: NDArray[Any]) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(
        self,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Step all environments."""
        observations, rewards, terminated, truncated, info = self._envs.step(self._actions)
        done = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(done):
            infos[i]["terminal_observation"] = self.look(info["final_obs"][i])
            infos[i]["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
        return self.look(observations), rewards.astype(np.float32), done, infos

    def close(self) -> None:
        """The VectorEnv belongs to its maker, who closes it."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The VectorEnv's own attribute, once per environment."""
        return [getattr(self._envs, attr_name, None)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Not offered: environments are configured when they are made."""
        raise AttributeError(f"{attr_name} cannot be set through the adapter")

    def env_method(self, method_name: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Not offered."""
        raise AttributeError(f"{method_name} cannot be called through the adapter")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> Sequence[bool]:
        """No environment is wrapped by stable-baselines3."""
        return [False] * len(list(self._get_indices(indices)))
