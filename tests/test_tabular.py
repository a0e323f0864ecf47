"""Q-learning and SARSA against value iteration on a small known MDP."""

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from tuner.tabular import TabularAgent, TabularConfig, q_learning, sarsa

# A corridor of 5 cells, start in the middle. Right pays 1 at the end, left 0.3; each step costs
# 0.02 and slips to the other side with probability 0.2. Action 2 waits. 12 steps at most.
CELLS, SLIP, COST = 5, 0.2, 0.02
FEATURES = ("cell", "late")


class Corridor(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-5, 5, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = 2
        return self._see(), {}

    def step(self, action):
        move = {0: -1, 1: 1, 2: 0}[int(action)]
        if move and self.np_random.random() < SLIP:
            move = -move
        self.cell += move
        over = self.cell in (0, CELLS - 1)
        reward = {0: 0.3, CELLS - 1: 1.0}.get(self.cell, 0.0) - COST
        return self._see(), reward, over, False, {}

    def _see(self):
        return np.array([self.cell, 0.0], dtype=np.float32)


def value_iteration():
    """Q*(cell, action) of the corridor, discount 1."""
    table = np.zeros((CELLS, 3))
    for _ in range(500):
        value = table.max(1)
        value[[0, CELLS - 1]] = 0.0
        for cell in range(1, CELLS - 1):
            for action, move in ((0, -1), (1, 1), (2, 0)):
                outcomes = [(1 - SLIP, move), (SLIP, -move)] if move else [(1.0, 0)]
                table[cell, action] = sum(
                    p * ({0: 0.3, CELLS - 1: 1.0}.get(cell + m, 0.0) - COST + value[cell + m])
                    for p, m in outcomes
                )
    return table


def learned(target, explore_to, iterations=400):
    config = TabularConfig(
        episodes=5,
        explore_to=explore_to,
        floor=0.002,
        power=0.75,
        bins=(("cell", (0.5, 1.5, 2.5, 3.5)), ("late", (1.0,))),
    )
    agent = TabularAgent(target, 3, 2, config, features=FEATURES)
    envs = SyncVectorEnv([Corridor] * 4, autoreset_mode=AutoresetMode.SAME_STEP)
    for i in range(iterations):
        agent.learn(envs, seed=i, share=i / iterations)
    return agent, agent.table.reshape(5, 2, 3)[:, 0]


@pytest.mark.parametrize("target", [q_learning, sarsa])
def test_learns_the_optimal_values(target):
    # SARSA's values are those of its own exploring policy; they become optimal as that ends.
    agent, table = learned(target, explore_to=0.3 if target is q_learning else 0.0)
    truth = value_iteration()
    inner = slice(1, CELLS - 1)
    tolerance = 0.05 if target is q_learning else 0.08
    assert np.abs(table[inner].max(1) - truth[inner].max(1)).max() < tolerance
    assert (table[inner].argmax(1) == truth[inner].argmax(1)).all()
    assert agent.visits.sum() > 1000


def test_q_learning_is_off_policy_and_sarsa_is_not():
    _, greedy = learned(q_learning, explore_to=0.6)
    _, exploring = learned(sarsa, explore_to=0.6)
    truth = value_iteration()[2].max()
    assert abs(greedy[2].max() - truth) < 0.06
    assert exploring[2].max() < truth - 0.05  # it values its own blunders


def test_targets_differ_in_one_term():
    table = np.array([[0.0, 2.0], [1.0, -1.0]])
    assert q_learning(table, 0.5, 0, 0) == 2.5
    assert sarsa(table, 0.5, 0, 0) == 0.5
    assert sarsa(table, 0.5, 0, 1) == 2.5


def test_same_seed_same_table_and_state_round_trip():
    first, second = learned(sarsa, 0.1, 20)[0], learned(sarsa, 0.1, 20)[0]
    assert np.array_equal(first.table, second.table)
    second.load(first.state())
    assert np.array_equal(first.visits, second.visits)


def test_unvisited_pairs_are_never_chosen():
    agent, _ = learned(q_learning, 0.1, 3)
    agent.visits[:, 2] = 0
    agent.table[:, 2] = 99.0
    _, arrays = agent.network()
    assert not (arrays["table"][..., 2] == arrays["table"].max()).any()


def test_in_a_state_never_met_the_rate_is_kept():
    agent, _ = learned(q_learning, 0.1, 3)
    agent.visits[7] = 0
    _, arrays = agent.network()
    assert arrays["table"].reshape(-1, 3)[7].argmax() == agent.keep
