"""Q-learning and SARSA over a binned observation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Discrete
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from envs.observe import FEATURES
from tuner.agent import Arrays, Network

Table = NDArray[np.float64]
Target = Callable[[Table, float, int, int], float]


def q_learning(table: Table, reward: float, state: int, action: int) -> float:
    """Reward + max_a Q(s', a): off-policy TD(0), discount 1 (Sutton & Barto 2018, eq. 6.8)."""
    return reward + float(table[state].max())


def sarsa(table: Table, reward: float, state: int, action: int) -> float:
    """Reward + Q(s', a'): on-policy TD(0), discount 1 (Sutton & Barto 2018, eq. 6.7)."""
    return reward + float(table[state, action])


@dataclass(frozen=True)
class TabularConfig:
    """Learning constants, and the features a state is made of with their bin edges."""

    episodes: int = 4  # of each environment in an iteration
    first_rate: float = 0.5  # step size of a pair's first update; falls as visits ** -power
    power: float = 0.6
    floor: float = 0.02
    explore_from: float = 1.0  # epsilon at the start, and at the end of the training
    explore_to: float = 0.05
    regret: float = 1.0  # what an action that was never shown is thought to cost
    lessons: int = 10  # updates that what was shown counts for
    # of the rate, where the lesson of `tuner.imitation` changes its mind under nine multipliers
    bins: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("rate_vs_reference", (-1.3, -0.8, -0.4, -0.2, -0.08, 0.03, 0.31, 0.7, 1.2)),
        ("progress", (0.05, 0.5)),
        ("validation_vs_best", (0.05,)),
    )


@dataclass
class TabularAgent:
    """A table Q(state, action), learned by temporal differences from epsilon-greedy episodes.

    target: `q_learning` or `sarsa`; nothing else tells the two apart.
    """

    target: Target
    actions: int
    keep: int  # the action of a state that was never met
    config: TabularConfig = TabularConfig()
    features: Sequence[str] = tuple(feature.name for feature in FEATURES)
    table: Table = field(init=False)
    visits: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self._columns = [list(self.features).index(name) for name, _ in self.config.bins]
        self._edges = [np.asarray(edges) for _, edges in self.config.bins]
        self._shape = tuple(len(edges) + 1 for edges in self._edges)
        states = int(np.prod(self._shape))
        self.table = np.zeros((states, self.actions))
        self.visits = np.zeros((states, self.actions), dtype=np.int64)

    def states(self, observations: NDArray[np.float32]) -> NDArray[np.intp]:
        """(environments, features) raw observations -> (environments,) rows of the table."""
        indices = [
            np.searchsorted(edges, observations[:, column], side="right")
            for column, edges in zip(self._columns, self._edges, strict=True)
        ]
        return np.asarray(np.ravel_multi_index(indices, self._shape))

    def imitate(
        self, observations: NDArray[np.float32], actions: NDArray[np.int64], seed: int
    ) -> None:
        """Begin with what a teacher did: (n, features) raw observations, (n,) actions."""
        shown = np.zeros_like(self.table)
        np.add.at(shown, (self.states(observations), actions), 1)
        met = shown.sum(1) > 0
        share = shown[met] / shown[met].sum(1, keepdims=True)
        self.table[met] = self.config.regret * (share - 1)
        self.visits[met] = self.config.lessons

    def learn(self, envs: VectorEnv, seed: int, share: float) -> dict[str, float]:
        """Some episodes in every environment, an update after each step."""
        return together([self], envs, seed, share)

    def network(self) -> tuple[Network, Arrays]:
        """The table with its bins; never-visited pairs stay below every visited one.

        In a state that was never met the policy keeps the rate.
        """
        values = np.where(self.visits > 0, self.table, self.table.min() - 1.0)
        values[self.visits.sum(1) == 0, self.keep] = self.table.min()
        bins = [{"feature": name, "edges": list(edges)} for name, edges in self.config.bins]
        array = values.reshape(*self._shape, self.actions).astype(np.float32)
        return {"kind": "table", "bins": bins}, {"table": array}

    def state(self) -> dict[str, Any]:
        """The table and the visits."""
        return {"table": torch.from_numpy(self.table), "visits": torch.from_numpy(self.visits)}

    def load(self, state: dict[str, Any]) -> None:
        """Take up a saved table."""
        self.table = state["table"].numpy().copy()
        self.visits = state["visits"].numpy().copy()

    def _choose(
        self, states: NDArray[np.intp], epsilon: float, rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """Epsilon-greedy, ties broken at random."""
        rows = self.table[states]
        greedy = (rows + 1e-9 * rng.random(rows.shape)).argmax(1)
        dice, random = rng.random(len(states)), rng.integers(self.actions, size=len(states))
        return np.asarray(np.where(dice < epsilon, random, greedy), dtype=np.int64)

    def _update(self, state: int, action: int, goal: float) -> float:
        self.visits[state, action] += 1
        size = self.config.first_rate * float(self.visits[state, action]) ** -self.config.power
        error = goal - self.table[state, action]
        self.table[state, action] += max(size, self.config.floor) * error
        return float(error)


def together(
    agents: "Sequence[TabularAgent]", envs: VectorEnv, seed: int, share: float
) -> dict[str, float]:
    """Some episodes in every environment; each agent learns from the reward that all share.

    Several agents, one for each seat of the joint view, learn independently: to each the others
    are part of the environment (Tan 1993).
    """
    config, rng = agents[0].config, np.random.default_rng(seed)
    epsilon = config.explore_from + (config.explore_to - config.explore_from) * min(
        1.0, share / 0.8
    )

    def choose(states: list[NDArray[np.intp]]) -> list[NDArray[np.int64]]:
        return [a._choose(s, epsilon, rng) for a, s in zip(agents, states, strict=True)]

    joint = not isinstance(envs.single_action_space, Discrete)
    observations, _ = envs.reset(seed=seed)
    state = [agent.states(observations) for agent in agents]
    action = choose(state)
    left = np.full(envs.num_envs, config.episodes)
    errors = []
    while left.any():
        taken = np.stack(action, 1) if joint else action[0]
        observations, rewards, terminated, truncated, _ = envs.step(taken)
        following = [agent.states(observations) for agent in agents]
        chosen = choose(following)
        for i in np.flatnonzero(left):
            if terminated[i] or truncated[i]:
                left[i] -= 1
            if truncated[i]:  # cut off from outside: neither an end nor a next state
                continue
            for k, agent in enumerate(agents):
                goal = float(rewards[i])
                if not terminated[i]:
                    after = int(following[k][i]), int(chosen[k][i])
                    goal = agent.target(agent.table, goal, *after)
                errors.append(abs(agent._update(int(state[k][i]), int(action[k][i]), goal)))
        state, action = following, chosen
    return {"epsilon": epsilon, "td_error": float(np.mean(errors)) if errors else 0.0}
