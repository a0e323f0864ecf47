"""Ray Tune's contestants: what is behind a trial without Ray, and then with it."""

import json
import math
import os
import random
import signal
import statistics
from dataclasses import asdict
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest
from fakes import OPTIMUM, TASK, FakeJob, no_data
from test_method import MethodConformance, Recorder, ended

from baselines.compare import compare
from baselines.identity import describe
from baselines.method import Arena, BudgetSpent, run_cost
from baselines.population import POPULATIONS, Asha, Herd, Pbt, knobs_of, space_of
from baselines.search import NO_DECAY, Search
from envs.errors import BadInput
from envs.knobs import OPTIMIZERS, RATE_CEILING, SHAPES, reference_rate

DRAWN = {
    "rate": OPTIMUM, "shape": "constant", "warmup": 0.0, "weight_decay": NO_DECAY / 2,
    "head_rate": 1.0, "optimizer": "adamw",
}  # fmt: skip
INTERVAL = run_cost(TASK) / TASK.decisions
pytest.importorskip("ray")


def off(knobs):
    """How many decades the rate is from the best one."""
    ruler = [reference_rate(1, name, "full") for name in ("adamw", knobs.optimizer)]
    return abs(math.log10(knobs.rate * ruler[0] / ruler[1] / OPTIMUM))


def drawn(rate=1.0, **others):
    """A point of the space; the rate in multiples of the best."""
    return DRAWN | {"rate": rate * OPTIMUM} | others


@pytest.fixture(autouse=True)
def _no_data(request, monkeypatch):
    if "tiny_task" not in request.fixturenames:
        no_data(monkeypatch)


@pytest.fixture
def herd():
    return Herd(Arena(TASK, 0, 1e-3, 4, FakeJob), 2)


def test_the_space_is_that_of_search():
    """Each draw of Optuna lies in the bounds, and makes the same knobs here."""
    space = space_of(TASK)
    assert space["rate"] == ("loguniform", *(pytest.approx(OPTIMUM * 10**d) for d in (-1.5, 1.5)))
    assert space["shape"] == ("choice", SHAPES)
    assert space["warmup"] == ("uniform", 0.0, 0.2)
    assert space["optimizer"] == ("choice", OPTIMIZERS)
    assert list(space) == ["rate", "shape", "warmup", "weight_decay", "optimizer", "head_rate"]
    arena = ended(Search(), Arena(TASK, 0, 1e-3, 5, FakeJob))
    for trial in arena.trials:
        knobs = trial.knobs
        ruler = [reference_rate(1, name, "full") for name in ("adamw", knobs.optimizer)]
        point = asdict(knobs) | {"rate": knobs.rate * ruler[0] / ruler[1]}
        assert asdict(knobs_of(TASK, point)) == pytest.approx(asdict(knobs))


def test_a_rate_that_was_perturbed_beyond_what_trains_is_held():
    assert knobs_of(TASK, drawn(1e9)).rate == RATE_CEILING


def test_an_interval_is_scored_charged_and_noted(herd):
    herd.settle("a", drawn(3.0))
    score, done = herd.advance("a")
    assert not done
    arena = herd._arena
    assert arena.budget.spent == pytest.approx(INTERVAL)
    herd.close("a")
    (trial,) = arena.trials
    assert (trial.state, trial.steps, trial.spent) == ("pruned", 2, arena.budget.spent)
    assert trial.selection == score == trial.curve[0].selection
    assert trial.knobs == knobs_of(TASK, drawn(3.0))
    assert not math.isnan(trial.test)


def test_a_copy_has_the_weights_of_the_other_and_settings_of_its_own(herd):
    herd.settle("good", drawn(1.0))
    herd.settle("bad", drawn(30.0))
    for name in ("good", "bad"):
        herd.advance(name)
    good, bad = (herd._members[name].job for name in ("good", "bad"))
    mark = herd.save("good")
    herd.advance("good")  # goes on before the other one has come
    herd.save("good")
    ahead = good.snapshot()
    herd.settle("bad", drawn(0.8, optimizer="sgd"))
    herd.load("bad", mark)
    assert bad.knobs == knobs_of(TASK, drawn(0.8, optimizer="sgd"))
    assert bad.step == 2
    assert bad.snapshot()[0] > ahead[0], "as they were when marked, of less training"
    before = good.snapshot()[0].clone()
    herd.advance("bad")
    assert good.snapshot()[0] == before
    herd.close("bad")
    assert [point.decision for point in herd._arena.trials[0].curve] == ["", "copy"]
    assert herd._arena.trials[0].knobs == knobs_of(TASK, drawn(30.0))


