"""The curriculum: its stages, its one dial, and a resume across stages."""

from dataclasses import asdict

import numpy as np
import pytest
from pydantic import ValidationError

from envs.errors import BadInput
from envs.surrogate import SurrogateVectorEnv
from envs.vector import PackedVectorEnv
from tuner.curriculum import SIMULATED, TrainConfig, opened, plan_of
from tuner.train import done, train


@pytest.fixture
def config(tiny_task):
    fields = {k: v for k, v in asdict(tiny_task()).items() if k not in ("steps", "interval")}

    def make(**changes):
        base = {
            "tasks": ({**fields, "dataset": str(fields["dataset"])},), "iterations": 4,
            "budget": "", "episodes": 1, "envs": 2, "group": 2, "workers": 0, "pack": 2, "steps": 8,
            "interval": 2, "surrogate": 0.5,
        }  # fmt: skip
        return TrainConfig(**(base | changes))

    return make


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("", 0)])
def test_a_budget_is_a_time(text, seconds):
    assert TrainConfig(budget=text).seconds == seconds


@pytest.mark.parametrize("text", ["10", "m", "-3m", "0s", "1d", "ten minutes", "1.2.3m"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValidationError, match="not a time; give one as 90s, 10m or 2h"):
        TrainConfig(budget=text)


def test_stages_follow_the_share_that_is_done(config):
    plain = config(surrogate=0.25)
    assert [plain.stage(s) for s in (0, 0.24, 0.25, 1)] == ["surrogate"] * 2 + [
        "tasks", "tasks",
    ]  # fmt: skip
    both = config(surrogate=0.25, larger=("trec6/tiny-64",), last=0.3)
    assert [both.stage(s) for s in (0.1, 0.5, 0.69, 0.7, 1)] == [
        "surrogate", "tasks", "tasks", "larger", "larger",
    ]  # fmt: skip
    rows = [{"seconds": 30.0}] * 2
    assert done(config(), rows) == 0.5
    assert done(config(budget="2m", iterations=0), rows) == 0.5
    assert done(config(budget="80s"), rows) == 0.75


def test_settings_that_do_not_go_together_are_refused(config):
    for bad, problem in (
        ({"iterations": 0}, "budget, iterations: both empty"),
        ({"envs": 3, "workers": 2}, "3 do not share out over 2 workers"),
        ({"tasks": ()}, "tasks: none given"),
    ):
        with pytest.raises(BadInput, match=problem):
            config(**bad).check()
    with pytest.raises(BadInput, match="batches, horizons: none given"):
        config(batches=()).relatives(0)


def test_environments_of_a_pack_share_batch_and_horizon(config):
    settings = config(envs=8, batches=(4, 8), horizons=(1.0, 2.0), steps=8, interval=2)
    seen = [(t.batch, t.interval, t.steps) for i in range(8) for t in settings.relatives(i)]
    assert seen == [(4, 2, 8)] * 2 + [(8, 2, 8)] * 2 + [(4, 4, 16)] * 2 + [(8, 4, 16)] * 2
    assert {task.decisions for i in range(8) for task in settings.relatives(i)} == {4}


def test_each_stage_has_environments_of_its_own(config):
    settings = config(larger=config().tasks)
    with opened(settings, plan_of(settings)) as curriculum:
        simulated, real, larger = map(curriculum.envs, ("surrogate", "tasks", "larger"))
        assert isinstance(simulated.env, SurrogateVectorEnv)
        assert simulated.num_envs == SIMULATED
        assert isinstance(real.env, PackedVectorEnv)
        assert larger is not real
        assert curriculum.envs("tasks") is real
        assert simulated.single_action_space == real.single_action_space


def test_a_switch_of_the_optimizer_is_learned_on_classification_alone(config, tmp_path):
    settings = config(optimizers=("sgd", "rmsprop"), iterations=2)
    actions = settings.actions()
    switch = [actions.label(action) for action in range(actions.size)].index("rmsprop")
    with opened(settings, plan_of(settings)) as curriculum:
        for stage in ("surrogate", "tasks"):
            envs = curriculum.envs(stage)
            envs.reset(seed=0)
            *_, info = envs.step(np.full(envs.num_envs, switch))
            assert "rmsprop" in info["optimizer"]  # not of those that diverged and began anew
    assert train(settings, tmp_path).manifest.actions == actions
    for bad, problem in (
        ({"larger": ("dpo",)}, "optimizers: .*dpo.* has a Trainer's optimizer, which cannot be"),
        ({"view": "continuous"}, "optimizers: only the discrete view"),
    ):
        with pytest.raises(BadInput, match=problem):
            config(optimizers=("sgd",), **bad).check()


@pytest.mark.parametrize("agent", ["ppo", "dqn", "sarsa"])
def test_a_training_cut_off_between_stages_resumes_to_the_same_artifact(config, tmp_path, agent):
    whole = train(config(agent=agent), tmp_path / "whole")
    for stop in (1, 2, 3):

        def cut(share, row, stop=stop):
            if row["iteration"] + 1 == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(config(agent=agent), tmp_path / "cut", cut)
    resumed = train(config(agent=agent), tmp_path / "cut")
    assert all(np.array_equal(whole.arrays[n], resumed.arrays[n]) for n in whole.arrays)
    lines = (tmp_path / "cut" / "train.jsonl").read_text().splitlines()
    assert ['"surrogate"' in line for line in lines] == [True, True, False, False]
