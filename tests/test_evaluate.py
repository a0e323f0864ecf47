"""The tuner as a contestant, and the comparison end to end on tiny real runs."""

import json
from dataclasses import replace

import numpy as np
import pytest
from fakes import FakeJob
from test_method import MethodConformance
from test_policy import example

from baselines.compare import outcomes
from baselines.ledger import Ledger
from baselines.method import Arena
from baselines.optimizers import OPTIMIZERS
from envs.env import FineTuneEnv
from envs.errors import BadInput
from envs.job import TorchJob
from envs.task import TASKS, Task
from tuner import evaluate
from tuner.evaluate import (
    KNOWN,
    LEARNED,
    PolicyMethod,
    make_method,
    run_comparison,
    write_report,
)
from tuner.settings import CompareConfig


def quiet(number, total, words):
    pass


class TestOneSteeredRun(MethodConformance):
    @pytest.fixture
    def method(self):
        return PolicyMethod(example("ppo"))


class TestSeveralSteeredRuns(MethodConformance):
    @pytest.fixture
    def method(self):
        return PolicyMethod(example("ppo"), "best of 3", 3)


class Scripted:
    """A policy that takes given actions in turn, and is never out of range."""

    def __init__(self, actions):
        self.manifest, self.sha256 = example("ppo").manifest, "0" * 64
        self._actions, self.seen = iter(actions), []

    def act(self, observation):
        self.seen.append(np.array(observation))
        return next(self._actions)

    def outside(self, observation):
        return []


def test_a_contestant_sees_and_does_what_the_environment_does(tiny_task):
    """The same job through FineTuneEnv and through the arena: equal observations and rates."""
    task, rate, script = tiny_task(), 3e-3, [5, 3, 7, 1, 3]
    env = FineTuneEnv(task, spread=0.0)
    observation, _ = env.reset(seed=0, options={"rate": rate})
    seed = int(np.random.default_rng(0).integers(5))
    opened = []

    def same_job(task, _, knobs):
        opened.append(TorchJob(task, seed, knobs))
        return opened[-1]

    env = FineTuneEnv(task, spread=0.0, make_job=same_job)
    observation, _ = env.reset(seed=0, options={"rate": rate})
    seen, rates = [observation], []
    for action in script:
        observation, _, over, _, info = env.step(action)
        seen.append(observation)
        rates.append(info["rate"])
    assert over
    arena, policy = Arena(task, seed, rate, 9), Scripted(script)
    PolicyMethod(policy).run(arena)
    assert [point.rate for point in arena.trials[0].curve] == rates
    assert all(np.array_equal(a, b) for a, b in zip(policy.seen, seen[:-1], strict=True))


def test_a_contestant_may_switch_the_optimizer():
    policy, jobs = Scripted([8] + [3] * 9), []
    actions = replace(policy.manifest.actions, optimizers=("sgd",))
    policy.manifest = policy.manifest.model_copy(update={"actions": actions})

    def opened(task, seed, knobs):
        jobs.append(FakeJob(task, seed, knobs))
        return jobs[-1]

    PolicyMethod(policy).run(Arena(Task("trec6", steps=20, interval=2), 0, 1e-4, 9, opened))
    assert jobs[0].knobs.optimizer == "sgd"


def test_later_runs_start_near_where_the_best_ended():
    task = Task("trec6", steps=20, interval=2)
    starts = []

    def opened(task, seed, knobs):
        starts.append(knobs.rate)
        return FakeJob(task, seed, knobs)

    arena = Arena(task, 0, 1e-4, 9, opened)
    PolicyMethod(Scripted([5] + [3] * 29), runs=3).run(arena)
    assert starts[0] == 1e-4
    assert len({*starts, 3e-4}) == 4
    assert all(10**-0.3 <= start / 3e-4 <= 10**0.3 for start in starts[1:])


