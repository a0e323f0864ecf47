"""Vector environments: many fine-tuning environments stepped together, in packs."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from envs.env import FineTuneEnv, MakeJob
from envs.errors import BadInput
from envs.hardware import Plan
from envs.lockstep import Lockstep

MakeEnv = Callable[[MakeJob], FineTuneEnv]
Start = tuple[NDArray[np.float32], dict[str, Any]]  # of an episode: observation and info


class Step(NamedTuple):
    """What one environment answers to an action; ``start`` is the next episode's, if one ended."""

    observation: NDArray[np.float32]
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]
    start: Start | None


class EachVectorEnv(VectorEnv):
    """A VectorEnv whose environments answer one by one, with ``AutoresetMode.SAME_STEP``.

    At the end of an episode the observation is the next one's first; the last one of the old
    episode is in ``info["final_obs"]``, its info in ``info["final_info"]``.
    """

    def __init__(self, some: FineTuneEnv, count: int) -> None:
        self.num_envs = count
        self.metadata = {**some.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = some.observation_space
        self.single_action_space = some.action_space
        self.observation_space = batch_space(self.single_observation_space, count)
        self.action_space = batch_space(self.single_action_space, count)

    @abstractmethod
    def reset_each(self, seeds: Sequence[int | None], options: dict[str, Any]) -> list[Start]:
        """Begin an episode in every environment."""

    @abstractmethod
    def step_each(self, actions: NDArray[Any]) -> list[Step]:
        """One step of every environment, and the next episode's start where one ended."""

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:  # fmt: skip
        """Reset all. seed: of the first environment, the others count on; or one for each."""
        if seed is None or isinstance(seed, int | np.integer):
            seeds = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise BadInput(f"reset: {len(seeds)} seeds for {self.num_envs} environments")
        infos: dict[str, Any] = {}
        starts = self.reset_each(seeds, options or {})
        for number, (_, info) in enumerate(starts):
            infos = self._add_info(infos, info, number)
        return np.stack([observation for observation, _ in starts]), infos

    def step(
        self, actions: Any
    ) -> tuple[
        NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_],
        dict[str, Any],
    ]:  # fmt: skip
        """Step all. Raises `BadInput` on an invalid action."""
        infos: dict[str, Any] = {}
        seen, steps = [], self.step_each(np.asarray(actions))
        for number, step in enumerate(steps):
            observation, info = step.observation, step.info
            if step.start is not None:
                final = {"final_obs": observation, "final_info": info}
                infos = self._add_info(infos, final, number)
                observation, info = step.start
            infos = self._add_info(infos, info, number)
            seen.append(observation)
        return (
            np.stack(seen),
            np.array([step.reward for step in steps]),
            np.array([step.terminated for step in steps]),
            np.array([step.truncated for step in steps]),
            infos,
        )


class PackedVectorEnv(EachVectorEnv):
    """Environments whose fine-tuning runs are computed together in packs.

    makes: one for each environment; called with what opens its jobs. Environments share a pack if
    their tasks are of one `envs.packed.Family`. Each owns its generators, so an episode is the
    same whichever others run beside it, up to rounding.
    """

    def __init__(self, makes: Sequence[MakeEnv], lockstep: Lockstep) -> None:
        self._lockstep = lockstep
        self.envs = [make(lockstep.open) for make in makes]
        super().__init__(self.envs[0], len(self.envs))

    def reset_each(self, seeds: Sequence[int | None], options: dict[str, Any]) -> list[Start]:
        """Begin an episode in every environment; first scores are computed together."""
        return self._lockstep.run(
            [
                partial(env.reset, seed=seed, options=dict(options))
                for env, seed in zip(self.envs, seeds, strict=True)
            ]
        )

    def step_each(self, actions: NDArray[Any]) -> list[Step]:
        """One step of every environment; updates and scores are computed together."""
        pairs = zip(self.envs, actions, strict=True)
        return self._lockstep.run([partial(_step, env, action) for env, action in pairs])


def packed(
    num_envs: int = 1, *, pack: int = 8, compiled: bool = False, **settings: Any
) -> PackedVectorEnv:
    """Environments of one kind in packs: what ``gymnasium.make_vec`` calls.

    pack: runs computed in one batched model; settings: of `FineTuneEnv`.
    """
    if num_envs < 1:
        raise BadInput(f"environments: num_envs: {num_envs!r} is not a count; give at least 1")
    plan = Plan("cuda" if torch.cuda.is_available() else "cpu", pack, compiled=compiled)
    makes = [lambda make_job: FineTuneEnv(**settings, make_job=make_job)] * num_envs
    return PackedVectorEnv(makes, Lockstep(plan))


def _step(env: FineTuneEnv, action: Any) -> Step:
    observation, reward, terminated, truncated, info = env.step(action)
    start = env.reset() if terminated or truncated else None
    return Step(observation, reward, terminated, truncated, info, start)