def test_a_trial_that_goes_on_with_its_own_weights_is_left_as_it_is(herd, monkeypatch):
    herd.settle("a", drawn())
    herd.advance("a")
    mark = herd.save("a")
    monkeypatch.setattr(FakeJob, "restore", None)  # would forget the optimizer's moments
    herd.settle("a", drawn())
    herd.load("a", mark)
    herd.advance("a")
    assert herd._members["a"].job.step == 4


def test_who_diverged_waits_for_help_if_there_is_anyone(herd):
    herd.settle("a", drawn(1000.0))
    assert herd.advance("a") == (0.0, False), "the other one may come yet"
    herd.settle("b", drawn())
    herd.advance("b")
    assert herd.advance("a") == (0.0, False)
    herd.settle("a", drawn())
    herd.load("a", herd.save("b"))
    score, _ = herd.advance("a")
    assert score > 0
    herd.settle("b", drawn(1000.0))
    herd.advance("b")
    herd.settle("a", drawn(1000.0))
    assert herd.advance("a") == (0.0, True), "nobody is left"
    for name in ("a", "b"):
        herd.close(name)
    assert [trial.state for trial in herd._arena.trials] == ["diverged", "diverged"]
    assert all(trial.selection > 0 for trial in herd._arena.trials)


def test_the_budget_ends_all_and_nothing_seen_is_lost():
    arena = Arena(TASK, 0, 1e-3, 0.35, FakeJob)
    with pytest.raises(BudgetSpent), Herd(arena, 2) as herd:  # noqa: PT012
        for turn in range(2):
            for name in ("a", "b"):
                herd.settle(name, drawn())
                assert not herd.over
                assert herd.advance(name)[1] is (turn == 1 and name == "b")
        assert herd.over
    assert [(trial.state, trial.steps) for trial in arena.trials] == [("pruned", 4), ("pruned", 2)]
    assert arena.budget.spent <= arena.budget.total


def test_what_never_ran_is_not_handed_in(herd):
    herd.settle("a", drawn())
    herd.close("a")
    herd.close("a")
    assert herd._arena.trials == []


def test_settings_that_cannot_be_used_say_so():
    for bad in ({"reduction": 1}, {"grace": 0}):
        with pytest.raises(BadInput, match="asha"):
            Asha(**bad)
    for bad in ({"population": 0}, {"every": 0}, {"share": 0.6}, {"factors": (0.8, 0)},
                {"resample": -1}):  # fmt: skip
        with pytest.raises(BadInput, match="pbt"):
            Pbt(**bad)


@pytest.mark.parametrize("method", POPULATIONS.values())
def test_a_missing_ray_says_what_to_install(method, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'steersman\[benchmark\]'"):
        method()


@pytest.mark.parametrize("name", POPULATIONS)
def test_the_version_of_ray_is_part_of_what_is_compared(name):
    method = POPULATIONS[name]()
    assert describe(method)["version"]
    assert method.name == name
    json.dumps(describe(method))


def processes():
    return {child.pid for child in psutil.Process().children(recursive=True)}


def traces():
    """What Ray might leave: folders and a token at home, settings, signal handlers."""
    home = Path.home()
    return (
        [path.exists() for path in (Path("/tmp/ray"), home / ".ray", home / "ray_results")],
        dict(os.environ), [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)],
    )  # fmt: skip


def test_with_ray_members_copy_the_good_ones_and_nothing_is_left_behind(capfd):
    before, had = traces(), processes()
    arena = ended(Pbt(), Arena(TASK, 3, 1e-3, 4, FakeJob))
    assert traces() == before
    assert processes() <= had
    assert capfd.readouterr() == ("", "")
    check_charges(arena)
    check_population(arena)


def check_charges(arena):
    """Every interval of every trial, and all of the budget."""
    intervals = sum(len(trial.curve) for trial in arena.trials)
    assert intervals * INTERVAL == pytest.approx(arena.budget.spent)
    assert arena.budget.spent == pytest.approx(arena.budget.total)


def check_population(arena, members=4):
    """All ran to their end, and ended near the best of them."""
    assert [trial.state for trial in arena.trials] == ["complete"] * members
    assert sum(p.decision == "copy" for t in arena.trials for p in t.curve) >= 5
    assert all(trial.curve[0].decision == "" for trial in arena.trials)
    last = [trial.curve[-1].selection for trial in arena.trials]
    assert max(last) - min(last) < 0.05


