"""The learners that are compared: evolution strategies, a network with a memory, other rewards."""

import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from safetensors.torch import save_file
from sb3_contrib.ppo_recurrent import MlpLstmPolicy

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import learners
import recurrent
from evolution import (
    EvolutionAgent,
    EvolutionConfig,
    centred_ranks,
    forward,
)

from envs.observe import SIZE, space
from tuner import policy
from tuner.agent import Normaliser
from tuner.sb3 import PPOConfig

PLAIN = Normaliser(np.zeros(2, np.float32), np.ones(2, np.float32))


class Lever(gymnasium.Env):
    """A cue is shown; after ``wait`` steps in the dark the action that it named is paid 1."""

    def __init__(self, wait):
        self.observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(3)
        self.wait, self.cue, self.left = wait, 0, 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.cue, self.left = int(self.np_random.integers(3)), self.wait
        return np.array([self.cue - 1, 1], np.float32), {}

    def step(self, action):
        self.left -= 1
        paid = float(self.left < 0 and action == self.cue)
        return np.zeros(2, np.float32), paid, self.left < 0, False, {}


def levers(count, wait):
    makes = [lambda: Lever(wait)] * count
    return SyncVectorEnv(makes, autoreset_mode=AutoresetMode.SAME_STEP)


def flat_start():
    rng, sizes = np.random.default_rng(0), [(8, 2), (3, 8)]
    start = {}
    for i, (out, inward) in enumerate(sizes):
        start[f"layer{i}.weight"] = 0.1 * rng.standard_normal((out, inward), dtype=np.float32)
        start[f"layer{i}.bias"] = np.zeros(out, np.float32)
    return start


def test_evolution_finds_which_lever_pays():
    agent = EvolutionAgent(flat_start(), PLAIN, EvolutionConfig(pairs=8))
    envs, rounds = levers(16 * 6, wait=0), 150
    returns = [agent.learn(envs, 1000 * i, i / rounds)["return"] for i in range(rounds)]
    assert returns[0] < 0.7
    described, arrays = agent.network()
    assert described["layers"] == [2, 8, 3]
    cues = np.array([[[-1, 1], [0, 1], [1, 1]]], np.float32)
    scores = forward({name: array[None] for name, array in arrays.items()}, cues)
    assert scores.argmax(-1).tolist() == [[0, 1, 2]]


def test_evolution_goes_on_from_its_state_as_if_never_stopped():
    envs, config = levers(8, wait=0), EvolutionConfig(pairs=4)
    whole, cut = (EvolutionAgent(flat_start(), PLAIN, config) for _ in range(2))
    for i in range(4):
        whole.learn(envs, i, i / 4)
    for i in range(2):
        cut.learn(envs, i, i / 4)
    other = EvolutionAgent(flat_start(), PLAIN, config)
    other.load(cut.state())
    for i in range(2, 4):
        other.learn(envs, i, i / 4)
    assert np.array_equal(whole.state()["weights"], other.state()["weights"])


def test_ranks_are_centred_and_ties_share_theirs():
    ranks = centred_ranks(np.array([3.0, -7.0, 100.0, 3.0]))
    assert ranks == pytest.approx([0, -0.5, 0.5, 0])


def test_what_evolution_learns_acts_the_same_as_a_policy_artifact():
    frame = policy.load(policy.DEFAULT)
    envs = learners.simulated(frame.manifest.actions, 64)
    agent = learners.make_agent(learners.Variant("evolution"), envs, frame, seed=0)
    agent.learn(envs, 0, 0.0)
    made = learners.artifact(learners.Variant("evolution"), agent, frame, {})
    assert made.manifest.algorithm == "evolution"
    seen = envs.reset(seed=5)[0]
    arrays = {name: array[None] for name, array in agent.network()[1].items()}
    scores = forward(arrays, learners.look_of(frame)(seen)[None])[0]
    assert np.allclose(scores, [made.scores(row) for row in seen], atol=1e-5)