def test_a_run_after_one_that_switched_starts_in_the_first_optimizers_terms():
    policy, starts = Scripted(([8] + [3] * 9) * 2), []
    actions = replace(policy.manifest.actions, optimizers=("sgd",))
    policy.manifest = policy.manifest.model_copy(update={"actions": actions})

    def opened(task, seed, knobs):
        starts.append((knobs.optimizer, knobs.rate))
        return FakeJob(task, seed, knobs)

    arena = Arena(Task("trec6", steps=20, interval=2), 0, 1e-4, 9, opened)
    PolicyMethod(policy, runs=2).run(arena)
    assert arena.trials[0].ended.optimizer == "sgd"
    assert arena.trials[0].curve[0].decision == "sgd"
    assert [name for name, _ in starts] == ["adamw", "adamw"]
    assert 10**-0.3 <= starts[1][1] / 1e-4 <= 10**0.3


def test_a_comparison_end_to_end(tiny_task, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "tiny", replace(tiny_task()))
    config = CompareConfig(
        tasks=("tiny",), training=("tiny",), seeds=2, search_seeds=1, runs=3, workers=0, best_of=2,
        methods=("keep", "fixed", "list", "random"),
    )  # fmt: skip
    run_comparison(config, [example("ppo")], tmp_path, quiet)
    first = outcomes(Ledger(tmp_path / "ledger.sqlite"))
    counts = {
        name: sum(o["method"] == name for o in first) for name in {o["method"] for o in first}
    }
    assert counts == {"keep": 2, "steersman": 2, "fixed": 2, "list": 1, "random": 1,
                      "steersman best of 2": 1}  # fmt: skip
    assert len({(o["seed"], o["start_rate"]) for o in first}) == 2
    run_comparison(config, [example("ppo")], tmp_path, quiet)  # nothing is left to do
    assert repr(outcomes(Ledger(tmp_path / "ledger.sqlite"))) == repr(first)
    summary = write_report(tmp_path)
    assert summary["steered"] == "steersman"
    page = (tmp_path / "report.html").read_text()
    assert "steersman" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert json.loads((tmp_path / "summary.json").read_text())["cells"] == 2


@pytest.mark.parametrize("name", [name for name in KNOWN if name not in LEARNED])
def test_every_contestant_is_made_by_its_name(name):
    if name in OPTIMIZERS:
        pytest.importorskip({"schedule-free": "schedulefree", "prodigy": "prodigyopt"}[name])
    assert make_method(name).name == name


def test_unknown_methods_are_refused_with_the_nearest():
    with pytest.raises(BadInput, match="Did you mean 'tpe'"):
        make_method("tpee")
    with pytest.raises(BadInput):
        make_method("keep+hyperband")


def test_a_folder_without_a_comparison_has_no_report(tmp_path):
    with pytest.raises(BadInput, match="no comparison"):
        write_report(tmp_path)
    (tmp_path / "ledger.sqlite").touch()
    with pytest.raises(BadInput, match="no cell is finished"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"offsets": (9.0,)}, "offset: 9.0 is not in"),
        ({"tasks": ("tiny", "tiny")}, "is given twice"),
        ({"tasks": ({"dataset": "absent.csv"},)}, "absent.csv: file: not found"),
        ({"tasks": ({"dataset": 3},)}, "dataset: 3 is not a name"),
        ({"tasks": ({"dataset": [1], "text": 3},)}, r"dataset: \[1\] is not a name"),
        ({"tasks": ({"dataset": "trec6", "text": 3},)}, "text: 3 is not a name"),
    ],
)
def test_all_is_checked_before_the_best_setting_is_searched(
    tiny_task, tmp_path, monkeypatch, changes, said
):
    monkeypatch.setitem(TASKS, "tiny", tiny_task())
    monkeypatch.setattr(evaluate, "learn", lambda *given: pytest.fail("searched first"))
    config = CompareConfig(**{"tasks": ("tiny",), "methods": ("keep", "fixed")} | changes)
    with pytest.raises(BadInput, match=said):
        run_comparison(config, [], tmp_path / "out", quiet)
    assert not (tmp_path / "out").exists()