class Broken(FakeJob):
    def advance(self, steps):
        if self.step >= 4:
            raise RuntimeError("no memory")
        return super().advance(steps)


@pytest.fixture(scope="class")
def one_ray():
    from baselines import raytune

    with raytune.running():
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
class TestPopulations(MethodConformance):
    @pytest.fixture(params=POPULATIONS)
    def method(self, request):
        return POPULATIONS[request.param]()


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
class TestWithRay:
    def test_a_large_population_is_in_step_and_draws_the_same_again(self):
        """With several to copy from, Ray's choice among them has to be repeatable."""
        found = []
        for noise in range(2):
            random.seed(noise)
            arena = Arena(TASK, 1, 1e-3, 8, FakeJob, clock=lambda: 0.0)
            ended(Pbt(8, share=0.5), arena)
            found.append(repr(arena.outcome("pbt")))
            assert len({trial.steps for trial in arena.trials}) == 1
        assert found[0] == found[1]

    def test_asha_stops_bad_trials_early_and_charges_what_they_used(self):
        arena = ended(Asha(), Arena(TASK, 3, 1e-3, 5, FakeJob))
        check_charges(arena)
        stopped = [trial for trial in arena.trials if trial.state == "pruned"]
        kept = [trial for trial in arena.trials if trial.state == "complete"]
        assert len(stopped) > len(arena.trials) / 2 > 3
        at_once = [trial for trial in stopped if trial.steps == TASK.interval]
        assert len(at_once) >= 0.8 * len(stopped), "the first rung stops most"
        assert all(trial.steps < TASK.steps for trial in stopped)
        first = [[t.curve[0].selection for t in trials] for trials in (stopped, kept)]
        assert statistics.median(first[0]) < statistics.median(first[1])
        assert off(max(arena.trials, key=lambda trial: trial.selection).knobs) < 0.3

    @pytest.mark.parametrize("seed", range(3))
    def test_members_end_near_the_best_rate(self, seed):
        """Drawn over three decades, 0.75 from the optimum in the median."""
        opened = Recorder()
        arena = ended(Pbt(8, resample=0.0), Arena(TASK, seed, 1e-3, 8, opened))
        assert statistics.median(off(trial.knobs) for trial in arena.trials) > 0.4
        assert statistics.median(off(job.knobs) for job in opened.jobs) < 0.3
        check_population(arena, 8)

    def test_a_budget_of_more_than_a_population_has_further_ones(self):
        arena = ended(Pbt(2), Arena(TASK, 0, 1e-3, 3.5, FakeJob))
        assert [t.state for t in arena.trials] == ["complete"] * 3 + ["pruned"]
        assert len({trial.knobs for trial in arena.trials}) == 4
        assert arena.budget.spent == pytest.approx(arena.budget.total)

    @pytest.mark.parametrize("name", POPULATIONS)
    def test_what_a_job_raises_ends_the_search_and_is_raised(self, name):
        with pytest.raises(RuntimeError, match="no memory"):
            POPULATIONS[name]().run(Arena(TASK, 0, 1e-3, 4, Broken))

    def test_nothing_sees_the_test_split_before_a_trial_ended(self):
        opened = Recorder()
        arena = ended(Asha(), Arena(TASK, 3, 1e-3, 3, opened))
        for job in opened.jobs:
            assert job.read.count("test") <= 1
            assert "test" not in job.read[:-1]
        assert any(trial.state == "pruned" for trial in arena.trials)


@pytest.mark.slow
def test_in_workers_or_not_the_outcome_is_the_same_to_the_bit(tiny_task, tmp_path):
    """Each worker has a Ray of its own, and takes it along when it ends."""
    methods, before, had = [Asha(), Pbt(2)], traces(), processes()
    here, there = (
        compare(methods, [tiny_task()], (0,), tmp_path / f"{n}", runs=2, workers=n, pack=4)
        for n in (0, 2)
    )
    for one, other in zip(here, there, strict=True):
        assert repr(one["trials"]) == repr(other["trials"])
        assert one["spent"] == other["spent"] <= one["budget"] * (1 + 1e-9)
        assert "packed" not in one
    assert traces() == before
    assert processes() - had <= {resource_tracker._resource_tracker._pid}


def test_a_ray_of_someone_else_is_not_touched(monkeypatch):
    from baselines import raytune

    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.shutdown", None)
    with pytest.raises(BadInput, match=r"call ray\.shutdown"), raytune.running():
        pass