@pytest.fixture
def method(tmp_path):
    frame = policy.load(policy.DEFAULT)
    actions = frame.manifest.actions
    torch.manual_seed(0)
    network = MlpLstmPolicy(space(), actions.space(), lambda _: 0.0, **recurrent.shape())
    with torch.no_grad():
        network.action_net.weight *= 100  # unlearned, it would always take one action
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    look = learners.look_of(frame)
    return recurrent.RecurrentMethod(tmp_path / "weights.safetensors", frame, look, "a")


def runs(count):
    rng = np.random.default_rng(3)
    return rng.uniform(-1, 1, (6, count, SIZE)).astype(np.float32)


def test_a_pilot_forgets_between_runs_and_remembers_within(method, monkeypatch):
    pilots, seen = [], runs(1)[:, 0]

    def steered(arena, pilot, start, mode):
        pilots.append(pilot)
        return [pilot.act(row) for row in seen]

    monkeypatch.setattr(recurrent, "steer", steered)

    class Arena:
        start_rate = 1e-3

    method.run(Arena())
    first = [each.copy() for each in pilots[0].memory.state]
    assert np.abs(first[0]).max() > 0
    method.run(Arena())
    assert all(np.array_equal(a, b) for a, b in zip(first, pilots[1].memory.state, strict=True))
    steered(None, pilots[1], 0, "")  # the same pilot on a second run, which no method does
    assert not np.allclose(first[0], pilots[1].memory.state[0])


def test_runs_together_are_remembered_apart(method):
    seen = runs(3)
    network = recurrent.network_of(method.path, method.frame.manifest.actions)
    together = recurrent.Memory(network, method.look)
    acted = np.array([together(rows) for rows in seen])
    alone = [method.pilot() for _ in range(3)]
    assert acted.tolist() == [[p.act(o) for p, o in zip(alone, rows, strict=True)] for rows in seen]
    assert len(np.unique(acted)) > 1


@pytest.mark.slow
def test_a_network_with_a_memory_learns_what_needs_one():
    envs = levers(64, wait=2)
    agent = recurrent.RecurrentAgent(
        envs, 3, PLAIN, PPOConfig(episodes=2, rate=3e-3, group=4, restraint=0.0), keep=0
    )
    for i in range(60):
        agent.learn(envs, 1000 * i, i / 60)
    act, paid = recurrent.Memory(agent.model.policy, PLAIN), np.zeros(64)
    seen = envs.reset(seed=10**6)[0]
    for _ in range(3):
        seen, rewards, *_ = envs.step(act(seen))
        paid += rewards
    assert paid.mean() > 0.9  # without a memory a third


@pytest.mark.parametrize("lowest", [False, True])
def test_paid_at_the_end_is_the_last_sum_or_the_highest(lowest):
    envs = learners.simulated(policy.load(policy.DEFAULT).manifest.actions, 8)
    late = learners.AtTheEnd(learners.simulated(envs.actions, 8), lowest)
    envs.reset(seed=0)
    late.reset(seed=0)
    rng, earned, differ, over = np.random.default_rng(0), [[] for _ in range(8)], 0, 0
    for _ in range(25):
        actions = rng.integers(envs.actions.size, size=8)
        _, rewards, ended, _, _ = envs.step(actions)
        _, paid, _, _, _ = late.step(actions)
        for i in range(8):
            earned[i].append(rewards[i])
            sums = np.cumsum(earned[i])
            wanted = sums.max() if lowest else sums[-1]
            assert paid[i] == pytest.approx(wanted if ended[i] else 0)
            if ended[i]:
                over, differ, earned[i] = over + 1, differ + (sums.max() > sums[-1] + 0.01), []
    assert over >= 16
    assert differ > 0


def test_a_difference_is_known_no_better_than_its_agents_agree():
    base = np.array([[0.0, 0.2], [0.2, 0.4]])  # means 0.1 and 0.3
    mine = np.array([[0.5, 0.7], [0.5, 0.7]])
    assert learners.paired(mine, base) == {"gain": 0.4, "standard_error": 0.1}
