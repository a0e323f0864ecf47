"""Vector environments: packed ones against gymnasium's own, and workers that die."""

import os
import signal
from functools import partial

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from envs.env import FineTuneEnv
from envs.errors import BadInput, RunFailed
from envs.hardware import Plan
from envs.job import TorchJob
from envs.lockstep import Lockstep
from envs.vector import PackedVectorEnv
from envs.workers import WorkerVectorEnv


@pytest.fixture
def make(tiny_task):
    """Environments of two horizons: episodes of three and of five decisions."""
    tasks = (tiny_task(steps=12), tiny_task())
    return [partial(_env, tasks[number % 2]) for number in range(4)]


def _env(task, make_job):
    return FineTuneEnv(task, make_job=make_job)


def packed(makes):
    return PackedVectorEnv(makes, Lockstep(Plan("cpu", 4), classes=4))


def play(envs, steps, seed=0):
    """Random actions that raise no rate (a diverging run is chaotic); everything that was seen."""
    rng, seen = np.random.default_rng(0), [envs.reset(seed=seed)]
    for _ in range(steps):
        seen.append(envs.step(rng.choice([0, 1, 2, 3, 7], size=envs.num_envs)))
    envs.close()
    return seen


def test_a_packed_vector_environment_is_gymnasiums_own(make):
    """Observations, rewards, ends, next episodes and infos of a `SyncVectorEnv` of plain ones."""
    plain = SyncVectorEnv(
        [partial(m, TorchJob) for m in make], autoreset_mode=AutoresetMode.SAME_STEP
    )
    envs = packed(make)
    assert envs.observation_space == plain.observation_space
    assert envs.action_space == plain.action_space
    assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    for mine, theirs in zip(play(envs, 12), play(plain, 12), strict=True):
        for a, b in zip(mine[:-1], theirs[:-1], strict=True):
            np.testing.assert_allclose(a, b, atol=5e-3)
        info, wanted = mine[-1], theirs[-1]
        assert info.keys() == wanted.keys()
        assert info["task"].tolist() == wanted["task"].tolist()
        np.testing.assert_allclose(info["rate"], wanted["rate"], rtol=1e-6)
        if "final_obs" in wanted:
            assert info["_final_obs"].tolist() == wanted["_final_obs"].tolist()
            for i in np.flatnonzero(wanted["_final_obs"]):
                np.testing.assert_allclose(info["final_obs"][i], wanted["final_obs"][i], atol=5e-3)
            final = info["final_info"]["metric"], wanted["final_info"]["metric"]
            np.testing.assert_allclose(*final, atol=0.05)


def same(one, other):
    return all(
        np.array_equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x[:-1], y[:-1], strict=True)
    )


def workers(make, parts=2, size=2):
    makes = [partial(packed, make[i * size : (i + 1) * size]) for i in range(parts)]
    return WorkerVectorEnv(makes, make[0](TorchJob), size)


def test_the_same_seed_gives_the_same_episodes_bit_for_bit_here_and_in_workers(make):
    here, again, there = (play(envs, 7) for envs in (packed(make), packed(make), workers(make)))
    assert same(here, again)
    assert not same(here, play(packed(make), 7, seed=9))
    assert same(there, play(workers(make), 7))
    for a, b in zip(here, there, strict=True):
        np.testing.assert_allclose(a[0], b[0], atol=5e-3)


def test_gymnasium_makes_them_by_name(tiny_task):
    envs = gymnasium.make_vec("Steersman/FineTune-v0", num_envs=3, task=tiny_task(), pack=2)
    assert isinstance(envs.unwrapped, PackedVectorEnv)
    observations, _ = envs.reset(seed=1)
    assert envs.observation_space.contains(observations)
    plain = [gymnasium.make("Steersman/FineTune-v0", task=tiny_task()) for _ in range(3)]
    for seed, env in enumerate(plain, 1):
        np.testing.assert_allclose(env.reset(seed=seed)[0], observations[seed - 1], atol=1e-5)
    simulated = gymnasium.make_vec("Steersman/Surrogate-v0", num_envs=5)
    assert simulated.reset(seed=0)[0].shape == observations[:1].repeat(5, 0).shape
    with pytest.raises(BadInput, match="num_envs: 0 is not a count"):
        gymnasium.make_vec("Steersman/FineTune-v0", num_envs=0)


def test_a_worker_that_dies_is_replaced_and_its_episodes_are_truncated(make):
    def run():
        envs = workers(make)
        before, _ = envs.reset(seed=0)
        first = envs.step(np.full(4, 3))
        os.kill(envs._workers[1][0].pid, signal.SIGKILL)
        second = envs.step(np.full(4, 3))
        third = envs.step(np.full(4, 3))
        envs.close()
        return before, first, second, third

    _, first, second, third = run()
    observations, rewards, terminated, truncated, info = second
    assert truncated.tolist() == [False, False, True, True]
    assert not terminated.any()
    assert rewards[2:].tolist() == [0, 0]
    np.testing.assert_array_equal(info["final_obs"][2], first[0][2])
    assert info["final_info"]["reason"][2] == "worker died"
    assert (observations[2:, 0] == 0).all()  # a new episode: no progress yet
    assert (third[0][2:, 0] > 0).all()
    assert same([second, third], run()[2:])


def test_a_worker_that_cannot_live_ends_the_run(make):
    envs = workers(make)
    envs._makes[1] = partial(os._exit, 7)
    os.kill(envs._workers[1][0].pid, signal.SIGKILL)
    with pytest.raises(RunFailed, match=r"number 1 died 3 times \(exit code 7\)"):
        envs.reset(seed=0)
    envs.close()


def test_bad_input_in_a_worker_is_raised_here(make):
    envs = workers(make)
    envs.reset(seed=0)
    with pytest.raises(BadInput, match="action: 99 is out of range"):
        envs.step(np.full(4, 99))
    with pytest.raises(BadInput, match="2 seeds for 4 environments"):
        envs.reset(seed=[1, 2])
    envs.close()
