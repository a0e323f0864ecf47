"""KnobsParallelEnv: one fine-tuning job whose knobs are turned by several agents, a knob each."""

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from pettingzoo import ParallelEnv

from envs.env import OPTIONS, FineTuneEnv
from envs.errors import BadInput
from envs.observe import LIMIT, SIZE

Observation = NDArray[np.float32]


class KnobsParallelEnv(ParallelEnv[str, Observation, Any]):
    """`FineTuneEnv` with the joint view of its actions as a PettingZoo parallel environment.

    Agents: the seats of ``env.actions`` (``Actions("joint", turns=...)``): ``rate``, and one for
        each further knob. They act at the same time, and all live as long as the episode.

    Observation: ``Box(-5, 5, (31,), float32)``: what `FineTuneEnv` shows, and the agent's own last
        choice, from -1 (the first, or the only one) to 1 (the last); before the first decision
        that of *keep*.

    Action: ``Discrete``: one of the seat's choices.

    Reward: `FineTuneEnv`'s, the same for all.

    Needs ``pettingzoo``. ``reset`` takes the options of `FineTuneEnv` and ignores others.
    """

    metadata = {"name": "knobs_v0", "render_modes": []}  # noqa: RUF012  (PettingZoo's own form)

    def __init__(self, env: FineTuneEnv) -> None:
        if env.actions.view != "joint":
            raise BadInput(
                f"agents: view: {env.actions.view!r} has one agent; give Actions('joint', ...)"
            )
        self._env, self._seats = env, env.actions.seats
        self.possible_agents = list(self._seats)
        self.agents: list[str] = []
        box = gymnasium.spaces.Box(-LIMIT, LIMIT, (SIZE + 1,), np.float32)
        self.observation_spaces = dict.fromkeys(self._seats, box)
        self.action_spaces = {
            name: gymnasium.spaces.Discrete(len(choices)) for name, choices in self._seats.items()
        }
        self.keep = {name: env.actions.keep if name == "rate" else 0 for name in self._seats}

    def observation_space(self, agent: str) -> gymnasium.Space[Any]:
        """The same for all."""
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> gymnasium.Space[Any]:
        """The agent's choices."""
        return self.action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Observation], dict[str, dict[str, Any]]]:
        """Start an episode."""
        known = {name: value for name, value in (options or {}).items() if name in OPTIONS}
        observation, info = self._env.reset(seed=seed, options=known)
        self.agents = list(self.possible_agents)
        return self._shown(observation, self.keep), self._all(info)

    def step(
        self, actions: Mapping[str, Any]
    ) -> tuple[
        dict[str, Observation], dict[str, float], dict[str, bool], dict[str, bool],
        dict[str, dict[str, Any]],
    ]:  # fmt: skip
        """Carry out all agents' choices and run one interval. Raises `BadInput` on a wrong one.

        Before `reset` and after the end it raises gymnasium's ``ResetNeeded``, as `FineTuneEnv`.
        """
        if not self.agents:
            raise gymnasium.error.ResetNeeded("no episode is running; call reset()")
        if missing := [name for name in self.agents if name not in actions]:
            raise BadInput(f"action: none of {', '.join(missing)}; give one for each agent")
        for name, space in self.action_spaces.items():
            if not space.contains(actions[name]):
                raise BadInput(f"action: {name}: {actions[name]!r:.60} is no choice; give {space}")
        joint = np.array([int(actions[name]) for name in self._seats])
        observation, reward, over, cut, info = self._env.step(joint)
        shown = self._shown(observation, dict(zip(self._seats, joint.tolist(), strict=True)))
        rewards = dict.fromkeys(self.agents, reward)
        ends, cuts = dict.fromkeys(self.agents, over), dict.fromkeys(self.agents, cut)
        infos = self._all(info)
        if over or cut:
            self.agents = []
        return shown, rewards, ends, cuts, infos

    def render(self) -> None:
        """There is nothing to draw."""

    def close(self) -> None:
        """The job goes with its environment."""
        self._env.close()

    def _shown(self, observation: Observation, last: Mapping[str, int]) -> dict[str, Observation]:
        """Each agent's observation: the one that all share, and its own last choice."""
        return {
            name: np.append(observation, np.float32(2 * last[name] / max(1, len(choices) - 1) - 1))
            for name, choices in self._seats.items()
        }

    def _all(self, info: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {name: dict(info) for name in self.possible_agents}
