"""Several agents at the knobs of one job: the environment, and learners with known answers."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from envs.env import FineTuneEnv
from envs.errors import BadInput
from envs.hands import decode_many
from envs.knobs import KEEP, Actions, Decision, decode
from envs.observe import FEATURES, SIZE
from tuner.agent import Normaliser
from tuner.sb3 import PPOAgent, PPOConfig
from tuner.tabular import TabularAgent, TabularConfig, q_learning, together

JOINT = Actions(
    "joint", (0.3, 1.0, 3.0), turns=(("weight_decay", 0.3), ("weight_decay", 3.0), ("clip", 0.3))
)


def test_the_joint_view_is_one_choice_for_each_knob():
    assert {name: len(choices) for name, choices in JOINT.seats.items()} == {
        "rate": 4, "weight_decay": 3, "clip": 2,
    }  # fmt: skip
    assert decode(np.array([1, 0, 0]), JOINT) == KEEP
    wish = Decision(3.0, turns=(("weight_decay", 3.0), ("clip", 0.3)))
    assert decode([2, 2, 1], JOINT) == wish
    assert decode([3, 1, 0], JOINT) == Decision(rollback=True, turns=(("weight_decay", 0.3),))
    switching = Actions("joint", optimizers=("sgd",))
    assert decode([3, 1], switching) == Decision(optimizer="sgd")
    assert decode_many(np.array([[2, 2, 1], [1, 0, 0]]), JOINT, 2).change.tolist() == [3.0, 1.0]
    for bad in ([1, 0], [4, 0, 0], [0, 0, -1], [0.0, 0.0, 0.0], 1, None):
        with pytest.raises(BadInput, match=r"^action: .*give 3 whole"):
            decode(bad, JOINT)


def test_agents_and_one_hand_turn_the_same_job(tiny_task):
    """The parallel environment's API, and its numbers against the environment's own."""
    testing = pytest.importorskip("pettingzoo.test")
    from envs.agents import KnobsParallelEnv

    env = KnobsParallelEnv(FineTuneEnv(tiny_task(), actions=JOINT))
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step({})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        testing.parallel_api_test(env, num_cycles=12)
    other = FineTuneEnv(tiny_task(), actions=JOINT)
    shown, infos = env.reset(seed=4, options={"rate": 1e-3})
    seen, info = other.reset(seed=4, options={"rate": 1e-3})
    assert shown["clip"][-1] == -1.0
    assert shown["rate"][-1] == pytest.approx(-1 / 3)  # of four choices the second keeps
    assert infos["rate"] == info
    while env.agents:
        shown, rewards, ends, _, _ = env.step({"rate": 1, "weight_decay": 2, "clip": 1})
        seen, reward, over, _, _ = other.step([1, 2, 1])
        assert set(rewards.values()) == {reward}
        assert set(ends.values()) == {over}
        for name, last in (("rate", -1 / 3), ("weight_decay", 1.0), ("clip", 1.0)):
            np.testing.assert_array_equal(shown[name][:SIZE], seen)
            assert shown[name][-1] == pytest.approx(last)
            assert env.observation_space(name).contains(shown[name])
    assert other._job.knobs.weight_decay == pytest.approx(0.081)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step({})
    with pytest.raises(BadInput, match="none of clip"):
        env.reset(seed=4), env.step({"rate": 1, "weight_decay": 2})
    for bad in (np.nan, None, 1.9, 2, -1, "1"):
        with pytest.raises(BadInput, match=r"^action: clip: .* is no choice; give Discrete\(2\)"):
            env.step({"rate": 1, "weight_decay": 2, "clip": bad})
    with pytest.raises(BadInput, match="joint"):
        KnobsParallelEnv(FineTuneEnv(tiny_task()))


def test_a_seat_of_one_choice_shows_it(tiny_task):
    pytest.importorskip("pettingzoo")
    from envs.agents import KnobsParallelEnv

    actions = Actions("joint", (1.0,), rollback=False, turns=(("clip", 0.3),))
    env = KnobsParallelEnv(FineTuneEnv(tiny_task(), actions=actions))
    shown, _ = env.reset(seed=4)
    assert shown["rate"][-1] == -1.0
    shown, *_ = env.step({"rate": 0, "clip": 1})
    assert shown["rate"][-1] == -1.0
    assert env.observation_space("rate").contains(shown["rate"])


class Bandit(gymnasium.Env):
    """Each knob has one right choice, and each right one pays alike, whatever the others do."""

    observation_space = gymnasium.spaces.Box(-5, 5, (SIZE,), np.float32)
    right = np.array([2, 1, 1])

    def __init__(self):
        self.action_space = JOINT.space()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(SIZE, np.float32), {}

    def step(self, action):
        return np.zeros(SIZE, np.float32), float((action == self.right).sum()), True, False, {}


def bandits():
    return SyncVectorEnv([Bandit] * 16, autoreset_mode=AutoresetMode.SAME_STEP)


def test_independent_q_learners_each_find_their_right_choice():
    envs, config = bandits(), TabularConfig(episodes=2)
    agents = [TabularAgent(q_learning, len(choices), 0, config) for choices in JOINT.seats.values()]
    for number in range(20):
        together(agents, envs, seed=number, share=number / 20)
    state = agents[0].states(np.zeros((1, len(FEATURES)), np.float32))
    assert [int(agent.table[state][0].argmax()) for agent in agents] == Bandit.right.tolist()


def test_one_network_with_a_head_for_each_knob_finds_them_too():
    envs = bandits()
    look = Normaliser(np.zeros(SIZE, np.float32), np.ones(SIZE, np.float32))
    agent = PPOAgent(envs, 1, look, PPOConfig(rate=1e-2), keep=[1, 4, 7])
    for number in range(15):
        agent.learn(envs, number, number / 15)
    found, _ = agent._model.predict(np.zeros(SIZE, np.float32), deterministic=True)
    assert found.tolist() == Bandit.right.tolist()
