"""Training a tuner: all four agents, exact resume, and what the artifact says of it."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from envs.errors import BadInput
from envs.knobs import Actions
from envs.observe import FEATURES, SIZE
from envs.surrogate import SurrogateVectorEnv
from tuner import policy
from tuner.agent import Normaliser
from tuner.curriculum import TrainConfig
from tuner.imitation import lessons, teacher
from tuner.policy import PLACES
from tuner.recorder import Recorder
from tuner.sb3 import DQNAgent, DQNConfig, PPOAgent, PPOConfig, above_others
from tuner.tabular import TabularAgent, q_learning
from tuner.train import MUTE, train
from tuner.vecenv import VectorAdapter

AGENTS = ("ppo", "dqn", "q-learning", "sarsa")


@pytest.fixture
def config(tiny_task):
    fields = {k: v for k, v in asdict(tiny_task()).items() if k not in ("steps", "interval")}

    def make(**changes):
        base = {
            "tasks": ({**fields, "dataset": str(fields["dataset"])},),
            "iterations": 4,
            "episodes": 1,
            "envs": 2,
            "group": 2,
            "workers": 0,
            "pack": 2,
            "budget": "",
            "surrogate": 0.0,
            "length": 12,
            "validation": 48,
            "steps": 8,
            "interval": 2,
        }
        return TrainConfig(**(base | changes))

    return make


class Stopped(Exception):
    pass


def stop_after(count):
    def on_iteration(share, row):
        if row["iteration"] + 1 == count:
            raise Stopped

    return on_iteration


@pytest.mark.parametrize("agent", AGENTS)
def test_a_killed_training_resumes_to_the_same_artifact(config, tmp_path, agent):
    whole = train(config(agent=agent), tmp_path / "whole")
    for _ in range(2):  # cut off twice, and a third call finishes it
        with pytest.raises(Stopped):
            train(config(agent=agent), tmp_path / "cut", stop_after(_ + 2))
    resumed = train(config(agent=agent), tmp_path / "cut")
    for name, array in whole.arrays.items():
        assert np.array_equal(array, resumed.arrays[name]), name
    assert whole.manifest.features == resumed.manifest.features
    lines = (tmp_path / "cut" / "train.jsonl").read_text().splitlines()
    assert [f'{{"iteration": {i},' in line for i, line in enumerate(lines)] == [True] * 4
    assert policy.load(tmp_path / "cut" / "policy.safetensors").sha256 == resumed.sha256


def test_the_seed_matters_and_processes_do_not(config, tmp_path):
    here = train(config(iterations=2), tmp_path / "here")
    there = train(config(iterations=2, workers=2), tmp_path / "there")
    other = train(config(iterations=2, seed=1), tmp_path / "other")
    assert all(np.array_equal(here.arrays[n], there.arrays[n]) for n in here.arrays)
    assert not np.array_equal(here.arrays["layer0.weight"], other.arrays["layer0.weight"])


def test_another_configuration_is_refused_and_more_of_the_same_is_not(config, tmp_path):
    train(config(agent="sarsa", iterations=1), tmp_path)
    with pytest.raises(BadInput, match="another configuration"):
        train(config(agent="q-learning", iterations=1), tmp_path)
    train(config(agent="sarsa", iterations=2), tmp_path)
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 2


def test_rows_that_a_kill_cut_off_come_back_from_the_checkpoint(config, tmp_path):
    train(config(agent="sarsa", iterations=2), tmp_path)
    whole = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(whole.splitlines()[0] + "\n")
    train(config(agent="sarsa", iterations=2), tmp_path)
    assert (tmp_path / "train.jsonl").read_text() == whole


def test_a_damaged_checkpoint_is_refused(config, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 not one")
    with pytest.raises(BadInput, match="not a checkpoint"):
        train(config(), tmp_path)


def test_features_that_did_not_vary_are_mute(config, tmp_path):
    trained = train(config(iterations=1), tmp_path)
    features = {f.name: f for f in trained.manifest.features}
    assert features["parameters"].deviation == MUTE
    assert (features["parameters"].low, features["parameters"].high) == (-5.0, 5.0)
    assert features["progress"].deviation < 1
    seen = np.array([f.mean for f in trained.manifest.features], dtype=np.float32)
    larger = seen.copy()
    larger[[f.name for f in trained.manifest.features].index("parameters")] = 3.0
    assert np.allclose(trained.scores(seen), trained.scores(larger), atol=1e-4)
    assert trained.outside(larger) == []


def test_provenance_tells_where_it_came_from(config, tmp_path):
    provenance = train(config(iterations=2), tmp_path).manifest.provenance
    assert provenance["config"]["iterations"] == 2
    assert provenance["decisions"] == 2 * 2 * 4
    assert set(provenance["versions"]) == {"torch", "transformers", "gymnasium"}


def test_continuous_actions_are_for_ppo(config, tmp_path):
    trained = train(config(view="continuous", iterations=1), tmp_path)
    assert trained.act(np.zeros(30, dtype=np.float32)).shape == (2,)
    with pytest.raises(BadInput, match="acts discretely"):
        config(view="continuous", agent="dqn").actions()


class Signpost(gymnasium.Env):
    """One feature tells which of the actions pays; five decisions. Any agent must solve it."""

    observation_space = gymnasium.spaces.Box(-5, 5, (30,), np.float32)
    action_space = Actions().space()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 5
        return self._see(), {}

    def step(self, action):
        reward = float(int(action) == (1 if self.sign < 0 else 6))
        self.left -= 1
        return self._see(), reward, self.left == 0, False, {}

    def _see(self):
        self.sign = float(self.np_random.choice([-1.0, 1.0]))
        seen = np.zeros(30, dtype=np.float32)
        seen[3] = self.sign
        return seen


class Lottery(Signpost):
    """A signpost whose last reward is mostly the job's own luck."""

    def reset(self, *, seed=None, options=None):
        start = super().reset(seed=seed)
        self.luck = 100.0 * self.np_random.normal()
        return start

    def step(self, action):
        seen, reward, ended, cut, info = super().step(action)
        return seen, reward + self.luck * ended, ended, cut, info


def side_by_side(kind, count=8):
    return Recorder(SyncVectorEnv([kind] * count, autoreset_mode=AutoresetMode.SAME_STEP))


def test_an_episode_is_paid_what_it_earned_above_the_others_of_its_group():
    """Two groups of two; in the first an environment has ended one episode, the other two."""
    rewards = np.array([[1, 2, 0, 7], [1, 3, 5, 1], [4, 1, 6, 0]], np.float32)
    ends = np.array([[0, 1, 0, 0], [1, 0, 0, 1], [0, 1, 1, 0]], bool)
    expected = np.zeros((3, 4))
    expected[1, 0], expected[0, 1] = 2 - 2, 2 - 2  # first episodes: 1 + 1 and 2
    expected[1, 3], expected[2, 2] = 8 - 11, 11 - 8  # 7 + 1 and 0 + 5 + 6
    assert above_others(rewards, ends, 2) == pytest.approx(expected)
    assert not above_others(rewards, ends, 1).any()


def test_a_group_meets_the_same_jobs_whatever_it_does():
    torch.set_num_threads(1)
    adapter = VectorAdapter(side_by_side(Lottery), lambda seen: seen, group=4)
    adapter.seed(5)
    seen = [adapter.reset()]
    for step in range(12):
        adapter.step_async(np.arange(8) % 7 * (step % 2))
        seen.append(adapter.step_wait()[0])
    signs = np.array(seen)[:, :, 3]
    assert (signs[:, :4] == signs[:, :1]).all()
    assert (signs[:, 4:] == signs[:, 4:5]).all()
    assert (signs[:, 0] != signs[:, 4]).any()


@pytest.mark.parametrize("kind", ["ppo", "dqn", "lottery"])
def test_network_agents_solve_a_signpost(kind):
    torch.set_num_threads(1)
    envs = side_by_side(Lottery if kind == "lottery" else Signpost)
    normaliser = Normaliser(np.zeros(30, np.float32), np.ones(30, np.float32))
    if kind != "dqn":
        agent = PPOAgent(envs, 5, normaliser, PPOConfig(group=8 if kind == "lottery" else 1))
    else:
        agent = DQNAgent(envs, 5, normaliser, DQNConfig(target_interval=100))
    for i in range(25 if kind == "dqn" else 40):
        agent.learn(envs, seed=i, share=i / 25)
    network, arrays = agent.network()
    trained = policy.make(
        arrays=arrays, algorithm="dqn" if kind == "dqn" else "ppo", network=network,
        actions=Actions(), decisions=5, start_decades=1.5, provenance={},
        features=[{"name": f.name, "unit": f.unit, "mean": 0.0, "deviation": 1.0, "low": -1.0,
                   "high": 1.0} for f in FEATURES],
    )  # fmt: skip
    seen = np.zeros(30, dtype=np.float32)
    for sign, best in ((-1.0, 1), (1.0, 6)):
        seen[3] = sign
        assert trained.act(seen) == best


def test_imitation_teaches_the_way_to_the_best_rate(config):
    """By hand: it is left alone where it is good; within reach only."""
    actions = Actions(multipliers=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), rollback=False)
    seen = np.zeros((5, SIZE), np.float32)
    seen[:, PLACES["rate_vs_reference"]] = (-1.1, -0.1, 0.75, 1.25, 1.25)
    seen[4, PLACES["rate_vs_start"]] = -1.0  # half a decade is left
    expected = ["x10", "keep", "x0.1", "x0.03", "x0.3"]
    assert [actions.label(a) for a in teacher(seen, actions)] == expected
    torch.set_num_threads(1)
    envs = SurrogateVectorEnv(32, actions=actions)
    normaliser = Normaliser(np.zeros(SIZE, np.float32), np.ones(SIZE, np.float32))
    agent = PPOAgent(envs, 10, normaliser, PPOConfig(), actions.keep)
    assert agent.imitate(*lessons(actions, 10, 0), 0) > 0.9
    table = TabularAgent(q_learning, actions.size, actions.keep)
    table.imitate(*lessons(actions, 10, 0), 0)
    assert table.table[table.states(seen)].argmax(1)[:4].tolist() == [
        actions.multipliers.index(x) for x in (10.0, 1.0, 0.1, 0.03)
    ]
    row = int(table.states(seen)[0])
    half = -table.config.regret / 2
    assert table.table[row].max() > half  # the teacher's, of a cell in which it does not differ
    assert table.table[row].min() == -table.config.regret  # never shown
    with pytest.raises(BadInput, match="imitate"):
        config(agent="dqn", imitate=True).check()


def test_imitation_alone_is_a_policy_like_any_other(config, tmp_path):
    """It goes where the teacher goes, and is what PPO begins with."""
    actions = {"multipliers": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), "rollback": False}
    taught = train(config(agent="imitation", **actions), tmp_path / "taught")
    assert taught.manifest.algorithm == "imitation"
    assert taught.manifest.provenance["episodes"] == 0
    seen = np.zeros(SIZE, np.float32)
    chosen = []
    for decades in (-1.1, 0.0, 1.25):
        seen[PLACES["rate_vs_reference"]] = decades
        chosen.append(taught.manifest.actions.label(taught.act(seen)))
    assert chosen == ["x10", "keep", "x0.03"]
    assert (tmp_path / "taught" / "train.jsonl").read_text() == ""
    with pytest.raises(BadInput, match="another configuration"):
        train(config(agent="imitation"), tmp_path / "taught")
    begun = train(config(imitate=True, iterations=1, rate=1e-9, **actions), tmp_path / "begun")
    for name, array in taught.arrays.items():
        assert np.allclose(array, begun.arrays[name], atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("agent", AGENTS)
def test_fifty_kills_leave_the_same_artifact(config, tmp_path, agent):
    """kill -9 at random moments; each time the next process goes on."""
    settings = config(agent=agent, iterations=60)
    whole = train(settings, tmp_path / "whole")
    code = textwrap.dedent(f"""
        import torch; torch.set_num_threads(1)
        from pathlib import Path
        from tuner.curriculum import TrainConfig
        from tuner.train import train
        config = TrainConfig.model_validate_json({settings.model_dump_json()!r})
        train(config, Path({str(tmp_path / "killed")!r}))
    """)
    rng, kills = np.random.default_rng(0), 0
    while True:
        process = subprocess.Popen([sys.executable, "-c", code])
        if kills < 50:
            time.sleep(6 + 4 * rng.random())
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        if process.wait() == 0:
            break
    resumed = policy.load(tmp_path / "killed" / "policy.safetensors")
    assert all(np.array_equal(whole.arrays[n], resumed.arrays[n]) for n in whole.arrays)
    assert not [name for name in os.listdir(tmp_path / "killed") if name.endswith(".tmp")]
